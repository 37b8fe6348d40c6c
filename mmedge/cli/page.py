"""Tables on standard output, readable in a terminal and in a pipe."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

PIPED_WIDTH = 160  # columns where there is no terminal: rows stay on one line for grep


def heading(console: Console, text: str) -> None:
    """A title above what follows."""
    console.print(f"\n{text}", style="bold", markup=False)


@contextmanager
def page() -> Iterator[Console]:
    """A console for standard output; no line ends in blanks, and none is short where there is no terminal."""
    from rich.console import Console

    fixed = not sys.stdout.isatty() and "COLUMNS" not in os.environ
    console = Console(highlight=False, width=PIPED_WIDTH if fixed else None)
    with console.capture() as captured:
        yield console
    click.echo("\n".join(line.rstrip() for line in captured.get().splitlines()))


def grid(heads: Sequence[str], rows: Iterable[Sequence[str | Text]]) -> Table:
    """Columns without lines between them; the last one is folded where there is no room."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), header_style="dim")
    table.show_header = any(heads)
    for index, head in enumerate(heads):
        table.add_column(Text(head), overflow="fold", no_wrap=index == 0 < len(heads) - 1)
    for row in rows:
        table.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in row))
    return table
