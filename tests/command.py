"""Running the command line within this process, through the same ``main`` that a shell starts."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from mmedge.cli.main import main


@dataclass(frozen=True)
class Outcome:
    """What a shell would see."""

    status: int
    out: str
    err: str


def mmedge(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object) -> Outcome:
    monkeypatch.setattr("sys.argv", ["mmedge", *map(str, arguments)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        main()
    said = capsys.readouterr()
    assert isinstance(exit.value.code, int)
    return Outcome(exit.value.code, said.out, said.err)
