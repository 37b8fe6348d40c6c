"""The twin rule: an INT8 engine is shipped only where it beats the same network in higher precision on the same
runtime, and within the accuracy budget. Otherwise groups of its layers go back to floating point; if nothing helps, the
twin is shipped, and the report says so.

The products of attention run in INT8 only where that is no slower and accurate enough: the engine is built both ways.
An engine that answers one sample differently from time to time is left out, a twin as well.

An engine whose answers cannot be scored (NaN, infinity) is as one that loses everything, and one in which the runtime
computes nothing in INT8 is none.

The engines are compared in interleaved runs. Which groups go back is decided on the engine's own accuracy, the most
damaging group (as the ``quantize`` stage measured it) first. Giving a group back can only make an engine more like its
twin, so judging that on the test split does not flatter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import inf, isfinite
from typing import Any, Literal

from mmedge.artifact import Artifact
from mmedge.errors import TargetError, TaskError, UnsteadyError
from mmedge.pipeline.environment import cpu_name
from mmedge.pipeline.line import Line, Step
from mmedge.pipeline.rows import FOR_ACCURACY, MORE_ACCURATE, UNSTEADY, fraction
from mmedge.profile.latency import EngineRef, interleaved
from mmedge.profile.worker import SETTLE, TURN
from mmedge.recipe import TwinConfig
from mmedge.report.gates import ROUNDING
from mmedge.report.values import root_percent
from mmedge.targets.base import Target
from mmedge.tensors import Array

STEADY = "the same answer at all times only"
NO_INT8 = "the runtime computes none of its layers in INT8"
WORTH_IT = 1.01  # by how much what is less INT8 must be faster to be taken for its speed


@dataclass(frozen=True)
class Engine:
    """An engine and what it was made from.

    Attributes:
        artifact: the engine.
        target: the form of the target that made it.
        step: the network.
        released: INT8 layers that went back to floating point, modules whose attention did among them.
    """

    artifact: Artifact
    target: Target
    step: Step
    released: tuple[str, ...] = ()

    @property
    def float_name(self) -> Literal["fp32", "bf16", "fp16"]:
        """What its layers that are not INT8 are computed in."""
        return self.step.float_name(self.target)

    @property
    def has_int8(self) -> bool:
        """Whether a layer of it runs in INT8, as far as the runtime says."""
        return fraction(self.artifact.about["coverage"]) != 0


@dataclass
class Settled:
    """What is shipped of a Q/DQ network on one target.

    Attributes:
        engine: the one that is shipped.
        twin: the fastest higher-precision engine of the same network; None where nothing could be timed.
        shipped: ``int8``, ``mixed`` (some groups are floating point) or ``twin``.
        backed_off: groups of layers that went back to floating point, each with the reason; where the twin is shipped,
            of the last that was tried.
        reason: of the whole decision, one sentence.
    """

    engine: Engine
    twin: Engine | None
    shipped: str
    reason: str
    backed_off: dict[str, str] = field(default_factory=dict)


@dataclass
class TwinRule:
    """Carries the rule out.

    Attributes:
        line: makes engines.
        rule: the recipe's limits.
        threads: of the engines while they are timed.
        samples: what they are timed on.
        value: ``value(step, engine)`` is the metric of an engine on the test split.
    """

    line: Line
    rule: TwinConfig
    threads: int
    samples: Mapping[str, Array]
    value: Callable[[Step, Engine], float]

    def settle(self, step: Step, target: Target, versions: Mapping[str, str]) -> Settled:
        """Decide what is shipped of ``step``, a Q/DQ network, on ``target``.

        Raises:
            UnsteadyError: no twin gives one answer to one sample.
        """
        parent = step.float_ancestor()
        if target.lowering.weight_bits == 7:
            cause = "products of 8-bit ones overflow on processors without VNNI"
            self.line.progress.say(f"{step.name} on {target.name}: weights keep 7 bits: {cause}")
        forms = target.forms()
        if why := target.cannot_run():
            unjudged = [self._engine(step, form, versions) for form in forms]
            return Settled(unjudged[-1], None, "int8", f"not compared with a higher precision: {why}")
        twins = self._steady(parent, forms, versions) or [self._engine(parent, target, versions)]  # which says why
        whole = self._steady(step, forms, versions)
        both_ways = [form for form in forms if step.attention and form.lowering.integer_attention]
        plain = self._steady(step, both_ways, versions, step.attention)
        if not whole and not plain:
            twin = fastest(twins, self._times(twins))
            return Settled(twin, twin, "twin", UNSTEADY)
        times = self._times([*twins, *whole, *plain])
        twin = fastest(twins, times)
        begun = fastest([*whole, *plain], times, WORTH_IT)
        search = _Search(self, step, versions, twin, begun, self.value(parent, twin), "faster" if whole else STEADY)
        return self._accurate(search, whole, plain, times).settle(times)

    def _accurate(
        self, search: _Search, whole: Sequence[Engine], plain: Sequence[Engine], times: Mapping[str, float]
    ) -> _Search:
        """The search, begun with the fastest engine that is accurate enough.

        Forms may differ: on a processor with AMX OpenVINO 2026.4 got INT8 attention wrong beside float32, and right
        beside bfloat16 on the one sample that was compared. Where no engine is accurate enough and faster than the
        twin, the search begins with attention in floating point: that is the nearest to it.
        """
        left = [*whole, *plain]
        while left and not search.accurate(search.drop(search.int8)):
            left.remove(search.int8)
            left = [engine for engine in left if search.speedup(engine, times) >= self.rule.min_speedup]
            nearest = fastest(left or plain or whole, times, WORTH_IT)
            search = replace(search, int8=nearest, gain=MORE_ACCURATE if whole else STEADY)
        return search

    def _engine(self, step: Step, form: Target, versions: Mapping[str, str], released: tuple[str, ...] = ()) -> Engine:
        return Engine(self.line.engine(step, form, versions, released), form, step, released)

    def _steady(
        self, step: Step, forms: Sequence[Target], versions: Mapping[str, str], released: tuple[str, ...] = ()
    ) -> list[Engine]:
        """The engines, one for each form, that give one answer to one sample: another is never shipped."""
        found = []
        for form in forms:
            try:
                found.append(self._engine(step, form, versions, released))
            except UnsteadyError as err:
                self.line.progress.say(f"{step.name}: an engine is left out: {err}")
        return found

    def _times(self, engines: Sequence[Engine]) -> dict[str, float]:
        """How long each engine takes relative to the first one, by its artifact's digest, from one interleaved run."""
        unique = list({engine.artifact.digest: engine for engine in engines}.values())
        if len(unique) == 1:
            return {unique[0].artifact.digest: 1.0}
        inputs = {
            "engines": [engine.artifact.digest for engine in unique],
            "timing": self.rule.timing,
            "threads": self.threads,
            "cpu": cpu_name(),
            "turn": [SETTLE, TURN],
        }

        def measure() -> dict[str, Any]:
            refs = [EngineRef(str(i), each.target.name, str(each.artifact.path)) for i, each in enumerate(unique)]
            settings = {"threads": self.threads, **self.rule.timing}
            series = interleaved(refs, self.samples, progress=self.line.progress, **settings)
            return {
                each.artifact.digest: 1 / series.speedup(ref.id, "0").value
                for each, ref in zip(unique, refs, strict=True)
            }

        return self.line.store.values("twins", inputs, measure)


