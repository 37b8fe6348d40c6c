"""The search for INT8 settings, walked by neural-compressor's ``autotune``.

neural-compressor brings the loop: it takes one point of the search space after the other, lets the algorithm that is
registered for it quantize, asks for a score, and stops at the first one that is good enough. mmedge registers its own
algorithm there for as long as a search runs, and answers with a score that says exactly what a recipe asks for.
"""

from __future__ import annotations

import glob
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from mmedge.errors import MmedgeError, StageError, needs_extra
from mmedge.progress import Progress
from mmedge.stages.base import Judgement
from mmedge.stages.trace import quiet

ALGORITHM = "mmedge_int8"
OBSERVERS = ("mse", "entropy", "percentile", "minmax")
ALPHAS = (0.3, 0.5, 0.7)  # SmoothQuant: around the paper's 0.5, for it fits most transformers
# neural-compressor accepts a score of at least ``baseline * (1 - tolerable_loss)``. With these, that is: of at least 1.
BASELINE, TOLERABLE_LOSS = 1.0, 0.0
ROUNDING = 1e-9  # as in gates: 0.97 - 0.96 is a little more than 0.01


@dataclass(frozen=True)
class Candidate:
    """One point of the search space.

    Attributes:
        name: for people (``smooth 0.5``).
        settings: what ``apply`` is to do. Candidates with equal settings are tried once.
    """

    name: str
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Trial:
    """What became of a candidate.

    Attributes:
        candidate: the one that was tried.
        drop: of the metric against the float network, positive when worse; None where it failed before it was judged.
        speedup: over the fastest higher precision, None where it was not measured.
        accepted: within both limits.
        reason: why not, or what the judge had to say.
        seconds: of applying and judging.
    """

    candidate: Candidate
    drop: float | None
    speedup: float | None
    accepted: bool
    reason: str
    seconds: float


def candidates(base: Mapping[str, Any], groups: Sequence[tuple[str, list[str]]]) -> list[Candidate]:
    """The search space, in order of rising cost.

    First what costs nothing when the engine runs: other observers, SmoothQuant, compensated rounding with bias
    correction. Then, upon that repair, the worst 1, 2, 4, … groups of layers in floating point; never all of them.

    Args:
        base: the recipe's settings: ``observer``, ``percentile``, ``smooth`` (alpha or None), ``rounding``,
            ``bias_correction``, ``keep_float`` (patterns).
        groups: name and module paths of each group of layers, the most damaged one first.
    """
    repaired = {**base, "rounding": "compensated", "bias_correction": True}
    found = [Candidate("as the recipe says", dict(base))]
    found += [Candidate(f"observer {name}", {**base, "observer": name}) for name in OBSERVERS]
    found += [Candidate(f"smooth {alpha}", {**base, "smooth": alpha}) for alpha in ALPHAS]
    found.append(Candidate("compensated rounding, bias correction", repaired))
    count = 1
    while count < len(groups):
        layers = [glob.escape(layer) for _, members in groups[:count] for layer in members]
        names = ", ".join(name for name, _ in groups[:count])
        found.append(
            Candidate(f"in float: {names}", {**repaired, "keep_float": [*base.get("keep_float", ()), *layers]})
        )
        count *= 2
    settings = [candidate.settings for candidate in found]
    return [candidate for index, candidate in enumerate(found) if candidate.settings not in settings[:index]]


def search(
    network: nn.Module,
    candidates: Sequence[Candidate],
    apply: Callable[[Candidate], Any],
    judge: Callable[[Any], Judgement],
    *,
    max_drop: float,
    min_speedup: float,
    max_trials: int,
    progress: Progress,
) -> tuple[Trial | None, list[Trial]]:
    """Try candidates in their order until one is within both limits.

    A candidate on which ``apply`` or ``judge`` raises an ``MmedgeError`` is a failed trial; any other exception ends
    the search. Nothing of a search is left in neural-compressor.

    Args:
        network: the float network, for neural-compressor; it is neither run nor copied nor changed.
        candidates: cheapest first.
        apply: makes something that can be judged of a candidate; called once for each.
        judge: compares that with the float network.
        max_drop: accepted up to and including it, in the metric's unit.
        min_speedup: accepted from it on; what was not measured is only accepted where this is 0.
        max_trials: at least 1.
        progress: hears of every trial.

    Returns:
        The accepted trial, None where there is none, and all trials in the order they were made.

    Raises:
        StageError: neural-compressor is not installed.
    """
    with neural_compressor("the search for settings"):
        from neural_compressor.common.base_tuning import SequentialSampler
        from neural_compressor.torch.quantization import TuningConfig, autotune

    walk = _Walk(apply, judge, max_drop, min_speedup, progress)
    with _silenced(), _registered(walk.quantize) as config:
        tuning = TuningConfig(
            config_set=[config(candidate) for candidate in candidates],
            sampler=SequentialSampler,
            tolerable_loss=TOLERABLE_LOSS,
            max_trials=max_trials,
        )
        autotune(_Uncopied(network), tuning, eval_fn=walk.score)
    return next((trial for trial in walk.trials if trial.accepted), None), walk.trials


