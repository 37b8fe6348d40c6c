"""Timing one engine artifact on its own. Device side: no torch, no onnx."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmedge.artifact import load_artifact
from mmedge.errors import UsageError
from mmedge.profile.latency import EngineRef, interleaved, peak_memory_mib
from mmedge.progress import Progress
from mmedge.tensors import Array

SAMPLES = 4


def time_artifact(
    path: Path,
    progress: Progress,
    *,
    queries: int = 700,
    processes: int = 3,
    budget_s: float = 60.0,
    threads: int = 1,
) -> dict[str, Any]:
    """Latency and memory of an engine artifact on random inputs; for the settings see ``interleaved``.

    Raises:
        UsageError: the artifact is no engine.
        ArtifactError: it is damaged.
        TargetError: it cannot run here.
    """
    artifact = load_artifact(path)
    if artifact.manifest.kind != "engine":
        kind = artifact.manifest.kind
        raise UsageError(
            f"this artifact is of kind {kind}, not an engine", where=str(path), fix="give an engine's folder"
        )
    target = artifact.about["target"]
    engine = EngineRef(artifact.manifest.name, target, str(path))
    inputs = random_inputs(artifact.about["inputs"])
    settings: dict[str, Any] = {"threads": threads, "queries": queries, "processes": processes, "budget_s": budget_s}
    series = interleaved([engine], inputs, progress=progress, **settings)
    return {
        "name": artifact.manifest.name,
        "target": target,
        "inputs": "random",
        "threads": threads,
        "latency_ms": series.latency(engine.id).as_json(),
        "peak_memory_mib": peak_memory_mib(engine, inputs, threads),
    }


def random_inputs(specs: Sequence[dict[str, Any]]) -> dict[str, Array]:
    """A few samples for declared inputs: normal values for floats, zeros for the rest; free dimensions are 1."""
    rng = np.random.default_rng(0)
    inputs: dict[str, Array] = {}
    for spec in specs:
        shape = (SAMPLES, *(size if isinstance(size, int) else 1 for size in spec["shape"][1:]))
        floating = spec["dtype"].startswith("float")
        inputs[spec["name"]] = (rng.standard_normal(shape) if floating else np.zeros(shape)).astype(spec["dtype"])
    return inputs
