"""What is wrong with a task is found before any work, and said in words that name it."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command import Outcome, mmedge
from safetensors.torch import save_file
from torch import nn

from mmedge.errors import TaskError
from mmedge.loading import load_task
from mmedge.pipeline.check import digest_of_task
from mmedge.task import Batch, Task, load_weights

GOOD = '''
import numpy as np
import torch
from torch import nn
from mmedge.task import Batch, Metric, Task, accuracy
from mmedge.tensors import TensorSpec

class Net(nn.Module):
    """Eight values of a camera and five word numbers: one of three classes."""

    def __init__(self):
        super().__init__()
        self.image, self.words, self.head = nn.Linear(8, 4), nn.Embedding(10, 4), nn.Linear(8, 3)

    def forward(self, image, words):
        both = torch.cat([self.image(image), self.words(words).mean(1)], dim=1)
        return self.head(both)

OFFSET = {"train": 0, "calibration": 1, "test": 2}

def batches(split, seed):
    rng = np.random.default_rng([OFFSET[split], seed if split == "train" else 0])
    for index in range(3):
        image = rng.normal(size=(4, 8)).astype(np.float32)
        words = rng.integers(10, size=(4, 5))
        targets = rng.integers(3, size=4)
        ids = None
        yield Batch({"image": image, "words": words}, targets, ids)

def loss(outputs, targets):
    return nn.functional.cross_entropy(outputs["logits"], targets)

def model():
    torch.manual_seed(0)
    return Net().eval()

def task():
    return Task(
        name="tiny",
        model=model(),
        inputs=(
            TensorSpec("image", "float32", ("batch", 8), "camera"),
            TensorSpec("words", "int64", ("batch", 5), "text"),
        ),
        outputs=("logits",),
        batches=batches,
        loss=loss,
        metric=Metric("accuracy", accuracy),
    )
'''
RETURN = "return self.head(both)"
RNG = 'rng = np.random.default_rng([OFFSET[split], seed if split == "train" else 0])'
IDS = "ids = None"
YIELD = 'yield Batch({"image": image, "words": words}, targets, ids)'
METRIC = 'metric=Metric("accuracy", accuracy)'

Check = Callable[..., Outcome]


def written(folder: Path, *changes: str) -> Path:
    """The good task with texts replaced: old, new, old, new …"""
    text = GOOD
    for old, new in zip(changes[::2], changes[1::2], strict=True):
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    file = folder / "tiny_task.py"
    file.write_text(text)
    return file


@pytest.fixture
def check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Check:
    """``mmedge task check`` of the good task with changes."""

    def run(*changes: str) -> Outcome:
        return mmedge(monkeypatch, capsys, "task", "check", f"{written(tmp_path, *changes)}:task", "--json", "-q")

    return run


def test_good_task_passes(check: Check) -> None:
    outcome = check()
    assert (outcome.status, outcome.err) == (0, "")
    samples = {"test": 12, "calibration": 12, "train": 12}
    assert json.loads(outcome.out) == {"task": "tiny", "untrainable": None, "samples": samples}


def test_a_loss_without_a_gradient_is_good_for_what_does_not_train(check: Check) -> None:
    outcome = check("], targets)", "], targets).detach()")
    assert outcome.status == 0
    assert "task tiny: loss: it has no gradient" in json.loads(outcome.out)["untrainable"]


@pytest.mark.parametrize(
    "returned",
    [
        pytest.param('return {"logits": self.head(both)}', id="dict"),
        pytest.param("return (self.head(both),)", id="tuple"),
    ],
)
def test_outputs_in_any_container(check: Check, returned: str) -> None:
    assert check(RETURN, returned).status == 0


def test_two_outputs_go_by_name(check: Check) -> None:
    """A dict may come in another order than the declared names; each output keeps its own values."""
    outcome = check(
        RETURN,
        'return {"feature": both, "logits": self.head(both)}',
        'outputs=("logits",)',
        'outputs=("logits", "feature")',
        METRIC,
        'metric=Metric("same", lambda outputs, targets: float((outputs["logits"].shape[1], '
        'outputs["feature"].shape[1]) == (3, 8)) or float("nan"))',
    )
    assert outcome.status == 0, outcome.err


# What the file itself does, before mmedge sees a Task.
FILES = {
    "raises on import": ("import numpy as np", "raise OSError('no disk')", "importing it raised OSError: no disk"),
    "exits on import": ("import numpy as np", "import sys; sys.exit(0)", "importing it raised SystemExit"),
    "not Python": ("def model():", "def model(:", "importing it raised SyntaxError"),
    "needs what is missing": ("import numpy as np", "import nowhere_to_be_found", "nowhere_to_be_found"),
    "raises when called": ("model=model()", "model=1 / 0", "raised ZeroDivisionError: division by zero"),
    "exits when called": ("model=model()", "model=exit(0)", "raised SystemExit"),
    "wants arguments": ("def task():", "def task(size):", "raised TypeError"),
    "another name": ("def task():", "def tusk():", "did you mean 'tusk'?"),
    "not a function": ("def task():", "task = 5\n\ndef other():", "unknown function 'task'"),
    "returns something else": ("return Task(", "return dict(", "returned dict"),
    "misspelt field": ("metric=", "metrics=", "metrics"),
}


@pytest.mark.parametrize(("old", "new", "said"), FILES.values(), ids=FILES)
def test_bad_file(check: Check, old: str, new: str, said: str) -> None:
    outcome = check(old, new)
    assert outcome.status == 2
    assert said in outcome.err
    assert "tiny_task.py" in json.loads(outcome.out)["error"]["where"]


DECLARATIONS = {
    "model is a state": ("model=model()", "model=model().state_dict()", "not a torch.nn.Module"),
    "metric is a function": (METRIC, "metric=accuracy", "not a Metric"),
    "metric without function": (METRIC, 'metric=Metric("accuracy", 0.5)', "not a Metric with a function"),
    "no galleries": (METRIC, METRIC[:-1] + ", together=0)", "together is 0, not a number of samples"),
    "half galleries": (METRIC, METRIC[:-1] + ", together=2.5)", "together is 2.5, not a number of samples"),
    "outputs is a string": ('outputs=("logits",)', 'outputs="logits"', "outputs is 'logits', not a tuple of names"),
    "no outputs": ('outputs=("logits",)', "outputs=()", "must not be empty"),
    "inputs is one": ('TensorSpec("image"', '*("image",), TensorSpec("image"', "not a tuple of TensorSpec"),
    "batches is a list": ("batches=batches", "batches=[]", "batches is [], not a function"),
    "loss is a number": ("loss=loss", "loss=0.1", "loss is 0.1, not a function"),
    "name twice": ('TensorSpec("words"', 'TensorSpec("image"', "'image' is used twice"),
    "output like input": ('outputs=("logits",)', 'outputs=("image",)', "'image' is used twice"),
    "no plain name": ('TensorSpec("image"', 'TensorSpec("the image"', "'the image' is not a plain name"),
    "keyword": ('TensorSpec("image"', 'TensorSpec("class"', "'class' is not a plain name"),
    "name for no folder": ('name="tiny"', 'name="../tiny"', "'../tiny' is not fit for a folder name"),
    "unknown dtype": ('"image", "float32"', '"image", "float64"', "dtype 'float64' is none of float32"),
    "batch not first": ('("batch", 8)', "(4, 8)", 'the first dimension must be "batch"'),
    "empty dimension": ('("batch", 8)', '("batch", 0)', "must be 1 or more"),
    "odd dimension": ('("batch", 8)', '("batch", None)', "something else than sizes and names"),
    "no modality": (', "camera")', ")", "image: no modality"),
    "fill is no number": ('"camera")', '"camera", float("nan"))', "fill nan is not a number"),
}


@pytest.mark.parametrize(("old", "new", "said"), DECLARATIONS.values(), ids=DECLARATIONS)
def test_bad_declaration(check: Check, old: str, new: str, said: str) -> None:
    outcome = check(old, new)
    assert outcome.status == 2
    assert said in outcome.err


DATA = {
    "wrong dtype": (".astype(np.float32)", "", "image: dtype float64, declared float32"),
    "wrong shape": ("size=(4, 8)", "size=(4, 9)", "image: shape (4, 9), declared ('batch', 8)"),
    "wrong rank": ("size=(4, 8)", "size=(4, 8, 1)", "image: shape (4, 8, 1)"),
    "shape changes": ("size=(4, 8)", "size=(4, 8 + index // 2)", "test batch 2: image: shape (4, 9)"),
    "sizes differ": ("size=(4, 8)", "size=(3, 8)", "batch sizes differ between inputs"),
    "input missing": ('{"image": image, "words": words}', '{"image": image}', "words: missing"),
    "input misspelt": ('"image": image', '"imgae": image', "imgae: not declared"),
    "targets too few": ("size=4)", "size=3)", "4 inputs, 3 targets"),
    "target form changes": ("size=4)", "size=(4,) if index < 2 else (4, 1))", "targets are (1,) per sample"),
    "target dtype changes": ("size=4)", "size=4).astype([np.int64, np.int32][index // 2])", "targets are int32"),
    "NaN": ("targets = ", "image[0, 0] = np.nan; targets = ", "image holds NaN or infinite values"),
    "infinite, late": ("targets = ", "image[0, 0] = 1e30 ** (index / 2 * 8 // 3); targets = ", "image holds NaN"),
    "targets NaN": ("rng.integers(3, size=4)", "np.full(4, np.nan)", "targets holds NaN"),
    "tensors": ('"image": image', '"image": torch.from_numpy(image)', "image is Tensor, not a NumPy array"),
    "no Batch": (YIELD, "yield image, targets", "batches() yielded tuple"),
    "nothing": (YIELD, "if index > 5: yield None", "the split is empty"),
    "empty batch": (YIELD, "yield Batch({'image': image[:0], 'words': words[:0]}, targets[:0])", "there are none"),
    "raises midway": (YIELD, f"assert index < 2, 'disk'; {YIELD}", "test batch 2: batches('test') raised"),
    "exits": (YIELD, "exit(0)\n        yield", "raised SystemExit"),
    "ids too few": (IDS, "ids = ['a']", "and their ids differ in number"),
    "ids now and then": (IDS, "ids = list('abcd') if index else None", "some batches have ids and others none"),
    "a split is missing": ('"train": 0, ', "", "batches('train') raised KeyError"),
}


@pytest.mark.parametrize(("old", "new", "said"), DATA.values(), ids=DATA)
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_bad_data(check: Check, old: str, new: str, said: str) -> None:
    outcome = check(old, new)
    assert outcome.status == 2
    assert said in outcome.err
    assert "task tiny: " in outcome.err


SPLITS = {
    "same data": (RNG, "rng = np.random.default_rng(0 if split != 'train' else 1)", "calibration and test share"),
    "train in test": ('"train": 0, "calibration": 1', '"train": 2, "calibration": 1', "train and test share"),
    "same ids": (IDS, "ids = [f'{index} {i}' for i in range(4)]", "share a sample (0 0)"),
    "same integer ids": (IDS, "ids = range(4)", "share a sample (0)"),
    "random order": (RNG, "rng = np.random.default_rng()", "gave different image the second time"),
    "shared generator": (RNG, "rng = SHARED", "gave different image the second time"),
    "test follows the seed": (RNG, "rng = np.random.default_rng([OFFSET[split], seed])", "for another seed"),
}


@pytest.mark.parametrize(("old", "new", "said"), SPLITS.values(), ids=SPLITS)
def test_bad_splits(check: Check, old: str, new: str, said: str) -> None:
    outcome = check(old, new, "def loss(", "SHARED = np.random.default_rng(0)\n\ndef loss(")
    assert outcome.status == 2
    assert said in outcome.err


def test_named_dimension_keeps_one_size(check: Check) -> None:
    named = ('("batch", 5)', '("batch", "time")')
    assert check(*named).status == 0
    outcome = check(*named, "size=(4, 5)", "size=(4, 5 + index // 2)")
    assert outcome.status == 2
    assert "words: dimension 'time' is 6, in other batches 5" in outcome.err


def test_ids_tell_samples_apart(check: Check) -> None:
    """Different ids for equal data: the user says that these are different samples."""
    same = "rng = np.random.default_rng(0)"
    assert check(RNG, same, IDS, "ids = [f'{split} {index} {i}' for i in range(4)]").status == 0


MODELS = {
    "NaN weight": ("return Net()", "net = Net(); net.head.bias.data[0] = torch.nan; return net", "weight head.bias"),
    "NaN out": (RETURN, "return self.head(both) / 0 * 0", "output logits holds NaN or infinite"),
    "too many": (RETURN, "return self.head(both), both", "returns 2 outputs, the task declares 1: logits"),
    "none": (RETURN, "return None", "returns NoneType outputs"),
    "another name": (RETURN, "return {'scores': self.head(both)}", "returns ['scores'], the task declares ['logits']"),
    "no tensor": (RETURN, "return {'logits': [1.0]}", "output logits is list, not a tensor"),
    "no batch": (RETURN, "return self.head(both).mean(0)", "output logits has shape (3,) for a batch of 4"),
    "a number": (RETURN, "return self.head(both).mean()", "output logits has shape () for a batch of 4"),
    "bfloat16": (RETURN, "return self.head(both).bfloat16()", "output logits has dtype bfloat16"),
    "raises": ("nn.Linear(8, 3)", "nn.Linear(9, 3)", "model(**inputs) raised RuntimeError"),
    "other samples": (RETURN, "return self.head(both - both.mean(0))", "depends on the other samples of the batch"),
    "batch is fixed": (RETURN, "return self.head(both.view(4, 8)[: len(image)])", "a batch of 4 and no single sample"),
    "random": (RETURN, "return self.head(both + torch.randn_like(both))", "changes from call to call"),
    "meta device": ("return Net()", "return Net().to('meta')", "has no values: it is on the meta device"),
    "other argument": ("forward(self, image, words)", "forward(self, picture, words)", "raised TypeError"),
    "loss raises": ('outputs["logits"], targets', 'outputs["scores"], targets', "loss: raised KeyError"),
    "loss per sample": ("], targets)", "], targets, reduction='none')", "did not return one number as a tensor"),
    "loss is a float": ("], targets)", "], targets).item()", "did not return one number as a tensor"),
    "loss is NaN": ("], targets)", "], targets) * torch.nan", "loss: is nan on the trained model"),
    "metric NaN": (METRIC, 'metric=Metric("m", lambda o, t: float("nan"))', "metric m: returned nan"),
    "metric infinite": (METRIC, 'metric=Metric("m", lambda o, t: float("inf"))', "metric m: returned inf"),
    "metric string": (METRIC, 'metric=Metric("m", lambda o, t: "0.9")', "metric m: returned '0.9'"),
    "metric bool": (METRIC, 'metric=Metric("m", lambda o, t: True)', "metric m: returned True"),
    "metric None": (METRIC, 'metric=Metric("m", lambda o, t: None)', "metric m: returned None"),
    "metric array": (METRIC, 'metric=Metric("m", lambda o, t: np.ones(2))', "metric m: returned array"),
    "metric raises": (METRIC, 'metric=Metric("m", lambda o, t: o["x"])', "metric m: raised KeyError"),
}


@pytest.mark.parametrize(("old", "new", "said"), MODELS.values(), ids=MODELS)
def test_bad_model(check: Check, old: str, new: str, said: str) -> None:
    outcome = check(old, new)
    assert outcome.status == 2
    assert said in outcome.err
    assert "task tiny" in outcome.err


EXPORTS = {
    "branch on values": ("both = ", "if image.isnan().any(): image = -image\n        both = ", "cannot follow"),
    "length of a tensor": (RETURN, f"{RETURN} + torch.zeros(len(image), 3)", "x.shape[0] in place of len(x)"),
    "NumPy inside": (RETURN, "return self.head(torch.from_numpy(both.detach().numpy() * 2))", "cannot"),
}


@pytest.mark.parametrize(("old", "new", "said"), EXPORTS.values(), ids=EXPORTS)
def test_does_not_export(check: Check, old: str, new: str, said: str) -> None:
    outcome = check(old, new)
    assert outcome.status == 2
    assert said in outcome.err
    assert "Traceback" not in outcome.err


def test_task_file_imports_its_neighbours(tmp_path: Path) -> None:
    """Both on import and when its function runs."""
    (tmp_path / "early_part.py").write_text("VALUE = 1")
    (tmp_path / "late_part.py").write_text("VALUE = 2")
    late = "def model():\n    import late_part\n    assert late_part.VALUE == 2"
    file = written(tmp_path, "import numpy as np", "import numpy as np, early_part", "def model():", late)
    assert load_task(f"{file}:task", {}).name == "tiny"


NEIGHBOURS = {
    "net.py": "VALUE = 1",
    "parts/fusion.py": "from . import norms",  # a folder without __init__.py
    "parts/norms.py": "VALUE = 2",
    "late.py": "VALUE = 3",
    "package/__init__.py": "",
    "package/layers.py": "VALUE = 4",
}
IMPORTS = "import numpy as np\nimport net, package.layers\nfrom parts import fusion"


@pytest.mark.parametrize("changed", [*NEIGHBOURS, "unrelated.py"])
def test_the_code_of_a_task_is_its_file_and_what_that_imports_beside_it(changed, tmp_path, monkeypatch) -> None:
    """Whatever was imported when: another command of the same run must find the same."""

    def source(made: str) -> str:
        folder = tmp_path / made  # Python keeps modules by name: only the files are asked
        change = {changed: "VALUE = 9"} if made == "changed" else {}
        for name, text in {**NEIGHBOURS, "unrelated.py": "", **change}.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)
        file = written(folder, "import numpy as np", IMPORTS, "def model():", "def model():\n    import late")
        return load_task(f"{file}:task", {}).source

    for name in ("net", "late", "package", "package.layers", "parts", "parts.fusion", "parts.norms"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert (source("as it was") != source("changed")) is (changed != "unrelated.py")


def test_the_code_of_a_task_in_a_package_is_the_packages(tmp_path, monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    sources = []
    for value in (1, 2):
        package = tmp_path / f"perception{value}"
        package.mkdir()
        (package / "__init__.py").write_text("")
        (package / "nets.py").write_text(f"VALUE = {value}")
        written(package, "import numpy as np", "import numpy as np\nfrom . import nets")
        sources.append(load_task(f"perception{value}.tiny_task:task", {}).source)
    assert sources[0] != sources[1]


def test_later_batches_of_the_test_split_are_part_of_what_a_task_is() -> None:
    task = load_good()

    def relabelled(split, seed, last):
        for index, batch in enumerate(task.batches(split, seed)):
            yield Batch(batch.inputs, last(batch.targets) if (split, index) == ("test", 2) else batch.targets)

    same = replace(task, batches=partial(relabelled, last=np.copy))
    other = replace(task, batches=partial(relabelled, last=lambda targets: 2 - targets))
    assert digest_of_task(same) == digest_of_task(task) != digest_of_task(other)


def test_tasks_by_name() -> None:
    found = load_task("tiny", {"tiny": lambda: lambda: load_good()})
    assert found.modalities == ("camera", "text")
    for spec, said in {
        "tinny": "did you mean 'tiny'?",
        "nowhere.py:task": "no file 'nowhere.py'",
        "nowhere_at_all:task": "no module 'nowhere_at_all'",
        "mmedge.nowhere:task": "no module 'mmedge.nowhere'",
        ":task": "names no function",
        "file.py:": "names no function",
    }.items():
        with pytest.raises(Exception, match=said.replace("?", r"\?")) as caught:
            load_task(spec, {"tiny": lambda: lambda: load_good()})
        assert caught.value.exit_status == 2  # type: ignore[attr-defined]


def test_module_that_lacks_a_part_is_not_called_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "needs_part_of_it.py").write_text("import needs_part")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(TaskError, match="importing it raised ModuleNotFoundError: No module named 'needs_part'"):
        load_task("needs_part_of_it:task", {})


def load_good() -> Task:
    space: dict[str, Any] = {}
    exec(GOOD, space)
    task: Task = space["task"]()
    return task


# --- `mmedge task new`


def test_new_task_is_good_and_never_overwrites(
    tmp_path: Path, template: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "my_task.py"
    shutil.copy(template.with_suffix(".safetensors"), file.with_suffix(".safetensors"))  # it would train itself
    assert mmedge(monkeypatch, capsys, "task", "new", file, "--json").status == 0
    assert "THIS_FILE" not in file.read_text()
    assert str(file) in file.read_text()  # the commands in its first lines can be pasted
    outcome = mmedge(monkeypatch, capsys, "task", "check", f"{file}:task", "-q", "--json")
    assert outcome.status == 0, outcome.err
    file.write_text("mine")
    outcome = mmedge(monkeypatch, capsys, "task", "new", file)
    assert outcome.status == 2
    assert "exists already" in outcome.err
    assert file.read_text() == "mine"


@pytest.mark.parametrize("name", ["no-name.py", "task.txt", "missing_folder/task.py"])
def test_new_task_needs_a_good_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    outcome = mmedge(monkeypatch, capsys, "task", "new", tmp_path / name)
    assert outcome.status == 2
    assert "error: " in outcome.err
    assert not (tmp_path / name).exists()


# --- checkpoints


def net() -> nn.Linear:
    return nn.Linear(3, 2)


class Bomb:
    """Pickles into a call that leaves a file behind."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.file),)


