"""What long work says while it runs. The command line shows it; everything below only speaks through it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Bar(Protocol):
    """One piece of work under way."""

    def advance(self, steps: int = 1, **facts: float) -> None:
        """``steps`` more are done; ``facts`` (loss, accuracy …) are shown beside the bar."""


class Progress:
    """Silent progress; a subclass shows it."""

    @contextmanager
    def bar(self, label: str, total: int) -> Iterator[Bar]:
        """A bar of ``total`` steps (0: not known), shown while the block runs."""
        yield _Silent()

    def say(self, text: str) -> None:
        """One line for the user."""


class _Silent:
    def advance(self, steps: int = 1, **facts: float) -> None:
        return
