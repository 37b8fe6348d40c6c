"""Where a training runs: on this process alone, or by Hugging Face Accelerate on whatever it was launched on.

Several processes share every batch: each takes some of its rows, and what they make of them is brought together before
the losses are computed. So each loss is that of the whole batch, also where samples are compared with one another, and
the gradients are those of one process with the same batch. Batch statistics are of each process's rows, as is usual.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.util import find_spec
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, distributed, nn

from mmedge.errors import StageError, needs_extra
from mmedge.stages.distillation.settings import Tracking, Training

Choice = Literal["auto", "fp32", "bf16", "fp16"]
Precision = Literal["fp32", "bf16", "fp16"]
Named = Mapping[str, Tensor]


class Engine:
    """One process on the processor.

    Attributes:
        count: number of processes.
        index: of this one; the first writes and speaks.
        device: that modules and batches must be on.
        precision: that calls of the module run in.
    """

    count, index = 1, 0
    device = torch.device("cpu")

    def __init__(self, choice: Choice) -> None:
        self.precision = precision(choice, self.device)
        if self.precision == "fp16" and self.device.type == "cpu":
            raise StageError(
                "precision: fp16 needs a GPU",
                where="distill",
                fix="use auto, bf16 or fp32; or start on a GPU machine with: accelerate launch -m mmedge.cli.main …",
            )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exception: object) -> None:
        """Let go of what was held."""

    def autocast(self) -> AbstractContextManager[Any]:
        """Mixed precision for what runs within."""
        return _autocast(self.precision, self.device)

    def prepare(self, module: nn.Module) -> nn.Module:
        """The module, on the device and ready to be trained by all processes."""
        return module

    def share(self, tensors: Named) -> dict[str, Tensor]:
        """This process's rows of a batch, on its device."""
        return dict(tensors)

    def whole(self, tensors: Named, count: int) -> dict[str, Tensor]:
        """The rows of all processes brought together: a batch of ``count`` samples again."""
        return dict(tensors)

    def alone(self, module: nn.Module) -> AbstractContextManager[Any]:
        """Within, gradients are only added up: no process waits for the others."""
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of the whole batch's loss."""
        self.scaler.scale(loss).backward()

    def step(self, optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter], max_norm: float) -> None:
        """One step along the gradients, scaled down to a norm."""
        self.scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(parameters, max_norm)
        self.scaler.step(optimizer)
        self.scaler.update()

    def draw(self, seed: int, step: int) -> None:
        """Before a step: the random state, where processes must draw differently."""

    def told(self, value: Any) -> Any:
        """The first process's ``value``, on every process."""
        return value

    def settle(self, module: nn.Module) -> None:
        """After training: the module on the processor again, and the same on every process."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Show values where the settings say."""


