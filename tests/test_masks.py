"""Masks of numbers that leave a query nothing to look at: zeros as in PyTorch, at no cost where there are none."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import reader_task
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmedge.lower.export import onnx_of, write
from mmedge.lower.shape import shape_for
from mmedge.stages.base import Network, as_tensors, outputs_of
from mmedge.stages.trace import graph_of, program_of
from mmedge.targets.base import Target
from mmedge.targets.onnxruntime import OnnxRuntime
from mmedge.targets.openvino import OpenVino
from mmedge.task import Batch, Metric, Task, accuracy
from mmedge.tensors import Array, TensorSpec

TOKENS, WIDTH = 5, 16
aten = torch.ops.aten


class Masked(nn.Module):
    """Attention of two heads with a mask made in one of several ways; ``seen`` is 0 where a token is padding."""

    def __init__(self, made: str) -> None:
        super().__init__()
        self.made = made
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.bias = nn.Parameter(torch.randn(1, TOKENS, TOKENS))
        self.register_buffer("causal", torch.full((TOKENS, TOKENS), -math.inf).triu(1))
        blind = self.causal.clone()
        blind[0] = -math.inf
        self.register_buffer("blind", blind, persistent=False)

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (2, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        mask = getattr(self, f"_{self.made}")(seen[:, None, None] != 0)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.o(mixed.transpose(1, 2).view(x.shape)) + seen[..., None]  # a view, as PyTorch lays out its result

    def _where(self, seen: Tensor) -> Tensor:
        return torch.where(seen, 0.0, -math.inf)

    def _logarithm(self, seen: Tensor) -> Tensor:
        return seen.float().log()

    def _beside_the_causal_one(self, seen: Tensor) -> Tensor:
        return self.causal + torch.zeros(seen.shape).masked_fill_(~seen, -math.inf)

    def _written_through_a_view(self, seen: Tensor) -> Tensor:
        mask = torch.zeros(seen.shape)
        mask[:, 0].masked_fill_(~seen[:, 0], -math.inf)
        return mask

    def _blind_for_all(self, seen: Tensor) -> Tensor:
        return self.blind

    def _finite(self, seen: Tensor) -> Tensor:
        return torch.where(seen, 0.0, torch.finfo(torch.float32).min)

    def _learned(self, seen: Tensor) -> Tensor:
        return self.bias + torch.where(seen, 0.0, -100.0)

    def _kept(self, seen: Tensor) -> Tensor:
        return self.causal.expand(seen.shape[0], 1, -1, -1)

    def _computed(self, seen: Tensor) -> Tensor:
        return torch.full((TOKENS, TOKENS), -math.inf).triu_(1)


class Decoder(nn.Module):
    """PyTorch's own, two layers; what it reads may be padding as a whole."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.TransformerDecoderLayer(WIDTH, 2, 32, batch_first=True) for _ in range(2))

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        y = x.flip(1)
        for layer in self.layers:
            y = layer(y, x, memory_key_padding_mask=seen == 0)
        return y


def task_of(model: nn.Module) -> Task:
    def batches(split: str, seed: int):
        rng = np.random.default_rng(len(split))
        seen = rng.integers(0, 2, (32, TOKENS))
        seen[0] = 0
        yield Batch({"x": rng.standard_normal((32, TOKENS, WIDTH), dtype=np.float32), "seen": seen}, np.zeros(32))

    specs = (
        TensorSpec("x", "float32", ("batch", TOKENS, WIDTH), "x"),
        TensorSpec("seen", "int64", ("batch", TOKENS), "x"),
    )
    torch.manual_seed(0)
    loss, metric = (lambda outputs, y: outputs["y"].sum()), Metric("accuracy", accuracy)
    return Task("masked", model.eval(), specs, ("y",), batches, loss, metric)


def in_pytorch(module: nn.Module, task: Task) -> Array:
    with torch.no_grad():
        return outputs_of(module, as_tensors(task.example().inputs), task.outputs)["y"].numpy()


def answers(target: Target, portable: Path, task: Task) -> Array:
    folder, model = portable.with_name(target.name), portable.with_name(f"{target.name}.onnx")
    folder.mkdir()
    shape_for(portable, target.lowering, model)
    target.build(model, folder)
    with target.runner(folder, 1) as run:
        return run(task.example().inputs)["y"]


def guards(graph: torch.fx.Graph) -> int:
    return sum(node.target is aten.all.dim for node in graph.nodes)


BLIND = ["where", "logarithm", "beside_the_causal_one", "written_through_a_view", "blind_for_all"]


@pytest.mark.parametrize("make", [*(partial(Masked, made) for made in BLIND), Decoder], ids=[*BLIND, "decoder"])
def test_a_query_that_sees_nothing_gets_zeros_as_in_pytorch(make, tmp_path) -> None:
    task = task_of(make())
    wanted = in_pytorch(task.model, task)
    assert np.isfinite(wanted).all()
    write(onnx_of(Network(task.model), task), tmp_path / "model.onnx")
    for target in (OnnxRuntime(), OpenVino()):
        np.testing.assert_allclose(answers(target, tmp_path / "model.onnx", task), wanted, atol=1e-4)


@pytest.mark.parametrize("make", [partial(Masked, "where"), Decoder], ids=["where", "decoder"])
def test_it_does_in_int8_too(make, tmp_path) -> None:
    task = task_of(make())
    wanted = in_pytorch(task.model, task)
    network, portable = reader_task.quantized(task, tmp_path / "portable.onnx")
    for found in (in_pytorch(network.module, task), *(answers(t, portable, task) for t in (OnnxRuntime(), OpenVino()))):
        assert np.abs(found - wanted).max() < 0.1 * np.abs(wanted).max()


@pytest.mark.parametrize("made", ["finite", "learned", "kept", "computed"])
def test_masks_that_leave_every_query_something_are_left_alone(made) -> None:
    task = task_of(Masked(made))
    assert guards(program_of(task.model, task).graph) == 0


def test_a_graph_that_is_traced_again_is_guarded_once_and_layers_share_what_they_can() -> None:
    task = task_of(Decoder())
    graph = graph_of(task.model, task)
    assert guards(graph.graph) == guards(program_of(graph, task).graph) == 2
    np.testing.assert_allclose(in_pytorch(graph, task), in_pytorch(task.model, task), atol=1e-5)
