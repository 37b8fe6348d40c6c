"""What is kept of a training that is under way, so that a killed process goes on at the step it had reached."""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mmedge.artifact import Store, digest_of, load_artifact
from mmedge.errors import ArtifactError

SHARE = 0.05  # of the time that may go into saving
TENSORS = "tensors.safetensors"


class Checkpoints:
    """The latest state of one training: an artifact, so it is whole and undamaged or not taken.

    Args:
        scratch: survives the process; None keeps nothing.
        origin: what the training began with; every origin has a folder of its own within ``scratch``.
        say: told when a state cannot be used.
    """

    def __init__(self, scratch: Path | None, origin: str, say: Callable[[str], None]) -> None:
        self.origin, self.say = origin, say
        self.store = None if scratch is None else Store(scratch / origin[:12], "", say)
        self.cost, self.saved = 0.0, time.monotonic()

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The latest state, None where there is none that can be used; others are set aside."""
        for place in reversed(self._states()):
            try:
                kept = load_artifact(place)
                if kept.manifest.inputs != {"origin": self.origin}:
                    raise ArtifactError("it is of another training", where=str(place))
                return load_file(kept.file(TENSORS)), kept.about
            except ArtifactError as err:
                aside = place.with_name(f".unused-{place.name}-{time.time_ns()}")
                place.rename(aside)
                self.say(f"the training cannot be resumed: {err}; kept as {aside.name}, it begins anew")
        return None

    def due(self) -> bool:
        """Whether to save now: at most a twentieth of the time goes into it."""
        return self.store is not None and time.monotonic() - self.saved >= self.cost * (1 / SHARE - 1)

    def save(self, step: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Keep the state after ``step`` steps in place of those before.

        Raises:
            ArtifactError: the disk is full or the folder cannot be written.
        """
        if self.store is None:
            return

        def write(folder: Path) -> Mapping[str, Any]:
            try:
                save_file({name: _own(tensor) for name, tensor in tensors.items()}, folder / TENSORS)
            except SafetensorError as err:
                fix = "free some space or choose another --output, then run the same command: it resumes"
                raise ArtifactError(f"the training cannot be kept: {err}", where=str(folder.parent), fix=fix) from err
            return facts

        began, before = time.monotonic(), self._states()
        self.store.make("cache", f"step-{step:09d}", {"origin": self.origin}, write)
        for old in before:
            shutil.rmtree(old)
        self.saved = time.monotonic()
        self.cost = self.saved - began

    def _states(self) -> list[Path]:
        return sorted(self.store.root.glob("step-*")) if self.store is not None else []


def _own(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu").clone(memory_format=torch.contiguous_format)


def origin_of(module: nn.Module, facts: Mapping[str, Any]) -> str:
    """The hash of a module's state and of what else a training depends on (a JSON value)."""
    digest = hashlib.sha256(digest_of(dict(facts)).encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(_own(tensor).reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """An optimizer's tensors by ``number of the parameter.name``, and its settings as JSON."""
    state = optimizer.state_dict()
    tensors = {f"{index}.{name}": value for index, kept in state["state"].items() for name, value in kept.items()}
    return tensors, state["param_groups"]


def load_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], groups: list[dict[str, Any]]
) -> None:
    """Put back what ``optimizer_state`` gave."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": groups})
