"""Errors a user can act on from whatever a runtime raises."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from mmedge.errors import MmedgeError, TargetError, unknown
from mmedge.targets.base import Runner
from mmedge.tensors import Array


@contextmanager
def reported(doing: str, where: str, fix: str | None = None) -> Iterator[None]:
    """Turn what a runtime raises within the block into a ``TargetError`` that carries the runtime's own words."""
    try:
        yield
    except MmedgeError:
        raise
    except Exception as err:
        raise _told(err, doing, where, fix) from err


def _told(err: Exception, doing: str, where: str, fix: str | None = None) -> TargetError:
    words = " ".join(str(err).split()) or type(err).__name__
    return TargetError(f"{doing} failed: {words[:600]}", where=where, fix=fix)


def checked(run: Runner, dtypes: Mapping[str, str], engine: str) -> Runner:
    """``run``, which on its first call compares the inputs with the engine's.

    Only the first: every call of a timed loop brings the same names and dtypes.

    Args:
        run: the engine.
        dtypes: input name to numpy dtype name.
        engine: what to call the engine in errors.

    Raises:
        TargetError: (from the function it returns) names or dtypes differ, or the engine refuses the arrays.
    """
    seen = False

    def checked_run(inputs: Mapping[str, Array]) -> dict[str, Array]:
        nonlocal seen
        if not seen:
            _compare(inputs, dtypes, engine)
            seen = True
        try:  # `reported` would cost every query some microseconds
            return run(inputs)
        except MmedgeError:
            raise
        except Exception as err:
            raise _told(err, "running the engine", engine) from err

    return checked_run


@dataclass(frozen=True)
class TimedRunner:
    """A runner on an accelerator, which can also tell where the time of a query goes.

    Attributes:
        run: the runner.
        parts_ms: runs a query and gives milliseconds by part: ``h2d`` (copying in), ``device`` (the engine), ``d2h``
            (copying out), by the accelerator's own clock.
        remarks: what must be known of its figures, after the queries.
    """

    run: Runner
    parts_ms: Callable[[Mapping[str, Array]], dict[str, float]]
    remarks: Callable[[], list[str]] = list

    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """A query."""
        return self.run(inputs)


def in_batches(run: Runner, largest: int) -> Runner:
    """``run``, which takes any number of samples and hands the engine at most ``largest`` at a time."""

    def batched(inputs: Mapping[str, Array]) -> dict[str, Array]:
        count = len(next(iter(inputs.values())))
        if count <= largest:
            return run(inputs)
        starts = range(0, count, largest)
        parts = [run({name: array[start : start + largest] for name, array in inputs.items()}) for start in starts]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    return batched


def _compare(inputs: Mapping[str, Array], dtypes: Mapping[str, str], engine: str) -> None:
    for name in inputs:
        if name not in dtypes:
            problem, fix = unknown("input", name, dtypes)
            raise TargetError(problem, where=engine, fix=fix)
    for name, dtype in dtypes.items():
        if name not in inputs:
            raise TargetError(f"input {name!r} is missing", where=engine, fix=f"give: {', '.join(sorted(dtypes))}")
        if str(inputs[name].dtype) != dtype:
            problem = f"input {name!r} has dtype {inputs[name].dtype}, the engine takes {dtype}"
            raise TargetError(problem, where=engine, fix=f'give {name}.astype("{dtype}")')