class Accelerated(Engine):
    """Accelerate: any number of processes, on GPUs where there are some, with trackers.

    Processes on CPUs were run (gloo); GPUs and Weights & Biases are written to the documentation and were not.

    Raises:
        StageError: a package is missing.
    """

    def __init__(self, settings: Training, label: str) -> None:
        if find_spec("accelerate") is None:
            raise StageError(needs_extra("accelerate", "compress"), where=label)
        self.accelerator = _accelerator(settings.track)
        self.count, self.index = self.accelerator.num_processes, self.accelerator.process_index
        self.device = self.accelerator.device
        super().__init__(settings.precision)
        if settings.track is not None:
            self.accelerator.init_trackers(label, init_kwargs={"wandb": {"dir": settings.track.folder}})

    def __exit__(self, *exception: object) -> None:
        for tracker in self.accelerator.trackers:
            tracker.finish()
        self.accelerator.free_memory()

    def prepare(self, module: nn.Module) -> nn.Module:  # noqa: D102
        prepared: nn.Module = self.accelerator.prepare(module)
        return prepared

    def share(self, tensors: Named) -> dict[str, Tensor]:  # noqa: D102
        count = len(next(iter(tensors.values())))
        each = -(-count // self.count)
        # The last rows are given twice where they do not divide; ``whole`` drops them again.
        rows = torch.arange(self.index * each, (self.index + 1) * each).clamp(max=count - 1)
        return {name: (tensor[rows] if self.count > 1 else tensor).to(self.device) for name, tensor in tensors.items()}

    def whole(self, tensors: Named, count: int) -> dict[str, Tensor]:  # noqa: D102
        if self.count == 1:
            return dict(tensors)
        found = {}
        for name, own in tensors.items():
            parts = list(self.accelerator.gather(own.detach().contiguous()).chunk(self.count))
            parts[self.index] = own  # with its gradient
            found[name] = torch.cat(parts)[:count]
        return found

    def alone(self, module: nn.Module) -> AbstractContextManager[Any]:  # noqa: D102
        found: AbstractContextManager[Any] = self.accelerator.no_sync(module)
        return found

    def backward(self, loss: Tensor) -> None:  # noqa: D102
        # Every process has the gradient that runs through its own rows. Their sum is wanted, DDP gives their mean.
        super().backward(loss * self.count)

    def draw(self, seed: int, step: int) -> None:  # noqa: D102
        if self.count > 1:
            torch.manual_seed(int(np.random.SeedSequence([seed, step, self.index]).generate_state(1)[0]))

    def told(self, value: Any) -> Any:  # noqa: D102
        from accelerate.utils import broadcast_object_list

        return broadcast_object_list([value])[0]

    def settle(self, module: nn.Module) -> None:  # noqa: D102
        from accelerate.utils import broadcast

        for buffer in module.buffers():  # batch statistics are of each process's own rows
            buffer.copy_(broadcast(buffer))
        module.to("cpu")

    def log(self, values: Mapping[str, float], step: int) -> None:  # noqa: D102
        self.accelerator.log(dict(values), step=step)


def engine_for(settings: Training, label: str) -> Engine:
    """Accelerate where a launcher started this process or a tracker is wanted, else this process alone.

    Raises:
        StageError: what the settings ask for is not to be had here.
    """
    engine = Accelerated(settings, label) if launched() or settings.track is not None else Engine(settings.precision)
    if settings.shard_teacher and engine.count == 1:
        raise StageError(
            "shard_teacher: there is one process, nothing to spread the teacher over",
            where=label,
            fix="start with: torchrun --nproc_per_node 2 -m mmedge.cli.main …; or leave shard_teacher out",
        )
    return engine


def launched() -> bool:
    """Whether ``accelerate launch`` or ``torchrun`` started this process."""
    return "LOCAL_RANK" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ


def _accelerator(track: Tracking | None) -> Any:
    """An ``Accelerator``; connects the processes when it is the first."""
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs

    # cuBLAS gives the same sums every time only with a workspace of fixed size (PyTorch, "Reproducibility").
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # A tracker is no reason to move to a GPU; and without one, processes are connected only if told to use CPUs.
    options: dict[str, Any] = {} if launched() and torch.accelerator.is_available() else {"cpu": True}
    if track is not None:
        _check_installed(track)
        options |= {"log_with": list(track.tools), "project_dir": track.folder}
    connected = distributed.is_initialized()
    # A batch that the teacher has not answered gives the projection no gradient.
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    accelerator = Accelerator(mixed_precision="no", kwargs_handlers=[unused], **options)
    if distributed.is_initialized() and not connected:
        atexit.register(distributed.destroy_process_group)
    return accelerator


def _check_installed(track: Tracking) -> None:
    for tool in track.tools:  # Accelerate leaves a tracker out that is not there
        if find_spec(tool) is None:
            raise StageError(f"{tool} is not installed", where="distill.track", fix=f"pip install {tool}")


def precision(choice: Choice, device: torch.device = Engine.device) -> Precision:
    """What ``auto`` means on a device."""
    if choice != "auto":
        return choice
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16" if native else "fp32"


def autocast(choice: Choice) -> AbstractContextManager[Any]:
    """The autocast context for a precision on the processor."""
    return _autocast(precision(choice), Engine.device)


def _autocast(chosen: Precision, device: torch.device) -> AbstractContextManager[Any]:
    if chosen == "fp32":
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16 if chosen == "bf16" else torch.float16)


@contextmanager
def reproducible(seed: int) -> Iterator[None]:
    """Seeded, deterministic torch for the block; the caller's random state is left as it was."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        torch.use_deterministic_algorithms(True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(deterministic)
