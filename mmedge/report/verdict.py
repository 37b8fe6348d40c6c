"""From judged gates to the verdict of a run."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from mmedge.report.model import Gate


def verdict(gates: Iterable[Gate]) -> Literal["pass", "fail"]:
    """``fail`` when a gate failed, or was measured on no target at all; ``pass`` otherwise, also without gates."""
    return "fail" if blame(gates) else "pass"


def blame(gates: Iterable[Gate]) -> list[Gate]:
    """The gates that make the run fail: those that failed, and those that were measured on no target."""
    gates = list(gates)
    measured = {(gate.name, gate.stage, gate.limit) for gate in gates if gate.verdict != "not_measured"}
    return [gate for gate in gates if gate.verdict == "fail" or (gate.name, gate.stage, gate.limit) not in measured]
