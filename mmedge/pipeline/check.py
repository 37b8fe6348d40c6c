"""Finding out what is wrong with a task before any work is spent on it."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping

import numpy as np
import torch

from mmedge.errors import MmedgeError, StageError, TargetError, TaskError
from mmedge.stages.base import Network, as_tensor, as_tensors, not_float32, outputs_of
from mmedge.task import SPLITS, Batch, Split, Task
from mmedge.tensors import DTYPES, Array

DIGESTED_SAMPLES = 256  # of the test and the calibration split; reading more would make every command slow
EXPORTED_SAMPLES = 8  # that an exported model answers; a large one is slow


def digest_of_task(task: Task) -> str:
    """A hash of what results depend on: source files, weights, declarations, and the data as far as it is read here.

    That is the first batch for training and the first samples of the other splits: a change behind them goes unnoticed.
    """
    digest = hashlib.sha256(task.source.encode())
    digest.update(repr((task.inputs, task.outputs, task.metric.name, task.metric.higher_is_better)).encode())
    for name, tensor in sorted(task.model.state_dict().items()):
        digest.update(name.encode() + tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    for split in SPLITS:
        left = 1 if split == "train" else DIGESTED_SAMPLES
        for batch in task.stream(split):
            for name, array in sorted({**batch.inputs, "targets": batch.targets}.items()):
                digest.update(f"{name} {array.dtype} {array.shape}".encode() + np.ascontiguousarray(array).tobytes())
            left -= len(batch)
            if left <= 0:
                break
    return digest.hexdigest()


def check_model(task: Task) -> dict[str, torch.Tensor]:
    """Weights, outputs, loss and metric on one calibration batch.

    Returns:
        What the model says to that batch.

    Raises:
        TaskError: names what is wrong.
    """
    where = f"task {task.name}"
    _check_weights(task.model, where)
    batch = task.example()
    outputs = _forward(task, batch)
    _check_outputs(outputs, batch, where)
    _check_alone(task, outputs, batch)
    _check_loss(task, outputs, batch)
    for metric in (task.metric, *task.also):
        task.score({name: tensor.numpy() for name, tensor in outputs.items()}, batch.targets, metric)
    return outputs


def _check_weights(model: torch.nn.Module, where: str) -> None:
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        raise TaskError("the model is TorchScript", where=where, fix="give the nn.Module, not a scripted or traced one")
    _check_copies(model, where)
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, torch.Tensor):
            raise TaskError(f"{name} in the model's state is {type(tensor).__name__}, not a tensor", where=where)
        if tensor.is_meta:
            fix = "build the model without torch.device('meta'), then load its weights"
            raise TaskError(f"weight {name} has no values: it is on the meta device", where=where, fix=fix)
        if tensor.is_floating_point() and not tensor.isfinite().all():
            fix = "the checkpoint is damaged or training diverged: load another"
            raise TaskError(f"weight {name} holds NaN or infinite values", where=where, fix=fix)
    if other := not_float32(model):
        name, dtype = other
        fix = f"load it in float32: model.float(), and no casts to {dtype} in forward(); mmedge lowers the precision"
        raise TaskError(f"weight {name} is {dtype}, not float32", where=where, fix=f"{fix} itself")


def _check_outputs(outputs: Mapping[str, torch.Tensor], batch: Batch, where: str) -> None:
    for name, tensor in outputs.items():
        if not isinstance(tensor, torch.Tensor):
            raise TaskError(f"output {name} is {type(tensor).__name__}, not a tensor", where=where)
        if tensor.ndim == 0 or len(tensor) != len(batch):
            shape = tuple(tensor.shape)
            raise TaskError(f"output {name} has shape {shape} for a batch of {len(batch)}", where=where)
        if (dtype := str(tensor.dtype).removeprefix("torch.")) not in DTYPES:
            raise TaskError(f"output {name} has dtype {dtype}, engines give {', '.join(DTYPES)}", where=where)
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise TaskError(f"output {name} holds NaN or infinite values", where=where, fix="check inputs and weights")


def _check_alone(task: Task, outputs: Mapping[str, torch.Tensor], batch: Batch) -> None:
    """Accuracy comes from batches and latency from single samples: both must be of the same network."""
    try:
        alone = _forward(task, _first(batch, 1))
    except TaskError as err:
        problem = f"it takes a batch of {len(batch)} and no single sample: {err.problem}"
        fix = "no fixed batch size in view(), reshape() or expand(): take x.shape[0] or -1"
        raise TaskError(problem, where=err.where, fix=fix) from err
    if not (name := _other_than(outputs, alone)):
        return
    if _other_than(outputs, _forward(task, batch)):
        problem = f"output {name} changes from call to call"
        fix = "look for randomness, and for inputs or state that forward() changes in place"
    else:
        problem = f"output {name} depends on the other samples of the batch: the first one alone gives another answer"
        fix = "no statistics over the batch in eval mode: mean(0), a branch, BatchNorm with track_running_stats=False"
    raise TaskError(problem, where=f"task {task.name}: model", fix=fix)


def _first(batch: Batch, samples: int) -> Batch:
    return Batch({name: array[:samples] for name, array in batch.inputs.items()}, batch.targets[:samples])


def _other_than(outputs: Mapping[str, torch.Tensor], others: Mapping[str, torch.Tensor]) -> str:
    """The first output that differs in its first rows by more than kernels for other sizes round differently."""
    for name, tensor in outputs.items():
        if not tensor.is_floating_point():
            continue  # made by argmax or the like: one step of rounding may be the next number
        found, own = others[name].double(), tensor.double()
        rounding = 100 * torch.finfo(tensor.dtype).eps * own.abs().max()
        if (found - own[: len(found)]).abs().max() > 1e-2 * own.std(unbiased=False) + rounding:
            return name
    return ""


def _check_copies(model: torch.nn.Module, where: str) -> None:
    """Stages work on copies."""
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}  # which can be copied
    try:
        copy.deepcopy(model, tensors)
    except Exception as err:
        raise TaskError(
            f"the model cannot be copied: {type(err).__name__}: {(str(err).splitlines() or [''])[0]:.200}",
            where=where,
            fix="keep parameters, buffers and plain values in modules, no tensors computed from them: call "
            "torch.nn.utils.remove_weight_norm() where weight_norm() was applied, or take "
            "torch.nn.utils.parametrizations.weight_norm",
        ) from err


def _forward(task: Task, batch: Batch) -> dict[str, torch.Tensor]:
    try:
        with torch.no_grad():
            return outputs_of(task.model.eval(), as_tensors(batch.inputs), task.outputs)
    except MmedgeError as err:
        raise TaskError(err.problem, where=f"task {task.name}: model", fix="correct Task(outputs=...)") from err
    except Exception as err:
        shapes = ", ".join(f"{name} {array.shape}" for name, array in batch.inputs.items())
        raise TaskError(
            f"model(**inputs) raised {type(err).__name__}: {str(err).splitlines()[0] if str(err) else ''}",
            where=f"task {task.name}: model with {shapes}",
            fix="the declared inputs must be the names and shapes that forward() takes",
        ) from err


def _check_loss(task: Task, outputs: Mapping[str, torch.Tensor], batch: Batch) -> None:
    where = f"task {task.name}: loss"
    try:
        loss = task.loss(outputs, as_tensor(batch.targets))
    except Exception as err:
        raise TaskError(f"raised {type(err).__name__}: {err}", where=where) from err
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
        raise TaskError("did not return one number as a tensor", where=where, fix="return a scalar tensor")
    if not loss.isfinite():
        raise TaskError(f"is {float(loss)} on the trained model", where=where, fix="check the targets")


def untrainable(task: Task, outputs: Mapping[str, torch.Tensor]) -> str | None:
    """Why stages that train will refuse the task's own loss, None where they take it.

    Args:
        task: checked.
        outputs: of the model, for the first calibration batch.
    """
    from mmedge.stages.distillation.student import check_gradient

    try:
        check_gradient(task, outputs, as_tensor(task.example().targets))
    except StageError as err:
        return str(err)
    return None


def check_splits(task: Task, limit: int | None) -> dict[str, int]:
    """Walk the splits (up to ``limit`` samples each), check every batch, and that no sample is in two splits.

    Returns:
        Samples seen by split.

    Raises:
        TaskError: a batch is wrong, a named dimension changes its size, or two splits share a sample.
    """
    owner: dict[str, str] = {}
    sizes: dict[tuple[str, str], int] = {}
    counts: dict[str, int] = {}
    order: tuple[Split, ...] = ("test", "calibration", "train")
    for split in order:
        counts[split] = 0
        for batch in task.stream(split):
            _check_sizes(task, split, batch, sizes)
            for identity in _identities(batch)[: None if limit is None else limit - counts[split]]:
                counts[split] += 1
                if owner.setdefault(identity, split) != split:
                    raise TaskError(
                        f"{split} and {owner[identity]} share a sample ({identity[:60]})",
                        where=f"task {task.name}: batches",
                        fix="split the data so that no sample is in two splits, else the accuracy flatters",
                    )
            if counts[split] == limit:
                break
    return counts


def _check_sizes(task: Task, split: Split, batch: Batch, sizes: dict[tuple[str, str], int]) -> None:
    """Only the batch stays symbolic in an engine; other named dimensions are built with the size they have."""
    for spec in task.inputs:
        for size, name in zip(batch.inputs[spec.name].shape[1:], spec.shape[1:], strict=True):
            if isinstance(name, str) and sizes.setdefault((spec.name, name), size) != size:
                raise TaskError(
                    f"{spec.name}: dimension {name!r} is {size}, in other batches {sizes[spec.name, name]}",
                    where=f"task {task.name}: {split}",
                    fix="pad to one size: engines are built for one",
                )


def _identities(batch: Batch) -> list[str]:
    if batch.ids is not None:
        return [str(identity) for identity in batch.ids]
    return [_hash_of(batch.inputs, index) for index in range(len(batch))]


def _hash_of(inputs: Mapping[str, Array], index: int) -> str:
    digest = hashlib.sha256()
    for name in sorted(inputs):
        digest.update(np.ascontiguousarray(inputs[name][index]).tobytes())
    return digest.hexdigest()


def check_repeatable(task: Task) -> None:
    """The same arguments must give the same batch: caching and interleaved comparison rest on it.

    Only the training split may depend on the seed.

    Raises:
        TaskError: they do not, or another split does.
    """
    for split in SPLITS:
        _check_same(task, split, 0, f"batches({split!r}, 0) gave different {{}} the second time")
        if split != "train":
            _check_same(task, split, 1, f"batches({split!r}, seed) gives different {{}} for another seed")


def _check_same(task: Task, split: Split, seed: int, problem: str) -> None:
    first, second = (next(iter(task.stream(split, number))) for number in (0, seed))
    for name, array in {**first.inputs, "targets": first.targets}.items():
        if not np.array_equal(array, {**second.inputs, "targets": second.targets}[name]):
            fix = 'draw all randomness from numpy.random.default_rng(seed), with a fixed seed for all but "train"'
            raise TaskError(problem.format(name), where=f"task {task.name}", fix=fix)


def check_export(task: Task) -> None:
    """Trace and export the trained model, and run the result in ONNX Runtime beside PyTorch, on a few samples.

    Raises:
        StageError: it cannot be exported.
        TaskError: the exported model does not run, or answers differently.
    """
    import tempfile
    from pathlib import Path

    from mmedge import plugins
    from mmedge.lower.export import onnx_of, write
    from mmedge.profile.accuracy import parity

    target = plugins.target("onnxruntime")
    target.check()
    batch = _first(task.example(), EXPORTED_SAMPLES)
    with tempfile.TemporaryDirectory() as name:
        model, engine = Path(name) / "exported.onnx", Path(name) / "engine"
        engine.mkdir()
        write(onnx_of(Network(task.model.eval()), task), model)
        reference = {key: value.numpy() for key, value in _forward(task, batch).items()}
        try:
            target.build(model, engine)
            with target.runner(engine, 1) as run:
                found = parity(reference, run(batch.inputs))
        except TargetError as err:  # the runtime is fine: it is this model that it cannot take
            raise TaskError(f"the exported model does not run: {err.problem}", where=err.where, fix=err.fix) from err
    if found["cosine"] < 0.999:
        raise TaskError(
            f"the exported model answers differently: cosine {found['cosine']:.4f}, largest gap {found['max_abs']:.3g}",
            where=f"task {task.name}",
            fix="look for randomness, in-place state or branches on values in forward()",
        )
