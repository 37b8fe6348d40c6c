"""What a lowered model says of itself in a file beside it, so that a device can build it with neither torch nor onnx.

``model.json`` lies beside ``model.onnx`` (or ``model.pt2``) and holds

- ``inputs``: name, dtype, shape and modality of each; a string in a shape names a dimension that may change,
- ``outputs``: names,
- ``cache``: of one step of a decoder, how it is fed (``mmedge.targets.decoding.Cache``),
- ``batch``: ``min``, ``opt`` and ``max`` of the recipe,
- ``weight_bits``: of INT8 weights, where there are any,
- and what the target's own ``describe`` added (names of weighted layers, opset …).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmedge.errors import ArtifactError


def described(model: Path) -> dict[str, Any] | None:
    """What lies in the file beside ``model``, None where there is none.

    Raises:
        ArtifactError: it cannot be read.
    """
    path = model.with_suffix(".json")
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as err:
        raise ArtifactError(f"cannot be read: {err}", where=str(path)) from err
    if not isinstance(found, dict):
        raise ArtifactError("not a JSON object", where=str(path))
    return found


def write_description(model: Path, about: Mapping[str, Any]) -> None:
    """Write the file beside ``model``."""
    model.with_suffix(".json").write_text(json.dumps(about, indent=2), encoding="utf-8")
