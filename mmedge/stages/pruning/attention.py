"""Attentions: which channels of which layers make up a head, so that heads can be removed or made narrower.

``ADAPTERS`` is the table of the forms that are known. Each tells, for every layer that makes queries, keys or values,
the head channel that each of its outputs belongs to; all else follows from that. Forms that look the same from outside
(the order of a fused layer's outputs) are given one after the other: the check that every cut must pass tells which is
the right one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mmedge.stages.pruning.groups import Group, Part, chunks, plain
from mmedge.stages.pruning.layers import slots_of
from mmedge.stages.structure import Slot

Heads = Literal["whole", "narrower"]
Side = Literal["in", "out"]
Ends = tuple[tuple[str, Side], ...]
Reading = Mapping[str, Tensor]  # for each layer the head channel of each output, -1 for those that stay

QUERY = re.compile(r"(to_|w_?|linear_|lin_)?q(uery|ueries)?(_?(proj(ection)?|lin(ear)?|layer))?(_?\d+|_[a-z]+)?")
FUSED = ("qkv", "qkv_proj", "to_qkv", "wqkv", "w_qkv", "in_proj", "query_key_value", "c_attn")
KEYS_AND_VALUES = ("kv", "to_kv", "kv_proj", "wkv", "w_kv", "key_value")
OUT = ("out", "o", "proj", "out_proj", "o_proj", "out_lin", "to_out", "wo", "w_o", "linear_out", "c_proj", "dense",
       "projection")  # fmt: skip
HEADS = ("num_heads", "n_heads", "n_head", "heads", "nhead", "num_attention_heads")
KEY_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "kv_heads", "num_kv_head")
REPEATS = ("num_key_value_groups", "num_kv_groups", "n_rep")
HEAD_WIDTHS = ("head_dim", "attention_head_size", "dim_head", "head_size", "d_head", "d_kv", "key_value_proj_dim")
WIDTHS = ("embed_dim", "all_head_size", "inner_dim", "hidden_size", "inner_size", "d_model", "dim", "width", "attn_dim")
KEY_WIDTHS = ("kv_dim", "kv_size", "key_dim")


@dataclass(frozen=True)
class Attention:
    """One attention.

    Attributes:
        path: its module.
        layers: the layers that make the queries, keys and values.
        group: its inner width, None where it must be left alone. It may lack places that only a trace shows: a norm
            of the queries, or the layer that reads the result. They are found along ``ends``.
        reason: why it must be left alone.
        ends: layers, each with the side on which it has that width.
        coupled: its inner width must equal that of the stream around it.
    """

    path: str
    layers: tuple[str, ...]
    group: Group | None
    reason: str = ""
    ends: tuple[tuple[str, Side], ...] = ()
    coupled: bool = False


@dataclass(frozen=True)
class Shape:
    """So many heads of so many channels; ``keys`` counts the heads of keys and values, each read by several queries."""

    heads: int
    keys: int
    size: int

    @property
    def width(self) -> int:
        """All channels of the queries."""
        return self.heads * self.size

    @property
    def queries(self) -> Tensor:
        """The channels as ``(key heads, queries per key head, size)``."""
        return torch.arange(self.width).view(self.keys, -1, self.size)

    def read(self, heads: Heads) -> Tensor:
        """For the channels of the keys (or values) those of the queries that stand for them: ``(key heads, size)``.

        One head that all queries read stays when queries go: -1.
        """
        shared = heads == "whole" and self.keys == 1 < self.heads
        return torch.full((1, self.size), -1) if shared else self.queries[:, 0]

    def parts(self, heads: Heads, alike: bool) -> tuple[Part, ...]:
        """What stays or goes: heads (with the keys they share), or channels, in each head its own unless ``alike``."""
        if heads == "whole":
            return chunks(self.width, self.size if self.keys == 1 else self.width // self.keys)
        if alike or self.keys < self.heads:
            return plain(self.width, self.heads)
        return tuple(
            tuple((channel,) for channel in head) for head in torch.arange(self.width).view(self.heads, -1).tolist()
        )


def attentions_of(module: nn.Module, heads: Heads = "whole") -> Iterator[Attention]:
    """Every attention in ``module``."""
    for path, child in module.named_modules():
        for adapter in ADAPTERS:
            if found := list(adapter(path, child, heads)):
                yield from found
                break


def _multihead(path: str, module: nn.Module, heads: Heads) -> Iterator[Attention]:
    """``nn.MultiheadAttention``, within which the stream and the heads are of one width."""
    if not isinstance(module, nn.MultiheadAttention):
        return
    fused = module.in_proj_weight is not None
    layers = (path,) if fused else tuple(f"{path}.{letter}" for letter in "qkv")
    if module.num_heads < 2:
        yield Attention(path, layers, None, "it has one head")
        return
    width, count = module.embed_dim, module.num_heads
    every = tuple(range(width))
    names = {"in_proj_weight": 3} if fused else {f"{letter}_proj_weight": 1 for letter in "qkv"}
    names |= {} if module.in_proj_bias is None else {"in_proj_bias": 3}
    slots = [Slot(path, name, 0, tuple(range(times * width)), every * times) for name, times in names.items()]
    slots += [Slot(path, name, 2, every, every) for name in ("bias_k", "bias_v") if getattr(module, name) is not None]
    slots += slots_of(_join(path, "out_proj"), module.out_proj, "in", every, every)
    slots += [Slot(path, name, None, every, every) for name in ("kdim", "vdim") if fused]
    slots += [Slot(path, "embed_dim", None, every, every)]
    size = width // count
    if heads == "whole":
        slots.append(Slot(path, "num_heads", None, tuple(range(count)), every[::size]))
        group = Group(path, width, tuple(slots), chunks(width, size), (path,), whole_heads=True)
    else:
        query = "in_proj_weight" if fused else "q_proj_weight"
        scaled = [Slot(path, name, 0, every, every, scaled=True) for name in (query, "in_proj_bias") if name in names]
        slots += [*scaled, Slot(path, "head_dim", None, tuple(range(size)), every[:size])]
        group = Group(path, width, tuple(slots), plain(width, count), (path,))
    yield Attention(path, layers, group, coupled=True)


def _all_in_one(path: str, module: nn.Module, heads: Heads) -> Iterator[Attention]:
    """One layer makes queries, keys and values."""
    fused, out = _layer(module, FUSED), _layer(module, OUT)
    if fused is None or out is None:
        return
    width = module.get_parameter(f"{out}.weight").shape[1]
    keys, odd = divmod(module.get_parameter(f"{fused}.weight").shape[0] - width, 2)
    if keys <= 0 or odd or width % keys:
        return
    shape = _shape(module, width, keys)
    readings = []
    if isinstance(shape, Shape):
        q, kv = shape.queries, shape.read(heads)
        all_queries_first = torch.cat([q.flatten(), kv.flatten(), kv.flatten()])
        head_by_head = torch.cat([q, kv[:, None], kv[:, None]], 1).flatten()
        readings = [{fused: all_queries_first}, {fused: head_by_head}]
    yield _attention(Frame(path, module, (fused,), (fused,), heads), shape, readings, ((out, "in"),))


def _separate(path: str, module: nn.Module, heads: Heads) -> Iterator[Attention]:
    """A layer each for queries, keys and values, or for queries and the rest; two sets of them in a co-attention."""
    sets = [layers for name, child in module.named_children() if (layers := _set(module, name, child))]
    if not sets:
        return
    sizes = {tuple(module.get_parameter(f"{layer}.weight").shape[0] for layer in layers) for layers in sets}
    queries = tuple(layers[0] for layers in sets)
    frame = Frame(path, module, tuple(layer for layers in sets for layer in layers), queries, heads)
    ends: Ends = tuple((query, "out") for query in queries)
    if len(sizes) > 1:
        yield _attention(frame, "its sets of queries, keys and values differ in width", [], ends)
        return
    width, *rest = sizes.pop()
    keys = rest[0] if len(rest) == 2 else rest[0] // 2
    shape = _shape(module, width, keys) if len(set(rest)) == 1 else "keys and values differ in width"
    readings = []
    if isinstance(shape, Shape):
        q, kv = shape.queries.flatten(), shape.read(heads)
        orders = (
            [[kv.flatten()] * 2]
            if len(rest) == 2
            else [[torch.cat([kv, kv]).flatten()], [torch.cat([kv, kv], 1).flatten()]]
        )
        readings = [dict(zip(frame.layers, [q, *order] * len(sets), strict=True)) for order in orders]
    yield _attention(frame, shape, readings, ends)


def _set(module: nn.Module, name: str, child: nn.Module) -> tuple[str, ...] | None:
    """The layers of the queries ``name`` and of what they meet."""
    query = _linear(name, child) if QUERY.fullmatch(name.lower()) else None
    if query is None:
        return None
    key, value = (_layer(module, (_swap(name.lower(), letter),)) for letter in "kv")
    both = _layer(module, KEYS_AND_VALUES)
    if key is not None and value is not None:
        return query, key, value
    return None if both is None else (query, both)


ADAPTERS: tuple[Callable[[str, nn.Module, Heads], Iterator[Attention]], ...] = (_multihead, _all_in_one, _separate)


def _swap(name: str, letter: str) -> str:
    one, many = {"k": ("key", "keys"), "v": ("value", "values")}[letter]
    return name.replace("queries", many).replace("query", one) if "quer" in name else name.replace("q", letter)


def _layer(module: nn.Module, names: tuple[str, ...]) -> str | None:
    """The relative path of the Linear child with one of ``names`` (or the first one inside it)."""
    found = (_linear(name, child) for name, child in module.named_children() if name.lower() in names)
    return next((path for path in found if path), None)


def _linear(name: str, child: nn.Module) -> str | None:
    for inner, layer in child.named_modules():
        if isinstance(layer, nn.Linear) and "weight" in layer._parameters:  # not a parametrized one
            return f"{name}.{inner}" if inner else name
    return None


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _counts(module: Any, names: Sequence[str]) -> dict[str, int]:
    return {name: value for name in names if type(value := getattr(module, name, None)) is int}


def _shape(module: nn.Module, width: int, keys: int) -> Shape | str:
    """The heads, from the attributes that tell their number or their width; or why that cannot be told."""
    counts = _counts(module, HEADS) or {
        name: width // size for name, size in _counts(module, HEAD_WIDTHS).items() if size > 0
    }
    counts = counts or _counts(getattr(module, "config", None), HEADS)
    if not counts:
        return f"no attribute tells its number of heads (looked for {', '.join(HEADS + HEAD_WIDTHS)})"
    if len(set(counts.values())) > 1:
        return f"its head counts differ: {counts}"
    count = next(iter(counts.values()))
    if count < 1 or width % count:
        return f"{count} heads over a width of {width} cannot be reduced"
    shape = Shape(count, keys * count // width, width // count)
    if shape.keys * shape.size != keys or not shape.keys or shape.heads % shape.keys:
        return f"keys of width {keys} do not fit {count} heads over a width of {width}"
    return shape


@dataclass(frozen=True)
class Frame:
    """Where an attention is, and what is to be done with its heads."""

    path: str
    module: nn.Module
    layers: tuple[str, ...]
    queries: tuple[str, ...]
    heads: Heads

    def at(self, name: str) -> str:
        """The path of something within."""
        return _join(self.path, name)


def _attention(frame: Frame, shape: Shape | str, readings: Sequence[Reading], ends: Ends) -> Attention:
    """The attention whose layers hold, in one of ``readings``, these channels of the heads."""
    layers = tuple(map(frame.at, frame.layers))
    least = 2 if frame.heads == "whole" else 1
    if isinstance(shape, Shape) and shape.heads < least:
        shape = f"{shape.heads} heads over a width of {shape.width} cannot be reduced"
    if isinstance(shape, str):
        return Attention(frame.path, layers, None, shape)
    groups = [group for reading in readings for group in _groups(frame, shape, reading)]
    groups = [replace(group, key=f"{frame.path} ({number})") for number, group in enumerate(groups)]
    first = replace(groups[0], key=frame.path, others=tuple(groups[1:]))
    return Attention(frame.path, layers, first, ends=tuple((frame.at(layer), side) for layer, side in ends))


def _groups(frame: Frame, shape: Shape, reading: Reading) -> Iterator[Group]:
    """The groups that ``reading`` may mean."""
    width, every = shape.width, tuple(range(shape.width))
    slots: list[Slot] = []
    for layer, channels in reading.items():
        held = [(place, channel) for place, channel in enumerate(channels.tolist()) if channel >= 0]
        slots += (
            slots_of(frame.at(layer), frame.module.get_submodule(layer), "out", *zip(*held, strict=True))
            if held
            else []
        )
    out = _layer(frame.module, OUT)
    if out is not None and frame.module.get_submodule(out).in_features == width:
        slots += slots_of(frame.at(out), frame.module.get_submodule(out), "in", every, every)
    if frame.heads == "whole":
        slots += _head_counters(frame, shape)
        entries = _one_per_head(frame, shape)
        variants = [(extra, shape.parts("whole", False)) for extra in ([entries, []] if entries else [[]])]
    else:
        norms = _one_per_channel(frame, shape)
        slots += [*_width_counters(frame, shape), *norms]
        scaled = _queries_scaled(frame, shape, reading, norms)
        choose = (True,) if norms else (False, True)
        variants = [(extra, shape.parts("narrower", alike)) for alike in choose for extra in ([], scaled)]
    for extra, parts in variants:
        width = shape.width // len(parts)
        yield Group(frame.path, width, (*slots, *extra), parts, (frame.path,), whole_heads=frame.heads == "whole")


def _head_counters(frame: Frame, shape: Shape) -> list[Slot]:
    every = tuple(range(shape.width))
    group = shape.width // shape.keys
    firsts, shared = every[:: shape.size], shape.keys == 1
    found = [(name, firsts) for name in _counts(frame.module, HEADS)]
    found += [(name, every[::group]) for name in _counts(frame.module, KEY_HEADS) if not shared]
    found += [(name, firsts) for name in _counts(frame.module, REPEATS) if shared]
    return [Slot(frame.path, name, None, tuple(range(len(channels))), channels) for name, channels in found] + _totals(
        frame, shape
    )


def _width_counters(frame: Frame, shape: Shape) -> list[Slot]:
    sizes = [name for name, value in _counts(frame.module, HEAD_WIDTHS).items() if value == shape.size]
    first = tuple(range(shape.size))
    return [Slot(frame.path, name, None, first, first) for name in sizes] + _totals(frame, shape)


def _totals(frame: Frame, shape: Shape) -> list[Slot]:
    """Attributes that hold the whole inner width, of the queries or of the keys."""
    own = vars(frame.module)
    every, read = tuple(range(shape.width)), tuple(shape.read(frame.heads).flatten().tolist())
    names = [(name, every) for name in WIDTHS]
    names += [(name, read) for name in KEY_WIDTHS if shape.keys < shape.heads and -1 not in read]
    return [
        Slot(frame.path, name, None, tuple(range(len(channels))), channels)
        for name, channels in names
        if type(own.get(name)) is int and own[name] == len(channels)
    ]


def _one_per_head(frame: Frame, shape: Shape) -> list[Slot]:
    """Tensors with an entry for each head: position biases, temperatures, gates."""
    firsts = tuple(range(0, shape.width, shape.size))
    found = []
    for name, module in frame.module.named_modules():
        if not isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.LayerNorm, nn.RMSNorm)):
            for own, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
                dims = [dim for dim, size in enumerate(tensor.shape) if size == shape.heads]
                if len(dims) == 1:
                    found.append(
                        Slot(frame.at(name) if name else frame.path, own, dims[0], tuple(range(shape.heads)), firsts)
                    )
    return found


def _one_per_channel(frame: Frame, shape: Shape) -> list[Slot]:
    """Norms within the heads: all heads share their weights."""
    first = tuple(range(shape.size))
    found = []
    for name, child in frame.module.named_children():
        own = list(child.named_parameters(recurse=False))
        if own and all(tuple(tensor.shape) == (shape.size,) for _, tensor in own):
            known = isinstance(child, (nn.LayerNorm, nn.RMSNorm))
            found += (
                slots_of(frame.at(name), child, "out", first, first)
                if known
                else [Slot(frame.at(name), parameter, 0, first, first) for parameter, _ in own]
            )
    return found


def _queries_scaled(frame: Frame, shape: Shape, reading: Reading, norms: Sequence[Slot]) -> list[Slot]:
    """The queries, to be scaled: code that divides by the root of the heads' width finds it changed.

    It is the rows that make them, or the norm that follows.
    """
    if of_queries := [slot for slot in norms if slot.dim is not None and "q" in slot.owner.rpartition(".")[2]]:
        return [replace(slot, scaled=True) for slot in of_queries]
    found: list[Slot] = []
    every = tuple(range(shape.width))
    for query in frame.queries:
        rows = {channel: place for place, channel in reversed(list(enumerate(reading[query].tolist())))}
        places = [rows[channel] for channel in every]
        found += slots_of(frame.at(query), frame.module.get_submodule(query), "out", places, every)
    return [replace(slot, scaled=True) for slot in found if slot.dim is not None]
