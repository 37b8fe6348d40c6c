"""What every converter starts from: one float network, one set of calibration samples."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mmedge import plugins
from mmedge.loading import load_task
from mmedge.lower.export import archive_of, onnx_of, write
from mmedge.profile.worker import write_arrays
from mmedge.stages.base import Network
from mmedge.task import Task
from mmedge.tensors import Arrays

NOTE = "ground.json"


@dataclass(frozen=True)
class Ground:
    """A folder with ``model.onnx`` (float), ``model.pt2`` (the same, for peers that take PyTorch), ``calibration.npz``.

    Attributes:
        task: what was exported.
        spec: its name on the command line.
        folder: where the files are.
        digest: of all three files.
    """

    task: Task
    spec: str
    folder: Path
    digest: str


def prepare(spec: str, samples: int, cache: Path) -> Ground:
    """Export a task's trained network and the first ``samples`` of its calibration split, if not done already."""
    task = load_task(spec, plugins.loaders("task"))
    task.model.eval().requires_grad_(False)
    folder = cache / f"{task.name}-{samples}"
    folder.mkdir(parents=True, exist_ok=True)
    calibration = first_samples(task, samples)
    content = _digest(task, calibration)
    note = folder / NOTE
    if not note.exists() or json.loads(note.read_text())["digest"] != content:
        note.unlink(missing_ok=True)
        network = Network(task.model)
        write(onnx_of(network, task), folder / "model.onnx")
        (folder / "model.pt2").write_bytes(archive_of(network, task))
        write_arrays(folder / "calibration.npz", calibration)
        note.write_text(json.dumps({"digest": content, "samples": samples, "outputs": list(task.outputs)}))
    return Ground(task, spec, folder, content)


def first_samples(task: Task, samples: int) -> dict[str, np.ndarray]:
    """The first calibration samples by input name."""
    parts: dict[str, list[np.ndarray]] = {}
    seen = 0
    for batch in task.stream("calibration"):
        for name, array in batch.inputs.items():
            parts.setdefault(name, []).append(array[: samples - seen])
        seen += len(batch)
        if seen >= samples:
            return {name: np.concatenate(arrays) for name, arrays in parts.items()}
    raise SystemExit(f"{task.name} has {seen} calibration samples: give --samples {seen} or fewer")


def _digest(task: Task, calibration: Arrays) -> str:
    digest = hashlib.sha256(task.source.encode())
    for name, tensor in sorted(task.model.state_dict().items()):
        digest.update(name.encode() + np.ascontiguousarray(tensor.numpy()).tobytes())
    for name, array in sorted(calibration.items()):
        digest.update(name.encode() + array.tobytes())
    return digest.hexdigest()[:16]
