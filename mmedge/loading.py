"""From what ``--task`` says to a checked :class:`mmedge.task.Task`."""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import inspect
import logging
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from keyword import iskeyword
from pathlib import Path
from typing import Any

from mmedge.errors import MmedgeError, TaskError, UsageError, unknown
from mmedge.task import Component, Metric, Task
from mmedge.tensors import DTYPES, TensorSpec

# What makes tasks of a specification: by name, as entry points are, because this layer may not import them.
MAKERS = {"hf": "mmedge.tasks.hf:task"}
MMEDGE = Path(__file__).resolve().parent


def load_task(spec: str, entry_points: Mapping[str, Callable[[], Callable[[], Any]]]) -> Task:
    """The task behind ``--task``.

    Args:
        spec: the name of an installed task, ``path/to/file.py:function``, ``package.module:function``, or
            ``hf:DIRECTORY_OR_ID:option=value,…`` for a model of transformers.
        entry_points: installed tasks by name; each value loads the function.

    Raises:
        UsageError: there is no such task.
        TaskError: its code fails or returns something else.
    """
    with _torchao_quiet():
        return _loaded(spec, entry_points)


@contextmanager
def _torchao_quiet() -> Iterator[None]:
    """transformers loads torchao, which then names libraries for GPUs that it misses: nothing about the task."""
    loggers = [logging.getLogger(name) for name in ("torchao", "torch.utils._pytree")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _loaded(spec: str, entry_points: Mapping[str, Callable[[], Callable[[], Any]]]) -> Task:
    maker, _, about = spec.partition(":")
    function: Callable[..., Any]
    if maker in MAKERS:
        function = partial(function_of(MAKERS[maker]), about)
    elif ":" in spec:
        function = function_of(spec)
    elif spec in entry_points:
        function = entry_points[spec]()
    else:
        problem, fix = unknown("task", spec, entry_points)
        raise UsageError(problem, fix=f"{fix}; your own: --task path/to/file.py:function")
    try:
        task = function()
    except MmedgeError:
        raise
    except (Exception, SystemExit) as err:
        fix = "correct the function; -v shows where it happened"
        raise TaskError(f"the task function raised {type(err).__name__}: {err}", where=spec, fix=fix) from err
    if not isinstance(task, Task):
        raise TaskError(f"the task function returned {type(task).__name__}", where=spec, fix="return mmedge.task.Task")
    check_declarations(task, spec)
    if not task.source:
        object.__setattr__(task, "source", _source_digest(function))
    return task


def function_of(spec: str) -> Callable[..., Any]:
    """The function that ``path/to/file.py:function`` or ``package.module:function`` names.

    Raises:
        UsageError: there is no such file, module or function.
        TaskError: importing it failed.
    """
    place, _, name = spec.rpartition(":")
    if not place or not name:
        raise UsageError(f"{spec!r} names no function", fix="write path/to/file.py:function or package.module:function")
    try:
        module = _module_from_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except ModuleNotFoundError as err:
        if not place.endswith(".py") and f"{place}.".startswith(f"{err.name}."):
            raise UsageError(f"no module {place!r}", where=spec, fix="is it installed in this environment?") from err
        raise TaskError(f"importing it raised {type(err).__name__}: {err}", where=spec) from err
    except MmedgeError:
        raise
    except (Exception, SystemExit) as err:
        raise TaskError(f"importing it raised {type(err).__name__}: {err}", where=spec) from err
    function = getattr(module, name, None)
    if not callable(function):
        here = [key for key, value in vars(module).items() if inspect.isfunction(value) and not key.startswith("_")]
        problem, fix = unknown("function", name, here)
        raise UsageError(problem, where=place, fix=fix)
    return function


def _module_from_file(path: Path) -> Any:
    if not path.is_file():
        raise UsageError(f"no file {str(path)!r}", fix="`mmedge task new my_task.py` writes one to start from")
    name = f"mmedge_task_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    if spec is None or spec.loader is None:
        raise UsageError(f"{path} cannot be imported as Python")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    sys.path.insert(0, str(path.resolve().parent))  # for good: its functions may import neighbours when they run
    spec.loader.exec_module(module)
    return module


def _source_digest(function: Callable[[], Any]) -> str:
    """A hash of the function's file and of what that imports from its own folder or package."""
    function = inspect.unwrap(function)
    name = inspect.getsourcefile(function)
    if not name or not Path(name).is_file():
        return ""
    file = Path(name).resolve()
    package = getattr(inspect.getmodule(function), "__package__", None)
    names = package.split(".") if package else []
    root = file.parents[len(names)]
    own = root.joinpath(*names[:1])
    files = {file} if own.name.endswith("-packages") else _imported(file, root, own)
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(files))).hexdigest()


