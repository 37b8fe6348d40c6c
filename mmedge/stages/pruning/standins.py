"""Stand-ins: what torch-pruning sees in place of layers that it cannot follow.

They are put into a copy of the network for as long as it is traced. Their widths hang together as those of the layer
do; what they compute does not matter. ``STAND_INS`` is the table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from mmedge.errors import StageError
from mmedge.stages.pruning.layers import LAYERS
from mmedge.stages.structure import Slot


@dataclass(frozen=True)
class Place:
    """Where a stand-in's width is in the real layer: at ``offsets`` along a tensor's dimension, or in an attribute."""

    name: str
    dim: int | None
    offsets: tuple[int, ...] = (0,)


class Seen(nn.Linear):
    """One of the linear layers that a stand-in is made of.

    Args:
        owner: path of the real layer.
        sizes: its inputs and outputs.
        into: where its inputs are in the real layer.
        out: where its outputs are; nowhere for what cannot be narrowed.
        name: of the bare parameter that it stands for.
    """

    def __init__(
        self, owner: str, sizes: tuple[int, int], into: Sequence[Place], out: Sequence[Place], name: str = ""
    ) -> None:
        super().__init__(*sizes, bias=False)
        self.owner, self.into, self.out, self.name = owner, tuple(into), tuple(out), name

    @property
    def counted(self) -> bool:
        """Whether other layers share the count of its outputs: the layers and directions of a recurrent layer."""
        return any(place.name == "hidden_size" for place in self.out)

    def slots(self, side: str, positions: Sequence[int], channels: Sequence[int]) -> list[Slot]:
        """The slots of the real layer: see ``layers.slots_of``.

        Raises:
            StageError: the real layer cannot be narrowed there.
        """
        places = self.out if side == "out" else self.into
        if not places:
            raise StageError("it cannot be narrowed", where=self.owner)
        found = []
        for place in places:
            child, _, name = place.name.rpartition(".")
            owner = ".".join(filter(None, (self.owner, child)))
            where = tuple(offset + position for offset in place.offsets for position in positions)
            found.append(Slot(owner, name, place.dim, where, tuple(channels) * len(place.offsets)))
        return found


class Recurrent(nn.Module):
    """In place of a GRU, LSTM or RNN: one linear layer per layer and direction."""

    def __init__(self, path: str, real: nn.RNNBase) -> None:
        super().__init__()
        for name in real.__constants__:
            setattr(self, name, getattr(real, name))
        self.directions = 2 if real.bidirectional else 1
        self.is_lstm = isinstance(real, nn.LSTM)
        self.parts = nn.ModuleList(
            Seen(path, *_recurrent_part(real, layer, direction))
            for layer in range(real.num_layers)
            for direction in range(self.directions)
        )

    def flatten_parameters(self) -> None:
        """Nothing to do here."""

    def forward(self, input: Any, hx: Any = None) -> Any:
        """Outputs and final states, in the shapes of the real layer."""
        packed = isinstance(input, PackedSequence)
        data = input.data if packed else input
        starts = _starts(hx, len(self.parts))
        states: list[Tensor] = []
        for first in range(0, len(self.parts), self.directions):
            last = [part(data) + starts[i] for i, part in list(enumerate(self.parts))[first : first + self.directions]]
            data = torch.cat(last, -1) if len(last) > 1 else last[0]
            states += last
        if packed:
            final = torch.stack([state[: int(input.batch_sizes[0])] for state in states])
            data = PackedSequence(data, *input[1:])
        else:
            time = data.ndim - 2 if self.batch_first else 0
            final = torch.stack([state.select(time, -1) for state in states])
        return data, (final, final) if self.is_lstm else final


def _starts(hx: Any, count: int) -> list[Any]:
    """What each layer and direction begins with: its width hangs together with theirs."""
    if hx is None:
        return [0] * count
    given = hx if isinstance(hx, tuple) else (hx,)
    return [sum(tensor[index].reshape(-1, tensor.shape[-1]).mean(0) for tensor in given) for index in range(count)]


Sides = tuple[tuple[int, int], list[Place], list[Place]]


def _recurrent_part(real: nn.RNNBase, layer: int, direction: int) -> Sides:
    suffix = f"_l{layer}" + ("_reverse" if direction else "")
    into = [Place(f"weight_ih{suffix}", 1)] + ([Place("input_size", None)] if layer == 0 else [])
    sizes = (getattr(real, f"weight_ih{suffix}").shape[1], real.proj_size or real.hidden_size)
    return sizes, into, [] if real.proj_size else _hidden(real, suffix)


def _hidden(real: Any, suffix: str) -> list[Place]:
    """Where the hidden units of a layer are: once per gate, and in what reads the state."""
    gates = getattr(real, f"weight_hh{suffix}").shape[0] // real.hidden_size
    offsets = tuple(gate * real.hidden_size for gate in range(gates))
    names = [f"weight_ih{suffix}", f"weight_hh{suffix}"]
    names += [f"bias_ih{suffix}", f"bias_hh{suffix}"] if real.bias else []
    out = [Place(name, 0, offsets) for name in names]
    return [*out, Place(f"weight_hh{suffix}", 1), Place("hidden_size", None)]


class RecurrentCell(nn.Module):
    """In place of a GRUCell, LSTMCell or RNNCell."""

    def __init__(self, path: str, real: nn.RNNCellBase) -> None:
        super().__init__()
        self.input_size, self.hidden_size = real.input_size, real.hidden_size
        self.is_lstm = isinstance(real, nn.LSTMCell)
        into = [Place("weight_ih", 1), Place("input_size", None)]
        self.parts = nn.ModuleList([Seen(path, (real.input_size, real.hidden_size), into, _hidden(real, ""))])

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        """The next state."""
        state = self.parts[0](input) + sum(hx if isinstance(hx, tuple) else [] if hx is None else [hx])
        return (state, state) if self.is_lstm else state


class Cross(nn.Module):
    """In place of an ``nn.MultiheadAttention`` whose keys or values have a width of their own."""

    def __init__(self, path: str, real: nn.MultiheadAttention) -> None:
        super().__init__()
        width, sizes = real.embed_dim, {"q": real.embed_dim, "k": real.kdim or 0, "v": real.vdim or 0}
        self.batch_first = real.batch_first
        for letter, size in sizes.items():
            into = [Place(f"{letter}_proj_weight", 1)]
            into += [] if letter == "q" else [Place(f"{letter}dim", None)]  # embed_dim changes with the heads
            self.add_module(letter, Seen(path, (size, width), into, []))
        bias = [Place("out_proj.bias", 0)] if real.out_proj.bias is not None else []
        out = [Place("out_proj.weight", 0), Place("out_proj.out_features", None), *bias]
        self.out = Seen(path, (width, width), [], out)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, **_: Any) -> tuple[Tensor, None]:
        """Outputs in the shape of the real layer's, and no attention weights."""
        read = sum(self.get_submodule(letter)(x).flatten(0, -2).mean(0) for letter, x in (("k", key), ("v", value)))
        return self.out(self.get_submodule("q")(query) + read), None


