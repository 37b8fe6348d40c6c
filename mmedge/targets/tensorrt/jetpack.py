"""Which JetPack this machine runs, from the files that every Jetson has."""

from __future__ import annotations

import re
from pathlib import Path

# L4T (Jetson Linux) to JetPack; the longest matching number counts. Sources: the L4T map of jetson_stats,
# jetson-containers#1677 (35), pytorch/TensorRT#3453 (36.4), roboflow/inference#2531 (38.4, 39.2).
_JETPACK = {
    **{"35": "5.1", "36.4": "6.2", "36.4.0": "6.1", "36.5": "6.2"},
    **{"38.2": "7.0", "38.4": "7.1", "39.2": "7.2"},
}
_RELEASE = re.compile(r"R(\d+) \(release\), REVISION: ([\d.]+)")


def jetpack_release(root: Path = Path("/")) -> str | None:
    """``6.2`` on a Jetson, None elsewhere; an L4T that no table knows is returned as ``L4T 40.1``."""
    try:
        text = (root / "etc/nv_tegra_release").read_text()
    except OSError:
        return None
    found = _RELEASE.search(text)
    if found is None:
        return None
    parts = [found[1], *found[2].split(".")]
    numbers = [".".join(parts[:count]) for count in range(len(parts), 0, -1)]
    return next((_JETPACK[each] for each in numbers if each in _JETPACK), f"L4T {numbers[0]}")
