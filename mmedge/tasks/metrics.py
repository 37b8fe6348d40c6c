"""Metrics for tasks, computed by torchmetrics: factories that return ``mmedge.task.Metric``.

Each takes the name of the output that is judged; None where the network has only one. ``column`` says which column of
two-dimensional targets it is compared with, None where targets are ``(n,)``. ``ignore`` is a value of the target at
which samples do not count (a distance of 0 where nothing is there).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Literal

from mmedge.errors import TaskError, unknown
from mmedge.task import Metric
from mmedge.tensors import Array

if TYPE_CHECKING:
    from torch import Tensor

SIMILARITIES = 1 << 20  # so many are in memory at once, unless one gallery has more
Kind = Literal["accuracy", "precision", "recall", "f1_score"]


def accuracy(output: str | None = None, column: int | None = None, *, ignore: int | None = None) -> Metric:
    """The fraction of samples whose largest logit is at the target; output ``(n, classes)``."""
    return _classification("accuracy", "accuracy", "micro", output, column, ignore)


def precision(output: str | None = None, column: int | None = None, *, ignore: int | None = None) -> Metric:
    """Of the samples given a class, the fraction that are of it; the mean over the classes that occur."""
    return _classification("precision", "precision", "macro", output, column, ignore)


def recall(output: str | None = None, column: int | None = None, *, ignore: int | None = None) -> Metric:
    """Of the samples of a class, the fraction that are given it; the mean over the classes that occur."""
    return _classification("recall", "recall", "macro", output, column, ignore)


def f1(output: str | None = None, column: int | None = None, *, ignore: int | None = None) -> Metric:
    """The harmonic mean of precision and recall of a class; the mean over the classes that occur (macro F1)."""
    return _classification("f1", "f1_score", "macro", output, column, ignore)


def calibration_error(
    output: str | None = None, column: int | None = None, *, bins: int = 15, ignore: int | None = None
) -> Metric:
    """How far confidence is from accuracy: the expected calibration error (Guo et al., 2017), 0 to 1, lower is better.

    Args:
        output: logits ``(n, classes)``; their softmax is the confidence.
        column: of the targets.
        bins: of equal width, over which confidence and accuracy are averaged.
        ignore: a target that does not count.
    """

    def score(outputs: Mapping[str, Array], targets: Array) -> float:
        from torchmetrics.functional.classification import multiclass_calibration_error

        logits, classes = _logits(outputs, output), _column(targets, column).long()
        error = multiclass_calibration_error(logits.softmax(1), classes, logits.shape[1], bins, ignore_index=ignore)
        return float(error)

    return Metric(_named("calibration_error", output), score, higher_is_better=False, outputs=_taken(output))


def mae(output: str | None = None, column: int | None = None, *, ignore: float | None = None) -> Metric:
    """The mean absolute error of an output ``(n,)`` or ``(n, 1)``, in its own unit."""

    def error(found: Tensor, wanted: Tensor) -> Tensor:
        from torchmetrics.functional import mean_absolute_error

        return mean_absolute_error(found, wanted)

    return _regression("mae", error, output, column, ignore)


def rmse(output: str | None = None, column: int | None = None, *, ignore: float | None = None) -> Metric:
    """The root of the mean squared error of an output ``(n,)`` or ``(n, 1)``, in its own unit."""

    def error(found: Tensor, wanted: Tensor) -> Tensor:
        from torchmetrics.functional import mean_squared_error

        return mean_squared_error(found, wanted, squared=False)

    return _regression("rmse", error, output, column, ignore)


def recall_at_k(first: str, second: str, k: int = 1, *, gallery: int | None = None) -> Metric:
    """How often a match is among the ``k`` nearest, from the first to the second and back: retrieval by two towers.

    Args:
        first: an output ``(n, dim)``, embeddings whose inner product says how near they are.
        second: the other tower's, ``(n, dim)``.
        k: so many of the nearest are looked at.
        gallery: search among so many consecutive pairs; by default among all.

    Returns:
        A metric whose targets ``(n,)`` are equal where pairs match each other: an identifier of the pair. One match is
        enough: torchmetrics calls it the hit rate, and computes it query by query, forty times as slowly.
    """
    if k < 1 or (gallery is not None and gallery < k):
        raise TaskError(f"recall@{k} in galleries of {gallery} pairs", fix="1 <= k <= gallery")

    def score(outputs: Mapping[str, Array], targets: Array) -> float:
        pairs = (_output(outputs, first), _output(outputs, second), _column(targets, None))
        n = len(targets)
        if any(len(each) != n for each in pairs):
            rows = f"{len(pairs[0])} and {len(pairs[1])} embeddings for {n} targets"
            raise TaskError(f"recall@{k} of {rows}", fix="give one target per pair")
        size = gallery or n
        whole, at_once = n // size * size, max(1, SIMILARITIES // size**2)
        parts = [each[:whole].unflatten(0, (-1, size)).split(at_once) for each in pairs]
        hits = sum(_found(one, other, ids, k) for one, other, ids in zip(*parts, strict=True))
        if whole < n:
            one, other, ids = (each[None, whole:] for each in pairs)
            hits += _found(one, other, ids, k)
        return hits / (2 * n)

    return Metric(f"recall@{k}", score, outputs=(first, second), together=gallery or 1)


def _found(one: Tensor, other: Tensor, ids: Tensor, k: int) -> int:
    """How often a match is among the ``k`` nearest, both ways; ``(galleries, n, dim)`` twice and ``(galleries, n)``."""
    import torch

    near, same = one @ other.mT, ids[:, :, None] == ids[:, None]
    nearest = [rows.topk(min(k, rows.shape[-1])).indices for rows in (near, near.mT)]
    return sum(int(torch.take_along_dim(same, indices, -1).any(-1).sum()) for indices in nearest)


def _classification(
    name: str,
    kind: Kind,
    average: Literal["micro", "macro"],
    output: str | None,
    column: int | None,
    ignore: int | None,
) -> Metric:
    def score(outputs: Mapping[str, Array], targets: Array) -> float:
        from torchmetrics.functional import classification

        logits, classes = _logits(outputs, output), _column(targets, column).long()
        judge = getattr(classification, f"multiclass_{kind}")
        return float(judge(logits, classes, logits.shape[1], average=average, ignore_index=ignore))

    return Metric(_named(name, output), score, outputs=_taken(output))


def _regression(
    name: str,
    error: Callable[[Tensor, Tensor], Tensor],
    output: str | None,
    column: int | None,
    ignore: float | None,
) -> Metric:
    def score(outputs: Mapping[str, Array], targets: Array) -> float:
        found, wanted = _output(outputs, output).double(), _column(targets, column).double()
        if found.shape not in (wanted.shape, (*wanted.shape, 1)):
            raise TaskError(f"{name} of {tuple(found.shape)} against targets {tuple(wanted.shape)}", fix=_COLUMN)
        counts = wanted != ignore if ignore is not None else wanted.new_ones(wanted.shape).bool()
        if not counts.any():
            raise TaskError(f"{name}: every target is {ignore}, which is ignored", fix="score a split with others")
        return float(error(found.reshape(wanted.shape)[counts], wanted[counts]))

    return Metric(_named(name, output), score, higher_is_better=False, outputs=_taken(output))


_COLUMN = "name the column of the targets that belongs to this output: column=0, column=1 …"


def _named(name: str, output: str | None) -> str:
    return f"{output}_{name}" if output else name


def _taken(output: str | None) -> tuple[str, ...]:
    return (output,) if output else ()


def _output(outputs: Mapping[str, Array], name: str | None) -> Tensor:
    import torch

    if name is None and len(outputs) == 1:
        (name,) = outputs
    if name is None or name not in outputs:
        problem, fix = unknown("output", str(name), outputs)
        raise TaskError(problem, fix=fix if name else f"name the one that is judged: {', '.join(outputs)}")
    return torch.as_tensor(outputs[name])


def _logits(outputs: Mapping[str, Array], name: str | None) -> Tensor:
    logits = _output(outputs, name)
    if logits.ndim != 2:
        raise TaskError(f"{name or 'the output'} is {tuple(logits.shape)}", fix="give logits (n, classes)")
    return logits.float()


def _column(targets: Array, column: int | None) -> Tensor:
    import torch

    if column is None and targets.ndim == 1:
        return torch.as_tensor(targets)
    if column is None or targets.ndim != 2 or not 0 <= column < targets.shape[1]:
        raise TaskError(f"targets are {targets.shape}, the column is {column}", fix=_COLUMN)
    return torch.as_tensor(targets[:, column])
