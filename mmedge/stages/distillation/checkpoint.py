"""What is kept of a training that is under way, so that a killed process goes on at the step it had reached."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mmedge.artifact import digest_of, writing
from mmedge.errors import ArtifactError

SHARE = 0.05  # of the time that may go into saving


class Checkpoints:
    """The latest state of one training, in a folder of its own.

    A state is complete or not there: it is written beside the one before and renamed into place.

    Args:
        folder: survives the process; None keeps nothing.
        origin: what the training began with; a state of another one is not taken.
        warn: told when a state cannot be used.
        writes: False on a process that only reads.
    """

    def __init__(self, folder: Path | None, origin: str, warn: Callable[[str], None], writes: bool = True) -> None:
        self.folder, self.origin, self.warn, self.writes = folder, origin, warn, writes
        self.cost, self.saved = 0.0, time.monotonic()

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The latest state, None where there is none that can be used; others are set aside."""
        for place in reversed(self._states()):
            try:
                facts = json.loads((place / "state.json").read_text())
                tensors = load_file(place / "tensors.safetensors")
            except (OSError, ValueError, SafetensorError) as err:
                self._set_aside(place, f"cannot be read: {err}")
                continue
            if facts["origin"] == self.origin:
                return tensors, facts
            self._set_aside(place, "is of another training")
        return None

    def _set_aside(self, place: Path, reason: str) -> None:
        if self.writes:
            aside = place.with_name(f".unused-{place.name}-{time.time_ns()}")
            place.rename(aside)
            self.warn(f"the training state {place} {reason}; kept as {aside.name}, training begins anew")

    def due(self) -> bool:
        """Whether to save now: at most a twentieth of the time goes into it."""
        return self.folder is not None and self.writes and time.monotonic() - self.saved >= self.cost * (1 / SHARE - 1)

    def save(self, step: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Keep the state after ``step`` steps in place of those before.

        Raises:
            ArtifactError: the disk is full or the folder cannot be written.
        """
        if self.folder is None or not self.writes:
            return
        began = time.monotonic()
        _make(self.folder)
        before = self._states()
        place = self.folder / f"step-{step:09d}"
        with writing(place, "keeping the state of the training") as folder:
            save_file({name: _own(tensor) for name, tensor in tensors.items()}, folder / "tensors.safetensors")
            (folder / "state.json").write_text(json.dumps({"origin": self.origin, **facts}))
        for old in before:
            shutil.rmtree(old)
        self.saved = time.monotonic()
        self.cost = self.saved - began

    def _states(self) -> list[Path]:
        return sorted(self.folder.glob("step-*")) if self.folder is not None else []


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(".making-*"):  # of a process that was killed
            shutil.rmtree(leftover)
    except OSError as err:
        fix = "free some space or choose another --output, then run the same command: it resumes"
        raise ArtifactError(f"the training cannot be kept: {err}", where=str(folder), fix=fix) from err


def _own(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu").clone(memory_format=torch.contiguous_format)


def origin_of(module: nn.Module, facts: Mapping[str, Any]) -> str:
    """The hash of a module's state and of what else a training depends on (a JSON value)."""
    digest = hashlib.sha256(digest_of(dict(facts)).encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(_own(tensor).reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


Groups = list[dict[str, Any]]


def optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], Groups]:
    """An optimizer's tensors by ``number of the parameter.name``, and its settings as JSON."""
    state = optimizer.state_dict()
    tensors = {f"{index}.{name}": value for index, kept in state["state"].items() for name, value in kept.items()}
    return tensors, [
        {name: value for name, value in group.items() if name != "params"} for group in state["param_groups"]
    ]


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], groups: Groups) -> None:
    """Put back what ``optimizer_state`` gave."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for key, value in tensors.items():
        index, _, name = key.partition(".")
        parameter = parameters[int(index)]
        # In the parameter's own layout, as the optimizer made it.
        place = torch.empty_like(parameter) if value.shape == parameter.shape else torch.empty_like(value)
        optimizer.state[parameter][name] = place.copy_(value)
    for group, kept in zip(optimizer.param_groups, groups, strict=True):
        group.update({name: tuple(value) if isinstance(value, list) else value for name, value in kept.items()})
