"""Running a decoder one token at a time: what it has seen lies in arrays here, each step adds a place to them.

Device side: numpy and the engine's own runtime. The engine is the ``_step`` graph of a component with a ``cache``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmedge.errors import UsageError
from mmedge.targets.base import Runner
from mmedge.tensors import Array, Arrays


@dataclass(frozen=True)
class Past:
    """One array of keys or values.

    Attributes:
        name: the engine's input that holds all places so far.
        new: the engine's output with the place that was just computed.
        axis: along which places lie, the first dimension (the batch) being 0.
        shape: without the batch.
        dtype: numpy's name.
    """

    name: str
    new: str
    axis: int
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Cache:
    """How a decoder's step is fed.

    Attributes:
        token: the input ``(batch, 1)`` with the token to read.
        token_dtype: numpy's name.
        position: the input ``(batch,)`` int64, at which place that token stands, counted from 0.
        length: how many places there are.
        past: what is remembered.
        outputs: the axis along which places lie, by output; the size there is 1.
    """

    token: str
    token_dtype: str
    position: str
    length: int
    past: tuple[Past, ...]
    outputs: Mapping[str, int]

    def as_json(self) -> dict[str, Any]:
        """The form used in manifests and in the file beside a model."""
        return {**vars(self), "past": [vars(each) | {"shape": list(each.shape)} for each in self.past]}

    @classmethod
    def of_json(cls, found: Mapping[str, Any]) -> Cache:
        """What ``as_json`` gave."""
        past = tuple(Past(**{**each, "shape": tuple(each["shape"])}) for each in found["past"])
        return cls(**{**found, "past": past})


class Decoding:
    """Some sequences on their way, all at the same place.

    Args:
        step: the runner of the ``_step`` engine.
        cache: how it is fed.
        memory: what the ``_memory`` engine made of the samples, by name; empty where the decoder reads tokens alone.
        count: how many sequences.
    """

    def __init__(self, step: Runner, cache: Cache, memory: Arrays, count: int) -> None:
        self.place, self.count = 0, count
        self._step, self._cache, self._memory = step, cache, dict(memory)
        self._past = {each.name: np.zeros((count, *each.shape), each.dtype) for each in cache.past}

    def inputs(self, tokens: Array) -> dict[str, Array]:
        """What the engine reads at the present place, if ``tokens`` ``(count,)`` stand there."""
        token = np.asarray(tokens).astype(self._cache.token_dtype).reshape(self.count, 1)
        position = np.full(self.count, self.place, np.int64)
        return {self._cache.token: token, self._cache.position: position, **self._memory, **self._past}

    def next(self, tokens: Array) -> dict[str, Array]:
        """Read one more token of each sequence.

        Args:
            tokens: ``(count,)``.

        Returns:
            The outputs for this place, without the axis of places: ``logits`` ``(count, vocabulary)`` of the next.

        Raises:
            UsageError: all places are taken.
        """
        if self.place >= self._cache.length:
            problem = f"the decoder has {self._cache.length} places and all are taken"
            raise UsageError(problem, fix="stop there, or export the decoder with longer token inputs")
        found = self._step(self.inputs(tokens))
        for each in self._cache.past:
            at = (slice(None),) * each.axis + (slice(self.place, self.place + 1),)
            self._past[each.name][at] = found[each.new]
        self.place += 1
        return {name: found[name].squeeze(axis) for name, axis in self._cache.outputs.items()}


def greedy(decoding: Decoding, begin: int, end: int, length: int, output: str = "logits") -> Array:
    """Write sequences, at each place the likeliest token after those before it.

    Args:
        decoding: fresh.
        begin: the token that everything starts with.
        end: the token after which a sequence is over.
        length: the most tokens to write.
        output: which output says how likely tokens are, ``(count, vocabulary)``.

    Returns:
        ``(count, length)`` int64, without ``begin``, 0 after ``end``.
    """
    found = np.zeros((decoding.count, length), np.int64)
    tokens = np.full(decoding.count, begin, np.int64)
    running = np.ones(decoding.count, np.bool_)
    for place in range(length):
        tokens = np.where(running, decoding.next(tokens)[output].argmax(axis=-1), 0)
        found[:, place] = tokens
        running &= tokens != end
        if not running.any():
            break
    return found
