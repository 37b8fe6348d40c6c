"""Attentions: which channels of which layers make up a head, so that whole heads can be removed.

Three forms are known: separate query, key and value layers; one fused layer (all queries, then all keys, then all
values); and ``nn.MultiheadAttention``. A form that turns out to be another one is caught by the check that every cut
must pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from mmedge.stages.structure import Slot
from mmedge.stages.units import Unit, slots_of

QUERY = ("q", "query", "q_proj", "query_proj", "q_lin", "to_q", "wq", "w_q", "linear_q", "q_linear")
FUSED = ("qkv", "qkv_proj", "to_qkv", "wqkv", "w_qkv", "in_proj", "query_key_value", "c_attn")
OUT = ("out", "o", "proj", "out_proj", "o_proj", "out_lin", "to_out", "wo", "w_o", "linear_out", "c_proj", "dense")
HEADS = ("num_heads", "n_heads", "n_head", "heads", "nhead", "num_attention_heads", "num_key_value_heads")
WIDTHS = ("embed_dim", "all_head_size", "inner_dim", "hidden_size", "inner_size", "d_model", "dim", "width")


@dataclass(frozen=True)
class Attention:
    """One attention.

    Attributes:
        path: its module.
        layers: the layers that make the queries, keys and values.
        unit: its inner width, None where it must be left alone. It may lack places that only a trace shows, such as
            a norm of the queries.
        reason: why it must be left alone.
    """

    path: str
    layers: tuple[str, ...]
    unit: Unit | None
    reason: str = ""


def attentions_of(module: nn.Module) -> Iterator[Attention]:
    """Every attention in ``module``."""
    for path, child in module.named_modules():
        if isinstance(child, nn.MultiheadAttention):
            yield _multihead(path, child)
        elif (fused := _layer(child, FUSED)) is not None:
            yield from _fused(path, child, fused)
        elif (query := _layer(child, QUERY)) is not None:
            key, value = (_layer(child, tuple(_swap(name, letter) for name in QUERY)) for letter in "kv")
            if key is not None and value is not None:
                yield _separate(path, child, (query, key, value))


def _swap(name: str, letter: str) -> str:
    word = {"k": "key", "v": "value"}[letter]
    return name.replace("query", word) if "query" in name else name.replace("q", letter)


def _layer(module: nn.Module, names: tuple[str, ...]) -> str | None:
    """The relative path of the Linear child with one of ``names`` (or the first one inside it)."""
    for name, child in module.named_children():
        if name.lower() in names:
            for inner, layer in child.named_modules():
                if isinstance(layer, nn.Linear) and "weight" in layer._parameters:  # not a parametrized one
                    return f"{name}.{inner}" if inner else name
    return None


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _heads(module: nn.Module) -> dict[str, int]:
    return {name: value for name in HEADS if type(value := getattr(module, name, None)) is int}


def _separate(path: str, module: nn.Module, names: tuple[str, str, str]) -> Attention:
    paths = tuple(_join(path, name) for name in names)
    widths = {module.get_parameter(f"{name}.weight").shape[0] for name in names}
    if len(widths) > 1:
        return Attention(path, paths, None, "queries, keys and values differ in width (grouped-query attention)")
    return _attention(path, module, {name: (0,) for name in names}, widths.pop())


def _fused(path: str, module: nn.Module, name: str) -> Iterator[Attention]:
    out = _layer(module, OUT)
    if out is None:
        return
    width = module.get_parameter(f"{out}.weight").shape[1]
    if module.get_parameter(f"{name}.weight").shape[0] == 3 * width:
        yield _attention(path, module, {name: (0, width, 2 * width)}, width)


def _attention(path: str, module: nn.Module, layers: dict[str, tuple[int, ...]], width: int) -> Attention:
    """``layers``: for each the offsets at which a whole set of heads begins among its outputs."""
    paths = tuple(_join(path, name) for name in layers)
    heads = _heads(module)
    if not heads:
        return Attention(path, paths, None, f"no attribute tells its number of heads (looked for {', '.join(HEADS)})")
    if len(set(heads.values())) > 1:
        return Attention(path, paths, None, f"its head counts differ: {heads}")
    count = next(iter(heads.values()))
    if count < 2 or width % count:
        return Attention(path, paths, None, f"{count} heads over a width of {width} cannot be reduced")
    slots: list[Slot] = []
    channels = list(range(width))
    for name, offsets in layers.items():
        positions = [offset + channel for offset in offsets for channel in channels]
        slots += slots_of(_join(path, name), module.get_submodule(name), "out", positions, channels * len(offsets))
    if (out := _layer(module, OUT)) is not None and module.get_submodule(out).in_features == width:
        slots += slots_of(_join(path, out), module.get_submodule(out), "in", channels, channels)
    slots += _counters(path, module, width, count)
    return Attention(path, paths, Unit(path, width, tuple(slots), head_dim=width // count))


def _counters(path: str, module: nn.Module, width: int, heads: int) -> list[Slot]:
    every = tuple(range(width))
    firsts = tuple(range(0, width, width // heads))
    slots = [Slot(path, name, None, tuple(range(heads)), firsts) for name in _heads(module)]
    return slots + [Slot(path, name, None, every, every) for name in WIDTHS if _is_width(module, name, width)]


def _is_width(module: nn.Module, name: str, width: int) -> bool:
    value = vars(module).get(name)
    return type(value) is int and value == width


def _multihead(path: str, module: nn.MultiheadAttention) -> Attention:
    if module.in_proj_weight is None:
        return Attention(path, (path,), None, "nn.MultiheadAttention with kdim or vdim of its own")
    if module.num_heads < 2:
        return Attention(path, (path,), None, "it has one head")
    width = module.embed_dim
    every = tuple(range(width))
    thirds, channels = tuple(range(3 * width)), every * 3
    slots = [Slot(path, "in_proj_weight", 0, thirds, channels)]
    if module.in_proj_bias is not None:
        slots.append(Slot(path, "in_proj_bias", 0, thirds, channels))
    slots += [Slot(path, name, 2, every, every) for name in ("bias_k", "bias_v") if getattr(module, name) is not None]
    slots += slots_of(_join(path, "out_proj"), module.out_proj, "in", every, every)
    slots += [Slot(path, name, None, every, every) for name in ("kdim", "vdim")]
    slots += _counters(path, module, width, module.num_heads)
    # Its code takes one number, embed_dim, for the stream around it and for its inner width.
    unit = Unit(path, width, tuple(slots), head_dim=width // module.num_heads, coupled=True)
    return Attention(path, (path,), unit)
