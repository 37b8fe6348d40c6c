"""From a lowered graph to an engine, on a workstation or on the device itself. Device side: neither torch nor onnx."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmedge.artifact import Artifact, Manifest, Store
from mmedge.progress import Progress
from mmedge.targets.base import Coverage, Target


def build_engine(
    store: Store, lowered: Artifact, target: Target, versions: Mapping[str, str], progress: Progress
) -> Artifact:
    """The engine of a lowered graph: found, or built now.

    Args:
        store: of the run.
        lowered: holds ``model.onnx`` or ``model.pt2``, and its description.
        target: what builds it.
        versions: of what builds it, the GPU's compute capability included: another TensorRT builds another engine.
        progress: told of long builds.

    Raises:
        TargetError: the backend refuses the model.
    """
    inputs = {
        "lowered": lowered.digest,
        "target": target.name,
        "target_version": target.version,
        "options": target.options(),
        "versions": dict(versions),
    }

    def fill(folder: Path) -> dict[str, Any]:
        target.progress = progress
        model = next(lowered.path / name for name in ("model.onnx", "model.pt2") if name in lowered.manifest.files)
        build = target.build(model, folder)
        kept = ("target", "inputs", "outputs", "cache")
        about: dict[str, Any] = {key: lowered.about[key] for key in kept if key in lowered.about}
        return {**about, "facts": dict(build.facts), "coverage": coverage_json(build.coverage)}

    name = lowered.manifest.name.removesuffix("-lowered")
    if store.find("engine", name, inputs) is None and (other := _of_other_versions(store, name, lowered, versions)):
        here = ", ".join(f"{package} {version}" for package, version in versions.items())
        progress.say(f"{name}: the engine that is there is of {other}, here is {here}: building anew")
    return store.make("engine", name, inputs, fill, lowered)


def _of_other_versions(store: Store, name: str, lowered: Artifact, versions: Mapping[str, str]) -> str | None:
    """What built an engine of the same graph that does not fit here."""
    for path in store.root.glob(f"{name}-*/manifest.json"):
        try:
            manifest = Manifest.model_validate_json(path.read_text())
        except (OSError, ValueError):
            continue  # damaged: it is no engine
        theirs = manifest.inputs.get("versions")
        if manifest.parent == lowered.digest and theirs and theirs != dict(versions):
            return ", ".join(f"{package} {version}" for package, version in theirs.items())
    return None


def coverage_json(coverage: Coverage | None) -> dict[str, Any] | None:
    """Coverage as it is kept in a manifest."""
    if coverage is None:
        return None
    reformats = None if coverage.reformats is None else list(coverage.reformats)
    return {"int8": list(coverage.int8), "other": dict(coverage.other), "reformats": reformats}


def place_name(text: str) -> str:
    """``text`` fit for a folder's name: the options of a target hold colons."""
    return re.sub(r"[^\w.-]+", "-", text).strip("-")
