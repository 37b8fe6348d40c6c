"""What an engine is compared with some of whose INT8 layers went back to floating point."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import reader_task
import torch
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn
from torch.nn import functional as F

from mmedge.lower.export import onnx_of, write
from mmedge.lower.shape import shape_for
from mmedge.pipeline.line import release_of
from mmedge.profile.accuracy import parity
from mmedge.stages.base import Network, as_tensors, outputs_of
from mmedge.stages.quantization.released import released
from mmedge.stages.quantize import Quantize
from mmedge.targets.base import Lowering
from mmedge.task import Batch, Metric, Task, accuracy
from mmedge.tensors import TensorSpec

INPUTS = {"image": (3, 8, 8), "odometry": (6,)}


class Rover(nn.Module):
    """Features of an image beside odometry: of the scale that they share in INT8, the image's are all zero."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.skip, self.up = (
            nn.Conv2d(3, 8, 3, padding=1),
            nn.Conv2d(8, 8, 1),
            nn.ConvTranspose2d(8, 8, 2, 2),
        )
        self.join, self.head = nn.Linear(14, 16), nn.Linear(16, 3)
        self.join.weight.data[:, 8:] /= 500

    def forward(self, image: Tensor, odometry: Tensor) -> Tensor:
        x = F.relu(self.down(image))
        x = F.relu(self.up(F.max_pool2d(F.relu(x + self.skip(x)), 2)))
        return self.head(F.relu(self.join(torch.cat([F.adaptive_avg_pool2d(x, 1).flatten(1), 500 * odometry], 1))))


class Eyes(nn.Module):
    """One layer sees both halves of an image, another with the same weight the odometry."""

    def __init__(self) -> None:
        super().__init__()
        self.see, self.feel, self.head = nn.Linear(6, 16), nn.Linear(6, 16), nn.Linear(48, 3)
        self.feel.weight = self.see.weight

    def forward(self, image: Tensor, odometry: Tensor) -> Tensor:
        pixels = image.flatten(1)
        found = [self.see(pixels[:, :6]), self.see(pixels[:, 6:12]), self.feel(odometry)]
        return self.head(F.relu(torch.cat(found, 1)))


class Plain(nn.Module):
    """Attention whose values are what queries and keys are made of, not projected."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.feel, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, image: Tensor, odometry: Tensor) -> Tensor:
        x = 4 * image.flatten(1, 2)
        mixed = F.scaled_dot_product_attention(self.q(x), self.k(x), x)
        return self.head(mixed[:, 0] + self.feel(odometry))


def batches(split: str, seed: int) -> Iterator[Batch]:
    rng = np.random.default_rng(len(split))
    inputs = {name: rng.standard_normal((32, *shape), dtype=np.float32) for name, shape in INPUTS.items()}
    yield Batch(inputs, np.zeros(32, np.int64))


def task_of(make: type[nn.Module]) -> Task:
    torch.manual_seed(0)
    specs = tuple(TensorSpec(name, "float32", ("batch", *shape), name) for name, shape in INPUTS.items())
    metric = Metric("accuracy", accuracy)
    return Task("robot", make().eval(), specs, ("speed",), batches, lambda o, y: o["speed"].sum(), metric)


@pytest.mark.parametrize(
    ("task", "released_layers"),
    [
        (partial(task_of, Rover), [(), ("join",), ("skip", "head"), ("up", "join", "head")]),
        (partial(task_of, Eyes), [(), ("see",), ("feel", "head"), ("see", "feel", "head")]),
        (partial(task_of, Plain), [(), ("model",), ("q", "model")]),
        (reader_task.task, [(), ("patch", "head"), ("up", "o", "model")]),
    ],
)
def test_pytorch_rounds_where_the_graph_of_an_engine_does(
    task: Callable[[], Task], released_layers: list[tuple[str, ...]], context_of: Callable, tmp_path: Path
) -> None:
    """Whether or not what convolutions give stays rounded; weights and biases go back as they were before repairs."""
    given = task()
    config = {"calibration": {"samples": 32}, "rounding": "compensated", "bias_correction": True}
    stage, context, original = (
        Quantize(Quantize.Config(**config, sensitivity_samples=0)),
        context_of(given),
        given.model,
    )
    network = stage.restore(Network(original), stage.run(Network(original), context), context)
    write(onnx_of(network, given), tmp_path / "portable.onnx")
    batch = given.example()
    whole = answers(network.module, given, batch)
    for layers, outputs in itertools.product(released_layers, ("all", "sums")):
        lowering = Lowering(quantized_outputs=outputs, integer_attention=True)
        shape_for(tmp_path / "portable.onnx", lowering, tmp_path / "model.onnx", release_of(network, layers))
        graph = ReferenceEvaluator(str(tmp_path / "model.onnx"))
        found = dict(zip(given.outputs, graph.run(None, dict(batch.inputs)), strict=True))
        module = released(network.prepared, network.exact, layers, keep_convolutions=outputs == "all")
        assert parity(answers(module, given, batch), found)["cosine"] > 0.999999
        if layers:
            assert parity(whole, found)["cosine"] < 0.99999


def answers(module: nn.Module, task: Task, batch: Batch) -> dict[str, np.ndarray]:
    with torch.no_grad():
        found = outputs_of(module, as_tensors(batch.inputs), task.outputs)
    return {name: tensor.numpy() for name, tensor in found.items()}
