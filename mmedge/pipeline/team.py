"""Several processes on one run (``torchrun``, ``accelerate launch``): the first walks the line, the others train along.

When a stage of the first process begins to train, the others are told which stage that is and where the artifacts of
the networks before it lie. They rebuild its input from these and run the stage too: it does the same everywhere, so all
meet in the training. What comes of it is the same on all; the first keeps it. All must see the run folder.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from mmedge.errors import StageError
from mmedge.recipe import PlannedStage
from mmedge.stages.distillation.engine import connect, launched, told

Summons = tuple[str, list[str]]  # the name of a stage, the artifacts before it


def follows() -> bool:
    """Whether a launcher started this process as another than the first."""
    return int(os.environ.get("RANK", "0")) > 0


class Team:
    """The processes of a command; one alone unless a launcher started it.

    Args:
        connected: with the others that the launcher started.
    """

    def __init__(self, connected: bool = False) -> None:
        self.count = connect()[0] if connected and launched() else 1
        self.busy = False

    def __enter__(self) -> Team:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        """Send the others home, unless they are at work or were interrupted: then what ended it here ends it there."""
        interrupted = kind is not None and not issubclass(kind, Exception)
        if self.count > 1 and not self.busy and not interrupted:
            told(None)

    @contextmanager
    def at_hand(self, planned: PlannedStage, origins: Sequence[Path]) -> Iterator[Callable[[], None] | None]:
        """Of the first process: yields what calls the others to a stage; None where there are none.

        Args:
            planned: the stage.
            origins: artifacts of the stages before it.
        """

        def summon() -> None:
            if not self.busy:
                self.busy = True
                told((planned.name, [str(path.resolve()) for path in origins]))

        yield summon if self.count > 1 else None
        self.busy = False

    def summoned(self) -> Iterator[Summons]:
        """Of the other processes: the stages that they are called to.

        Raises:
            StageError: the first process ended without a word.
        """
        while True:
            try:
                summons: Summons | None = told(None)
            except RuntimeError as err:
                fix = "see what it said; the same command goes on from what it kept"
                raise StageError("the first process of the launch ended", fix=fix) from err
            if summons is None:
                return
            yield summons
