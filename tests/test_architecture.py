"""What holds for the package as a whole: who imports whom, what stays light, what is never called."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint, distribution
from pathlib import Path
from typing import Any

import pytest

import mmedge
from mmedge import plugins

PACKAGE = Path(mmedge.__file__).parent

# Lower layers first. A part may import parts of lower layers and itself, not those beside or above it.
LAYERS = (
    ("errors", "tensors", "progress", "strict_yaml"),
    ("artifact",),
    ("task",),
    ("loading",),
    ("stages", "targets", "tasks"),
    ("lower",),
    ("profile", "report"),
    ("plugins",),
    ("recipe",),
    ("forecast",),
    ("pipeline", "doctor"),
    ("cli",),
    ("__main__",),
)
# The device's timing process finds the runtimes of its engines by name.
UPWARD = {("profile.worker", "plugins")}
# Narrower than the layers say.
ONLY = {
    "plugins": {"errors", "targets.base", "targets.devices", "targets.devices.table"},
    "recipe": {"errors", "plugins", "report.gates", "strict_yaml"},
}

Import = tuple[str, str]  # who imports what, both without the leading "mmedge."


def sources(package: Path) -> Iterator[tuple[str, Path, ast.Module]]:
    """Every module: dotted name without the package, file, syntax tree."""
    for file in sorted(package.rglob("*.py")):
        parts = file.relative_to(package).with_suffix("").parts
        yield ".".join(parts).removesuffix("__init__").rstrip("."), file, ast.parse(file.read_text(encoding="utf-8"))


def imports(package: Path) -> Iterator[Import]:
    """Every import of the package's own modules, wherever it stands: functions and type checks included."""
    modules = {name for name, _, _ in sources(package)}
    for module, file, tree in sources(package):
        inside = [part for part in module.split(".") if part]
        folder = inside if file.name == "__init__.py" else inside[:-1]
        for node in ast.walk(tree):
            for name in imported(node, folder):
                while name and name not in modules:
                    name = name.rpartition(".")[0]  # a name within a module
                if name:
                    yield module, name


def imported(node: ast.AST, folder: list[str]) -> Iterator[str]:
    """Dotted names without ``mmedge.`` that a statement may import."""
    if isinstance(node, ast.Import):
        yield from (alias.name.removeprefix("mmedge.") for alias in node.names if alias.name.startswith("mmedge."))
    elif isinstance(node, ast.ImportFrom):
        base = (node.module or "").split(".")
        if node.level:
            base = [*folder[: len(folder) - node.level + 1], *filter(None, base)]
        elif base[0] == "mmedge":
            base = base[1:]
        else:
            return
        yield from (".".join([*base, alias.name]) for alias in node.names)


def wrong_imports(package: Path) -> list[str]:
    level = {part: number for number, layer in enumerate(LAYERS) for part in layer}
    wrong = []
    for module, name in imports(package):
        part, other = module.partition(".")[0], name.partition(".")[0]
        if not part or part == other or (module, name) in UPWARD:
            continue
        allowed = {name, other} & ONLY[part] if part in ONLY else level[other] < level[part]
        if not allowed:
            wrong.append(f"{module} imports {name}")
    return wrong


def test_imports_go_one_way() -> None:
    assert wrong_imports(PACKAGE) == []


def test_every_part_has_a_layer() -> None:
    """A new module or folder at the top must be given its place above."""
    parts = {name.partition(".")[0] for name, _, _ in sources(PACKAGE)} - {""}
    assert parts == {part for layer in LAYERS for part in layer}


def test_package_itself_imports_nothing() -> None:
    assert [name for module, name in imports(PACKAGE) if not module] == []


BAD_IMPORTS = {
    "upward": ("artifact.py", "from mmedge.task import Task", "artifact imports task"),
    "upward, as a module": ("task.py", "from mmedge import recipe", "task imports recipe"),
    "upward, plain": ("task.py", "import mmedge.pipeline.line", "task imports pipeline.line"),
    "upward, relative": ("lower/passes.py", "from ..profile import latency", "lower.passes imports profile.latency"),
    "in a function": ("task.py", "def f():\n    from mmedge.cli.main import main", "task imports cli.main"),
    "for types": ("stages/base.py", "if TYPE_CHECKING:\n    from mmedge.lower import a", "stages.base imports lower"),
    "beside": ("targets/base.py", "from mmedge.stages import base", "targets.base imports stages.base"),
    "not the worker": ("profile/latency.py", "from mmedge import plugins", "profile.latency imports plugins"),
    "too much for plugins": ("plugins.py", "from mmedge.task import Task", "plugins imports task"),
    "too much for recipe": ("recipe.py", "from mmedge.report.html import x", "recipe imports report.html"),
}


@pytest.mark.parametrize(("file", "code", "said"), BAD_IMPORTS.values(), ids=BAD_IMPORTS)
def test_bad_import_is_found(tmp_path: Path, file: str, code: str, said: str) -> None:
    """The checker works: the package's skeleton with one import added."""
    for _, source, _ in sources(PACKAGE):
        copy = tmp_path / source.relative_to(PACKAGE)
        copy.parent.mkdir(exist_ok=True, parents=True)
        copy.touch()
    assert wrong_imports(tmp_path) == []
    (tmp_path / file).write_text(code)
    assert wrong_imports(tmp_path) == [said]


# --- what stays light