def fastest(engines: Sequence[Engine], times: Mapping[str, float], worth_it: float = 1.0) -> Engine:
    """The first of those that are as fast as the fastest, but for less than ``worth_it``."""
    least = min(times[engine.artifact.digest] for engine in engines)
    return next(engine for engine in engines if times[engine.artifact.digest] <= least * worth_it)


@dataclass
class _Search:
    """One Q/DQ network on one target, on its way to an engine that is worth shipping.

    Attributes:
        rules: the rule and its limits.
        step: the network.
        versions: of what makes engines.
        twin: the fastest in higher precision.
        int8: the engine to begin with.
        reference: the twin's metric.
        gain: why attention's products are in floating point, where they are.
        unscored: why engines have no metric, by their artifacts' digests.
    """

    rules: TwinRule
    step: Step
    versions: Mapping[str, str]
    twin: Engine
    int8: Engine
    reference: float
    gain: str
    unscored: dict[str, str] = field(default_factory=dict)

    def settle(self, times: Mapping[str, float]) -> Settled:
        drop, speedup = self.drop(self.int8), self.speedup(self.int8, times)
        if not self.int8.has_int8:
            return Settled(self.twin, self.twin, "twin", NO_INT8)
        figures = self._figures(self.int8, drop, speedup)
        if self._good(drop, speedup):
            return Settled(self.int8, self.twin, "int8", figures)
        given_back: dict[str, str] = {}
        engine = self.int8
        if self._groups and not self.accurate(drop):
            engine, given_back = self._repair_accuracy(drop)
            times = self.rules._times([self.twin, engine])
        if self._groups and self.accurate(self.drop(engine)) and self.speedup(engine, times) < self._least:
            engine, given_back = self._repair_speed(engine, given_back)
            times = self.rules._times([self.twin, engine])
        drop, speedup = self.drop(engine), self.speedup(engine, times)
        if engine.has_int8:  # else all layers are back, and what is left to say is of the engine before
            figures = self._figures(engine, drop, speedup)
            if given_back and self._good(drop, speedup):
                return Settled(engine, self.twin, "mixed", figures, given_back)
        reason = f"no INT8 form was good enough: at best {figures}"
        return Settled(self.twin, self.twin, "twin", reason, given_back)

    @property
    def _least(self) -> float:
        return self.rules.rule.min_speedup

    @property
    def _groups(self) -> dict[str, list[str]]:
        """What can go back to floating point: only lowering to ONNX can release single layers."""
        return self.step.groups if self.int8.target.lowering.format == "onnx" else {}

    def _good(self, drop: float, speedup: float) -> bool:
        return self.accurate(drop) and speedup >= self._least

    def accurate(self, drop: float) -> bool:
        """Whether the budget allows it."""
        return drop <= self.rules.rule.max_drop + ROUNDING

    def drop(self, engine: Engine) -> float:
        """By how much the engine's metric is worse than the twin's, infinity where it has none."""
        sign = 1 if self.rules.line.task.metric.higher_is_better else -1
        try:
            return sign * (self.reference - self.rules.value(self.step, engine))
        except (TargetError, TaskError) as err:  # the twin was scored on the same data: it is this engine's answers
            self.unscored[engine.artifact.digest] = err.problem
            return inf

    def speedup(self, engine: Engine, times: Mapping[str, float]) -> float:
        """How many times as fast as the twin the engine is."""
        return times[self.twin.artifact.digest] / times[engine.artifact.digest]

    def _figures(self, engine: Engine, drop: float, speedup: float) -> str:
        rule = self.rules.rule
        return (
            f"{speedup:.2f}x the speed of its {self.twin.float_name} twin (at least {rule.min_speedup:.2f}x), "
            f"{self._told(engine, drop)} (at most {rule.max_drop:.4f})"
            + (", weights of 7 bits" if self.int8.target.lowering.weight_bits == 7 else "")
            + (f", attention's products in floating point: {self.gain} so" if self.int8.released else "")
        )

    def _told(self, engine: Engine, drop: float) -> str:
        return f"drop {drop:.4f}" if isfinite(drop) else f"no accuracy: {self.unscored[engine.artifact.digest]}"

    def _without(self, groups: Sequence[str]) -> Engine | None:
        """The engine with some groups in floating point too, None where that one gives no steady answers."""
        layers = {*self.int8.released, *(layer for group in groups for layer in self._groups[group])}
        found = self.rules._steady(self.step, [self.int8.target], self.versions, tuple(sorted(layers)))
        return found[0] if found else None

    def _repair_accuracy(self, drop: float) -> tuple[Engine, dict[str, str]]:
        """Give back the most damaging groups, twice as many each time, until the budget holds."""
        order = sorted(self._groups, key=lambda group: -self.step.damage.get(group, 0.0))
        count, engine, given = 1, self.int8, order[:0]
        while not self.accurate(drop) and count < 2 * len(order):
            more = order[: min(count, len(order))]
            if found := self._without(more):
                engine, given, drop = found, more, self.drop(found)
                told = self._told(engine, drop)
                self._say(f"{len(given)} of {len(order)} groups in floating point for accuracy: {told}")
            count *= 2
        damage = {group: root_percent(self.step.damage.get(group, 0.0)) for group in given}
        said = FOR_ACCURACY + "rounding it alone changes the outputs by {} of their standard deviation"
        return engine, {group: said.format(percent) for group, percent in damage.items()}

    def _repair_speed(self, engine: Engine, given_back: dict[str, str]) -> tuple[Engine, dict[str, str]]:
        """Give back every group that is faster in floating point."""
        kept = [group for group in self._groups if group not in given_back]
        trials = {group: found for group in kept if (found := self._without([*given_back, group]))}
        times = self.rules._times([engine, *trials.values()])
        now = times[engine.artifact.digest]
        gains = {group: now / times[trial.artifact.digest] for group, trial in trials.items()}
        slow = {group: gain for group, gain in gains.items() if gain >= WORTH_IT}
        self._say(f"{len(slow)} of {len(kept)} groups are faster in floating point")
        if not slow:
            return engine, given_back
        more = {group: f"speed: {gain:.2f}x faster in floating point" for group, gain in slow.items()}
        faster = self._without([*given_back, *more])
        return (faster, {**given_back, **more}) if faster else (engine, given_back)

    def _say(self, text: str) -> None:
        self.rules.line.progress.say(f"{self.step.name} on {self.int8.target.name}: {text}")
