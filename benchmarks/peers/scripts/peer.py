"""What every converter shares: its command line, its samples, its note. Runs under a peer's Python, knows no mmedge.

``python CONVERTER.py GROUND OUTPUT VARIANT`` reads ``model.onnx`` (or ``model.pt2``) and ``calibration.npz`` in GROUND
and writes a quantized model and ``conversion.json`` into OUTPUT.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np


@dataclass
class Conversion:
    """What a converter is given, and what it has to say.

    Attributes:
        model: the float ONNX file.
        archive: the same network as a ``torch.export`` archive.
        samples: all calibration samples by input name, samples first.
        outputs: the names of the model's outputs.
        output: the folder for the quantized model.
        notes: what a reader should know of how it was made.
    """

    model: Path
    archive: Path
    samples: Mapping[str, np.ndarray]
    outputs: list[str]
    output: Path
    notes: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(next(iter(self.samples.values())))

    def singles(self, count: int | None = None) -> Iterator[dict[str, np.ndarray]]:
        """The samples (the first ``count``) one by one, as batches of one."""
        for index in range(len(self) if count is None else count):
            yield {name: array[index : index + 1] for name, array in self.samples.items()}


Convert = Callable[[Conversion], None]


def main(variants: Mapping[str, Convert], *packages: str) -> None:
    """Run the variant that the command line names.

    Args:
        variants: by name. Each writes ``model.onnx``, ``model.xml`` or ``model.pt2`` into ``output``.
        packages: whose versions are noted.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("ground", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("variant", choices=list(variants))
    parser.add_argument("--memory-gib", type=float, default=0, help="refuse more than this; 0: no limit")
    options = parser.parse_args()
    if options.memory_gib:
        resource.setrlimit(resource.RLIMIT_AS, (int(options.memory_gib * 2**30),) * 2)
    ground: Path = options.ground
    with np.load(ground / "calibration.npz") as file:
        samples = {name: file[name] for name in file.files}
    outputs = json.loads((ground / "ground.json").read_text())["outputs"]
    job = Conversion(ground / "model.onnx", ground / "model.pt2", samples, outputs, options.output)
    started = time.perf_counter()
    variants[options.variant](job)
    found = {
        "seconds": time.perf_counter() - started,
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "samples": len(job),
        "versions": {name: version(name) for name in packages},
        **job.notes,
    }
    (options.output / "conversion.json").write_text(json.dumps(found, indent=1) + "\n")
