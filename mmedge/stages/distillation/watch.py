"""Seeing inside a module while it runs: hidden features and attention maps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from mmedge.errors import StageError, unknown
from mmedge.stages.base import outputs_of
from mmedge.stages.distillation.settings import LAST, Training


@dataclass(frozen=True)
class Seen:
    """What a network made of some samples; all tensors count samples first.

    Attributes:
        outputs: by the task's names.
        features: hidden features ``(samples, width)`` or ``(samples, places, width)``, by layer.
        maps: attention maps ``(samples, queries, keys)``, averaged over heads, by layer.
        projected: of a student, its features in the teacher's width.
        sequence: ``tokens`` that the teacher generated, int64 ``(samples, length)``; the student's ``scores`` when it
            reads those, ``(samples, length, vocabulary)``.
    """

    outputs: Mapping[str, Tensor]
    features: Mapping[str, Tensor] = field(default_factory=dict)
    maps: Mapping[str, Tensor] = field(default_factory=dict)
    projected: Mapping[str, Tensor] = field(default_factory=dict)
    sequence: Mapping[str, Tensor] = field(default_factory=dict)

    def flat(self) -> dict[str, Tensor]:
        """All tensors by ``group.name``: how they are stored and passed between processes."""
        return {f"{group}.{name}": tensor for group, named in vars(self).items() for name, tensor in named.items()}

    @staticmethod
    def of(flat: Mapping[str, Tensor]) -> Seen:
        """The inverse of ``flat``; all but tokens become float32."""
        groups: dict[str, dict[str, Tensor]] = {part.name: {} for part in fields(Seen)}
        for key, tensor in flat.items():
            group, _, name = key.partition(".")
            groups[group][name] = tensor if name == "tokens" else tensor.float()
        return Seen(**groups)

    def to(self, device: torch.device) -> Seen:
        """The same on another device."""
        return Seen.of({name: tensor.to(device) for name, tensor in self.flat().items()})

    def rows(self, first: int, count: int) -> Seen:
        """What was made of samples ``first`` … ``first + count - 1``."""
        return Seen.of({name: tensor[first : first + count] for name, tensor in self.flat().items()})


@dataclass(frozen=True)
class Wanted:
    """What is to be seen: layers by module path, or ``LAST``."""

    features: tuple[str, ...] = ()
    maps: tuple[str, ...] = ()
    pool: bool = True

    @staticmethod
    def of(settings: Training, side: int) -> Wanted:
        """What the losses of ``settings`` compare in the student (``side`` 0) or in the teacher (1)."""
        features = dict.fromkeys(pair[side] for pair in settings.feature_layers())
        maps = dict.fromkeys(pair[side] for pair in settings.attention_layers())
        return Wanted(tuple(features), tuple(maps), settings.features.pool)


class Watch:
    """Runs a module and sees what is wanted; hooks are in place while the block is open.

    Raises:
        StageError: on entering, a layer does not exist; on running, it gives nothing of the kind.
    """

    def __init__(self, module: nn.Module, wanted: Wanted, outputs: tuple[str, ...]) -> None:
        self.module, self.wanted, self.outputs = module, wanted, outputs
        self.layers = Layers(module, [name for name in wanted.features if name != LAST], wanted.pool)
        self.probe = Probe(module, wanted.pool) if LAST in wanted.features else None
        self.maps = Maps(module) if wanted.maps else None

    def __enter__(self) -> Watch:
        try:
            for part in (self.layers, self.probe, self.maps):
                if part is not None:
                    part.attach()
        except StageError:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        for part in (self.layers, self.probe, self.maps):
            if part is not None:
                part.detach()

    def run(self, inputs: Mapping[str, Tensor]) -> Seen:
        """The module's outputs for ``inputs`` and what was seen on the way."""
        with self.maps.recording() if self.maps else nullcontext():
            outputs = outputs_of(self.module, inputs, self.outputs)
        features = dict(self.layers.latest)
        if self.probe is not None:
            features[LAST] = self.probe.features()
        maps = {name: self.maps.of(name) for name in self.wanted.maps} if self.maps else {}
        return Seen(outputs, features, maps)


