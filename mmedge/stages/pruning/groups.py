"""Groups: a width of the network together with every place that has to change when the width does."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mmedge.errors import StageError
from mmedge.stages.structure import Cut, Slot

COUNTED = ("out_channels", "out_features", "num_features", "num_channels", "normalized_shape", "embedding_dim",
           "hidden_size")  # fmt: skip

Atom = tuple[int, ...]
Part = tuple[Atom, ...]


@dataclass(frozen=True)
class Group:
    """A width that is narrowed as a whole.

    Its channels come in parts of equal width (the layers and directions of a GRU, the heads of an attention that are to
    become narrower, a stream and the attentions that must be as wide as it is); most groups have one. Every part loses
    the same number of channels, each its own. Within a part, channels stay or go in atoms: a head, or the channels that
    have the same place in each group of a convolution.

    Attributes:
        name: the path of the module that makes it; of an attention, the attention's.
        width: how many channels each part has.
        slots: all places of that length; their channels are numbered through the parts.
        parts: for each part its atoms, for each atom its channels.
        attentions: those whose inner width it is.
        whole_heads: their atoms are heads.
        members: names of the groups that became this one, itself included.
        others: other readings of the same layers, to be tried when this one turns out wrong.
        key: tells it from its other readings.
    """

    name: str
    width: int
    slots: tuple[Slot, ...]
    parts: tuple[Part, ...]
    attentions: tuple[str, ...] = ()
    whole_heads: bool = False
    members: tuple[str, ...] = ()
    others: tuple[Group, ...] = ()
    key: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "members", self.members or (self.name,))
        object.__setattr__(self, "key", self.key or self.name)

    @property
    def channels(self) -> int:
        """The number of channels in all parts."""
        return self.width * len(self.parts)

    @property
    def owners(self) -> set[str]:
        """The modules it touches."""
        return {slot.owner for slot in self.slots}

    @property
    def makers(self) -> set[str]:
        """The modules whose outputs it narrows: those that count them in an attribute, and attentions."""
        return {slot.owner for slot in self.slots if slot.name in COUNTED} | set(self.attentions)

    @property
    def atom(self) -> int:
        """The number of channels that a part loses at once, at least."""
        return math.lcm(*(len(part[0]) for part in self.parts))

    def sizes(self, round_to: int) -> tuple[int, ...]:
        """The widths that it may have, narrowest first: whole heads, else multiples of ``round_to`` where it can."""
        step = self.atom if self.whole_heads else self._step(self.width, round_to)
        return (*range(step, self.width, step), self.width)

    def goal(self, ratio: float, round_to: int) -> tuple[int, int]:
        """How many channels stay in each part at ``ratio``, and the multiple to which that was rounded.

        Raises:
            StageError: less than one channel or head would be left.
        """
        step = self.atom if self.whole_heads else self._step(self.width * ratio, round_to)
        least = self.atom / 2 if self.whole_heads else 1
        if self.width * ratio < least:
            what = f"{self.width // self.atom} heads" if self.whole_heads else f"{self.width} channels"
            heads = ", or set heads: narrower" if self.whole_heads else ""
            raise StageError(
                f"width {ratio} of {what} leaves less than one",
                where=self.name,
                fix=f"raise width, or add {self.name!r} to keep{heads}",
            )
        return min(self.width, max(step, math.floor(self.width * ratio / step + 0.5) * step)), step

    def _step(self, target: float, round_to: int) -> int:
        powers = [1 << bit for bit in reversed(range(round_to.bit_length())) if 1 << bit < round_to]
        steps = [math.lcm(multiple, self.atom) for multiple in (round_to, *powers)]
        return next((step for step in steps if step <= target), steps[-1])

    def cuts(self, kept: int, scores: Tensor) -> list[Cut]:
        """The cuts that leave ``kept`` channels in each part: those with the highest scores ``(channels,)``."""
        gone: set[int] = set()
        for part in self.parts:
            values = torch.stack([scores[list(atom)].sum() for atom in part])
            order = torch.argsort(values, descending=True, stable=True).tolist()
            gone.update(channel for index in order[kept // len(part[0]) :] for channel in part[index])
        return [Cut(slot, frozenset(gone)) for slot in self.slots]


def plain(width: int, blocks: int = 1) -> tuple[Part, ...]:
    """One part whose atoms are the channels in the same place of each of ``blocks`` equal blocks."""
    period = width // blocks
    return (tuple(tuple(range(first, width, period)) for first in range(period)),)


def chunks(width: int, size: int) -> tuple[Part, ...]:
    """One part whose atoms are ``size`` channels in a row."""
    return (tuple(tuple(range(first, first + size)) for first in range(0, width, size)),)


def moved(slots: Iterable[Slot], offset: int) -> tuple[Slot, ...]:
    """``slots`` with their channels counted from ``offset``."""
    return tuple(replace(slot, channels=tuple(channel + offset for channel in slot.channels)) for slot in slots)


def side_by_side(groups: Sequence[Group]) -> Group:
    """One group of the parts of several equally wide ones: they must stay equally wide, each chooses its channels."""
    slots: list[Slot] = []
    parts: list[Part] = []
    counted: set[tuple[str, str]] = set()  # an attribute loses what one part does
    for group in groups:
        offset = groups[0].width * len(parts)
        slots += moved((slot for slot in group.slots if (slot.owner, slot.name) not in counted), offset)
        counted |= {(slot.owner, slot.name) for slot in group.slots if slot.dim is None}
        parts += [tuple(tuple(channel + offset for channel in atom) for atom in part) for part in group.parts]
    return replace(
        groups[0],
        slots=tuple(slots),
        parts=tuple(parts),
        attentions=tuple(path for group in groups for path in group.attentions),
        whole_heads=any(group.whole_heads for group in groups),
        members=tuple(name for group in groups for name in group.members),
        others=(),
        key="+".join(group.key for group in groups),
    )
