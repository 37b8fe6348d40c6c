"""Models that resist: what cannot be traced is named, and what is unusual is counted all the same."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from command import mmedge
from families import context_of, task_of
from torch import Tensor, nn
from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex
from torch.nn import functional as F

from mmedge.errors import StageError, TaskError
from mmedge.lower.export import archive_of, onnx_of, write
from mmedge.pipeline.check import check_model
from mmedge.stages.base import Network, as_tensors
from mmedge.stages.distill import Distill
from mmedge.stages.prune import Prune
from mmedge.stages.structure import count, macs_by_module
from mmedge.stages.trace import program_of


class Gate(nn.Module):
    """Control flow that depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        found = self.linear(x)
        return found if found.sum() > 0 else x


class Scaled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * float(x.mean())


class Net(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 16), inner)
        self.head = nn.Linear(16, 10)

    def forward(self, signal: Tensor) -> Tensor:
        return self.head(self.body(signal))


@pytest.mark.parametrize(
    ("inner", "named"),
    [(Gate(), "(Gate): test_hostile_models.py line "), (Scaled(), "`return x * float(x.mean())`")],
)
def test_the_module_that_cannot_be_traced_is_named(capfd: pytest.CaptureFixture[str], inner, named) -> None:
    task = task_of(Net(inner), {"signal": (4,)})
    with pytest.raises(StageError, match="cannot follow the model") as caught:
        program_of(task.model, task)
    assert str(caught.value).startswith("task random: body.1 (")
    assert named in str(caught.value)
    assert ", `return " in str(caught.value)
    assert "torch.where" in (caught.value.fix or "")
    assert capfd.readouterr() == ("", "")  # torch.export would print the graph


class Sides(nn.Module):
    """Both sides of a Siamese network in one pass, or one that has a rule for few samples."""

    def __init__(self, apart: str) -> None:
        super().__init__()
        self.apart = apart

    def forward(self, x: Tensor) -> Tensor:
        both, count = torch.cat([x, -x]), x.shape[0]
        if self.apart == "chunk":
            return both.chunk(2)[0]
        if self.apart == "branch":
            return x * 2 if count < 5 else x
        if self.apart == "loop":
            return torch.stack([row * 2 for row in x])
        return both.split([count, count])[0] if self.apart == "split" else both[:count] - both[count:]


@pytest.mark.parametrize(
    ("apart", "only"),
    [
        ("chunk", "only where (((-1) + 3*batch) // batch) == 2\n"),
        ("branch", "only where 2 <= batch and batch <= 4\n"),
        ("loop", "only for 2 samples, as it was traced\n"),
    ],
)
def test_code_that_is_not_for_every_size_of_the_batch_is_said_to_be_that(apart: str, only: str) -> None:
    task = task_of(Net(Sides(apart)), {"signal": (4,)})
    with pytest.raises(StageError, match="its code is not for every size of the batch") as caught:
        program_of(task.model, task)
    assert only in str(caught.value)
    assert "x.split([b, b])" in (caught.value.fix or "")


@pytest.mark.parametrize("apart", ["split", "slices"])
def test_sides_of_one_pass_are_taken_apart_as_that_error_says(apart: str) -> None:
    task = task_of(Net(Sides(apart)), {"signal": (4,)})
    program_of(task.model, task)


class Called(nn.Module):
    """A layer, a parameter or a tensor that is neither, under a name that Python may have a use for."""

    def __init__(self, kind: str, name: str) -> None:
        super().__init__()
        self.kind, self.name, self.parts = kind, name, nn.Module()
        if kind == "layer":
            self.parts.add_module(name, nn.Linear(16, 16))
        elif kind == "parameter":
            self.parts.register_parameter(name, nn.Parameter(torch.ones(16)))
        else:
            setattr(self.parts, name, torch.ones(16))

    def forward(self, x: Tensor) -> Tensor:
        part = getattr(self.parts, self.name)
        return part(x) if self.kind == "layer" else part * x


@pytest.mark.parametrize("kind", ["layer", "parameter", "tensor"])
def test_a_part_with_the_name_of_a_python_keyword_is_named(kind: str) -> None:
    task = task_of(Net(Called(kind, "in")), {"signal": (4,)})
    with pytest.raises(StageError, match="has the name of a Python keyword") as caught:
        onnx_of(Network(task.model), task)
    assert str(caught.value).startswith("task random: body.1.parts.in has")
    assert "rename it in the model and in the keys of its state dict, to 'in_'" in (caught.value.fix or "")


@pytest.mark.parametrize("name", ["in_", "match"])  # the second one is a keyword only where a statement begins
def test_other_names_are_as_good_as_any(name: str) -> None:
    task = task_of(Net(Called("layer", name)), {"signal": (4,)})
    onnx_of(Network(task.model), task)


