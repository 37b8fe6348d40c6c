"""A network's components as engines of their own: a dual encoder's towers, an encoder and its decoder.

They are cut from the graph of what is shipped, run one after the other as a robot would run them, and compared with
PyTorch's outputs of the whole network. Device side: neither torch nor onnx.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
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

VERSION = 1  # raise it when agreement is found in another way: kept values expire
INSIDE = "PyTorch gives no such values; what is made of them agrees or does not"


@dataclass(frozen=True)
class Parts:
    """The components of one network on one target.

    Attributes:
        stage: whose network.
        target: in the form that built the engines.
        engines: by component; each says what it reads and makes.
        expected: ``expected()`` gives PyTorch's outputs of the whole network for the first samples.
        data: digest of what the samples and these outputs come from.
    """

    stage: str
    target: Target
    engines: Mapping[str, Artifact]
    expected: Callable[[], Arrays]
    data: str

    def in_order(self) -> Iterator[tuple[str, Artifact]]:
        """The engines, each after those whose outputs it reads."""
        waiting = dict(self.engines)
        while waiting:
            made = {output: name for name, engine in waiting.items() for output in engine.about["outputs"]}
            ready = [name for name, engine in waiting.items() if {made.get(i, name) for i in reads(engine)} == {name}]
            for name in ready or list(waiting):  # none is ready: two read each other, and running them will say so
                yield name, waiting.pop(name)

    @property
    def digests(self) -> dict[str, str]:
        """Of the engines."""
        return {name: engine.digest for name, engine in self.engines.items()}


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
class Relay:
    """The components of one network run one after the other, once, when somebody first asks for what came of it.

    Attributes:
        parts: the components.
        samples: inputs of the whole network.
    """

    parts: Parts
    samples: Arrays

    @property
    def fed(self) -> dict[str, Arrays]:
        """What each component read."""
        return self._done[0]

    @property
    def agreement(self) -> dict[str, dict[str, float]]:
        """With PyTorch, of each component that makes outputs of the whole network."""
        return self._done[1]

    @cached_property
    def _done(self) -> tuple[dict[str, Arrays], dict[str, dict[str, float]]]:
        parts, expected = self.parts, self.parts.expected()
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
            if known := {key: expected[key] for key in engine.about["outputs"] if key in expected}:
                found[name] = parity(known, {key: answers[key] for key in known})
        return fed, found


@dataclass
class Bench:
    """Where components are measured.

    Attributes:
        store: keeps what was measured.
        profile: how to time.
        samples: inputs of the whole network.
        progress: for the user.
        why_not: why engines of this target cannot run here, None where they can.
        again: time them even if there is a result for exactly these engines; the old one is kept aside.
    """

    store: Store
    profile: ProfileConfig
    samples: Arrays
    progress: Progress
    why_not: str | None
    again: bool = False

    def results(self, first: Parts, last: Parts) -> tuple[list[ComponentResult], list[ComponentResult]]:
        """The components of the baseline and of the last network of a run, measured side by side."""
        if self.why_not is not None:
            return self._rows(first, {}, {}), self._rows(last, {}, {})
        relays = {parts.stage: Relay(parts, self.samples) for parts in (first, last)}
        same = {stage: self._agreement(relay) for stage, relay in relays.items()}
        times = self._times(list(relays.values()))
        return self._rows(first, same[first.stage], times), self._rows(last, same[last.stage], times)

    def _agreement(self, relay: Relay) -> dict[str, Any]:
        parts = relay.parts
        inputs = {"engines": parts.digests, "data": parts.data, "version": VERSION}
        name = place_name(f"{parts.stage}-{parts.target.name}-components")
        return self.store.values(name, inputs, lambda: relay.agreement)

    def _times(self, relays: Sequence[Relay]) -> dict[str, Any]:
        """By component and stage: see ``timings``. Each network gets what its own components made."""
        inputs = {
            "engines": [relay.parts.digests for relay in relays],
            "profile": self.profile.timing,
            "cpu": cpu_name(),
            "turn": [SETTLE, TURN],
        }
        first, last = relays[0].parts, relays[-1].parts

        def measure() -> dict[str, Any]:
            return {name: self._time(name, relays) for name in first.engines}

        place = place_name(f"timing-{last.target.name}-components")
        if self.again:
            self.store.set_aside("measurement", place, inputs)
        return self.store.values(place, inputs, measure)

    def _time(self, name: str, relays: Sequence[Relay]) -> dict[str, Any]:
        first = relays[0].parts
        self.progress.say(f"timing {name} alone on {first.target.name}")
        timed = [
            Timed(
                relay.parts.stage,
                relay.parts.engines[name],
                None if relay is relays[0] else first.stage,
                samples=relay.fed[name],
            )
            for relay in relays
        ]
        return timings(first.target.name, timed, {}, self.profile, self.progress)

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
