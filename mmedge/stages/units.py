"""Units: a width of the network together with every place that has to change when the width does."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from mmedge.errors import StageError
from mmedge.stages.structure import Slot

Places = list[tuple[str, int | None]]


@dataclass(frozen=True)
class Unit:
    """A width that is narrowed as a whole.

    Attributes:
        name: the path of the module that makes it; of an attention, the attention's.
        width: how many channels it has.
        slots: all places of that length.
        blocks: in so many equal blocks the same channels must stay (groups of a convolution or a normalisation).
        head_dim: of an attention, channels per head, which stay or go together; 0 elsewhere.
        coupled: cannot change alone (an attention whose inner width must equal that of the stream around it).
    """

    name: str
    width: int
    slots: tuple[Slot, ...]
    blocks: int = 1
    head_dim: int = 0
    coupled: bool = False

    @property
    def owners(self) -> set[str]:
        """The modules it touches."""
        return {slot.owner for slot in self.slots}

    @property
    def makers(self) -> set[str]:
        """The modules whose outputs it narrows: those that count them in an attribute, and attentions."""
        counted = ("out_channels", "out_features", "num_features", "num_channels", "normalized_shape", "embedding_dim")
        return {slot.owner for slot in self.slots if slot.name in counted} | ({self.name} if self.head_dim else set())

    def atoms(self) -> list[list[int]]:
        """The channels, in parts that stay or go together."""
        if self.head_dim:
            return [list(range(first, first + self.head_dim)) for first in range(0, self.width, self.head_dim)]
        period = self.width // self.blocks
        return [list(range(first, self.width, period)) for first in range(period)]

    def goal(self, ratio: float, round_to: int) -> tuple[int, int]:
        """How many channels stay at ``ratio``, and the multiple to which that was rounded.

        Raises:
            StageError: less than one channel or head would be left.
        """
        step = self.head_dim or self._step(self.width * ratio, round_to)
        least = self.head_dim / 2 if self.head_dim else 1
        if self.width * ratio < least:
            what = f"{self.width // self.head_dim} heads" if self.head_dim else f"{self.width} channels"
            raise StageError(
                f"width {ratio} of {what} leaves less than one",
                where=self.name,
                fix=f"raise width, or add {self.name!r} to keep",
            )
        return min(self.width, max(step, math.floor(self.width * ratio / step + 0.5) * step)), step

    def _step(self, target: float, round_to: int) -> int:
        powers = [1 << bit for bit in reversed(range(round_to.bit_length())) if 1 << bit < round_to]
        steps = [math.lcm(multiple, self.blocks) for multiple in (round_to, *powers)]
        return next((step for step in steps if step <= target), steps[-1])


def slots_of(path: str, module: nn.Module, side: str, positions: Sequence[int], channels: Sequence[int]) -> list[Slot]:
    """The slots of one layer.

    Args:
        path: the layer's path.
        module: the layer.
        side: ``out`` or ``in``; the same for layers that work channel by channel.
        positions: which of its channels on that side.
        channels: the unit's channel for each position.

    Raises:
        StageError: it is of a kind that cannot be narrowed.
    """
    found = []
    for name, dim in _places(path, module, side):
        kept = list(zip(positions, channels, strict=True))
        if dim is not None:
            tensor = _tensor(path, module, name)
            if tensor is None:
                continue
            # Each group of a grouped convolution reads its own channels; the weight is as long as one group.
            kept = [(place, channel) for place, channel in kept if place < tensor.shape[dim]]
        found.append(Slot(path, name, dim, tuple(p for p, _ in kept), tuple(c for _, c in kept)))
    return found


def _tensor(path: str, module: nn.Module, name: str) -> Tensor | None:
    own = {**module._parameters, **module._buffers}
    if name not in own and getattr(module, name, None) is not None:
        raise StageError(f"{name} is computed from other tensors (a parametrization)", where=path)
    return own.get(name)


def _places(path: str, module: nn.Module, side: str) -> Places:
    if isinstance(module, _ConvNd):
        return _conv_places(path, module, side)
    if isinstance(module, nn.Linear):
        out: Places = [("weight", 0), ("bias", 0), ("out_features", None)]
        return out if side == "out" else [("weight", 1), ("in_features", None)]
    if isinstance(module, _NormBase):
        names = ("weight", "bias", "running_mean", "running_var")
        return [*((name, 0) for name in names), ("num_features", None)]
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)) and len(module.normalized_shape) == 1:
        return [("weight", 0), ("bias", 0), ("normalized_shape", None)]
    if isinstance(module, nn.GroupNorm):
        return [("weight", 0), ("bias", 0), ("num_channels", None)]
    if isinstance(module, nn.Embedding):
        return [("weight", 1), ("embedding_dim", None)]
    if isinstance(module, nn.PReLU):
        return [("weight", 0), ("num_parameters", None)] if module.num_parameters > 1 else []
    if isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None:
        return [("in_proj_weight", 1)]  # its out_proj is added by the caller: it is a module of its own
    raise StageError(f"{type(module).__name__} cannot be narrowed", where=path)


def _conv_places(path: str, module: _ConvNd, side: str) -> Places:
    if is_depthwise(module):
        counts = ("out_channels", "in_channels", "groups")
        return [("weight", 0), ("bias", 0), *((name, None) for name in counts)]
    if module.transposed and module.groups > 1:
        raise StageError("grouped transposed convolutions cannot be narrowed", where=path)
    first = 1 if module.transposed else 0
    if side == "out":
        return [("weight", first), ("bias", 0), ("out_channels", None)]
    return [("weight", 1 - first), ("in_channels", None)]


def is_depthwise(module: _ConvNd) -> bool:
    """Whether each channel has its own filter."""
    return module.groups > 1 and module.groups == module.in_channels == module.out_channels


def blocks_of(path: str, module: nn.Module, side: str, positions: Sequence[int], width: int) -> int:
    """In how many equal blocks of the unit the same channels must stay for ``module`` to go on working.

    Raises:
        StageError: the unit does not cover whole groups of it.
    """
    if isinstance(module, nn.GroupNorm):
        groups, size = module.num_groups, module.num_channels
    elif isinstance(module, _ConvNd) and module.groups > 1 and not is_depthwise(module):
        groups, size = module.groups, module.in_channels if side == "in" else module.out_channels
        if side == "in" and len(positions) != size:
            raise StageError("only some inputs of a grouped convolution would go", where=path)
    else:
        return 1
    period = size // groups
    whole = list(positions) == list(range(positions[0], positions[0] + width)) and positions[0] % period == 0
    if not whole or width % period:
        raise StageError(f"only parts of its {groups} groups would go", where=path)
    return width // period
