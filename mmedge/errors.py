"""What can go wrong, and what each failure means for the exit status of the command."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MmedgeError(Exception):
    """A failure that the user can act on.

    Args:
        problem: what is wrong, in one sentence.
        where: the place, as the user knows it (``int8_distill.yaml: stages[1].quantize.calibration``).
        fix: what to do about it.
    """

    exit_status = 2

    def __init__(self, problem: str, *, where: str | None = None, fix: str | None = None) -> None:
        super().__init__(problem)
        self.problem = problem
        self.where = where
        self.fix = fix

    def __str__(self) -> str:
        place = f"{self.where}: " if self.where else ""
        remedy = f"\n  {self.fix}" if self.fix else ""
        return f"{place}{self.problem}{remedy}"


class UsageError(MmedgeError):
    """A command was given something it cannot work with."""


class RecipeError(MmedgeError):
    """A recipe cannot be carried out as written."""


class TaskError(MmedgeError):
    """The user's model, data, loss or metric is not what a task must be."""


class StageError(MmedgeError):
    """A stage could not do its work on this network."""


class ArtifactError(MmedgeError):
    """A file of a run is missing, damaged or not what its manifest says."""


class TargetError(MmedgeError):
    """A target or device cannot be used on this machine."""

    exit_status = 4


class UnsteadyError(TargetError):
    """An engine that was built does not give one answer to one sample."""


def unknown(kind: str, name: str, known: Iterable[str]) -> tuple[str, str]:
    """Problem and fix for a name that does not exist: the nearest known name, or all of them."""
    options = sorted(known)
    near = difflib.get_close_matches(name, options, n=1, cutoff=0.5)
    fix = f"did you mean {near[0]!r}? " if near else ""
    return f"unknown {kind} {name!r}", f"{fix}known: {', '.join(options) or 'none'}"


def needs_extra(package: str, extra: str) -> str:
    """The sentence that tells how to install an optional part."""
    return f'{package} is not installed: pip install "mmedge[{extra}]"'