def _cross(path: str, real: nn.MultiheadAttention) -> nn.Module | None:
    return Cross(path, real) if real.in_proj_weight is None else None


STAND_INS: tuple[tuple[type[nn.Module], Callable[[str, Any], nn.Module | None]], ...] = (
    (nn.RNNBase, Recurrent),
    (nn.RNNCellBase, RecurrentCell),
    (nn.MultiheadAttention, _cross),
)


def stand_in(module: nn.Module) -> nn.Module:
    """``module`` with stand-ins for its layers, in place; itself a layer, its stand-in."""
    for path, child in list(module.named_modules()):
        for kind, make in STAND_INS:
            if isinstance(child, kind) and (other := make(path, child)) is not None:
                if not path:
                    return other
                owner, _, name = path.rpartition(".")
                setattr(module.get_submodule(owner), name, other)
    return module


class Closed(nn.Module):
    """In place of a module that is kept and cannot be traced: runs it, and remembers what it read.

    Args:
        real: the module.
    """

    def __init__(self, real: nn.Module) -> None:
        super().__init__()
        self.run = (real,)  # in a tuple: no part of the network that is traced
        self.read: list[Tensor] = []

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the real module gives, without gradients."""
        self.read += [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor) and each.requires_grad]
        args, kwargs = tree_map_only(Tensor, Tensor.detach, (args, kwargs))
        with torch.no_grad():
            return tree_map_only(Tensor, Tensor.detach, self.run[0](*args, **kwargs))


def close(module: nn.Module, path: str) -> Closed:
    """Put a ``Closed`` in the place of the module at ``path``."""
    owner, _, name = path.rpartition(".")
    closed = Closed(module.get_submodule(path))
    setattr(module.get_submodule(owner), name, closed)
    return closed


class SpelledOut(TorchFunctionMode):
    """While open, operators that torch-pruning misreads run as others that mean the same.

    Products with a bare parameter (``x @ self.projection``) become linear layers, and a gated
    linear unit becomes two halves and their product.

    Args:
        module: the network that is traced.

    Attributes:
        layers: those that stand for bare parameters.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        known = tuple(kind for kinds, _ in LAYERS for kind in (kinds if isinstance(kinds, tuple) else (kinds,)))
        self.layers = nn.ModuleList()
        self.standing: dict[tuple[int, bool], Seen] = {}
        for path, child in list(module.named_modules()):
            if not isinstance(child, (*known, nn.RNNBase)):
                for name, tensor in list(child.named_parameters(recurse=False)):
                    if tensor.ndim == 2 and tensor.is_floating_point():
                        self._add(path, child, name, tensor)

    def _add(self, path: str, owner: nn.Module, name: str, tensor: Tensor) -> None:
        for transposed in (False, True):
            rows, columns = (1, 0) if transposed else (0, 1)  # of inputs and outputs
            sizes = (tensor.shape[rows], tensor.shape[columns])
            into, out = [Place(name, rows)], [Place(name, columns)]
            for places, counts, size in (
                (into, ("in_features", "nx"), sizes[0]),
                (out, ("out_features", "nf"), sizes[1]),
            ):
                places += [Place(count, None) for count in counts if vars(owner).get(count) == size]
            layer = Seen(path, sizes, into, out, f"{name}.T" if transposed else name)
            self.layers.append(layer)
            self.standing[id(tensor), transposed] = layer

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run ``func`` or what stands for it."""
        kwargs = dict(kwargs or {})
        if func is F.glu:
            halves = args[0].chunk(2, kwargs.get("dim", args[1] if len(args) > 1 else -1))
            return halves[0] * halves[1].sigmoid()
        if func in PRODUCTS and not kwargs:
            bias, (x, weight) = PRODUCTS[func](args)
            layer = self.standing.get((id(weight), func is F.linear))
            if layer is not None:
                return layer(x) if bias is None else layer(x) + bias
        return func(*args, **kwargs)


def _two(args: Sequence[Any]) -> tuple[Any, Sequence[Any]]:
    return None, args[:2]


PRODUCTS: dict[Any, Callable[[Sequence[Any]], tuple[Any, Sequence[Any]]]] = {
    **dict.fromkeys((torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__), _two),
    F.linear: lambda args: (args[2] if len(args) > 2 else None, args[:2]),
    torch.addmm: lambda args: (args[0], args[1:3]),
}
