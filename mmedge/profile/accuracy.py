"""What an engine answers: accuracy, agreement with a reference, and what is left when a modality is lost or noisy.

An engine is a ``Runner``: named arrays in, named arrays out. That holds for the trained module as well, so every figure
here means the same for all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from mmedge.errors import MmedgeError, TargetError, TaskError
from mmedge.progress import Progress
from mmedge.targets.base import Runner
from mmedge.task import Batch, Metric, Split, Task
from mmedge.tensors import Array, Arrays, blank, disturb

RESAMPLES = 200
FEWEST = 30  # samples, or groups scored together; below, resampling says more about the resampling than about the model
MOST_SAMPLES = 2000  # drawn per resample, if they are enough groups …
MOST_VALUES = 4 << 20  # … and numbers copied: outputs can be maps or images
ROUNDING = 1e-9  # relative, of a mean of equal scores
DRIFT = 0.5  # standard deviations between the value and the resamples' mean; chance makes 0.07 of them

Case = tuple[str, str]  # modality and what befell it
_CLEAN: Case = ("all", "clean")
_FIXES = {"missing": "if the model cannot take the declared fill value, choose another: TensorSpec(..., fill=)"}


class _NotFiniteError(TargetError):
    """An engine's outputs hold NaN or infinite values."""


@dataclass(frozen=True)
class Outputs:
    """What an engine answers over some samples.

    Attributes:
        outputs: those that are scored, name to array, first dimension samples.
        targets: what the metric compares with, first dimension samples.
        first: all outputs of the first samples, as many as were asked for.
    """

    outputs: Mapping[str, Array]
    targets: Array
    first: Mapping[str, Array] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.targets)


def run_split(
    runner: Runner,
    task: Task,
    split: Split,
    label: str,
    *,
    progress: Progress | None = None,
    limit: int | None = None,
    first: int = 0,
) -> Outputs:
    """Run an engine over a split and gather what the task's metrics take of its answers.

    Outputs that no metric takes (hidden states, maps) can be megabytes per sample: they are checked and let go.

    Args:
        runner: the engine.
        task: where the batches come from.
        split: ``test``, as a rule.
        label: what the engine is called in errors and beside the bar.
        progress: shows the samples; the bar's total is 0, not known, without a ``limit``.
        limit: only the first so many samples.
        first: of so many samples all outputs are kept as well.

    Raises:
        TargetError: the engine failed, or its outputs are not the task's or not finite; names output and batch.
        TaskError: a batch is wrong.
    """
    kept = task.scored()
    parts: list[Outputs] = []
    begin: list[Outputs] = []
    with (progress or Progress()).bar(label, limit or 0) as bar:
        for index, batch in enumerate(_first(task, split, limit)):
            answers = _answers(runner, task, batch.inputs, f"{label}: {split} batch {index}")
            parts.append(_some(answers, batch.targets, kept))
            if first > 0:
                begin.append(_some(answers, batch.targets, task.outputs, first))
                first -= len(batch)
            bar.advance(len(batch))
    whole = _joined(parts, label)
    return replace(whole, first=_joined(begin, label).outputs) if begin else whole


@dataclass(frozen=True)
class Resampled:
    """A task's metric on resamples of the test samples.

    Every engine of a task gets the same resamples, so that two engines can be compared on each.

    Attributes:
        scores: of each resample.
        shrink: the spread of the metric over all samples, relative to that of the scores: sqrt(m / n) where a resample
            draws m of n samples, as the spread of a mean is (m out of n bootstrap: Bickel, Goetze and van Zwet, 1997).
    """

    scores: tuple[float, ...]
    shrink: float

    def interval(self, value: float) -> tuple[float, float] | str:
        """The 95 % interval of the metric, whose value over all samples is ``value``, or why there is none."""
        low, high = (float(bound) for bound in np.quantile(self.scores, (0.025, 0.975)))
        if low == high:
            return "every resample scores the same"
        return value + self.shrink * (low - value), value + self.shrink * (high - value)

    def interval_of_difference(self, other: Resampled, difference: float) -> tuple[float, float] | str:
        """The 95 % interval of this metric less another engine's, on the same samples, or why there is none.

        Engines that were made from one another err on mostly the same samples, so their difference is known far better
        than the metric of either. Normal, not by quantiles: where engines differ in one answer of thousands, quantiles
        of resamples never reach the other side of zero. With four or five such answers, all one way, it is a little too
        narrow: it leaves zero out, where a sign test at 5 % would not.
        """
        if (len(self.scores), self.shrink) != (len(other.scores), other.shrink):
            return "the engines were scored on different samples"
        half = 1.96 * self.shrink * float(np.std(np.subtract(self.scores, other.scores)))
        return (difference - half, difference + half) if half > 0 else "every resample gives the same difference"


