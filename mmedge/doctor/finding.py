"""What one check of ``mmedge doctor`` tells."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "warn", "fail", "absent"]


@dataclass(frozen=True)
class Finding:
    """The outcome of one check.

    Attributes:
        name: what was looked at.
        state: ``ok``; ``warn`` where it works but measurements or engines may suffer; ``fail`` where something that is
            installed does not work; ``absent`` where an optional part is not there.
        detail: what was seen.
        fix: a command, or the one thing to do.
    """

    name: str
    state: State
    detail: str
    fix: str | None = None