class Reflections(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.householder_product(x.unflatten(1, (4, 4)), x[:, :4]).flatten(1)


def test_an_operator_that_onnx_does_not_have_is_named() -> None:
    task = task_of(Net(Reflections()), {"signal": (4,)})
    with pytest.raises(StageError) as caught:
        onnx_of(Network(task.model), task)
    said = str(caught.value)
    assert "cannot convert aten.linalg_householder_product.default of body.1: No ONNX function found" in said
    assert "replace aten.linalg_householder_product.default" in (caught.value.fix or "")
    assert "\x1b" not in said
    assert "step 3/3" not in said


class Summed(nn.Module):
    def __init__(self, divisor: int | None) -> None:
        super().__init__()
        self.sums = nn.AvgPool2d(2, divisor_override=divisor)

    def forward(self, x: Tensor) -> Tensor:
        return self.sums(x.unflatten(1, (4, 4))[:, None]).flatten(1).repeat(1, 4)


def test_an_average_by_another_divisor_is_refused_for_the_exporter_drops_it() -> None:
    task = task_of(Net(Summed(1)), {"signal": (4,)})
    with pytest.raises(StageError, match=r"ignores divisor_override, which body.1.sums averages with"):
        onnx_of(Network(task.model), task)
    task = task_of(Net(Summed(None)), {"signal": (4,)})
    onnx_of(Network(task.model), task)


class Words(nn.Module):
    """With outputs that the exporter would call values inside: one is the name of an operator."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(8, 16), nn.Linear(16, 10)

    def forward(self, signal: Tensor) -> tuple[Tensor, Tensor]:
        found = self.words(signal.abs().long().clamp(max=7)).mean(1)
        return self.head(found), found.relu()


def test_outputs_may_have_the_names_of_values_inside(tmp_path) -> None:
    task = replace(task_of(Words(), {"signal": (4,)}), outputs=("linear", "embedding"))
    write(onnx_of(Network(task.model), task), tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    signal = np.arange(8, dtype=np.float32).reshape(2, 4)
    for found, wanted in zip(
        session.run(["linear", "embedding"], {"signal": signal}), task.model(torch.tensor(signal)), strict=True
    ):
        np.testing.assert_allclose(found, wanted.detach().numpy(), atol=1e-5)


class Mapped(nn.Module):
    """A mask made as transformers makes those of its decoders: elements are picked by index within ``vmap``."""

    def forward(self, x: Tensor) -> Tensor:
        positive, places = x > 0, torch.arange(x.shape[1])
        with TransformGetItemToIndex():
            seen = torch.vmap(lambda row: torch.vmap(lambda place: positive[row, place])(places))
            return x * seen(torch.arange(x.shape[0]))


def test_an_archive_of_a_model_that_calls_vmap_can_be_run() -> None:
    task = task_of(Net(Mapped()), {"signal": (4,)})
    program = torch.export.load(io.BytesIO(archive_of(Network(task.model), task)))
    inputs = as_tensors(task.example().inputs)
    torch.testing.assert_close(program.module()(**inputs)[0], task.model(**inputs))


class Keeping(nn.Module):
    """Writes a buffer in every call: one to normalize by or look at, one that it fills first, one that only counts."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.register_buffer("mean", torch.zeros(16))
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        if self.how == "in place":
            self.mean.mul_(0.9).add_(x.mean(0), alpha=0.1)
        elif self.how == "a part":
            self.mean[:4] = x[0, :4]
        elif self.how == "assigned":
            self.mean = 0.9 * self.mean + 0.1 * x.mean(0)
        elif self.how == "filled":
            self.mean.copy_(torch.arange(16.0))
        return F.relu(x - self.mean, inplace=True)


@pytest.mark.parametrize("how", ["in place", "a part", "assigned"])
def test_a_buffer_that_is_kept_between_calls_is_refused(how: str) -> None:
    task = task_of(Net(Keeping(how)), {"signal": (4,)})
    with pytest.raises(StageError, match=r"reads and writes the buffer body\.1\.mean: an engine keeps nothing"):
        program_of(task.model.eval(), task)


@pytest.mark.parametrize("how", ["filled", "only read"])
def test_a_buffer_whose_old_value_does_not_count_may_be_written(how: str) -> None:
    task = task_of(Net(Keeping(how)), {"signal": (4,)})
    program_of(task.model.eval(), task)


def test_the_command_says_it_in_two_lines(template: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    source = template.read_text().replace(
        "return self.head(self.fusion(both))",
        "both = both if both.sum() > 0 else -both\n        return self.head(self.fusion(both))",
    )
    for file in template.parent.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / template.name).write_text(source)
    outcome = mmedge(monkeypatch, capsys, "task", "check", "-q", f"{tmp_path / template.name}:task")
    assert (outcome.status, outcome.out) == (2, "")
    assert len(outcome.err.splitlines()) == 2
    assert "the model (Net): my_task.py line " in outcome.err


@pytest.mark.parametrize(
    "stage", [Distill(Distill.Config(student="current")), Prune(Prune.Config(width=0.5, importance="taylor"))]
)
def test_a_loss_that_is_cut_off_from_the_outputs_trains_nothing(stage: Distill | Prune) -> None:
    task = task_of(nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 10)), {"input": (4,)})
    cut = replace(task, loss=lambda outputs, targets: task.loss(outputs, targets).detach())
    with pytest.raises(StageError, match="has no gradient") as caught:
        stage.run(Network(cut.model.eval()), context_of(cut))
    assert ".detach()" in (caught.value.fix or "")


