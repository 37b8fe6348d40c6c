"""``distill``: a student learns from the trained model what labels do not tell."""

from __future__ import annotations

import copy
from typing import Literal

import torch
from torch import nn
from torch.fx import GraphModule

from mmedge.errors import StageError
from mmedge.stages.base import Context, Network, Saved, Stage, as_tensors, outputs_of
from mmedge.stages.training import Training, distil


class Distill(Stage):
    """Train the current network, or the task's own student, to answer as the teacher does.

    After ``quantize`` this is quantization-aware training: the network rounds while it learns.
    """

    name = "distill"
    accepts = frozenset({"float", "qdq"})
    version = 2

    class Config(Training):
        """Settings of ``distill``.

        Attributes:
            student: ``current`` goes on with the network as it is at this point (after ``prune``: the pruned teacher);
                ``task`` starts from the task's ``student()``; ``auto`` does that where the task has one.
        """

        student: Literal["auto", "current", "task"] = "auto"

    def run(self, network: Network, context: Context) -> Saved:
        """Train a copy of the student and keep its weights."""
        if network.prepared is not None:
            return self._train_quantized(network, network.prepared, context)
        student = self._student(network, context)
        distil(student, self.config, context, "distill")
        return Saved({name: tensor.contiguous() for name, tensor in student.state_dict().items()})

    def restore(self, network: Network, saved: Saved, context: Context) -> Network:
        """The student with the weights it ended with."""
        if network.prepared is not None:
            from mmedge.stages.quantization.prepared import converted, with_state

            prepared = with_state(network.prepared, saved.tensors)
            return Network(converted(prepared), "qdq", prepared)
        student = self._student(network, context)
        student.load_state_dict(dict(saved.tensors), strict=True)
        return Network(student.eval(), network.form)

    def _train_quantized(self, network: Network, prepared: GraphModule, context: Context) -> Saved:
        """Quantization-aware training: the student rounds as its engine will, and learns to live with it."""
        from mmedge.stages.quantization.prepared import state_of
        from mmedge.stages.quantization.simulate import simulated, trained

        if self.config.student == "task":
            raise StageError(
                "student: task, but the network is quantized already",
                where=f"task {context.task.name}: distill",
                fix="put this stage before quantize, or use student: current",
            )
        graph = simulated(prepared, follow_weights=True)
        distil(graph, self.config, context, "distill (quantization-aware)")
        return Saved(state_of(trained(prepared, graph)))

    def _student(self, network: Network, context: Context) -> nn.Module:
        task = context.task
        if self.config.student == "current" or (self.config.student == "auto" and task.student is None):
            return copy.deepcopy(network.module)
        if task.student is None:
            raise StageError(
                "student: task, but the task has no student()",
                where=f"task {task.name}",
                fix="give Task(student=...) a function that builds the smaller module, or use student: current",
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(context.seed)
            student = task.student().eval()
        example = as_tensors(task.example().inputs)
        with torch.no_grad():
            ours, theirs = (outputs_of(net, example, task.outputs) for net in (student, context.teacher))
        for name in task.outputs:
            if ours[name].shape != theirs[name].shape:
                shapes = f"{tuple(ours[name].shape)} and the teacher's {tuple(theirs[name].shape)}"
                raise StageError(f"the student's output {name} has shape {shapes}", where=f"task {task.name}: student")
        return student
