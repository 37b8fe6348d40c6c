"""Changing the structure of a module: dropping blocks, narrowing tensors, and writing both down so they can be redone.

Nothing here knows why something is removed: ``pruning.coupling`` finds what hangs together and ``prune`` decides.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.weight_norm import WeightNorm, remove_weight_norm

from mmedge.errors import StageError
from mmedge.stages.base import outputs_of

Depth = Mapping[str, Sequence[int]]
Attributes = Mapping[str, Mapping[str, Any]]
Items = TypeVar("Items")
Container = nn.Sequential | nn.ModuleList


@dataclass(frozen=True)
class Slot:
    """A place that is as long as a width: a dimension of a tensor, or an integer attribute that repeats its length.

    Attributes:
        owner: the module's path.
        name: the parameter, buffer or attribute.
        dim: the tensor's dimension; None for an attribute, which loses one per removed position. Of a tuple
            (``normalized_shape``) the last entry does.
        positions: the indices along the dimension.
        channels: for each position, the channel of the group that it belongs to.
        scaled: what stays is multiplied by the root of the fraction that stays (queries whose product with the keys is
            divided by the root of their width).
    """

    owner: str
    name: str
    dim: int | None
    positions: tuple[int, ...]
    channels: tuple[int, ...]
    scaled: bool = False

    def removed(self, channels: frozenset[int]) -> set[int]:
        """The positions that go when ``channels`` do."""
        return {place for place, channel in zip(self.positions, self.channels, strict=True) if channel in channels}


@dataclass(frozen=True)
class Cut:
    """A slot and the channels it loses."""

    slot: Slot
    channels: frozenset[int]

    @property
    def factor(self) -> float:
        """By what the rest is multiplied."""
        whole = set(self.slot.channels)
        return math.sqrt(1 - len(whole & self.channels) / len(whole)) if self.slot.scaled else 1.0


Places = dict[int, tuple[Tensor, dict[int, set[int]]]]


def places(module: nn.Module, cuts: Iterable[Cut]) -> Places:
    """What ``cuts`` remove from each tensor: by the tensor's id, the tensor and positions by dimension.

    Keyed by identity, so that a tied weight is cut once however many modules hold it.
    """
    found: Places = {}
    for cut in cuts:
        if cut.slot.dim is not None:
            tensor = getattr(module.get_submodule(cut.slot.owner), cut.slot.name)
            _, dims = found.setdefault(id(tensor), (tensor, {}))
            dims.setdefault(cut.slot.dim % tensor.ndim, set()).update(cut.slot.removed(cut.channels))
    return found


def narrowed(module: nn.Module, cuts: Sequence[Cut]) -> nn.Module:
    """A copy of ``module`` without what ``cuts`` remove."""
    smaller = copy.deepcopy(module)
    swaps: dict[int, Tensor] = {}
    factors = _factors(smaller, cuts)
    for key, (tensor, dims) in places(smaller, cuts).items():
        value = tensor.detach() * factors[key] if key in factors else tensor.detach()
        for dim, gone in dims.items():
            value = value.index_select(dim, torch.tensor([i for i in range(value.shape[dim]) if i not in gone]))
        swaps[key] = value.contiguous()
    swap_tensors(smaller, swaps)
    for (owner, name), loss in _attribute_losses(cuts).items():
        holder = smaller.get_submodule(owner)
        old = getattr(holder, name)
        setattr(holder, name, (*old[:-1], old[-1] - loss) if isinstance(old, tuple) else old - loss)
    return smaller


def _factors(module: nn.Module, cuts: Iterable[Cut]) -> dict[int, Tensor]:
    """By what the entries of scaled tensors are multiplied, by the tensor's id."""
    found: dict[int, Tensor] = {}
    for cut in cuts:
        if cut.slot.scaled and cut.slot.dim is not None:
            tensor = getattr(module.get_submodule(cut.slot.owner), cut.slot.name)
            factors = found.setdefault(id(tensor), torch.ones_like(tensor))
            factors.index_fill_(cut.slot.dim, torch.tensor(cut.slot.positions), cut.factor)
    return found


def _attribute_losses(cuts: Iterable[Cut]) -> dict[tuple[str, str], int]:
    gone: dict[tuple[str, str], set[int]] = {}
    for cut in cuts:
        if cut.slot.dim is None:
            gone.setdefault((cut.slot.owner, cut.slot.name), set()).update(cut.slot.removed(cut.channels))
    return {key: len(positions) for key, positions in gone.items()}


