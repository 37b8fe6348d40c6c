"""Progress and messages on standard error; standard output is for results."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from mmedge.progress import Bar, Progress

EVERY_S = 5.0  # how often a plain line is written where there is no terminal


def progress_for(quiet: bool) -> Progress:
    """Bars on a terminal, plain lines elsewhere, nothing when quiet."""
    if quiet:
        return Progress()
    return Bars() if sys.stderr.isatty() else Lines()


class Lines(Progress):
    """One line now and then, for logs and CI."""

    @contextmanager
    def bar(self, label: str, total: int) -> Iterator[Bar]:
        """Lines at the start, at most every five seconds, and at the end."""
        yield (line := _Line(label, total))
        line.end()

    def say(self, text: str) -> None:
        """One line."""
        print(text, file=sys.stderr, flush=True)


class _Line:
    def __init__(self, label: str, total: int) -> None:
        self.label, self.total, self.done = label, total, 0
        self.started = self.spoke = time.monotonic()
        self.facts = ""

    def advance(self, steps: int = 1, **facts: float) -> None:
        self.done += steps
        self.facts = _words(facts) or self.facts
        if time.monotonic() - self.spoke > EVERY_S:
            self.spoke = time.monotonic()
            spent = self.spoke - self.started
            count, left = f"{self.done}", ""  # a total of 0 means that nobody knows it
            if self.total:
                count += f"/{self.total}"
                left = f", about {spent / max(self.done, 1) * (self.total - self.done):.0f} s left"
            text = f"{self.label}: {count}{self.facts}, {spent:.0f} s{left}"
            print(text, file=sys.stderr, flush=True)

    def end(self) -> None:
        spent = time.monotonic() - self.started
        if spent > 1:
            print(f"{self.label}: done{self.facts}, {spent:.0f} s", file=sys.stderr, flush=True)


class Bars(Progress):
    """Live bars with the loss and the time left."""

    @contextmanager
    def bar(self, label: str, total: int) -> Iterator[Bar]:
        """A bar that stays as one line when it is done."""
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )
        from rich.progress import (
            Progress as RichProgress,
        )

        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with RichProgress(*columns, console=Console(stderr=True)) as shown:
            task = shown.add_task(label, total=total or None, facts="")

            class Live:
                def advance(self, steps: int = 1, **facts: float) -> None:
                    shown.update(task, advance=steps, facts=_words(facts).removeprefix(", "))

            yield Live()

    def say(self, text: str) -> None:
        """One line."""
        from rich.console import Console

        Console(stderr=True, highlight=False).print(text, markup=False)


def _words(facts: dict[str, float]) -> str:
    return "".join(f", {name} {value:.4g}" for name, value in facts.items())
