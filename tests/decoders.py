"""The pieces of a decoder with a cache, lowered, built and run, for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmedge.lower.export import onnx_of, write
from mmedge.lower.shape import shape_for
from mmedge.lower.step import piece_of
from mmedge.stages.base import Network, as_tensors, outputs_of
from mmedge.targets.base import Target
from mmedge.targets.decoding import Decoding
from mmedge.task import Component, Task
from mmedge.tensors import Array


def exported(task: Task, folder: Path, network: Network | None = None) -> Path:
    write(onnx_of(network or Network(task.model), task), folder / "whole.onnx")
    return folder / "whole.onnx"


class Engines:
    """The pieces of a component, lowered and built for a target, and what they make."""

    def __init__(self, whole: Path, component: Component, target: Target, folder: Path) -> None:
        self.target, self.component, self.folder, self.coverage = target, component, folder, {}
        for piece in component.pieces:
            place = folder / piece.role
            place.mkdir(parents=True)
            model, cache = piece_of(whole, piece)
            write(model, place / "portable.onnx")
            shape_for(place / "portable.onnx", target.lowering, place / "lowered.onnx")
            (place / "engine").mkdir()
            self.coverage[piece.role] = target.build(place / "lowered.onnx", place / "engine").coverage
            self.cache = cache or getattr(self, "cache", None)

    def run(self, role: str, inputs: dict[str, Array]) -> dict[str, Array]:
        with self.target.runner(self.folder / role / "engine", 1) as run:
            return run(inputs)

    def memory(self, inputs: dict[str, Array]) -> dict[str, Array]:
        others = {name: inputs[name] for name in self.component.inputs if name != self.component.cache}
        return self.run("memory", others) if others else {}

    def steps(self, inputs: dict[str, Array]) -> Array:
        """``logits`` as if all tokens had been read at once."""
        tokens = inputs[self.component.cache]
        with self.target.runner(self.folder / "step" / "engine", 1) as run:
            decoding = Decoding(run, self.cache, self.memory(inputs), len(tokens))
            return np.stack([decoding.next(tokens[:, i])["logits"] for i in range(tokens.shape[1])], axis=1)


def expected(task: Task, inputs: dict[str, Array], module: Any = None) -> dict[str, Array]:
    with torch.no_grad():
        found = outputs_of(module or task.model, as_tensors(inputs), task.outputs)
    return {name: value.numpy() for name, value in found.items()}
