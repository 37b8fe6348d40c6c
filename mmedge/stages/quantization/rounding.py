"""Error-compensated rounding: choose the integers of a weight so that the errors of its columns cancel.

Frantar et al. 2023, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", section 3: the
columns of a weight are rounded one after the other, and what rounding a column changes in the layer's output is made up
for by the columns still to come. That needs the second moment ``H = E[x x^T]`` of what the layer reads, and no
training.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.nn import functional as F

from mmedge.errors import StageError
from mmedge.stages.quantization.operators import TRANSPOSED
from mmedge.stages.quantization.prepared import Layer, Range, layers_of, tensor_at
from mmedge.stages.quantization.simulate import FakeQuantize, simulated
from mmedge.stages.quantization.smoothing import uses_of

WIDEST = 4096  # columns; the second moment has their square
MEMORY = 2**28  # bytes of second moments held at a time
DAMPING = 0.01  # of the mean of H's diagonal, added to it: the paper's
LEAST = 1e-60  # of that mean; values are seldom smaller than 1e-30, unless they are all zero
POSITIONS = 64  # rows taken from one sample: neighbouring positions tell little that is new
HELD_OUT = 4  # every fourth sample judges
GAIN = 0.02  # of the error, the least that is worth it: less may be the luck of the held-out samples


@dataclass(frozen=True)
class Compensated:
    """What became of one layer.

    Attributes:
        layer: its name.
        reason: why its weight was left as it is; empty where the compensated integers were kept.
        nearest: squared error of its output on held-out samples with weights rounded to nearest, relative to the
            squared output; NaN where nothing was tried.
        compensated: the same with the compensated integers.
    """

    layer: str
    reason: str
    nearest: float = float("nan")
    compensated: float = float("nan")


def compensate(prepared: GraphModule, inputs: Iterable[Mapping[str, Tensor]]) -> list[Compensated]:
    """Round the weights of linear and ungrouped convolution layers with compensation, in running order.

    A weight becomes ``scale * integer`` with the scale of its range, so that rounding it again gives the same integers.
    A layer keeps them only if they do better (by 2 %) than rounding to nearest on samples that were held out. Layers
    are taken in waves of bounded memory; a wave sees what the layers before it have become.

    Args:
        prepared: calibrated, with measured weights that are its own, not shared with another graph: they are changed
            in place. Do not measure them again afterwards: the scale is part of the choice.
        inputs: samples by input name, as many at a time as one forward call may take; walked once per wave.

    Returns:
        One entry per layer, in running order.

    Raises:
        StageError: ranges of weights were not measured, or ``inputs`` can be walked only once.
    """
    if iter(inputs) is inputs:
        raise StageError("the samples can be walked only once", where="rounding", fix="pass a list of batches")
    layers, uses = layers_of(prepared), uses_of(prepared)
    reasons = {layer.node: _reason_to_skip(prepared, layer, len(uses[_weight(prepared, layer).data_ptr()]))
               for layer in layers}  # fmt: skip
    result = {layer.node: Compensated(layer.name, reasons[layer.node]) for layer in layers}
    for wave in _waves(prepared, [layer for layer in layers if not reasons[layer.node]]):
        moments = _moments(prepared, wave, inputs)
        for layer in wave:
            result[layer.node] = _compensate_layer(prepared, layer, moments[_key(prepared, layer)])
    return list(result.values())


def _reason_to_skip(prepared: GraphModule, layer: Layer, uses: int) -> str:
    weight = _weight(prepared, layer)
    if prepared.get_submodule(layer.weight_range).bound.numel() != weight.shape[layer.channel_axis]:  # type: ignore[operator]
        raise StageError("its weight was not measured", where=layer.name, fix="call measure_weights first")
    if layer.node.target in TRANSPOSED:
        return "transposed convolution"
    if layer.is_convolution and _argument(layer, 6, 1) != 1:
        return "grouped convolution: few columns to share an error among"
    if weight[0].numel() > WIDEST:
        return f"{weight[0].numel()} columns, more than {WIDEST}"
    if uses > 1:
        return "its weight is used more than once"
    return ""


def _weight(prepared: GraphModule, layer: Layer) -> Tensor:
    return tensor_at(prepared, layer.weight_path).detach()


def _argument(layer: Layer, index: int, default: Any) -> Any:
    return layer.node.args[index] if len(layer.node.args) > index else default


def _key(prepared: GraphModule, layer: Layer) -> str:
    """Layers that see the same rows share one second moment."""
    geometry = (tuple(_weight(prepared, layer).shape[2:]), layer.node.args[3:]) if layer.is_convolution else ()
    return f"{layer.input_range} {geometry}"


def _waves(prepared: GraphModule, layers: list[Layer]) -> Iterator[list[Layer]]:
    """Runs of layers whose second moments fit into memory together."""
    wave: list[Layer] = []
    held: dict[str, int] = {}
    for layer in layers:
        size = 2 * 4 * _weight(prepared, layer)[0].numel() ** 2
        if wave and _key(prepared, layer) not in held and sum(held.values()) + size > MEMORY:
            yield wave
            wave, held = [], {}
        wave.append(layer)
        held[_key(prepared, layer)] = size
    if wave:
        yield wave


@dataclass
class _Moment:
    """Sums of ``x x^T``, ``(columns, columns)`` float32, over the samples that choose and those that judge."""

    choose: Tensor
    judge: Tensor
    samples: int = 0
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    def add(self, rows: Tensor) -> None:
        """``rows``: ``(samples, positions, columns)``."""
        held = (torch.arange(len(rows)) + self.samples) % HELD_OUT == HELD_OUT - 1
        for moment, part in ((self.choose, rows[~held]), (self.judge, rows[held])):
            flat = part.flatten(0, 1)
            moment.addmm_(flat.T, flat)
        self.samples += len(rows)


def _moments(prepared: GraphModule, layers: list[Layer], inputs: Iterable[Mapping[str, Tensor]]) -> dict[str, _Moment]:
    graph = simulated(prepared)
    found: dict[str, _Moment] = {}
    for layer in {_key(prepared, layer): layer for layer in layers}.values():
        columns = _weight(prepared, layer)[0].numel()
        moment = found[_key(prepared, layer)] = _Moment(torch.zeros(columns, columns), torch.zeros(columns, columns))
        kernel = _weight(prepared, layer).shape[2:]

        def see(module: object, arguments: object, tensor: Tensor, layer=layer, moment=moment, kernel=kernel) -> None:  # type: ignore[no-untyped-def]
            moment.add(_rows(layer, tensor, kernel, moment.generator))

        graph.get_submodule(layer.input_range).register_forward_hook(see)
    with torch.no_grad():
        for batch in inputs:
            graph(**batch)
    return found


def _rows(layer: Layer, tensor: Tensor, kernel: torch.Size, generator: torch.Generator) -> Tensor:
    """What the columns of the weight are multiplied with: ``(samples, positions, columns)``, positions drawn."""
    if not layer.is_convolution:
        rows = tensor.reshape(len(tensor), -1, tensor.shape[-1])
        return rows[:, _draw(rows.shape[1], generator)]
    windows = _windows(layer, tensor, kernel)
    count = windows.shape[2 : 2 + len(kernel)]
    drawn: tuple[Any, ...] = torch.unravel_index(_draw(count.numel(), generator), count)
    picked = windows[(slice(None), slice(None), *drawn)]  # (samples, channels, positions, *kernel)
    return picked.transpose(1, 2).flatten(2)


def _draw(count: int, generator: torch.Generator) -> Tensor:
    return torch.randperm(count, generator=generator)[:POSITIONS]


def _windows(layer: Layer, tensor: Tensor, kernel: torch.Size) -> Tensor:
    """A view of ``(samples, channels, *positions, *kernel)`` on what a convolution reads."""
    spatial = len(kernel)
    stride, padding, dilation = (
        _each(_argument(layer, index, default), spatial) for index, default in ((3, 1), (4, 0), (5, 1))
    )
    tensor = F.pad(tensor, [side for pad in reversed(padding) for side in (pad, pad)])
    for axis in range(spatial):
        reach = (kernel[axis] - 1) * dilation[axis] + 1
        tensor = tensor.unfold(2 + axis, reach, stride[axis])[..., :: dilation[axis]]
    return tensor


def _each(value: int | list[int], count: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * count if len(values) == 1 else values


def _compensate_layer(prepared: GraphModule, layer: Layer, moment: _Moment) -> Compensated:
    weight = _weight(prepared, layer)
    flat = weight.flatten(1).double()
    kept: Range = prepared.get_submodule(layer.weight_range)  # type: ignore[assignment]
    scale = kept.scale[:, None]
    judge = moment.judge.double()
    output = _error(flat, judge)
    if not output > 0:
        return Compensated(layer.name, "what it reads is zero on the held-out samples")
    nearest = FakeQuantize(kept)(weight).flatten(1)
    integers = compensated_integers(flat, scale.double(), moment.choose.double(), kept.quant_max)
    errors = [_error(flat - found, judge) / output for found in (nearest, scale * integers)]
    if errors[1] > (1 - GAIN) * errors[0]:
        return Compensated(layer.name, "rounding to nearest does as well on held-out samples", *errors)
    weight.copy_((scale * integers.float()).reshape(weight.shape))
    return Compensated(layer.name, "", *errors)


def _error(weight: Tensor, moment: Tensor) -> float:
    """The sum of squares of what a weight makes of all rows that ``moment`` sums up."""
    return float((weight @ moment * weight).sum())


def compensated_integers(weight: Tensor, scale: Tensor, moment: Tensor, limit: int) -> Tensor:
    """Algorithm 1 of the paper, with the columns that matter most rounded first.

    Args:
        weight: ``(channels, columns)`` float64.
        scale: ``(channels, 1)`` float64.
        moment: ``(columns, columns)`` float64, the sum or mean of ``x x^T``.
        limit: the largest integer; the smallest is its negative.

    Returns:
        Integers as float64, ``(channels, columns)``.
    """
    order = moment.diagonal().argsort(descending=True, stable=True)
    upper = _upper(moment[order][:, order])
    rest = weight[:, order] / scale
    integers = torch.empty_like(rest)
    for start in range(0, rest.shape[1], 128):  # what lies behind a block is updated once per block: fast
        block = slice(start, min(start + 128, rest.shape[1]))
        errors = torch.empty_like(rest[:, block])
        for index in range(block.start, block.stop):
            integers[:, index] = rest[:, index].round().clamp(-limit, limit)
            error = (rest[:, index] - integers[:, index]) / upper[index, index]
            rest[:, index : block.stop] -= error[:, None] * upper[index, index : block.stop]
            errors[:, index - start] = error
        rest[:, block.stop :] -= errors @ upper[block, block.stop :]
    result = torch.empty_like(integers)
    result[:, order] = integers
    return result


def _upper(moment: Tensor) -> Tensor:
    """The upper Cholesky factor of the inverse of the damped second moment."""
    diagonal = moment.diagonal()
    damped = moment + torch.diag(torch.full_like(diagonal, DAMPING * float(diagonal.mean().clamp(min=LEAST))))
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