def test_pickled_code_is_refused_and_does_not_run(tmp_path: Path) -> None:
    fuse = tmp_path / "ran"
    state = {**net().state_dict(), "bomb": Bomb(fuse)}
    torch.save(state, tmp_path / "zip.pt")
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps(Bomb(fuse)))
    for file in ("zip.pt", "old.pth", "plain.pkl"):
        with pytest.raises(TaskError, match="pickled code could run anything") as caught:
            load_weights(net(), tmp_path / file)
        assert "safetensors.torch.save_file" in str(caught.value)
        assert not fuse.exists(), file
    pickle.loads(pickle.dumps(Bomb(fuse)))
    assert fuse.exists()  # the bomb does work


def test_whole_model_is_refused(tmp_path: Path) -> None:
    torch.save(net(), tmp_path / "model.pt")
    with pytest.raises(TaskError, match="pickled code could run anything"):
        load_weights(net(), tmp_path / "model.pt")


@pytest.mark.parametrize("form", ["safetensors", "pt", "old", "state_dict", "model"])
def test_checkpoints_that_load(tmp_path: Path, form: str) -> None:
    trained = net()
    file = tmp_path / f"weights.{'safetensors' if form == 'safetensors' else 'pt'}"
    if form == "safetensors":
        save_file(trained.state_dict(), file)
    elif form == "old":
        torch.save(trained.state_dict(), file, _use_new_zipfile_serialization=False)
    else:
        torch.save(trained.state_dict() if form == "pt" else {form: trained.state_dict(), "epoch": 3}, file)
    fresh = net().train()
    found = load_weights(fresh, file)
    assert found is fresh
    assert not found.training
    assert all(torch.equal(a, b) for a, b in zip(found.parameters(), trained.parameters(), strict=True))


