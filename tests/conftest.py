"""What tests share: a small task that is the shipped template, trained once per session."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import replace
from functools import cache
from importlib import import_module
from importlib.resources import files
from pathlib import Path

import pytest

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
# A process per processor runs tests: threads of one would wait for those of another.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # those of commands must not spin while they wait
os.environ.pop("COLUMNS", None)  # what is printed is tested at the width of a pipe, wherever tests are started


@pytest.fixture(scope="session", autouse=True)
def _configuration_elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Engines are sealed with a key of this machine: tests make one of their own, not in the user's home."""
    before = os.environ.get("XDG_CONFIG_HOME")
    os.environ["XDG_CONFIG_HOME"] = str(tmp_path_factory.mktemp("config"))
    yield
    if before is None:
        del os.environ["XDG_CONFIG_HOME"]
    else:
        os.environ["XDG_CONFIG_HOME"] = before


@pytest.fixture(scope="session", autouse=True)
def _short_warm_up() -> Iterator[None]:
    """Half a second per engine and process is for latencies that somebody reads."""
    from mmedge.profile.latency import interleaved

    defaults = interleaved.__kwdefaults__
    before, defaults["warmup_s"] = defaults["warmup_s"], 0.02
    yield
    defaults["warmup_s"] = before


@pytest.fixture(scope="session", autouse=True)
def threads_at_first() -> int:
    """How many PyTorch begins with."""
    import torch

    return torch.get_num_threads()


@pytest.fixture(autouse=True)
def _threads_given_back(threads_at_first: int) -> None:
    """A compression takes all processors and keeps them; the next test shares them with other processes."""
    import torch

    torch.set_num_threads(threads_at_first)


@pytest.fixture(scope="session", autouse=True)
def _operators_parsed_once() -> Iterator[None]:
    """PyTorch's exporter parses its library of operators anew for every graph: half of the time of a small one."""
    from torch.onnx._internal.exporter import _registration

    import_module("torch.ao.quantization.fx._decomposed")  # operators that are not loaded by now it would never know
    operators = getattr(_registration, "ONNXRegistry", None)
    with pytest.MonkeyPatch.context() as patch:
        if hasattr(operators, "from_torchlib"):
            made = cache(operators.from_torchlib)

            def again(**settings: int) -> object:
                found = copy(made(**settings))
                found.functions = {name: list(each) for name, each in found.functions.items()}  # an export adds its own
                return found

            patch.setattr(operators, "from_torchlib", staticmethod(again))
        yield


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file that `mmedge task new` writes, with its checkpoint beside it."""
    path = tmp_path_factory.mktemp("task") / "my_task.py"
    shutil.copy(str(files("mmedge.tasks") / "template.py"), path)
    from mmedge.loading import load_task

    load_task(f"{path}:task", {})
    return path


@pytest.fixture
def small_task(template: Path):
    """The template's task, loaded anew."""
    from mmedge.loading import load_task

    return load_task(f"{template}:task", {})


@pytest.fixture
def context_of() -> Callable:
    """Makes the context of a stage for a task; nothing is remembered."""
    from mmedge.progress import Progress
    from mmedge.stages.base import Context

    def make(task, seed: int = 0, **changes):
        context = Context(task, task.model.eval(), seed, Progress(), lambda name, inputs, compute: compute())
        return replace(context, **changes)

    return make