def swap_tensors(module: nn.Module, swaps: Mapping[int, Tensor]) -> None:
    """Put ``swaps[id(tensor)]`` wherever ``module`` holds ``tensor``; ties stay ties."""
    made: dict[int, nn.Parameter] = {}
    for child in module.modules():
        for name, old in list(child._parameters.items()):
            if old is not None and id(old) in swaps:
                new = made.setdefault(id(old), nn.Parameter(swaps[id(old)], requires_grad=old.requires_grad))
                child._parameters[name] = new
        for name, buffer in list(child._buffers.items()):
            if buffer is not None and id(buffer) in swaps:
                child._buffers[name] = swaps[id(buffer)]
        if isinstance(child, nn.RNNBase):
            child._init_flat_weights()  # it keeps its own list of its parameters


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer by name, tied ones once: what safetensors can hold."""
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}


def load_tensors(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give ``module`` these tensors, whatever their shapes; names must match exactly.

    Raises:
        StageError: names are missing or left over, or a tensor differs in dtype or number of dimensions.
    """
    own = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    if set(own) != set(tensors):
        missing, extra = sorted(set(own) - set(tensors)), sorted(set(tensors) - set(own))
        raise StageError(f"saved tensors do not fit the network: missing {missing[:5]}, not expected {extra[:5]}")
    for name, old in own.items():
        if old.dtype != tensors[name].dtype or old.ndim != tensors[name].ndim:
            raise StageError(f"{name} is {tensors[name].dtype} with {tensors[name].ndim} dimensions", where="restore")
    swap_tensors(module, {id(old): tensors[name].detach().clone() for name, old in own.items()})


def set_attributes(module: nn.Module, attributes: Attributes) -> None:
    """Set integer attributes by module path; lists (from JSON) become tuples."""
    for path, values in attributes.items():
        holder = module.get_submodule(path)
        for name, value in values.items():
            setattr(holder, name, tuple(value) if isinstance(value, list) else value)


def attributes_changed(before: nn.Module, after: nn.Module) -> dict[str, dict[str, Any]]:
    """Integer (or tuple) attributes of ``after`` that differ from ``before``, which has the same modules."""
    changes: dict[str, dict[str, Any]] = {}
    olds = dict(before.named_modules())
    for path, module in after.named_modules():
        old = vars(olds[path])
        for name, value in vars(module).items():
            if type(value) in (int, tuple) and value != old.get(name):
                changes.setdefault(path, {})[name] = list(value) if isinstance(value, tuple) else value
    return changes


def keep_blocks(module: nn.Module, depth: Depth) -> None:
    """Leave only the named children in each container, in place; numbered children are numbered anew."""
    for path, indices in deepest_first(depth):
        container = module.get_submodule(path)
        children = list(container._modules.items())
        kept = [children[index] for index in indices]
        numbered = all(name.isdigit() for name, _ in children)
        container._modules = {str(i) if numbered else name: child for i, (name, child) in enumerate(kept)}


def deepest_first(containers: Mapping[str, Items]) -> list[tuple[str, Items]]:
    """In the order in which containers may lose blocks: it renames what is inside them, so the outer ones come last."""
    return sorted(containers.items(), key=lambda item: (-item[0].count("."), item[0]))


def bake(module: nn.Module, paths: Iterable[str] | None = None) -> list[str]:
    """Make plain tensors of weights that are computed from others (weight and spectral norm), in place.

    Args:
        module: the network.
        paths: where; by default wherever there are any.

    Returns:
        The paths of the layers that changed.
    """
    layers = dict(module.named_modules())
    baked = set()
    for path in list(layers) if paths is None else paths:
        layer = layers[path]
        if is_parametrized(layer):
            _unparametrize(layer)
            baked.add(path)
        for hook in list(layer._forward_pre_hooks.values()):
            if isinstance(hook, WeightNorm):
                remove_weight_norm(layer, hook.name)
                baked.add(path)
    return sorted(baked)


def _unparametrize(layer: nn.Module) -> None:
    """``remove_parametrizations`` for a copy: that function changes the class, which copies share."""
    names = list(layer.get_submodule("parametrizations")._modules)
    values = {name: getattr(layer, name).detach().clone() for name in names}
    trainable = any(parameter.requires_grad for parameter in layer.parameters())
    del layer._modules["parametrizations"]
    layer.__class__ = type(layer).__bases__[0]
    for name, value in values.items():
        layer.register_parameter(name, nn.Parameter(value, requires_grad=trainable))


