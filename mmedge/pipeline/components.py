"""A network's components as engines of their own: a dual encoder's towers, an encoder and its decoder.

They are cut from the graph of what is shipped, run one after the other as a robot would run them, and compared with
PyTorch's outputs of the whole network. Device side: neither torch nor onnx.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmedge.artifact import Artifact, Store
from mmedge.pipeline.engines import place_name
from mmedge.pipeline.environment import cpu_name
from mmedge.pipeline.folder import processors
from mmedge.pipeline.rows import Timed, timing_json, timings
from mmedge.profile.accuracy import parity
from mmedge.profile.worker import SETTLE, TURN
from mmedge.progress import Progress
from mmedge.recipe import ProfileConfig
from mmedge.report.model import ComponentResult
from mmedge.targets.base import Runner, Target
from mmedge.targets.decoding import Cache, Decoding
from mmedge.tensors import Array, Arrays

INSIDE = "PyTorch gives no such values; what is made of them agrees or does not"


@dataclass(frozen=True)
class Parts:
    """The components of one network on one target.

    Attributes:
        stage: whose network.
        target: in the form that built the engines.
        engines: by component; each says what it reads and makes.
        expected: PyTorch's outputs of the whole network for the first samples.
    """

    stage: str
    target: Target
    engines: Mapping[str, Artifact]
    expected: Arrays

    def in_order(self) -> Iterator[tuple[str, Artifact]]:
        """The engines, each after those whose outputs it reads."""
        waiting = dict(self.engines)
        while waiting:
            made = {output: name for name, engine in waiting.items() for output in engine.about["outputs"]}
            ready = [name for name, engine in waiting.items() if {made.get(i, name) for i in reads(engine)} == {name}]
            for name in ready or list(waiting):  # none is ready: two read each other, and running them will say so
                yield name, waiting.pop(name)


def reads(engine: Artifact) -> list[str]:
    """The names of an engine's inputs."""
    return [spec["name"] for spec in engine.about["inputs"]]


def steps(run: Runner, engine: Artifact, values: Arrays) -> tuple[Arrays, dict[str, Array]]:
    """Run a decoder token by token over tokens that are known.

    Args:
        run: of the engine.
        engine: one step of the decoder.
        values: the tokens, and what the decoder's memory holds.

    Returns:
        What the engine read halfway, and its outputs as if it had read all tokens at once.
    """
    cache = Cache.of_json(engine.about["cache"])
    tokens = values[cache.token]
    own = {cache.token, cache.position, *(each.name for each in cache.past)}
    decoding = Decoding(run, cache, {key: values[key] for key in reads(engine) if key not in own}, len(tokens))
    fed: Arrays = {}
    made = []
    for place in range(cache.length):
        if place == cache.length // 2:
            fed = {key: array.copy() for key, array in decoding.inputs(tokens[:, place]).items()}
        made.append(decoding.next(tokens[:, place]))
    return fed, {key: np.stack([each[key] for each in made], axis=axis) for key, axis in cache.outputs.items()}


@dataclass
class Bench:
    """Where components are measured.

    Attributes:
        store: keeps timings.
        profile: how to time.
        samples: inputs of the whole network.
        progress: for the user.
        why_not: why engines of this target cannot run here, None where they can.
    """

    store: Store
    profile: ProfileConfig
    samples: Arrays
    progress: Progress
    why_not: str | None

    def results(self, first: Parts, last: Parts) -> tuple[list[ComponentResult], list[ComponentResult]]:
        """The components of the baseline and of the last network of a run, measured side by side."""
        if self.why_not is not None:
            return self._rows(first, {}, {}), self._rows(last, {}, {})
        fed, same = self._run(first)
        fed_last, same_last = (fed, same) if last is first else self._run(last)
        times = self._times(first, last, fed, fed_last)
        return self._rows(first, same, times), self._rows(last, same_last, times)

    def _run(self, parts: Parts) -> tuple[dict[str, Arrays], dict[str, dict[str, float]]]:
        """What each component read as they ran one after the other, and its agreement with PyTorch."""
        values: dict[str, Array] = dict(self.samples)
        fed: dict[str, Arrays] = {}
        found = {}
        for name, engine in parts.in_order():
            with parts.target.runner(engine.path, processors()) as run:
                if "cache" in engine.about:
                    fed[name], answers = steps(run, engine, values)
                else:
                    fed[name] = {key: values[key] for key in reads(engine)}
                    answers = run(fed[name])
            values |= answers
            if known := {key: parts.expected[key] for key in engine.about["outputs"] if key in parts.expected}:
                found[name] = parity(known, {key: answers[key] for key in known})
        return fed, found

    def _times(
        self, first: Parts, last: Parts, fed: Mapping[str, Arrays], fed_last: Mapping[str, Arrays]
    ) -> dict[str, Any]:
        """By component and stage: see ``timings``. Each network gets what its own components made."""
        sides = [first] if last.stage == first.stage else [first, last]
        inputs = {
            "engines": [{name: engine.digest for name, engine in side.engines.items()} for side in sides],
            "profile": self.profile.timing,
            "cpu": cpu_name(),
            "turn": [SETTLE, TURN],
        }

        def measure() -> dict[str, Any]:
            return {name: self._time(name, sides, [fed[name], fed_last[name]]) for name in first.engines}

        return self.store.values(place_name(f"timing-{last.target.name}-components"), inputs, measure)

    def _time(self, name: str, sides: Sequence[Parts], fed: Sequence[Arrays]) -> dict[str, Any]:
        target = sides[0].target.name
        self.progress.say(f"timing {name} alone on {target}")
        timed = [
            Timed(side.stage, side.engines[name], None if side is sides[0] else sides[0].stage, samples=samples)
            for side, samples in zip(sides, fed, strict=False)
        ]
        return timings(target, timed, {}, self.profile, self.progress)

    def _rows(self, parts: Parts, same: Mapping[str, Any], times: Mapping[str, Any]) -> list[ComponentResult]:
        rows = []
        for name, engine in parts.in_order():
            reasons = {} if name in same else {"parity": self.why_not or INSIDE}
            timing = timing_json(times.get(name, {}).get(parts.stage), self.why_not, reasons)
            fields = {key: timing[key] for key in ("latency_ms", "speedup", "peak_memory_mib")}
            rows.append(
                ComponentResult(
                    name=name,
                    artifact=f"artifacts/{engine.path.name}",
                    size_bytes=engine.size_bytes(),
                    parity=same.get(name),
                    reasons=reasons,
                    **fields,
                )
            )
        return rows