class _Uncopied(nn.Module):
    """neural-compressor copies what it tunes for the baseline and for each trial; nothing here needs a copy."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def __deepcopy__(self, memo: dict[int, Any]) -> _Uncopied:
        return self


@dataclass
class _Applied:
    """What the algorithm gives neural-compressor in place of a quantized model, for it sets attributes on it."""

    candidate: Candidate
    started: float
    result: Any = None
    failure: MmedgeError | None = None


@dataclass
class _Walk:
    """What neural-compressor calls back while it walks the candidates."""

    apply: Callable[[Candidate], Any]
    judge: Callable[[Any], Judgement]
    max_drop: float
    min_speedup: float
    progress: Progress
    trials: list[Trial] = field(default_factory=list)

    def quantize(self, model: nn.Module, configs: Mapping[str, Any], **unused: Any) -> _Applied:
        """The registered algorithm: apply one candidate."""
        candidate: Candidate = configs[ALGORITHM].candidate
        applied = _Applied(candidate, time.monotonic())
        # At the end of its trials neural-compressor quantizes the best one again. Its result is in the caller's hands.
        if not any(trial.candidate is candidate for trial in self.trials):
            try:
                applied.result = self.apply(candidate)
            except MmedgeError as err:
                applied.failure = err
        return applied

    def score(self, model: nn.Module | _Applied) -> float:
        """The evaluation: at least ``BASELINE`` exactly where a candidate is accepted.

        neural-compressor knows one number and limits its loss relative to the baseline; a drop in the metric's unit
        and a speedup at once cannot be said so, and rounding would blur the limits.
        """
        if not isinstance(model, _Applied):  # the float network: the measure of all others
            return BASELINE
        trial = self._trial(model)
        model.result = None  # neural-compressor holds ``model`` while it makes the next one
        self.trials.append(trial)
        self.progress.say(f"tuning, trial {len(self.trials)}: {_told(trial)}")
        return BASELINE if trial.accepted else 0.0

    def _trial(self, applied: _Applied) -> Trial:
        judgement, failure = None, applied.failure
        if failure is None:
            try:
                judgement = self.judge(applied.result)
            except MmedgeError as err:
                failure = err
        seconds = time.monotonic() - applied.started
        if judgement is None:
            return Trial(applied.candidate, None, None, False, str(failure), seconds)
        against = self._against(judgement)
        reason = "; ".join(part for part in (*against, judgement.reason) if part)
        return Trial(applied.candidate, judgement.drop, judgement.speedup, not against, reason, seconds)

    def _against(self, judgement: Judgement) -> list[str]:
        """Which limits a judgement fails; NaN fails every limit."""
        drop, speedup, found = judgement.drop, judgement.speedup, []
        if not drop - self.max_drop <= ROUNDING:
            found.append(
                f"the drop {drop:.4g} is over {self.max_drop:g}" if math.isfinite(drop) else f"the drop is {drop}"
            )
        if speedup is None:
            if self.min_speedup > 0:
                found.append("the speedup was not measured")
        elif not self.min_speedup - speedup <= ROUNDING:
            found.append(f"the speedup {speedup:.4g} is under {self.min_speedup:g}")
        return found


def _told(trial: Trial) -> str:
    facts = [] if trial.drop is None else [f"drop {trial.drop:.4g}"]
    facts += [] if trial.speedup is None else [f"{trial.speedup:.2f}× as fast"]
    facts.append("accepted" if trial.accepted else trial.reason.splitlines()[0])
    return f"{trial.candidate.name}: {', '.join(facts)}"


@contextmanager
def _silenced() -> Iterator[None]:
    """Nothing of neural-compressor's log, while what it calls back may speak: ``quiet`` would silence that too."""
    logger = logging.getLogger("neural_compressor")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


@contextmanager
def neural_compressor(reader: str) -> Iterator[None]:
    """Where neural-compressor is imported: quietly, for it reports accelerators that are missing here.

    Args:
        reader: what needs it, for the error.

    Raises:
        StageError: it is not installed.
    """
    try:
        with quiet():
            yield
    except ModuleNotFoundError as err:
        raise missing(reader) from err


def missing(reader: str) -> StageError:
    """What ``reader`` is told where neural-compressor is not installed."""
    fix = needs_extra("neural-compressor-pt", "compress")
    return StageError(f"{reader} needs neural-compressor", where="quantize", fix=fix)


@contextmanager
def _registered(algorithm: Callable[..., _Applied]) -> Iterator[Any]:
    """Our algorithm among neural-compressor's own for as long as the context is open, which gives its config class."""
    from neural_compressor.common.base_config import BaseConfig, config_registry, register_config
    from neural_compressor.torch.quantization.config import FRAMEWORK_NAME
    from neural_compressor.torch.utils.utility import algos_mapping, register_algo

    config = _config_class(BaseConfig)
    register_config(framework_name=FRAMEWORK_NAME, algo_name=ALGORITHM)(config)
    register_algo(name=ALGORITHM)(algorithm)
    try:
        yield config
    finally:
        del algos_mapping[ALGORITHM]
        del config_registry.registered_configs[FRAMEWORK_NAME][ALGORITHM]


def _config_class(base: Any) -> Any:
    """A class of configurations whose parameters are a candidate's settings; ``base`` is there only once loaded."""

    class Int8Config(base):  # type: ignore[misc]
        name = ALGORITHM

        def __init__(self, candidate: Candidate) -> None:
            super().__init__(white_list=None)
            self.candidate = candidate
            self.params_list = list(candidate.settings)  # what configurations are compared by
            for key, value in candidate.settings.items():
                setattr(self, key, value)

        def expand(self) -> list[Int8Config]:
            """A candidate is one point: lists among its settings are values, not choices."""
            return [self]

        def get_model_info(self, model: nn.Module) -> list[tuple[str, str]]:
            """Nothing: the algorithm finds its layers itself."""
            return []

        def to_config_mapping(self, config_list: Any = None, model_info: Any = None) -> dict[str, Int8Config]:
            """One configuration for the whole network."""
            return {ALGORITHM: self}

        @classmethod
        def register_supported_configs(cls) -> None:
            """Nothing to list: asked for by the base."""

        @classmethod
        def get_config_set_for_tuning(cls) -> list[Int8Config]:
            """No search space of its own: ``search`` is given one."""
            return []

    return Int8Config