class Computed(nn.Module):
    """A tensor with a history among the attributes, as the old weight norm leaves one behind."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.utils.weight_norm(nn.Linear(4, 10))

    def forward(self, signal: Tensor) -> Tensor:
        return self.linear(signal)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_torchscript_is_refused_by_name() -> None:
    task = task_of(torch.jit.trace(nn.Linear(4, 10), torch.zeros(1, 4)), {"signal": (4,)})
    with pytest.raises(TaskError, match=r"TorchScript\n.*give the nn.Module"):
        check_model(task)


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_a_model_that_cannot_be_copied_is_refused_before_any_work() -> None:
    task = task_of(Computed(), {"signal": (4,)})
    with pytest.raises(TaskError, match=r"cannot be copied: RuntimeError: .*\n.*remove_weight_norm\(\)"):
        check_model(task)
    nn.utils.remove_weight_norm(task.model.linear)
    check_model(task)


class Scales(nn.Module):
    """A layer, and what may be of another precision than layers are: one number, and buffers."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 10)
        self.scale = nn.Parameter(torch.tensor(1.5, dtype=dtype))
        self.register_buffer("offset", torch.ones(10, dtype=dtype))
        self.register_buffer("order", torch.arange(10))

    def forward(self, signal: Tensor) -> Tensor:
        scaled = self.linear(signal.to(self.linear.weight.dtype)) * self.scale
        return (scaled.float() + self.offset.float())[:, self.order]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_precision_are_refused_by_name(dtype: torch.dtype) -> None:
    task = task_of(Scales(dtype), {"signal": (4,)})
    check_model(task)
    task.model.linear.to(dtype)
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(TaskError, match=rf"weight linear\.weight is {name}, not float32\n.*model\.float\(\)"):
        check_model(task)


class Bare(nn.Module):
    """Nothing in it can be trained or narrowed."""

    def forward(self, signal: Tensor) -> Tensor:
        return signal.repeat(1, 3)[:, :10]


def broken() -> nn.Module:
    raise KeyError("weights")


def half() -> nn.Module:
    return Net(nn.Identity()).bfloat16()


@pytest.mark.parametrize(
    ("student", "said"),
    [
        (broken, "student() raised KeyError"),
        (list, "student() returned list"),
        (Bare, "no parameters to train"),
        (half, "is bfloat16, not float32"),
    ],
)
def test_a_student_that_is_none_is_refused(student: Any, said: str) -> None:
    task = replace(task_of(Net(nn.Identity()), {"signal": (4,)}), student=student)
    with pytest.raises(StageError, match=re.escape(said)) as caught:
        Distill(Distill.Config.model_validate({"student": "task", "features": 0})).run(
            Network(task.model), context_of(task)
        )
    assert caught.value.fix


@pytest.mark.parametrize("settings", [{"macs": 0.5}, {"width": 0.5}])
def test_a_model_without_anything_to_prune_is_refused(settings: dict[str, float]) -> None:
    task = task_of(Bare(), {"signal": (4,)})
    with pytest.raises(StageError, match="prune"):
        Prune(Prune.Config.model_validate(settings)).run(Network(task.model), context_of(task))


class Latents(nn.Module):
    """A parameter enters a module as its input, as latents and relative positions do."""

    def __init__(self) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.rand(3, 8))
        self.norm, self.linear = nn.LayerNorm(8), nn.Linear(8, 10)

    def forward(self, signal: Tensor) -> Tensor:
        return signal @ self.linear(self.norm(self.latents))


def test_a_parameter_that_enters_a_module_is_counted() -> None:
    model = Latents()
    model.norm.weight.requires_grad_(False)
    signal = {"signal": torch.rand(2, 3)}
    assert count(model, signal, ("logits",)) == {"parameters": 24 + 16 + 90, "macs": 3 * 8 * 10 + 3 * 10}
    assert macs_by_module(model, signal) == {"linear": 240, "": 30}
    learned = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert learned == ["latents", "norm.bias", "linear.weight", "linear.bias"]


def test_read_only_arrays_are_read_without_a_warning() -> None:
    """As ``np.load(mmap_mode="r")`` gives them; warnings are errors here, and a tensor must not write to them."""
    array = np.ones((2, 4), np.float32)
    array.setflags(write=False)
    tensor = as_tensors({"signal": array})["signal"]
    tensor += 1
    assert (array == 1).all()
