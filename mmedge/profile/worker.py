"""The process that runs engines: ``python -m mmedge.profile.worker SPEC.json``.

It holds nothing but NumPy, the inputs and the runtimes of the engines, so that neither a training framework nor the
parent's garbage disturbs the clock. It speaks JSON lines on its standard output; whatever a runtime prints goes to
standard error.

Latency is measured in rounds. In every round each engine has its turn, in an order shuffled anew, on the same samples:
a disturbance of the machine meets all engines alike. A turn is a few queries in a row, of which the first are not
timed: they find caches and branch predictors as another engine left them, and how long they take depends on which one
that was. Of networks of 0.1 ms, single queries in turn made the same INT8 engine 1.15 times as fast as its twin in one
company and 0.93 times in another; queries behind three of its own, 1.01 and 0.97 times.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import sys
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mmedge import plugins
from mmedge.errors import MmedgeError, TargetError, UsageError
from mmedge.targets.base import Runner, Target
from mmedge.targets.checked import TimedRunner
from mmedge.tensors import Array, Arrays

STATUS = Path("/proc/self/status")  # Linux tells the memory of one process here
FEWEST_QUERIES = 64  # what a p90 and an interval need
OVERRUN = 4  # how far the budget may be exceeded to reach them
WARM_QUERIES = 10
SETTLE, TURN = 2, 8  # queries of a turn: untimed ones, then timed ones
REPORT_EVERY_S = 0.25

Say = Callable[[Mapping[str, Any]], None]
Samples = list[dict[str, Array]]  # by query, named arrays of batch 1


@dataclass(frozen=True)
class EngineRef:
    """Where an engine is and what runs it.

    Attributes:
        id: the caller's name for it, unique within a run.
        target: the name of an installed target.
        folder: what the target's ``build`` wrote.
        inputs: of an engine that reads other shapes than those beside it, what the names of its own inputs begin with
            in the npz, before a slash.
    """

    id: str
    target: str
    folder: str
    inputs: str = ""

    def own(self, samples: Samples) -> Samples:
        """What this engine reads."""
        start = f"{self.inputs}/" if self.inputs else ""
        return [
            {name.removeprefix(start): array for name, array in sample.items() if name.startswith(start)}
            for sample in samples
        ]


@dataclass(frozen=True)
class Spec:
    """What the process is to do. Paths are relative to the folder of the spec.

    Attributes:
        engines: one or more; exactly one for ``memory``.
        inputs: an npz of named arrays, samples first; query k uses sample k modulo their number, with batch 1.
        output: the npz to write: nanoseconds per query, int64 of shape (queries,), by engine id.
        threads: threads of each engine.
        warmup_s: how long each engine is warmed up, at least.
        queries: to time on each engine.
        budget_s: timing stops after so many seconds; before ``FEWEST_QUERIES`` only after ``OVERRUN`` times as many.
        mode: ``latency`` or ``memory``.
        seed: of the order within a round.
    """

    engines: tuple[EngineRef, ...]
    inputs: str
    output: str
    threads: int = 1
    warmup_s: float = 0.5
    queries: int = 700
    budget_s: float = 60.0
    mode: Literal["latency", "memory"] = "latency"
    seed: int = 0

    @classmethod
    def read(cls, path: Path) -> Spec:
        """Read a spec.

        Raises:
            UsageError: it is not one.
        """
        try:
            raw = json.loads(path.read_text())
            spec = cls(**{**raw, "engines": tuple(EngineRef(**engine) for engine in raw["engines"])})
        except (OSError, ValueError, TypeError, KeyError) as err:
            raise UsageError(f"not a measuring spec: {type(err).__name__}: {err}", where=str(path)) from err
        if spec.mode not in ("latency", "memory") or not spec.engines or spec.queries < 1:
            raise UsageError("mode must be latency or memory, with an engine and a query at least", where=str(path))
        return spec


def write_arrays(path: Path, arrays: Arrays) -> None:
    """Write an npz that is there whole or not at all; unlike ``numpy.savez`` it takes any name, even ``file``."""
    partial = path.with_name(f".{path.name}.partial")
    with zipfile.ZipFile(partial, "w") as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.ascontiguousarray(array), allow_pickle=False)
    partial.replace(path)


def main(spec_path: Path) -> int:
    """Do what the spec says; the exit status is 0, or that of the error that was reported."""
    say = _claim_stdout()
    try:
        spec = Spec.read(spec_path)
        folder = spec_path.resolve().parent
        samples = _samples(folder / spec.inputs)
        if spec.mode == "memory":
            say({"peak_memory_mib": _peak_memory_mib(spec, folder, samples, say)})
        else:
            write_arrays(folder / spec.output, _latencies(spec, folder, samples, say))
    except MmedgeError as err:
        say({"error": err.problem, "where": err.where, "fix": err.fix})
        return err.exit_status
    return 0


def _claim_stdout() -> Say:
    """Keep standard output for our lines: runtimes print to it from C++, out of Python's reach."""
    own = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def say(message: Mapping[str, Any]) -> None:
        own.write(json.dumps(message) + "\n")
        own.flush()

    return say


def _samples(path: Path) -> Samples:
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    counts = {len(array) for array in arrays.values()}
    if len(counts) != 1 or 0 in counts:
        raise UsageError(f"inputs of {sorted(counts)} samples: give each equally many", where=str(path))
    (count,) = counts
    return [{name: np.ascontiguousarray(array[k : k + 1]) for name, array in arrays.items()} for k in range(count)]