def damaged(folder: Path) -> dict[str, tuple[Path, str]]:
    save_file(net().state_dict(), folder / "cut.safetensors")
    torch.save(net().state_dict(), folder / "cut.pt")
    for file in (folder / "cut.safetensors", folder / "cut.pt"):
        file.write_bytes(file.read_bytes()[:-40])
    (folder / "empty.pt").touch()
    (folder / "empty.safetensors").touch()
    (folder / "text.pt").write_text("these are no weights")
    with zipfile.ZipFile(folder / "zip.pt", "w") as archive:
        archive.writestr("note.txt", "no weights")
    save_file(nn.Linear(4, 2).state_dict(), folder / "shapes.safetensors")
    save_file({"layer.weight": torch.zeros(2, 3)}, folder / "names.safetensors")
    torch.save([torch.zeros(2)], folder / "list.pt")
    torch.save({"weight": 1.0}, folder / "number.pt")
    torch.save({0: torch.zeros(2)}, folder / "keys.pt")
    return {
        "cut.safetensors": (folder / "cut.safetensors", "cannot be read"),
        "cut.pt": (folder / "cut.pt", "cannot be read"),
        "empty.pt": (folder / "empty.pt", "cannot be read"),
        "empty.safetensors": (folder / "empty.safetensors", "cannot be read"),
        "text.pt": (folder / "text.pt", "cannot be read"),
        "zip.pt": (folder / "zip.pt", "cannot be read"),
        "missing.pt": (folder / "missing.pt", "no such checkpoint"),
        "shapes.safetensors": (folder / "shapes.safetensors", "is not this model's.*size mismatch for weight"),
        "names.safetensors": (folder / "names.safetensors", 'is not this model\'s.*Missing key.*"weight"'),
        "list.pt": (folder / "list.pt", "something else than named tensors"),
        "number.pt": (folder / "number.pt", "something else than named tensors"),
        "keys.pt": (folder / "keys.pt", "something else than named tensors"),
    }


def test_checkpoints_that_do_not_fit(tmp_path: Path) -> None:
    for name, (file, said) in damaged(tmp_path).items():
        with pytest.raises(TaskError, match=said) as caught:
            load_weights(net(), file)
        assert name in str(caught.value)


def test_batches_are_arrays_of_numpy() -> None:
    task = load_good()
    batch = task.example()
    assert len(batch) == 4
    assert {name: array.dtype for name, array in batch.inputs.items()} == {
        "image": np.dtype("float32"),
        "words": np.dtype("int64"),
    }