HEAVY = (
    "torch",
    "onnx",
    "onnxruntime",
    "openvino",
    "tensorrt_rtx",
    "onnxscript",
    "onnx_ir",
    "torchao",
    "torch_pruning",
)
DEVICE_SIDE = (
    *("errors", "tensors", "artifact", "progress", "plugins", "targets.base", "targets.checked"),
    *("profile.worker", "profile.latency", "profile.statistics", "profile.single", "report.model", "cli.main"),
    *("task", "recipe", "report.gates", "report.terminal"),
    *(f"targets.{name}" for name in ("onnxruntime", "openvino", "tensorrt.target", "torch", "torch_tensorrt")),
)
COMMANDS = (
    *(["--help"], ["--version"], ["compress", "--help"], ["profile", "--help"], ["recipe", "list"]),
    *(["recipe", "show", "int8_distill"], ["task", "list"], ["report", "nowhere"], ["profile", "nowhere"]),
)


def heavy_after(steps: str) -> Any:
    """Runs ``steps`` in a new interpreter, which fills ``found`` by calling ``heavy()``; returns ``found``."""
    code = (
        "import contextlib, importlib, io, json, sys\n"
        f"def heavy(): return [name for name in {HEAVY!r} if name in sys.modules]\n"
        f"found = {{}}\n{steps}\nsys.__stdout__.write(json.dumps(found))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_device_side_imports_neither_torch_nor_onnx() -> None:
    steps = f"for name in {DEVICE_SIDE!r}:\n    importlib.import_module(f'mmedge.{{name}}'); found[name] = heavy()"
    assert heavy_after(steps) == {name: [] for name in DEVICE_SIDE}


def test_import_and_light_commands_load_no_torch() -> None:
    steps = f"""
import mmedge
found["import mmedge"] = heavy()
from mmedge.cli.main import main
for arguments in {COMMANDS!r}:
    sys.argv = ["mmedge", *arguments]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            main()
        except SystemExit:
            found[" ".join(arguments)] = heavy()
"""
    found = heavy_after(steps)
    assert found == {step: [] for step in ["import mmedge", *map(" ".join, COMMANDS)]}


def test_planning_a_run_loads_no_exporter_and_no_quantizer() -> None:
    """They take as long as torch, and neither a mistake in a recipe nor a run that finds everything made needs them."""
    steps = """
import mmedge.pipeline.compress
from mmedge.recipe import find_recipe, load_recipe, plan
plan(load_recipe(find_recipe("int8_distill")), "int8_distill")
slow = ("torchao", "torch._dynamo", "onnx_ir", "onnxscript", "sympy")
found["torch"] = "torch" in sys.modules
found["slow"] = [name for name in slow if name in sys.modules]
"""
    assert heavy_after(steps) == {"torch": True, "slow": []}


def test_heavy_is_seen() -> None:
    assert heavy_after("import onnx; found['onnx'] = heavy()") == {"onnx": ["onnx"]}


# --- what is installed


def entry_points() -> list[EntryPoint]:
    return [point for point in distribution("mmedge").entry_points if point.group.startswith(("mmedge.", "console_"))]


@pytest.mark.parametrize("point", entry_points(), ids=lambda point: f"{point.group}: {point.name}")
def test_entry_point_loads(point: EntryPoint) -> None:
    found = point.load()
    if point.group in ("mmedge.stages", "mmedge.targets"):
        assert found.name == point.name
        assert not found.__abstractmethods__
    else:
        assert callable(found)


def test_every_kind_is_offered() -> None:
    for kind in plugins.GROUPS:
        assert plugins.names(kind)
        assert set(plugins.loaders(kind)) == set(plugins.names(kind))
    assert {point.group for point in entry_points()} == {*plugins.GROUPS.values(), "console_scripts"}


# --- what is never called

NEVER = {
    *(f"{module}.{name}" for module in ("pickle", "marshal", "dill") for name in ("load", "loads", "Unpickler")),
    *(f"yaml.{name}" for name in ("load", "load_all", "full_load", "unsafe_load", "Loader", "UnsafeLoader")),
    *("torch.save", "torch.jit.load", "shelve.open", "joblib.load", "os.system", "eval", "exec"),
}


def unsafe_calls(tree: ast.Module) -> list[str]:
    """Calls that may run what a file holds, as ``line: name``."""
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        head, *rest = ast.unparse(node.func).split(".")
        name = ".".join([names.get(head, head), *rest])
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        pickled = options.get("allow_pickle", "False") != "False" or options.get("shell", "False") != "False"
        if name in NEVER or pickled or (name == "torch.load" and options.get("weights_only") != "True"):
            found.append(f"{node.lineno}: {name}")
    return found


def test_package_calls_nothing_unsafe() -> None:
    assert {str(file): calls for _, file, tree in sources(PACKAGE) if (calls := unsafe_calls(tree))} == {}


@pytest.mark.parametrize(
    "code",
    [
        "import pickle\npickle.load(f)",
        "from pickle import loads as read\nread(b)",
        "import torch\ntorch.load(f)",
        "import torch as t\nt.load(f, weights_only=False)",
        "from torch import load\nload(f, weights_only=flag)",
        "import yaml\nyaml.load(f, yaml.SafeLoader)",
        "import yaml\nyaml.unsafe_load(f)",
        "import numpy as np\nnp.load(f, allow_pickle=True)",
        "eval(text)",
        "import subprocess\nsubprocess.run(line, shell=True)",
    ],
)
def test_unsafe_call_is_found(code: str) -> None:
    assert len(unsafe_calls(ast.parse(code))) == 1


def test_safe_calls_are_not_found() -> None:
    code = "import torch, yaml, json\ntorch.load(f, weights_only=True)\nyaml.safe_load(t)\njson.load(f)\nmodel.eval()"
    assert unsafe_calls(ast.parse(code)) == []
