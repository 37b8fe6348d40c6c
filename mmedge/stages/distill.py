"""``distill``: a student learns from the trained model what labels do not tell."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field
from torch import nn
from torch.fx import GraphModule

from mmedge.errors import StageError
from mmedge.stages.base import Context, Network, Saved, Stage
from mmedge.stages.distillation.student import blocks_to_keep, check_fit, of_task, shallow
from mmedge.stages.training import Training, distil


class Distill(Stage):
    """Train the current network, or the task's own student, to answer as the teacher does.

    After ``quantize`` this is quantization-aware training: the network rounds while it learns.
    """

    name = "distill"
    accepts = frozenset({"float", "qdq"})
    version = 3

    class Config(Training):
        """Settings of ``distill``.

        Attributes:
            student: ``current`` goes on with the network as it is at this point (after ``prune``: the pruned teacher);
                ``shallow`` with that network less some of its repeated blocks; ``task`` starts from the task's
                ``student()``; ``auto`` does that where the task has one, else ``current``.
            depth: of ``shallow``, the fraction of repeated blocks that stays.
        """

        student: Literal["auto", "current", "shallow", "task"] = "auto"
        depth: float = Field(0.5, gt=0, lt=1)

    def check(self, network: Network, context: Context) -> None:
        """Student and teacher fit together."""
        kept = blocks_to_keep(network, self.config.depth, context) if self.config.student == "shallow" else {}
        check_fit(self._student(network, kept, context), self.config, context)

    def run(self, network: Network, context: Context) -> Saved:
        """Train a copy of the student and keep its weights."""
        if network.prepared is not None:
            return self._train_quantized(network, network.prepared, context)
        if network.form == "qdq":
            raise StageError(
                "the network is quantized for x86, a form that cannot be trained",
                where=f"task {context.task.name}: distill",
                fix="put this stage before quantize, or leave quantize's placement out",
            )
        kept = blocks_to_keep(network, self.config.depth, context) if self.config.student == "shallow" else {}
        student = self._student(network, kept, context)
        distil(student, self.config, context, "distill")
        edits: dict[str, Any] = {"depth": kept} if kept else {}
        return Saved({name: tensor.contiguous() for name, tensor in student.state_dict().items()}, edits)

    def restore(self, network: Network, saved: Saved, context: Context) -> Network:
        """The student with the weights it ended with."""
        if network.prepared is not None:
            from mmedge.stages.quantization.prepared import converted, with_state

            prepared = with_state(network.prepared, saved.tensors)
            return Network(converted(prepared), "qdq", prepared)
        student = self._student(network, saved.edits.get("depth", {}), context)
        student.load_state_dict(dict(saved.tensors), strict=True)
        return Network(student.eval(), network.form)

    def _train_quantized(self, network: Network, prepared: GraphModule, context: Context) -> Saved:
        """Quantization-aware training: the student rounds as its engine will, and learns to live with it."""
        from mmedge.stages.quantization.prepared import state_of
        from mmedge.stages.quantization.simulate import simulated, trained

        if self.config.student in ("task", "shallow"):
            raise StageError(
                f"student: {self.config.student}, but the network is quantized already",
                where=f"task {context.task.name}: distill",
                fix="put this stage before quantize, or use student: current",
            )
        graph = simulated(prepared, follow_weights=True)
        distil(graph, self.config, context, "distill (quantization-aware)")
        return Saved(state_of(trained(prepared, graph)))

    def _student(self, network: Network, depth: Mapping[str, Sequence[int]], context: Context) -> nn.Module:
        """Where the student begins; ``depth`` are the blocks that a shallow one keeps."""
        choice = self.config.student
        if choice == "auto":
            choice = "current" if context.task.student is None else "task"
        if choice == "task":
            return of_task(context)
        return shallow(network, depth) if choice == "shallow" else copy.deepcopy(network.module)
