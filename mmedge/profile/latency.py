"""Latency and memory of engines, measured in a process of their own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmedge.errors import TargetError
from mmedge.profile.worker import EngineRef, Spec, write_arrays
from mmedge.progress import Progress
from mmedge.tensors import Arrays

__all__ = ["EngineRef", "interleaved", "peak_memory_mib"]

Message = dict[str, Any]


class Series(dict[str, NDArray[np.int64]]):
    """Latencies by engine id, nanoseconds, int64 of shape (queries,).

    Attributes:
        parts_ms: of engines on an accelerator, by id: median milliseconds of ``h2d``, ``device`` and ``d2h``.
    """

    parts_ms: dict[str, dict[str, float]]


def interleaved(
    engines: Sequence[EngineRef],
    inputs: Arrays,
    *,
    threads: int = 1,
    queries: int = 700,
    budget_s: float = 60.0,
    warmup_s: float = 0.5,
    seed: int = 0,
    progress: Progress | None = None,
    workdir: Path | None = None,
) -> Series:
    """Time queries of batch 1 on engines side by side, a few in a row on each, see ``mmedge.profile.worker``.

    Args:
        engines: what to time; their ids differ.
        inputs: a few samples, first dimension samples; every engine gets the same in the same order.
        threads: threads of each engine.
        queries: to time on each engine. 700 are enough for a p99.
        budget_s: seconds after which timing stops early, though not before 64 queries unless they take four times as
            long.
        warmup_s: seconds of warm-up per engine.
        seed: of the order within the rounds.
        progress: shows the queries.
        workdir: where the temporary folder is made; the system's by default.

    Returns:
        For each id the latencies in nanoseconds, int64 of shape (queries,), in the order measured. All have the same
        length: entries k were taken on the same sample in the same round.

    Raises:
        TargetError: an engine cannot be opened or run, or the process died; says at what and the last thing it said.
    """
    if len({engine.id for engine in engines}) != len(engines):
        raise TargetError("engines to time share an id", where=", ".join(engine.id for engine in engines))
    spec = Spec(tuple(engines), "inputs.npz", "out.npz", threads, warmup_s, queries, budget_s, seed=seed)
    with _prepared(spec, inputs, workdir) as folder:
        with (progress or Progress()).bar(f"timing {len(engines)} engines", queries) as bar:
            done = 0
            parts: dict[str, dict[str, float]] = {}

            def listen(message: Message) -> None:
                nonlocal done
                parts.update(message.get("parts", {}))
                if "queries" in message:
                    bar.advance(message["queries"] - done)
                    done = message["queries"]

            _run(folder, threads, listen)
        with np.load(folder / spec.output, allow_pickle=False) as file:
            series = Series({engine.id: file[engine.id] for engine in engines})
        series.parts_ms = parts
        return series


def peak_memory_mib(engine: EngineRef, inputs: Arrays, threads: int = 1) -> float:
    """How much memory the engine takes: by how much the resident memory of a fresh process rises at most, in MiB.

    Counted are the runtime's library, the engine and the activations of ten queries of batch 1; the Python
    interpreter, NumPy and the inputs are not, nor is memory on an accelerator.

    Raises:
        TargetError: the engine cannot be run, or the system does not tell.
    """
    found: Message = {}
    spec = Spec((engine,), "inputs.npz", "out.npz", threads, mode="memory")
    with _prepared(spec, inputs, None) as folder:
        _run(folder, threads, found.update)
    return float(found["peak_memory_mib"])


@contextmanager
def _prepared(spec: Spec, inputs: Arrays, workdir: Path | None) -> Iterator[Path]:
    """A temporary folder that holds the spec and the inputs."""
    absolute = tuple(replace(engine, folder=str(Path(engine.folder).resolve())) for engine in spec.engines)
    with tempfile.TemporaryDirectory(prefix="mmedge-profile-", dir=workdir) as name:
        folder = Path(name)
        try:
            write_arrays(folder / spec.inputs, inputs)
            (folder / "spec.json").write_text(json.dumps(asdict(replace(spec, engines=absolute))))
        except OSError as err:
            raise TargetError(f"cannot write the inputs to time with: {err.strerror or err}", where=name) from err
        yield folder


def _run(folder: Path, threads: int, listen: Callable[[Message], None]) -> None:
    """Run the worker on ``folder/spec.json`` and hand on its messages; it never outlives this call."""
    command = [sys.executable, "-m", "mmedge.profile.worker", str(folder / "spec.json")]
    last: Message = {"doing": "starting"}
    with (folder / "stderr").open("w+b") as stderr:
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=stderr, cwd=folder, env=_environment(threads), encoding="utf-8"
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