def _imported(file: Path, root: Path, own: Path) -> set[Path]:
    """Python files of the folder ``own`` that a file imports, itself among them; of mmedge itself only its tasks.

    Read, not imported: so it does not matter what was imported before, and imports within functions count.

    Args:
        file: where to begin.
        root: where modules of full names lie.
        own: what lies elsewhere is another's code.
    """
    found: set[Path] = set()
    waiting = [file]
    while waiting:
        path = waiting.pop()
        found.add(path)
        places = set(_named(path, root)) - {root}
        modules = {place.with_suffix(".py") for place in places}
        modules |= {folder / "__init__.py" for place in places for folder in (place, *place.parents)}
        for module in modules - found:
            apart = MMEDGE in module.parents and MMEDGE / "tasks" not in module.parents
            if own in module.parents and not apart and module.is_file():
                waiting.append(module)
    return found


def _named(path: Path, root: Path) -> Iterator[Path]:
    """Where the modules that a file imports would lie, without ``.py``."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return  # whoever imports it will hear of that
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (root.joinpath(*alias.name.split(".")) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = path.parents[node.level - 1] if node.level else root
            base = start.joinpath(*(node.module or "").split("."))
            yield base
            yield from (base / alias.name for alias in node.names)


def check_declarations(task: Task, where: str) -> None:
    """Types, names and sizes that are wrong whatever the data.

    Raises:
        TaskError: says which.
    """
    if problems := _wrong_types(task) or _wrong_names(task) + _wrong_specs(task) + _wrong_components(task):
        raise TaskError("; ".join(problems), where=where, fix="correct the Task that the function returns")


def _wrong_types(task: Task) -> list[str]:
    from torch import nn

    several = (tuple, list)
    wanted = {
        "name": ("a string", isinstance(task.name, str)),
        "model": ("a torch.nn.Module", isinstance(task.model, nn.Module)),
        "inputs": (
            "a tuple of TensorSpec",
            isinstance(task.inputs, several) and all(isinstance(spec, TensorSpec) for spec in task.inputs),
        ),
        "outputs": (
            "a tuple of names",
            isinstance(task.outputs, several) and all(isinstance(name, str) for name in task.outputs),
        ),
        "batches": ("a function", callable(task.batches)),
        "loss": ("a function", callable(task.loss)),
        "metric": ("a Metric with a function", isinstance(task.metric, Metric) and callable(task.metric.score)),
        "also": (
            "a tuple of Metric",
            isinstance(task.also, several) and all(isinstance(each, Metric) for each in task.also),
        ),
        "student": ("a function", task.student is None or callable(task.student)),
        "components": (
            "a tuple of Component",
            isinstance(task.components, several) and all(isinstance(part, Component) for part in task.components),
        ),
    }
    wrong = [f"{name} is {getattr(task, name)!r:.60}, not {what}" for name, (what, good) in wanted.items() if not good]
    return wrong or [problem for metric in (task.metric, *task.also) for problem in _wrong_metric(metric)]


def _wrong_metric(metric: Metric) -> list[str]:
    problems, taken, together = [], metric.outputs, metric.together
    if not isinstance(taken, (tuple, list)) or not all(isinstance(name, str) for name in taken):
        problems.append(f"metric {metric.name}: outputs is {taken!r:.60}, not a tuple of names")
    if not isinstance(together, int) or isinstance(together, bool) or together < 1:
        problems.append(f"metric {metric.name}: together is {together!r:.60}, not a number of samples")
    return problems


def _wrong_names(task: Task) -> list[str]:
    names = [str(spec.name) for spec in task.inputs] + list(task.outputs)
    problems = [f"{name!r} is used twice" for name in sorted({n for n in names if names.count(n) > 1})]
    metrics = [metric.name for metric in (task.metric, *task.also)]
    problems += [f"two metrics are called {name!r}" for name in sorted({n for n in metrics if metrics.count(n) > 1})]
    problems += [
        f"metric {metric.name} takes {name!r}, which is no output of the task ({', '.join(task.outputs)})"
        for metric in (task.metric, *task.also)
        for name in metric.outputs
        if name not in task.outputs
    ]
    problems += [f"{name!r} is not a plain name" for name in names if not name.isidentifier() or iskeyword(name)]
    if not task.inputs or not task.outputs:
        problems.append("inputs and outputs must not be empty")
    if not task.name.replace("-", "_").isidentifier():
        problems.append(f"the name {task.name!r} is not fit for a folder name")
    return problems


def _wrong_specs(task: Task) -> list[str]:
    problems = []
    for spec in task.inputs:
        if not all(isinstance(size, (int, str)) for size in spec.shape):
            problems.append(f"{spec.name}: {spec.shape} holds something else than sizes and names")
        if spec.dtype not in DTYPES:
            problems.append(f"{spec.name}: dtype {spec.dtype!r} is none of {', '.join(DTYPES)}")
        if not spec.shape or spec.shape[0] != "batch":
            problems.append(f'{spec.name}: the first dimension must be "batch", not {spec.shape[:1]}')
        if any(isinstance(size, bool) or (isinstance(size, int) and size < 1) for size in spec.shape):
            problems.append(f"{spec.name}: sizes in {spec.shape} must be 1 or more")
        if not spec.modality:
            problems.append(f"{spec.name}: no modality")
        if not isinstance(spec.fill, (int, float)) or not math.isfinite(spec.fill):
            problems.append(f"{spec.name}: fill {spec.fill} is not a number")
    return problems


def _wrong_components(task: Task) -> list[str]:
    names = [piece.name for part in task.components for piece in part.pieces]
    problems = [f"two components are called {name!r}" for name in sorted({n for n in names if names.count(n) > 1})]
    given = {spec.name for spec in task.inputs}
    for part in task.components:
        if not part.name.isidentifier():
            problems.append(f"the component name {part.name!r} is not fit for a file name")
        made = {name for other in task.components if other is not part for name in other.outputs}
        problems += [
            f"{part.name}: no input {name!r}, and no other component makes it"
            for name in part.inputs
            if name not in given | made
        ]
        problems += [
            f"{part.name}: the task has no output {name!r}" for name in part.outputs if name not in task.outputs
        ]
        if not part.inputs or not part.outputs:
            problems.append(f"{part.name}: inputs and outputs must not be empty")
        if part.cache:
            problems += _wrong_cache(part, {spec.name: spec for spec in task.inputs})
    return problems


def _wrong_cache(part: Component, given: Mapping[str, TensorSpec]) -> list[str]:
    """What keeps the tokens of a component from being read one by one."""
    named = f"{part.name}: cache {part.cache!r}"
    if part.cache not in part.inputs:
        return [f"{named} is none of its inputs: {', '.join(part.inputs)}"]
    if part.cache not in given:
        return [f"{named} is made by another component; it must be an input of the task"]
    spec, problems = given[part.cache], []
    if spec.dtype not in ("int64", "int32"):
        problems.append(f"{named} is {spec.dtype}, and tokens are int64 or int32")
    if len(spec.shape) != 2 or not isinstance(spec.shape[1], int):
        problems.append(f'{named} has the shape {spec.shape}, and tokens are ("batch", length)')
    return problems