def runs_of(module: nn.Module, inputs: Mapping[str, Tensor]) -> Iterator[tuple[str, list[list[int]]]]:
    """Containers with runs of interchangeable children, as ``(path, [indices of a run, …])``.

    Children form a run when they follow one another, are of the same class with the same parameter shapes, and each
    is called once and maps a tensor to one of the same shape (residual blocks, transformer layers).
    """
    keeps_shape = _shape_keepers(module, inputs)
    for path, container in module.named_modules():
        if isinstance(container, Container):
            runs: list[list[int]] = [[]]
            previous = None
            for index, child in enumerate(container):
                kind = _kind(child) if id(child) in keeps_shape else None
                if kind is None or kind != previous:
                    runs.append([])
                runs[-1].append(index)
                previous = kind
            if long := [run for run in runs if len(run) > 1]:
                yield path, long


def _kind(module: nn.Module) -> tuple[Any, ...] | None:
    shapes = tuple((name, tuple(value.shape)) for name, value in module.named_parameters())
    return (type(module), shapes) if shapes else None


def _shape_keepers(module: nn.Module, inputs: Mapping[str, Tensor]) -> set[int]:
    calls: dict[int, list[bool]] = {}

    def see(child: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        first = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        result = output[0] if isinstance(output, (tuple, list)) and output else output
        same = isinstance(first, Tensor) and isinstance(result, Tensor) and first.shape == result.shape
        calls.setdefault(id(child), []).append(same)

    children = {id(child): child for box in module.modules() if isinstance(box, Container) for child in box}
    handles = [child.register_forward_hook(see, with_kwargs=True) for child in children.values()]
    try:
        with torch.no_grad(), SlowAttention():
            module(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return {key for key, same in calls.items() if same == [True]}


class SlowAttention:
    """While open, PyTorch's transformer layers run operator by operator, so that hooks and counters see inside."""

    def __enter__(self) -> None:
        self.before = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)

    def __exit__(self, *exception: object) -> None:
        torch.backends.mha.set_fastpath_enabled(self.before)


def count(module: nn.Module, inputs: Mapping[str, Tensor], outputs: tuple[str, ...]) -> dict[str, int]:
    """Parameters, and multiply-accumulates for one sample.

    Counted are convolutions, matrix products and attention products (half of what PyTorch's ``FlopCounterMode``
    reports); normalisation, activations and additions are not. Tied parameters count once.
    """
    one = {name: value[:1] for name, value in inputs.items()}
    with _counting(module) as counter:
        outputs_of(module, one, outputs)
    return {"parameters": sum(p.numel() for p in module.parameters()), "macs": counter.get_total_flops() // 2}


def macs_by_module(module: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, int]:
    """Multiply-accumulates for one sample that each module does itself, not in the modules inside it; by path.

    Modules that do none are left out; see ``count`` for what is counted.
    """
    found: dict[str, int] = {}
    inside = [0]  # of the modules that are running: what those within them did
    started: list[int] = []
    paths = {child: path for path, child in module.named_modules()}

    with _counting(module) as counter:

        def enter(child: nn.Module, _: Any) -> None:
            started.append(counter.get_total_flops())
            inside.append(0)

        def leave(child: nn.Module, args: Any, output: Any) -> None:
            done = counter.get_total_flops() - started.pop()
            found[paths[child]] = found.get(paths[child], 0) + (done - inside.pop()) // 2
            inside[-1] += done

        hooks = [child.register_forward_pre_hook(enter) for child in paths]
        hooks += [child.register_forward_hook(leave) for child in paths]
        try:
            module(**{name: value[:1] for name, value in inputs.items()})
        finally:
            for hook in hooks:
                hook.remove()
    return {path: macs for path, macs in found.items() if macs}


@contextmanager
def _counting(module: nn.Module) -> Iterator[Any]:
    """A counter of floating-point operations. It sees operators, so no layer, attention or LSTM may run fused."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    before = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    # The counter asks for the gradient of what enters a module; a parameter that does so has none without gradients.
    learned = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in learned:
        parameter.requires_grad_(False)
    try:
        # The processor's fused attention is one operator that is not counted.
        with (
            torch.no_grad(),
            SlowAttention(),
            sdpa_kernel(SDPBackend.MATH),
            FlopCounterMode(display=False) as counter,
        ):
            yield counter
    finally:
        torch._C._set_mkldnn_enabled(before)
        for parameter in learned:
            parameter.requires_grad_(True)
