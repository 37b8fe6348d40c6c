"""Latency and memory of engines, measured in processes of their own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmedge.errors import TargetError
from mmedge.profile.statistics import Latency, Speedup
from mmedge.profile.worker import FEWEST_QUERIES, TURN, EngineRef, Spec, write_arrays
from mmedge.progress import Progress
from mmedge.tensors import Arrays

__all__ = ["EngineRef", "Series", "interleaved", "peak_memory_mib"]

INPUTS, OUTPUT = "inputs.npz", "out.npz"

Message = dict[str, Any]


Times = Mapping[str, NDArray[np.int64]]
Parts = Mapping[str, Mapping[str, float]]


class Series(dict[str, NDArray[np.int64]]):
    """Latencies by engine id, nanoseconds, int64 of shape (queries,), in the order measured.

    All have the same length: entries k were taken on the same sample in the same round.

    Args:
        runs: one process's latencies after the other's.
        parts_ms: of engines on an accelerator, process by process: by id the medians of ``h2d``, ``device``, ``d2h``.

    Attributes:
        processes: how many of the queries each process made.
    """

    def __init__(self, runs: Sequence[Times], parts_ms: Sequence[Parts] = ()) -> None:
        super().__init__({name: np.concatenate([run[name] for run in runs]) for name in runs[0]})
        self.processes = tuple(len(next(iter(run.values()))) for run in runs)
        self._parts_ms = parts_ms

    def latency(self, engine: str) -> Latency:
        """What is known of the latency of one engine."""
        return Latency.of(self[engine], self.processes)

    def speedup(self, engine: str, over: str) -> Speedup:
        """How many times faster one engine is than another, turn by turn."""
        return Speedup.of(self[over], self[engine], self.processes, turn=TURN)

    def parts_ms(self, engine: str) -> dict[str, float] | None:
        """Median milliseconds of ``h2d``, ``device`` and ``d2h`` of an engine on an accelerator; None for others."""
        found = [parts[engine] for parts in self._parts_ms if engine in parts]
        return {part: float(np.median([each[part] for each in found])) for part in found[0]} if found else None


def interleaved(
    engines: Sequence[EngineRef],
    inputs: Arrays,
    *,
    threads: int = 1,
    queries: int = 700,
    processes: int = 1,
    budget_s: float = 60.0,
    warmup_s: float = 0.5,
    seed: int = 0,
    progress: Progress | None = None,
    workdir: Path | None = None,
) -> Series:
    """Time queries of batch 1 on engines side by side, a few in a row on each, see ``mmedge.profile.worker``.

    The same engine may be a few percent faster in one process than in the next, for as long as the process lives, on
    some machines far more: so the queries may be shared among several, each of which opens all engines anew.

    Args:
        engines: what to time; their ids differ.
        inputs: a few samples, first dimension samples; every engine gets the same in the same order.
        threads: threads of each engine.
        queries: to time on each engine. 700 are enough for a p99.
        processes: to share them among, at most: each makes 64 of them at least, or all.
        budget_s: seconds of all processes together after which timing stops early, though not before 64 queries each
            unless they take four times as long.
        warmup_s: seconds of warm-up per engine and process.
        seed: of the order within the rounds.
        progress: shows the queries.
        workdir: where the temporary folder is made; the system's by default.

    Raises:
        TargetError: an engine cannot be opened or run, or a process died; says at what and the last thing it said.
    """
    if len({engine.id for engine in engines}) != len(engines):
        raise TargetError("engines to time share an id", where=", ".join(engine.id for engine in engines))
    count = max(1, min(processes, queries // FEWEST_QUERIES))
    spec = Spec(tuple(engines), INPUTS, OUTPUT, threads, warmup_s, budget_s=budget_s / count)
    shares = [queries // count + (number < queries % count) for number in range(count)]
    progress = progress or Progress()
    remarks: list[str] = []
    with _prepared(inputs, workdir) as folder, progress.bar(f"timing {len(engines)} engines", queries) as bar:
        specs = [replace(spec, queries=share, seed=seed + number) for number, share in enumerate(shares)]
        series = Series(*zip(*[_timed(folder, each, bar.advance, remarks) for each in specs], strict=True))
    for text in dict.fromkeys(remarks):  # every process makes them
        progress.say(text)
    return series


def _timed(folder: Path, spec: Spec, advance: Callable[[int], None], remarks: list[str]) -> tuple[Times, Parts]:
    """One process's queries; ``remarks`` gets what must be known of them."""
    parts: dict[str, dict[str, float]] = {}
    done = 0

    def listen(message: Message) -> None:
        nonlocal done
        parts.update(message.get("parts", {}))
        if "remark" in message:
            remarks.append(message["remark"])
        if "queries" in message:
            advance(message["queries"] - done)
            done = message["queries"]

    _run(folder, spec, listen)
    with np.load(folder / spec.output, allow_pickle=False) as file:
        return {engine.id: file[engine.id] for engine in spec.engines}, parts


