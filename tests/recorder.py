"""A progress display for tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from mmedge.progress import Bar, Progress


class Recorder(Progress):
    """Adds up what it is told."""

    def __init__(self) -> None:
        self.total = self.done = 0
        self.said: list[str] = []

    @contextmanager
    def bar(self, label: str, total: int) -> Iterator[Bar]:
        self.total = total
        yield self

    def say(self, text: str) -> None:
        self.said.append(text)

    def advance(self, steps: int = 1, **facts: float) -> None:
        self.done += steps
