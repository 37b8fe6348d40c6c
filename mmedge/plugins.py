"""Tasks, stages and targets by name: the entry points of installed packages, our own included."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from mmedge.errors import MmedgeError, UsageError, unknown

GROUPS = {"task": "mmedge.tasks", "stage": "mmedge.stages", "target": "mmedge.targets"}


def names(kind: str) -> list[str]:
    """The installed names of one kind, without importing any."""
    return sorted({point.name for point in entry_points(group=GROUPS[kind])})


def load(kind: str, name: str) -> Any:
    """The object behind a name.

    Raises:
        UsageError: there is no such name (with a suggestion), or two packages claim it.
        MmedgeError: the package that offers it fails to import.
    """
    points = {point.value: point for point in entry_points(group=GROUPS[kind], name=name)}
    if not points:
        problem, fix = unknown(kind, name, names(kind))
        raise UsageError(problem, fix=fix)
    if len(points) > 1:
        raise UsageError(f"{kind} {name!r} is offered twice: {', '.join(points)}", fix="uninstall one of the packages")
    return _import(kind, next(iter(points.values())))


def loaders(kind: str) -> dict[str, Callable[[], Any]]:
    """Every name of one kind with the function that loads it."""
    return {name: partial(load, kind, name) for name in names(kind)}


def _import(kind: str, point: EntryPoint) -> Any:
    try:
        return point.load()
    except MmedgeError:
        raise
    except ImportError as err:
        owner = point.dist.name if point.dist else "an installed package"
        if owner == "mmedge":
            extra = "compress"
            raise UsageError(f"{kind} {point.name!r} needs {err.name}", fix=f'pip install "mmedge[{extra}]"') from err
        raise UsageError(f"{kind} {point.name!r} of {owner} cannot be imported: {err}") from err