@contextmanager
def _naming(engine: EngineRef) -> Iterator[None]:
    """Whatever goes wrong inside names the engine."""
    try:
        yield
    except MmedgeError as err:
        raise TargetError(err.problem, where=err.where or engine.id, fix=err.fix) from err
    except Exception as err:
        raise TargetError(f"{type(err).__name__}: {err}", where=f"{engine.id} on {engine.target}") from err


def _target(engine: EngineRef) -> Target:
    with _naming(engine):
        return plugins.target(engine.target)


def _open(engine: EngineRef, target: Target, folder: Path, threads: int, stack: ExitStack) -> Runner:
    with _naming(engine):
        return stack.enter_context(target.runner(folder / engine.folder, threads))


def _latencies(spec: Spec, folder: Path, samples: Samples, say: Say) -> dict[str, NDArray[np.int64]]:
    with ExitStack() as stack:
        runners = []
        for engine in spec.engines:
            say({"doing": f"opening {engine.id}"})
            runners.append(_open(engine, _target(engine), folder, spec.threads, stack))
        for engine, run in zip(spec.engines, runners, strict=True):
            say({"doing": f"warming up {engine.id}"})
            with _naming(engine):
                _warm_up(run, engine.own(samples), spec.warmup_s)
        say({"doing": "timing"})
        times = _rounds(spec, runners, samples, say)
        for engine, run in zip(spec.engines, runners, strict=True):
            if isinstance(run, TimedRunner):
                with _naming(engine):
                    say({"parts": {engine.id: _parts(run, engine.own(samples))}})
                for text in run.remarks():
                    say({"remark": f"{engine.id} on {engine.target}: {text}"})
    return {engine.id: series for engine, series in zip(spec.engines, times, strict=True)}


def _parts(run: TimedRunner, samples: Samples) -> dict[str, float]:
    """Median milliseconds by part of a query; taken apart, because looking at the device's clock costs time."""
    found = [run.parts_ms(samples[number % len(samples)]) for number in range(FEWEST_QUERIES)]
    return {name: float(np.median([each[name] for each in found])) for name in found[0]}


def _warm_up(run: Runner, samples: Samples, seconds: float) -> None:
    end = time.perf_counter() + seconds
    done = 0
    while done < WARM_QUERIES or time.perf_counter() < end:
        run(samples[done % len(samples)])
        done += 1


def _rounds(spec: Spec, runners: list[Runner], samples: Samples, say: Say) -> NDArray[np.int64]:
    """Nanoseconds, int64 of shape (engines, queries)."""
    times = np.zeros((spec.queries, len(runners)), dtype=np.int64)
    rng = np.random.default_rng(spec.seed)
    own = [engine.own(samples) for engine in spec.engines]
    done = 0
    gc.collect()
    gc.disable()  # this process does nothing else: a collection would only land in somebody's tail
    start = said = time.perf_counter()
    while done < spec.queries and not spent(done, time.perf_counter() - start, spec.budget_s):
        count = min(TURN, spec.queries - done)
        for index in rng.permutation(len(runners)):
            with _naming(spec.engines[index]):
                times[done : done + count, index] = _turn(runners[index], own[index], done, count)
        done += count
        if time.perf_counter() - said > REPORT_EVERY_S:
            said = time.perf_counter()
            say({"queries": done})
    say({"queries": done})
    return times[:done].T


def _turn(run: Runner, samples: Samples, first: int, count: int) -> list[int]:
    """Nanoseconds of ``count`` queries in a row, numbers ``first`` and up, behind those that are not timed."""
    found = []
    for number in range(first - SETTLE, first + count):
        sample = samples[number % len(samples)]
        before = time.perf_counter_ns()
        run(sample)
        found.append(time.perf_counter_ns() - before)
    return found[SETTLE:]


def spent(queries: int, elapsed_s: float, budget_s: float) -> bool:
    """Whether the budget ends the measurement after so many queries (always at least one) and seconds."""
    limit = budget_s if queries >= FEWEST_QUERIES else budget_s * OVERRUN
    return queries > 0 and elapsed_s > limit


def _peak_memory_mib(spec: Spec, folder: Path, samples: Samples, say: Say) -> float:
    """By how much resident memory rises at most: the runtime's library, the engine and its activations, in MiB.

    Memory on an accelerator is not in it. Linux counts in batches of pages for each core, so an engine
    of a few hundred KiB may show as none; 0 is an answer there, elsewhere it means that nothing was counted.
    """
    (engine,) = spec.engines
    target = _target(engine)  # reading the device table is no part of the engine
    _forget_peak()
    before = _resident_kib("VmRSS")
    with ExitStack() as stack:
        say({"doing": f"opening {engine.id}"})
        run = _open(engine, target, folder, spec.threads, stack)
        say({"doing": f"running {engine.id}"})
        with _naming(engine):
            _warm_up(run, engine.own(samples), 0.0)
        rise = _resident_kib("VmHWM") - before
    if rise <= 0 and not STATUS.exists():
        raise TargetError("this system does not tell the memory of one process", where=engine.id)
    return max(rise, 0.0) / 1024


def _forget_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts again from what is resident now
    except OSError:
        return  # what loading NumPy and the inputs took for a moment then counts too


def _resident_kib(field: str) -> float:
    if STATUS.exists():
        for line in STATUS.read_text().splitlines():
            if line.startswith(f"{field}:"):
                return float(line.split()[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1024 if sys.platform == "darwin" else peak  # bytes on macOS, KiB elsewhere


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
