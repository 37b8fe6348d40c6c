"""Which module a trace failed at."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from mmedge.stages.structure import SlowAttention


def suspect(module: nn.Module, inputs: Mapping[str, Tensor], error: Exception) -> tuple[str, str]:
    """The path of the module at which gradients are lost or an error arises, and what happened there.

    Args:
        module: the network; it is run once more.
        inputs: the example.
        error: what the trace raised.
    """
    open_modules: list[str] = []
    lost: list[str] = []
    paths = {child: path for path, child in module.named_modules()}

    def enter(child: nn.Module, *_: Any) -> None:
        open_modules.append(paths[child])

    def leave(child: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        open_modules.pop()
        if _has_gradient([args, kwargs]) and not _has_gradient(output) and _floats(output):
            lost.append(paths[child])

    hooks = [child.register_forward_pre_hook(enter) for child in paths]
    hooks += [child.register_forward_hook(leave, with_kwargs=True) for child in paths]
    tracked = {
        name: value.clone().requires_grad_() if value.is_floating_point() else value for name, value in inputs.items()
    }
    with suppress(Exception), torch.enable_grad(), SlowAttention():
        module(**tracked)
    for hook in hooks:
        hook.remove()
    if open_modules:  # it raised there
        return open_modules[-1], _first_line(error)
    if lost:
        return lost[0], "no gradient comes out of it"
    return "", _first_line(error)


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [tensor for item in value for tensor in _tensors(item)]
    return [value] if isinstance(value, Tensor) else []


def _has_gradient(value: Any) -> bool:
    return any(tensor.requires_grad for tensor in _tensors(value))


def _floats(value: Any) -> bool:
    return any(tensor.is_floating_point() for tensor in _tensors(value))


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"