def peak_memory_mib(engine: EngineRef, inputs: Arrays, threads: int = 1) -> float:
    """How much memory the engine takes: by how much the resident memory of a fresh process rises at most, in MiB.

    Counted are the runtime's library, the engine and the activations of ten queries of batch 1; the Python
    interpreter, NumPy and the inputs are not, nor is memory on an accelerator.

    Raises:
        TargetError: the engine cannot be run, or the system does not tell.
    """
    found: Message = {}
    with _prepared(inputs, None) as folder:
        _run(folder, Spec((engine,), INPUTS, OUTPUT, threads, mode="memory"), found.update)
    return float(found["peak_memory_mib"])


@contextmanager
def _prepared(inputs: Arrays, workdir: Path | None) -> Iterator[Path]:
    """A temporary folder that holds the inputs."""
    with tempfile.TemporaryDirectory(prefix="mmedge-profile-", dir=workdir) as name:
        with _written(Path(name, INPUTS)) as path:
            write_arrays(path, inputs)
        yield Path(name)


@contextmanager
def _written(path: Path) -> Iterator[Path]:
    """Where ``path`` cannot be written, the error says so."""
    try:
        yield path
    except OSError as err:
        raise TargetError(f"cannot write what is to be timed: {err.strerror or err}", where=str(path)) from err


def _run(folder: Path, spec: Spec, listen: Callable[[Message], None]) -> None:
    """Run the worker on ``spec`` in ``folder`` and hand on its messages; it never outlives this call."""
    absolute = tuple(replace(engine, folder=str(Path(engine.folder).resolve())) for engine in spec.engines)
    with _written(folder / "spec.json") as path:
        path.write_text(json.dumps(asdict(replace(spec, engines=absolute))))
    command = [sys.executable, "-m", "mmedge.profile.worker", str(path)]
    last: Message = {"doing": "starting"}
    with (folder / "stderr").open("w+b") as stderr:
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=stderr, cwd=folder, env=_environment(spec.threads), encoding="utf-8"
        ) as process:
            try:
                for line in process.stdout or ():
                    message: Message = json.loads(line)
                    last.update(message)
                    listen(message)
                status = process.wait()
            finally:
                process.kill()
        if "error" in last:
            raise TargetError(last["error"], where=last["where"], fix=last["fix"])
        if status:
            stderr.seek(0)
            raise TargetError(f"the measuring process {_end(status, stderr.read())}", where=last["doing"])


def _environment(threads: int) -> dict[str, str]:
    """The parent's, with thread pools limited and the parent's import path: what it found, the worker finds."""
    pools = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    path = os.pathsep.join(str(Path(entry).absolute()) for entry in sys.path)
    return {**os.environ, **dict.fromkeys(pools, str(threads)), "PYTHONPATH": path, "ORT_DISABLE_TELEMETRY": "1"}


def _end(status: int, stderr: bytes) -> str:
    lines = [line for line in stderr.decode(errors="replace").splitlines() if line.strip()]
    how = f"ended with status {status}" if status > 0 else f"was killed by {_signal_name(-status)}"
    return f"{how}: {lines[-1].strip()}" if lines else f"{how} without a word"


def _signal_name(number: int) -> str:
    return signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
