"""Layers: which dimensions of which tensors are as long as a layer's outputs and its inputs.

``LAYERS`` is the table; a layer that is in none of its rows cannot be narrowed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from mmedge.errors import StageError
from mmedge.stages.structure import Slot

Places = list[tuple[str, int | None]]


def slots_of(path: str, module: nn.Module, side: str, positions: Sequence[int], channels: Sequence[int]) -> list[Slot]:
    """The slots of one layer.

    Args:
        path: the layer's path.
        module: the layer.
        side: ``out`` or ``in``; the same for layers that work channel by channel.
        positions: which of its channels on that side.
        channels: the group's channel for each position.

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
    for kinds, places in LAYERS:
        if isinstance(module, kinds) and (found := places(module, side)) is not None:
            return found
    raise StageError(f"{type(module).__name__} cannot be narrowed", where=path)


def _linear(module: nn.Module, side: str) -> Places:
    out: Places = [("weight", 0), ("bias", 0), ("out_features", None)]
    return out if side == "out" else [("weight", 1), ("in_features", None)]


def _conv(module: Any, side: str) -> Places | None:
    if is_depthwise(module):
        counts = ("out_channels", "in_channels", "groups")
        return [("weight", 0), ("bias", 0), *((name, None) for name in counts)]
    if module.transposed and module.groups > 1:
        return None
    first = 1 if module.transposed else 0
    if side == "out":
        return [("weight", first), ("bias", 0), ("out_channels", None)]
    return [("weight", 1 - first), ("in_channels", None)]


def _batch_norm(module: nn.Module, side: str) -> Places:
    names = ("weight", "bias", "running_mean", "running_var")
    return [*((name, 0) for name in names), ("num_features", None)]


def _layer_norm(module: Any, side: str) -> Places | None:
    return [("weight", 0), ("bias", 0), ("normalized_shape", None)] if len(module.normalized_shape) == 1 else None


def _group_norm(module: nn.Module, side: str) -> Places:
    return [("weight", 0), ("bias", 0), ("num_channels", None)]


def _embedding(module: nn.Module, side: str) -> Places:
    return [("weight", 1), ("embedding_dim", None)]


def _prelu(module: Any, side: str) -> Places:
    return [("weight", 0), ("num_parameters", None)] if module.num_parameters > 1 else []


def _multihead(module: Any, side: str) -> Places | None:
    # Its out_proj is added by the caller: it is a module of its own.
    return [("in_proj_weight", 1)] if module.in_proj_weight is not None else None


LAYERS: tuple[tuple[type[nn.Module] | tuple[type[nn.Module], ...], Callable[[Any, str], Places | None]], ...] = (
    (_ConvNd, _conv),
    (nn.Linear, _linear),
    (_NormBase, _batch_norm),
    ((nn.LayerNorm, nn.RMSNorm), _layer_norm),
    (nn.GroupNorm, _group_norm),
    (nn.Embedding, _embedding),
    (nn.PReLU, _prelu),
    (nn.MultiheadAttention, _multihead),
)


def is_depthwise(module: _ConvNd) -> bool:
    """Whether each channel has its own filter."""
    return module.groups > 1 and module.groups == module.in_channels == module.out_channels


def blocks_of(path: str, module: nn.Module, side: str, positions: Sequence[int], width: int) -> int:
    """In how many equal blocks of the group the same channels must stay for ``module`` to go on working.

    Raises:
        StageError: the group does not cover whole groups of it.
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
