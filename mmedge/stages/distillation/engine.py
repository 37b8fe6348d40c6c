"""Where a training runs, by Hugging Face Accelerate: this process on the processor, or what a launcher started.

Several processes share every batch: each takes some of its rows, and what they make of them is brought together before
the losses are computed. So each loss is that of the whole batch, also where samples are compared with one another, and
the gradients are those of one process with the same batch. Batch statistics are of each process's rows, as is usual.
"""

from __future__ import annotations

import atexit
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
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
CPU = torch.device("cpu")
LEAVE = 0.3  # seconds; one that waits for the lock gets it at once


class Engine:
    """What the processes of a training do together.

    On one process nothing is shared, and the numbers are those of the plain loop. Several processes on CPUs were run
    (gloo); GPUs and Weights & Biases are written to the documentation and were not.

    Attributes:
        count: number of processes.
        index: of this one; the first writes and speaks.
        device: that modules and batches must be on.
        precision: that calls of the module run in.

    Raises:
        StageError: a package is missing, or what the settings ask for is not to be had here.
    """

    def __init__(self, settings: Training, label: str) -> None:
        self.accelerator = _accelerator(settings.track, label)
        self.count, self.index = self.accelerator.num_processes, self.accelerator.process_index
        self.device = self.accelerator.device
        self.precision = precision(settings.precision, self.device)
        self._check(settings, label)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")
        if settings.track is not None:
            self.accelerator.init_trackers(label, init_kwargs={"wandb": {"dir": settings.track.folder}})

    def _check(self, settings: Training, label: str) -> None:
        if self.precision == "fp16" and self.device.type == "cpu":
            raise StageError(
                "precision: fp16 needs a GPU",
                where=label,
                fix="use auto, bf16 or fp32; or start on a GPU machine with: accelerate launch -m mmedge …",
            )
        if settings.shard_teacher and self.count == 1:
            raise StageError(
                "shard_teacher: there is one process, nothing to spread the teacher over",
                where=label,
                fix="start with: torchrun --nproc-per-node 2 -m mmedge …; or leave shard_teacher out",
            )

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exception: object) -> None:
        """Let go of what was held."""
        for tracker in self.accelerator.trackers:
            tracker.finish()
        self.accelerator.free_memory()

    def autocast(self) -> AbstractContextManager[Any]:
        """Mixed precision for what runs within."""
        return _autocast(self.precision, self.device)

    def prepare(self, module: nn.Module) -> nn.Module:
        """The module, on the device and ready to be trained by all processes."""
        prepared: nn.Module = self.accelerator.prepare(module)
        return prepared

    def share(self, tensors: Named) -> dict[str, Tensor]:
        """This process's rows of a batch, on its device."""
        count = len(next(iter(tensors.values())))
        each = -(-count // self.count)
        # The last rows are given twice where they do not divide; ``whole`` drops them again.
        rows = torch.arange(self.index * each, (self.index + 1) * each).clamp(max=count - 1)
        return {name: (tensor[rows] if self.count > 1 else tensor).to(self.device) for name, tensor in tensors.items()}

    def whole(self, tensors: Named, count: int) -> dict[str, Tensor]:
        """The rows of all processes brought together: a batch of ``count`` samples again."""
        if self.count == 1:
            return dict(tensors)
        found = {}
        for name, own in tensors.items():
            parts = list(self.accelerator.gather(own.detach().contiguous()).chunk(self.count))
            parts[self.index] = own  # with its gradient
            found[name] = torch.cat(parts)[:count]
        return found

    def alone(self, module: nn.Module) -> AbstractContextManager[Any]:
        """Within, gradients are only added up: no process waits for the others."""
        found: AbstractContextManager[Any] = self.accelerator.no_sync(module)
        return found

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of the whole batch's loss."""
        # Every process has the gradient that runs through its own rows. Their sum is wanted, DDP gives their mean.
        self.scaler.scale(loss * self.count if self.count > 1 else loss).backward()

    def step(self, optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter], max_norm: float) -> None:
        """One step along the gradients, scaled down to a norm."""
        self.scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(parameters, max_norm)
        self.scaler.step(optimizer)
        self.scaler.update()

    def draw(self, seed: int, step: int) -> None:
        """Before a step: the random state, where processes must draw differently."""
        if self.count > 1:
            torch.manual_seed(int(np.random.SeedSequence([seed, step, self.index]).generate_state(1)[0]))

    def settle(self, module: nn.Module) -> None:
        """After training: the module on the processor again, and the same on every process."""
        from accelerate.utils import broadcast

        for buffer in module.buffers() if self.count > 1 else ():  # batch statistics are of each process's own rows
            buffer.copy_(broadcast(buffer))
        module.to("cpu")

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Show values where the settings say."""
        self.accelerator.log(dict(values), step=step)


def launched() -> bool:
    """Whether ``accelerate launch`` or ``torchrun`` started this process."""
    return "LOCAL_RANK" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ


def told(value: Any) -> Any:
    """The first process's ``value``, on every process; they must have been connected."""
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([value])[0]


def connect() -> tuple[int, int]:
    """Connect the processes that a launcher started; their number and which of them this is."""
    found = _accelerator(None, "distill")
    return found.num_processes, found.process_index


def _accelerator(track: Tracking | None, label: str) -> Any:
    """An ``Accelerator``; connects the processes when it is the first."""
    if find_spec("accelerate") is None:
        raise StageError(needs_extra("accelerate", "compress"), where=label)
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

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
    # Between two trainings the others wait while the first builds engines and times them, for hours perhaps.
    patient = InitProcessGroupKwargs(timeout=timedelta(days=7))
    accelerator = Accelerator(mixed_precision="no", kwargs_handlers=[unused, patient], **options)
    if distributed.is_initialized() and not connected:
        atexit.register(_disconnect)
    return accelerator


def _disconnect() -> None:
    """Take leave of the other processes, once gloo's threads have let go of the last message.

    They need Python's lock for that, and one that asks for it when Python is ending aborts the process (PyTorch
    2.13, whose DistributedDataParallel keeps these threads alive to the end).
    """
    time.sleep(LEAVE)
    distributed.destroy_process_group()


def _check_installed(track: Tracking) -> None:
    for tool in track.tools:  # Accelerate leaves a tracker out that is not there
        if find_spec(tool) is None:
            package = '"mmedge[track]"' if tool == "tensorboard" else tool
            raise StageError(f"{tool} is not installed", where="distill.track", fix=f"pip install {package}")


def precision(choice: Choice, device: torch.device = CPU) -> Precision:
    """What ``auto`` means on a device."""
    if choice != "auto":
        return choice
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16" if native else "fp32"


def autocast(choice: Choice) -> AbstractContextManager[Any]:
    """The autocast context for a precision on the processor."""
    return _autocast(precision(choice), CPU)


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