@dataclass(frozen=True)
class Accuracy:
    """A task's metric for one engine.

    Attributes:
        value: the metric over all samples, in its own unit.
        samples: how many.
        ci95: 95 % interval for the choice of samples, None with a ``reason``.
        reason: why there is none.
        others: the task's further metrics, by name: the value, or why there is none.
        resampled: what intervals come from; None, with a ``reason``, where the samples cannot be resampled.
    """

    value: float
    samples: int
    ci95: tuple[float, float] | None
    reason: str | None = None
    others: Mapping[str, float | str] = field(default_factory=dict)
    resampled: Resampled | None = None

    @classmethod
    def of(cls, answers: Outputs, task: Task, seed: int = 0) -> Accuracy:
        """Score the answers and bootstrap over samples, or over groups of them that are scored together.

        Each of 200 resamples draws m samples with replacement and is scored by the task. m is the number of samples n,
        but at most 2,000 (or 30 groups) and at most what copies 4 million numbers. A metric that is no mean over
        samples (ranks, retrieval among all of them) may break on resamples or drift off its value: then there is no
        interval.

        Raises:
            TaskError: the metric fails on the answers. Further metrics may.
        """
        value = task.score(answers.outputs, answers.targets)
        others = {metric.name: _further(answers, task, metric) for metric in task.also}
        drawn = _resample(answers, task, value, seed)
        if isinstance(drawn, str):
            return cls(value, len(answers), None, drawn, others)
        found = drawn.interval(value)
        interval, reason = (None, found) if isinstance(found, str) else (found, None)
        return cls(value, len(answers), interval, reason, others, drawn)

    def as_json(self) -> dict[str, Any]:
        """For ``from_json``."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Accuracy:
        """What ``as_json`` wrote."""
        interval, drawn = data["ci95"], data["resampled"]
        resampled = Resampled(tuple(drawn["scores"]), drawn["shrink"]) if drawn else None
        return cls(**{**data, "ci95": tuple(interval) if interval else None, "resampled": resampled})


@dataclass(frozen=True)
class Drop:
    """What an engine loses against another on the same samples.

    Attributes:
        value: the difference of the metric, positive when worse, whichever way is better.
        ci95: its 95 % interval for the choice of samples, None with a ``reason``.
        reason: why there is none.
    """

    value: float
    ci95: tuple[float, float] | None
    reason: str | None = None

    @classmethod
    def between(cls, before: Accuracy, after: Accuracy, higher_is_better: bool) -> Drop:
        """What ``after`` loses against ``before``."""
        better, worse = (before, after) if higher_is_better else (after, before)
        value = better.value - worse.value
        if better.resampled is None or worse.resampled is None:
            return cls(value, None, better.reason or worse.reason)
        found = better.resampled.interval_of_difference(worse.resampled, value)
        return cls(value, None, found) if isinstance(found, str) else cls(value, found)


def _further(answers: Outputs, task: Task, metric: Metric) -> float | str:
    """The value of a further metric, or why it has none."""
    try:
        return task.score(answers.outputs, answers.targets, metric)
    except TaskError as err:
        return err.problem


def _resample(answers: Outputs, task: Task, value: float, seed: int) -> Resampled | str:
    """The metric on resamples, or why there are none; what is drawn depends on the samples alone, not on the engine."""
    taken = {name: answers.outputs[name] for name in task.scored(task.metric)}
    each = max(1, sum(array.size for array in (*taken.values(), answers.targets)) // len(answers))
    together = task.metric.together
    groups = len(answers) // together
    size = min(groups, max(FEWEST, MOST_SAMPLES // together), MOST_VALUES // (each * together))
    if size < FEWEST:
        what = "samples" if together == 1 else f"groups of {together} samples"
        why = f"{groups} {what}" if size == groups else f"outputs of {each} numbers per sample"
        return f"{why}, resampling needs {FEWEST} {what} of at most {MOST_VALUES:,} numbers in all"
    rng = np.random.default_rng(seed)
    scores = []
    for _ in range(RESAMPLES):
        rows = (rng.integers(0, groups, size)[:, None] * together + np.arange(together)).reshape(-1)
        drawn = {name: array[rows] for name, array in taken.items()}
        try:
            scores.append(task.score(drawn, answers.targets[rows]))
        except TaskError as err:
            return f"on resampled samples, the metric {err.problem}"
    if abs(float(np.mean(scores)) - value) > DRIFT * float(np.std(scores)) + ROUNDING * abs(value):
        return "resamples do not score around the value: the metric is no mean over samples"
    return Resampled(tuple(scores), float(np.sqrt(size / groups)))


@dataclass(frozen=True)
class Health:
    """What a model still does when one of its modalities is missing or noisy.

    Attributes:
        clean: the metric on the same samples, undisturbed; None where it is not defined on them.
        samples: how many.
        modalities: by modality the metric with it ``missing`` and with it ``noisy``, None where there is none, and the
            ``reasons`` of what is None, ``clean`` among them.
    """

    clean: float | None
    samples: int
    modalities: Mapping[str, Mapping[str, Any]]


def modality_health(runner: Runner, task: Task, limit: int, seed: int = 0, label: str = "modality health") -> Health:
    """Score the first ``limit`` test samples as they are, and with each modality missing and noisy.

    ``limit`` is rounded up to whole groups of samples that the metric scores with each other.
    Missing inputs hold their declared fill value; see ``tensors.disturb`` for the noise. It depends on ``seed``, the
    batch and the modality alone, so every engine and every stage gets the same. What is disturbed may have no score:
    its outputs are not finite, or so much alike that the metric (a correlation, say) is not defined.

    Raises:
        TargetError: the engine failed, or its outputs on undisturbed inputs are not finite.
    """
    kept = task.scored(task.metric)
    parts: dict[Case, list[Outputs]] = {}
    found: dict[Case, float | str] = {}  # a text says why there is no score
    limit += -limit % task.metric.together
    for index, batch in enumerate(_first(task, "test", limit)):
        for case, inputs in _cases(task, batch.inputs, (seed, index)):
            where = f"{label}: test batch {index}, {' '.join(case)}"
            try:
                answers = _answers(runner, task, inputs, where, _FIXES.get(case[1]))
            except _NotFiniteError as err:
                if case == _CLEAN:
                    raise
                found[case] = f"with {' '.join(case)}, {err.problem}" + (f"; {err.fix}" if err.fix else "")
            else:
                parts.setdefault(case, []).append(_some(answers, batch.targets, kept))
    whole = {case: _joined(some, label) for case, some in parts.items() if case not in found}
    found |= {case: _score(task, answers, case) for case, answers in whole.items()}
    modalities = {
        name: _figures({case[1]: found[case] for case in (_CLEAN, (name, "missing"), (name, "noisy"))})
        for name in task.modalities
    }
    clean = found[_CLEAN]
    return Health(None if isinstance(clean, str) else clean, len(whole[_CLEAN]), modalities)


def _score(task: Task, answers: Outputs, case: Case) -> float | str:
    """The metric, or why it is not defined on these answers."""
    try:
        return task.score(answers.outputs, answers.targets)
    except TaskError as err:
        return f"with {' '.join(case)}, the metric {err.problem}"


def _figures(found: Mapping[str, float | str]) -> dict[str, Any]:
    """What ``Health.modalities`` holds of one."""
    reasons = {state: value for state, value in found.items() if isinstance(value, str)}
    figures = {state: None if state in reasons else found[state] for state in ("missing", "noisy")}
    return {**figures, "reasons": reasons}


def _cases(task: Task, inputs: Arrays, seed: tuple[int, int]) -> Iterator[tuple[Case, Arrays]]:
    yield _CLEAN, inputs
    for number, modality in enumerate(task.modalities):
        yield (modality, "missing"), blank(task.inputs, inputs, modality)
        yield (modality, "noisy"), disturb(task.inputs, inputs, modality, np.random.default_rng((*seed, number)))


def parity(reference: Arrays, engine: Arrays) -> dict[str, float]:
    """How far an engine's outputs are from those of a reference on the same inputs.

    Returns:
        ``max_abs``, the largest absolute difference of any element, and ``cosine``, the cosine between the flattened
        outputs in float64. With several outputs, the worst of each.

    Raises:
        TargetError: an output is missing, not known, not finite or of another shape.
    """
    _same_names(reference, engine, "parity")
    worst = {"max_abs": 0.0, "cosine": 1.0}
    for name, expected in reference.items():
        if expected.shape != engine[name].shape:
            problem = f"output {name!r} has the shape {engine[name].shape}, the reference {expected.shape}"
            raise TargetError(problem, where="parity")
        a, b = (array.astype(np.float64).reshape(-1) for array in (expected, engine[name]))
        if not (np.isfinite(a).all() and np.isfinite(b).all()):
            raise TargetError(f"output {name!r} holds NaN or infinite values", where="parity")
        worst["max_abs"] = max(worst["max_abs"], float(np.abs(a - b).max(initial=0.0)))
        worst["cosine"] = min(worst["cosine"], _cosine(a, b))
    return worst


def _cosine(a: Array, b: Array) -> float:
    norms = float(np.linalg.norm(a)), float(np.linalg.norm(b))
    if 0.0 in norms:
        return float(norms[0] == norms[1])  # two zero vectors agree, a zero and another do not
    return float(np.dot(a / norms[0], b / norms[1]))


def _first(task: Task, split: Split, limit: int | None) -> Iterator[Batch]:
    """The batches of a split, cut off after ``limit`` samples."""
    left = limit
    for batch in task.stream(split):
        if left is None or len(batch) < left:
            yield batch
        else:
            yield Batch({name: array[:left] for name, array in batch.inputs.items()}, batch.targets[:left])
            return
        left = None if left is None else left - len(batch)


def _answers(runner: Runner, task: Task, inputs: Arrays, where: str, nan_fix: str | None = None) -> dict[str, Array]:
    """The engine's outputs in the task's order, checked."""
    try:
        outputs = runner(inputs)
    except MmedgeError:
        raise
    except Exception as err:
        raise TargetError(f"the engine raised {type(err).__name__}: {err}", where=where) from err
    _same_names(dict.fromkeys(task.outputs), outputs, where)
    count = len(next(iter(inputs.values())))
    for name, array in outputs.items():
        if array.shape[:1] != (count,):
            raise TargetError(f"output {name!r} has the shape {array.shape} for {count} samples", where=where)
        if np.issubdtype(array.dtype, np.floating) and not np.isfinite(array).all():
            raise _NotFiniteError(f"output {name!r} holds NaN or infinite values", where=where, fix=nan_fix)
    return {name: outputs[name] for name in task.outputs}


def _same_names(expected: Mapping[str, Any], found: Mapping[str, Any], where: str) -> None:
    if set(expected) != set(found):
        raise TargetError(f"the outputs are {sorted(found)}, expected {sorted(expected)}", where=where)


def _some(answers: Arrays, targets: Array, names: Sequence[str], count: int | None = None) -> Outputs:
    """The named outputs of the first ``count`` samples; copies where that is not all, or the rest would stay alive."""
    outputs = {name: answers[name] for name in names}
    if count is not None and count < len(targets):
        return Outputs({name: array[:count].copy() for name, array in outputs.items()}, targets[:count])
    return Outputs(outputs, targets)


def _joined(parts: Sequence[Outputs], where: str) -> Outputs:
    try:
        outputs = {name: np.concatenate([part.outputs[name] for part in parts]) for name in parts[0].outputs}
        return Outputs(outputs, np.concatenate([part.targets for part in parts]))
    except ValueError as err:
        raise TargetError(f"outputs change their shape between batches: {err}", where=where) from err
