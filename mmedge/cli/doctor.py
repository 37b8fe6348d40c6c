"""``mmedge doctor``: what is installed, what works, and how to mend what does not."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mmedge.cli.page import grid, heading, page
from mmedge.cli.runs import result_options
from mmedge.errors import TargetError

if TYPE_CHECKING:
    from rich.text import Text

    from mmedge.doctor.finding import Finding

_MARKS = {"ok": "✓", "warn": "!", "fail": "✗", "absent": "–"}
_STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red", "absent": "dim"}


@click.command()
@click.option(
    "--runs", type=click.Path(path_type=Path), default="runs", show_default=True, metavar="DIR", help="Where runs go."
)
@result_options
def doctor(runs: Path, as_json: bool, quiet: bool, verbose: bool) -> int:
    """What is installed, what works here, and the command that mends what does not.

    Exit status 4 when something that is installed does not work; an optional part that is merely
    absent is no failure.
    """
    from mmedge.cli.console import progress_for
    from mmedge.doctor.examination import examine

    sections = examine(folder=runs, progress=progress_for(quiet))
    broken = [each.name for found in sections.values() for each in found if each.state == "fail"]
    if as_json:
        rows = {section: [asdict(each) for each in found] for section, found in sections.items()}
        click.echo(json.dumps({"state": "fail" if broken else "ok", "broken": broken, "findings": rows}, indent=2))
    else:
        _print(sections, broken)
    return TargetError.exit_status if broken else 0


def _print(sections: Mapping[str, Sequence[Finding]], broken: Sequence[str]) -> None:
    with page() as console:
        for section, found in sections.items():
            heading(console, section)
            console.print(grid(("", "", ""), _rows(found)))
        verdict = f"broken: {', '.join(broken)}" if broken else "nothing that is installed is broken"
        heading(console, f"{verdict}   (✓ works, ! mind this, ✗ broken, – not there)")


def _rows(found: Sequence[Finding]) -> Iterator[Sequence[str | Text]]:
    from rich.text import Text

    for each in found:
        style = _STYLES[each.state]
        yield Text(_MARKS[each.state], style), Text(each.name, style), each.detail
        if each.fix is not None:
            yield "", "", Text(f"→ {each.fix}", "dim" if each.state == "absent" else "")