class _Hooks:
    """Hooks that are put in and taken out together."""

    def __init__(self) -> None:
        self.handles: list[Any] = []

    def detach(self) -> None:
        """Take all hooks out."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()


class Probe(_Hooks):
    """Watches what enters the last linear layer or convolution that runs: the last hidden features."""

    def __init__(self, module: nn.Module, pool: bool = True) -> None:
        super().__init__()
        self.module, self.pool = module, pool
        self.latest: Tensor | None = None

    def attach(self) -> None:
        """Begin to watch."""
        for module in self.module.modules():
            if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d)):
                self.handles.append(module.register_forward_pre_hook(self._see))

    def _see(self, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        if arguments and isinstance(arguments[0], Tensor):
            self.latest = _places(arguments[0], isinstance(module, (nn.Conv1d, nn.Conv2d)), self.pool)

    def features(self) -> Tensor:
        """The features of the latest call: ``(batch, width)``, or ``(batch, places, width)`` where not pooled.

        Raises:
            StageError: the module has no linear layer or convolution.
        """
        if self.latest is None:
            raise StageError(
                "no Linear or Conv module to take features from",
                where="distill.features",
                fix="set features: 0 (and relations: 0), or name layers: {student's module: teacher's module}",
            )
        return self.latest


class Layers(_Hooks):
    """Watches the outputs of named modules."""

    def __init__(self, module: nn.Module, names: Sequence[str], pool: bool) -> None:
        super().__init__()
        self.module, self.names, self.pool = module, names, pool
        self.latest: dict[str, Tensor] = {}

    def attach(self) -> None:
        """Begin to watch."""
        modules = dict(self.module.named_modules())
        for name in self.names:
            if name not in modules:
                problem, fix = unknown("layer", name, filter(None, modules))
                raise StageError(problem, where="distill.features.layers", fix=_short(fix))
            self.handles.append(modules[name].register_forward_hook(partial(self._see, name)))

    def _see(self, name: str, module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        result = output[0] if isinstance(output, (tuple, list)) and output else output
        if not isinstance(result, Tensor) or result.ndim < 2 or not result.is_floating_point():
            raise StageError(
                f"layer {name!r} gives no features (batch, …, width)",
                where="distill.features.layers",
                fix="name a layer whose output is a tensor of floating-point numbers",
            )
        self.latest[name] = _places(result, result.ndim == 4, self.pool)


def _places(tensor: Tensor, channels_first: bool, pool: bool) -> Tensor:
    """Features as ``(batch, width)``, averaged over tokens or pixels, or as ``(batch, places, width)``."""
    if not pool:
        places = tensor.flatten(2).mT if channels_first else tensor.flatten(1, -2) if tensor.ndim > 2 else tensor
        return places
    spare = range(2, tensor.ndim) if channels_first else range(1, tensor.ndim - 1)
    return tensor.mean(dim=tuple(spare)) if len(spare) else tensor


def _short(fix: str) -> str:
    """Advice on a name without the list of all names: networks have hundreds of modules."""
    near, _, known = fix.partition("known:")
    return near.strip() or f"a path of named_modules(), such as {', '.join(known.split(',')[:8]).strip()}"


class Maps(_Hooks):
    """Watches attention maps: ``scaled_dot_product_attention``, softmax over four dimensions, ``MultiheadAttention``.

    Every call is credited to the innermost module that is running.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.running: list[str] = []
        self.latest: dict[str, Tensor] = {}

    def attach(self) -> None:
        """Begin to watch."""
        for name, module in self.module.named_modules():
            enter, leave = partial(self._enter, name), self._leave
            self.handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]

    def _enter(self, name: str, *call: Any) -> None:
        self.running.append(name)

    def _leave(self, *call: Any) -> None:
        self.running.pop()

    def recording(self) -> AbstractContextManager[Any]:
        """Keep the maps of the calls within the block, and only those."""
        self.running.clear()
        self.latest.clear()
        return _Attention(self._note)

    def _note(self, weights: Tensor) -> None:
        name = self.running[-1] if self.running else LAST
        self.latest.pop(name, None)  # so that the order is that of the latest calls
        self.latest[name] = weights

    def of(self, name: str) -> Tensor:
        """The latest map of one module, or the last of all.

        Raises:
            StageError: it gave none.
        """
        if not self.latest:
            raise StageError(
                "the network gives no attention maps",
                where="distill.attention",
                fix="set attention: 0; seen are scaled_dot_product_attention, nn.MultiheadAttention and a softmax over "
                "the last of four dimensions",
            )
        if name == LAST:
            return next(reversed(self.latest.values()))
        if name not in self.latest:
            problem, fix = unknown("attention", name, self.latest)
            raise StageError(f"{problem}: it gives no attention maps", where="distill.attention.layers", fix=fix)
        return self.latest[name]


class _Attention(TorchFunctionMode):
    """Hears of every attention map that PyTorch computes while it is active."""

    def __init__(self, heard: Callable[[Tensor], None]) -> None:
        super().__init__()
        self.heard = heard

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if function is F.multi_head_attention_forward:
            kwargs |= {"need_weights": True, "average_attn_weights": True}
        result = function(*args, **kwargs)
        weights = _weights(function, args, kwargs, result)
        if weights is not None:
            self.heard(weights)
        return result


def _weights(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> Tensor | None:
    """The map ``(batch, queries, keys)`` that a call computed, None where it was something else."""
    if function is F.multi_head_attention_forward:
        weights: Tensor = result[1]
        return weights
    if function is F.scaled_dot_product_attention:
        return _dot_product(*args, **kwargs).mean(dim=1)
    if function in (F.softmax, torch.softmax, Tensor.softmax):
        axis = kwargs.get("dim", args[1] if len(args) > 1 else None)
        return result.mean(dim=1) if result.ndim == 4 and axis in (-1, 3) else None
    return None


def _dot_product(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The weights within ``scaled_dot_product_attention``, by the formula of its documentation."""
    query, key = (tensor[:, None] if tensor.ndim == 3 else tensor for tensor in (query, key))
    if enable_gqa:
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, float("-inf"))
    elif attn_mask is not None:
        scores = scores + attn_mask
    return scores.softmax(dim=-1)
