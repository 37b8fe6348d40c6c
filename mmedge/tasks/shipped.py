"""Trained weights and data of the built-in tasks.

They lie beside the code in a checkout. As a package they come apart (``mmedge-models``): a device that only runs
engines need not carry them.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from mmedge.errors import TaskError

if TYPE_CHECKING:
    from torch import Tensor


def shipped(package: str, name: str) -> Path:
    """The path of a file of a built-in task.

    Raises:
        TaskError: it is not installed.
    """
    path = Path(str(files(package) / name))
    if not path.is_file():
        task = package.rpartition(".")[2]
        raise TaskError(f"{name} is not installed", where=f"task {task}", fix="pip install mmedge-models")
    return path


def trained_weights(package: str) -> dict[str, Tensor]:
    """The state of a built-in task's trained model, float32: it is kept in half precision to halve the file.

    Raises:
        TaskError: it is not installed.
    """
    from safetensors.torch import load_file

    state = load_file(shipped(package, "teacher.safetensors"))
    return {name: value.float() if value.is_floating_point() else value for name, value in state.items()}
