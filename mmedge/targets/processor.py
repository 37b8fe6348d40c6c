"""The processor of this machine, as far as it decides how a network is lowered. Device side."""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path
from typing import Literal

from mmedge.progress import Progress
from mmedge.targets.lowered import described

VNNI = frozenset({"avx512_vnni", "avx_vnni", "amx_int8"})


def processor(root: Path = Path("/")) -> tuple[str, frozenset[str]]:
    """Name and features of the first processor; no features where Linux's account of them cannot be read.

    Args:
        root: where the machine's files begin.
    """
    try:
        text = (root / "proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor() or platform.machine(), frozenset()
    facts: dict[str, str] = {}
    for line in text.splitlines():
        key, _, value = line.partition(":")
        facts.setdefault(key.strip(), value.strip())
    features = facts.get("flags") or facts.get("Features") or ""
    return facts.get("model name") or platform.machine(), frozenset(features.split())


@cache
def overflows() -> bool:
    """Whether products of 8-bit numbers may overflow: x86 without VNNI adds them in pairs to an int16, and clips.

    The instruction is ``vpmaddubsw``. On an EPYC with AVX2 a convolution of 255s and 127s gives half of what it should
    in ONNX Runtime 1.32 and OpenVINO 2026.4, and a hundredth where the zero point is 128. See also oneDNN, "Nuances of
    int8 Computations".
    """
    features = processor()[1]
    return platform.machine() in ("x86_64", "AMD64") and bool(features) and not features & VNNI


def fitting_bits() -> Literal[7, 8]:
    """How many bits INT8 weights may use on this processor."""
    return 7 if overflows() else 8


def overflow(model: Path, progress: Progress) -> dict[str, str]:
    """What to note of an engine whose products may overflow here, also said at once; empty for others.

    Args:
        model: the lowered file; what lies beside it says how many bits its weights use, if it has INT8 weights.
        progress: where to say it.
    """
    if not overflows() or (described(model) or {}).get("weight_bits") != 8:
        return {}
    problem = (
        f"INT8 products may overflow on this processor ({processor()[0]}, without VNNI), for which the network was not "
        "lowered; lower it for this one: --target NAME:weight_bits=7"
    )
    progress.say(problem)
    return {"overflow": problem}
