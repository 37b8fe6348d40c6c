"""Timing engines side by side, and what of it goes into a row of the report. Device side: neither torch nor onnx."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from mmedge.artifact import Artifact
from mmedge.pipeline.folder import processors
from mmedge.profile.latency import EngineRef, interleaved, peak_memory_mib
from mmedge.progress import Progress
from mmedge.recipe import ProfileConfig
from mmedge.report.model import Twin
from mmedge.tensors import Arrays

LARGE_ENGINE = 512 << 20  # bytes
NO_RAILS = "this machine has no power rails to read"
NOT_YET = "not measured yet"
FIRST = "the first stage has none before it"
FOR_ACCURACY = "accuracy: "  # begins the reason why a group of layers went back to floating point
UNSTEADY = "no INT8 engine answers one sample the same at all times"
MORE_ACCURATE = "more accurate"  # with attention in floating point


@dataclass(frozen=True)
class Timed:
    """One engine among those that are timed together.

    Attributes:
        name: of its stage.
        engine: the artifact.
        parent: the name of the stage before, None for the first.
        twin: of an INT8 engine, the higher-precision engine it is compared with.
        samples: what this engine reads, where shapes differ from stage to stage.
    """

    name: str
    engine: Artifact
    parent: str | None
    twin: Artifact | None = None
    samples: Arrays | None = None

    @property
    def place(self) -> tuple[str, str]:
        """What tells engines apart: the folder, and the inputs if they are its own."""
        return str(self.engine.path), self.name if self.samples is not None else ""


def timings(
    target: str, engines: Sequence[Timed], samples: Arrays, profile: ProfileConfig, progress: Progress
) -> dict[str, Any]:
    """Time the engines of all stages in one interleaved run, and their memory one by one.

    Returns:
        By stage: ``latency``, ``vs_baseline``, ``vs_parent``, ``vs_twin``, ``memory``, ``threads``; JSON.
    """
    separate = {f"{each.name}/{name}": array for each in engines for name, array in (each.samples or {}).items()}
    samples = {**samples, **separate}
    # By folder: a stage that ships the very engine of another has that one's figures, not a second draw of them.
    refs: dict[tuple[str, str], EngineRef] = {}
    for each in engines:
        refs.setdefault(each.place, EngineRef(each.name, target, *each.place))
    stages = list(refs.values())
    for each in engines:
        if each.twin:
            refs.setdefault((str(each.twin.path), ""), EngineRef(f"twin of {each.name}", target, str(each.twin.path)))
    series = interleaved(list(refs.values()), samples, progress=progress, **profile.timing)
    memory = _memory(stages, engines, samples, profile.threads)
    names = {each.name: refs[each.place].id for each in engines}
    found: dict[str, Any] = {}
    for each in engines:
        own = names[each.name]
        twin = refs[str(each.twin.path), ""].id if each.twin else None
        found[each.name] = {
            "latency": series.latency(own).as_json(),
            "vs_baseline": vars(series.speedup(own, engines[0].name)) if each.parent else None,
            "vs_parent": series.speedup(own, names[each.parent]).value if each.parent else None,
            "vs_twin": vars(series.speedup(own, twin)) if twin else None,
            "parts": series.parts_ms(own),
            "memory": memory[own],
            "threads": profile.threads,
        }
    return found


def _memory(refs: Sequence[EngineRef], engines: Sequence[Timed], samples: Arrays, threads: int) -> dict[str, float]:
    """By id, one process each. Large ones take turns, so that together they do not need more memory than there is."""
    large = max(each.engine.size_bytes() for each in engines) > LARGE_ENGINE
    with ThreadPoolExecutor(1 if large else processors()) as pool:
        peaks = pool.map(lambda ref: peak_memory_mib(ref, samples, threads), refs)
        return {ref.id: peak for ref, peak in zip(refs, peaks, strict=True)}


def timing_json(timing: Mapping[str, Any] | None, why_not: str | None, reasons: dict[str, str]) -> dict[str, Any]:
    """``latency_ms``, ``speedup``, ``peak_memory_mib`` and ``threads`` of a row; ``reasons`` gets what is null.

    Args:
        timing: one stage's entry of ``timings``, None where it was not timed.
        why_not: why the engine cannot be timed here.
        reasons: of the row.
    """
    names = ("latency_ms", "speedup", "peak_memory_mib", "threads")
    if timing is None:
        reasons.update(dict.fromkeys(names, why_not or NOT_YET))
        return {**dict.fromkeys(names), "parts_ms": None}
    latency = dict(timing["latency"])
    why = latency.pop("reason", "")
    reasons.update({f"latency_ms.{name}": str(why) for name, value in latency.items() if value is None})
    ratio = timing["vs_baseline"] or {"value": 1.0, "ci95": [1.0, 1.0], "reason": None}
    if ratio["ci95"] is None:
        reasons["speedup.ci95"] = str(ratio["reason"])
    if timing["vs_parent"] is None:
        reasons["speedup.vs_parent"] = FIRST
    speedup = {"vs_baseline": ratio["value"], "vs_parent": timing["vs_parent"], "ci95": ratio["ci95"]}
    return {
        "latency_ms": latency,
        "parts_ms": timing.get("parts"),
        "speedup": speedup,
        "peak_memory_mib": timing["memory"],
        "threads": timing["threads"],
    }


def coverage_fields(coverage: Mapping[str, Any] | None, reasons: dict[str, str]) -> dict[str, Any]:
    """``int8_coverage`` and ``coverage`` of a row; ``reasons`` gets what is null."""
    found = fraction(coverage)
    if found is None:
        reasons["int8_coverage"] = "the runtime does not say" if coverage is None else "no weighted layer"
    if coverage is None:
        reasons["coverage"] = reasons["int8_coverage"]
    return {"int8_coverage": found, "coverage": coverage}


def lost_accuracy(twin: Twin) -> bool:
    """Whether the twin rule found INT8 throughout not accurate enough, whatever it shipped then."""
    return MORE_ACCURATE in twin.reason or any(why.startswith(FOR_ACCURACY) for why in twin.backed_off.values())


def fraction(coverage: Mapping[str, Any] | None) -> float | None:
    """INT8 layers over all weighted layers."""
    if coverage is None:
        return None
    total = len(coverage["int8"]) + len(coverage["other"])
    return len(coverage["int8"]) / total if total else None
