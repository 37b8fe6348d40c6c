"""``quantize``: post-training static INT8 by PyTorch's export quantization (PT2E)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.fx import GraphModule

from mmedge.errors import StageError
from mmedge.stages.base import Context, Network, Saved, Stage, StageConfig, as_tensors
from mmedge.stages.trace import graph_of, quiet
from mmedge.task import Task


class Calibration(StageConfig):
    """How ranges of activations are found; only the calibration split is ever used.

    Attributes:
        samples: how many calibration samples are run.
        observer: ``histogram`` clips outliers where that lowers the squared error, ``minmax`` keeps the whole range.
    """

    samples: int = Field(256, ge=1)
    observer: Literal["histogram", "minmax"] = "histogram"


class Quantize(Stage):
    """Float in, Q/DQ out.

    What is kept is the state of the prepared graph: weights and observers. Restoring traces the float network again,
    places the same quantizers and loads that state, so no graph, code or pickle is stored.
    """

    name = "quantize"
    gives = "qdq"

    class Config(StageConfig):
        """Settings of ``quantize``.

        Attributes:
            dtype: ``int8``; symmetric, per tensor for activations, per output channel for weights.
            calibration: how ranges are found.
            keep_float: patterns of layer names that stay floating point (``head``, ``audio.*``).
        """

        dtype: Literal["int8"] = "int8"
        calibration: Calibration = Calibration()
        keep_float: tuple[str, ...] = ()

    def run(self, network: Network, context: Context) -> Saved:
        """Calibrate; keep the prepared graph's state and which layers were quantized or skipped."""
        prepared, placement = self._prepare(network, context.task)
        calibrate(prepared, self.config.calibration, context)
        tensors = {name: tensor.detach().clone().contiguous() for name, tensor in prepared.state_dict().items()}
        check_ranges(tensors)
        edits = {
            "quantized": placement.quantized,
            "skipped": {skipped.layer: skipped.reason for skipped in placement.skipped},
        }
        return Saved(tensors, edits)

    def restore(self, network: Network, saved: Saved, context: Context) -> Network:
        """The Q/DQ graph with the ranges that calibration found."""
        with quiet():
            from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e

        prepared, _ = self._prepare(network, context.task)
        with quiet():
            prepared.load_state_dict(dict(saved.tensors), strict=True)
            converted = convert_pt2e(prepared)
        return Network(converted, "qdq")

    def _prepare(self, network: Network, task: Task) -> tuple[GraphModule, Any]:
        with quiet():  # torchao reports accelerator libraries that a CPU does not need
            from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e

            from mmedge.stages.placement import Int8Placement

        placement = Int8Placement(self.config.calibration.observer, self.config.keep_float)
        with quiet():
            prepared = prepare_pt2e(graph_of(network.module, task), placement)
        if not placement.quantized:
            reasons = sorted({skipped.reason for skipped in placement.skipped}) or ["no convolution or linear layer"]
            raise StageError(
                f"nothing to quantize: {'; '.join(reasons)}",
                where=f"task {task.name}: quantize",
                fix="check keep_float, or leave the stage out",
            )
        return prepared, placement


def calibrate(prepared: GraphModule, settings: Calibration, context: Context) -> None:
    """Run calibration samples through the observers.

    Raises:
        StageError: fewer samples than asked for.
    """
    seen = 0
    with torch.no_grad(), quiet(), context.progress.bar("calibrating", settings.samples) as bar:
        for batch in context.task.stream("calibration"):
            count = min(len(batch), settings.samples - seen)
            prepared(**as_tensors({name: array[:count] for name, array in batch.inputs.items()}))
            seen += count
            bar.advance(count)
            if seen >= settings.samples:
                return
    raise StageError(
        f"the calibration split has {seen} samples, the recipe asks for {settings.samples}",
        where=f"task {context.task.name}: quantize.calibration.samples",
        fix=f"set calibration.samples to {seen} or less, or give the task more calibration data",
    )


def check_ranges(state: Mapping[str, Tensor]) -> None:
    """Refuse observers that saw nothing or something that is not a number.

    Raises:
        StageError: names the observers.
    """
    bad = [
        name for name, tensor in state.items() if name.endswith(("min_val", "max_val")) and not tensor.isfinite().all()
    ]
    if bad:
        raise StageError(
            f"calibration found no finite range at {len(bad)} places, first {bad[0]}",
            where="quantize",
            fix="look for NaN or overflow in the network's activations on the calibration split",
        )
