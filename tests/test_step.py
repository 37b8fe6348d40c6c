"""Decoders with a cache: one token at a time gives what all tokens at once give, and what cannot is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from decoders import Engines, expected, exported
from families import lively
from torch import Tensor, nn
from torch.nn import functional as F

from mmedge.artifact import load_artifact
from mmedge.errors import StageError, TaskError, UsageError
from mmedge.loading import check_declarations
from mmedge.lower.step import check, piece_of, step_of
from mmedge.pipeline.compress import Job, compress
from mmedge.pipeline.device import build_here
from mmedge.progress import Progress
from mmedge.recipe import Recipe
from mmedge.targets.decoding import Cache, Decoding, greedy
from mmedge.targets.onnxruntime import OnnxRuntime
from mmedge.task import Batch, Component, Metric, Task
from mmedge.tensors import Array, TensorSpec

HERE = f"{Path(__file__).resolve()}:writer"
WORDS, PLACES, WIDTH, HEADS = 11, 6, 16, 2
INT8 = {"quantize": {"calibration": {"samples": 32, "observer": "minmax"}}}


# --- a small writer, whose attention can be had in several forms

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
PAST = torch.ones(PLACES, PLACES, dtype=torch.bool).tril()


def masked(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, attn_mask=PAST)


def causal(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, is_causal=True)


def by_hand(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """With a bias by distance, as relative positions are learned."""
    places = torch.arange(PLACES)
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5 + 0.3 * (places[:, None] - places)
    return scores.masked_fill(~PAST, -1e9).softmax(dim=-1) @ value


def few_keys(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """One head of keys and values for all queries."""
    key, value = (each[:, :1].expand(-1, HEADS, -1, -1) for each in (key, value))
    return masked(query, key, value)


def gated(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """What each place is keeps it from being looked at or not, and by how much it looks."""
    bias = value.mean(dim=-1)[:, :, None] * 3
    weights = (query @ key.transpose(-1, -2) + bias).masked_fill(~PAST, -1e9).softmax(dim=-1)
    return weights * query.amax(dim=-1, keepdim=True).sigmoid() @ value


def everything(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value)


def one_ahead(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, attn_mask=PAST | PAST.roll(1, dims=1).tril(1))


def running_sum(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return value.cumsum(dim=2)


def average(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return value - value.mean(dim=2, keepdim=True)


def distances(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    scores = query.amax(dim=-1)[..., None] - key.amax(dim=-1)[:, :, None]
    return scores.masked_fill(~PAST, -1e9).softmax(dim=-1) @ value


def unweighed(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return (query @ key.transpose(-1, -2) * PAST) @ value


class Writer(nn.Module):
    """Reads ``notes (batch, 5, WIDTH)``, or nothing, and writes: ``tokens`` to ``logits (batch, PLACES, WORDS)``."""

    def __init__(self, attend: Attend, notes: bool) -> None:
        super().__init__()
        self.attend = attend
        self.words = nn.Embedding(WORDS, WIDTH)
        self.place = nn.Parameter(torch.randn(PLACES, WIDTH))
        self.mix = nn.Linear(WIDTH, 3 * WIDTH)
        self.read = nn.Linear(WIDTH, 2 * WIDTH) if notes else None
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, WORDS)

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (HEADS, WIDTH // HEADS)).transpose(1, 2)

    def forward(self, tokens: Tensor, notes: Tensor | None = None) -> Tensor:
        x = self.words(tokens) + self.place
        query, key, value = (self.split(each) for each in self.mix(self.norm(x)).chunk(3, dim=-1))
        x = x + self.attend(query, key, value).transpose(1, 2).flatten(2)
        if self.read is not None and notes is not None:
            key, value = (self.split(each) for each in self.read(notes).chunk(2, dim=-1))
            x = x + F.scaled_dot_product_attention(self.split(x), key, value).transpose(1, 2).flatten(2)
        return self.head(self.norm(x))


def writer(attend: Attend = masked, notes: bool = True, cache: str = "tokens") -> Task:
    torch.manual_seed(0)

    def batches(split: str, seed: int) -> Iterator[Batch]:
        rng = np.random.default_rng(["train", "calibration", "test"].index(split))
        for _ in range(2):
            read = {"notes": rng.standard_normal((32, 5, WIDTH), dtype=np.float32)} if notes else {}
            tokens = rng.integers(0, WORDS, (32, PLACES))
            yield Batch({"tokens": tokens, **read}, tokens)

    inputs = [TensorSpec("tokens", "int64", ("batch", PLACES), "text")]
    inputs += [TensorSpec("notes", "float32", ("batch", 5, WIDTH), "notes")] if notes else []
    return Task(
        name="writer",
        model=lively(Writer(attend, notes)),
        inputs=tuple(inputs),
        outputs=("logits",),
        batches=batches,
        loss=lambda outputs, targets: F.cross_entropy(outputs["logits"].flatten(0, 1), targets.flatten()),
        metric=Metric("right", lambda outputs, targets: float((outputs["logits"].argmax(-1) == targets).mean())),
        components=(Component("writer", tuple(spec.name for spec in inputs), ("logits",), cache=cache),),
    )


@pytest.mark.parametrize(
    ("attend", "notes"),
    [(masked, True), (masked, False), (causal, True), (by_hand, False), (few_keys, False), (gated, False)],
)
def test_steps_give_what_all_tokens_at_once_give(tmp_path, attend, notes) -> None:
    task = writer(attend, notes)
    engines = Engines(exported(task, tmp_path), task.components[0], OnnxRuntime(), tmp_path)
    inputs = dict(task.example().inputs)
    np.testing.assert_allclose(engines.steps(inputs), expected(task, inputs)["logits"], atol=1e-5)
    assert (tmp_path / "memory").exists() == notes
    assert [len(engines.cache.past), engines.cache.length] == [2 + (attend is gated), PLACES]


class FromPyTorch(nn.Module):
    """PyTorch's own decoder, whose attention puts places before samples."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        layer = nn.TransformerDecoderLayer(WIDTH, HEADS, 32, batch_first=True, norm_first=True)
        self.layers = nn.TransformerDecoder(layer, 2)
        self.head = nn.Linear(WIDTH, WORDS)

    def forward(self, tokens: Tensor, notes: Tensor) -> Tensor:
        return self.head(self.layers(self.words(tokens), notes, tgt_mask=~PAST, tgt_is_causal=True))


def test_pytorchs_own_decoder_goes_step_by_step(tmp_path) -> None:
    task = dataclasses.replace(writer(), model=lively(FromPyTorch()))
    engines = Engines(exported(task, tmp_path), task.components[0], OnnxRuntime(), tmp_path)
    inputs = dict(task.example().inputs)
    np.testing.assert_allclose(engines.steps(inputs), expected(task, inputs)["logits"], atol=1e-5)


@pytest.mark.parametrize(
    ("attend", "problem"),
    [
        (everything, "looks ahead"),
        (one_ahead, "looks ahead"),
        (running_sum, "no rule for CumSum"),
        (average, "reduces over places"),
        (distances, "compares places with one another"),
        (unweighed, "no softmax has weighed"),
    ],
)
def test_a_decoder_that_needs_other_places_is_refused(tmp_path, attend, problem) -> None:
    task = writer(attend)
    with pytest.raises(StageError, match=problem) as caught:
        piece_of(exported(task, tmp_path), task.components[0].pieces[-1])
    assert caught.value.where == "component writer: cache"
    assert "leave `cache` out" in str(caught.value.fix)


def looking_ahead() -> Task:
    return writer(everything)


def test_the_line_refuses_such_a_decoder_before_it_measures_anything(tmp_path) -> None:
    recipe = Recipe.model_validate({"task": HERE.replace(":writer", ":looking_ahead"), "targets": ["onnxruntime"]})
    with pytest.raises(StageError, match="looks ahead"):
        compress(Job(recipe, "step.yaml", 0, tmp_path / "run", "mmedge compress …"), Progress())
    assert not list((tmp_path / "run" / "artifacts").glob("*-accuracy-*"))


def test_steps_that_are_wrong_are_noticed(tmp_path) -> None:
    """The comparison behind every step: here the position table is shifted by a place."""
    task = writer()
    whole = exported(task, tmp_path)
    component = task.components[0]
    memory, _ = piece_of(whole, component.pieces[1])
    step, _ = piece_of(whole, component.pieces[0])
    cache = step_of(step, component)
    check(piece_of(whole, component.pieces[0])[0], memory, step, cache, "writer")
    (table,) = (value for name, value in step.graph.initializers.items() if "place.places" in name)
    table.const_value = ir.tensor(np.roll(table.const_value.numpy(), 1, axis=0), name=table.name)
    with pytest.raises(StageError, match="steps is off"):
        check(piece_of(whole, component.pieces[0])[0], memory, step, cache, "writer")


@pytest.mark.parametrize(
    ("cache", "problem"),
    [
        ("words", "writer: cache 'words' is none of its inputs: tokens, notes"),
        ("notes", "cache 'notes' is float32"),
    ],
)
def test_a_cache_that_is_no_tokens_is_refused_with_the_task(cache, problem) -> None:
    with pytest.raises(TaskError, match=problem):
        check_declarations(writer(cache=cache), "test")
    check_declarations(writer(), "test")


def test_names_of_pieces_do_not_meet_those_of_components() -> None:
    task = writer()
    twice = (*task.components, Component("writer_step", ("notes", "tokens"), ("logits",)))
    object.__setattr__(task, "components", twice)
    with pytest.raises(TaskError, match="two components are called 'writer_step'"):
        check_declarations(task, "test")


def test_sequences_are_written_until_they_end() -> None:
    """A step that says one more than it read, and keeps it."""
    cache = Cache.of_json(
        {
            **{"token": "tokens", "token_dtype": "int32", "position": "position", "length": 4},
            "past": [{"name": "past_0", "new": "new_0", "axis": 2, "shape": [1, 4], "dtype": "float32"}],
            "outputs": {"logits": 1},
        }
    )
    assert Cache.of_json(cache.as_json()) == cache
    seen = []

    def step(inputs: dict[str, Array]) -> dict[str, Array]:
        seen.append({name: array.copy() for name, array in inputs.items()})
        said = np.eye(9, dtype=np.float32)[inputs["tokens"] + 1]
        return {"logits": said, "new_0": inputs["tokens"][:, None].astype(np.float32)}

    assert greedy(Decoding(step, cache, {}, 2), begin=1, end=3, length=4).tolist() == [[2, 3, 0, 0]] * 2
    assert [each["position"].tolist() for each in seen] == [[0, 0], [1, 1]]
    assert seen[1]["tokens"].tolist() == [[2], [2]]
    assert seen[1]["tokens"].dtype == np.int32
    assert seen[1]["past_0"].tolist() == [[[1, 0, 0, 0]]] * 2
    decoding = Decoding(step, cache, {}, 1)
    with pytest.raises(UsageError, match="4 places and all are taken"):
        greedy(decoding, begin=0, end=8, length=5)


# --- through the line, and on devices


def test_rows_of_the_report_here_and_on_a_device(tmp_path) -> None:
    recipe = Recipe.model_validate(
        {
            "task": HERE,
            "targets": ["onnxruntime"],
            "stages": [INT8],
            "profile": {"queries": 64, "budget_s": 1, "health_samples": 32},
            "twin": {"queries": 64, "budget_s": 1, "min_speedup": 0.0, "max_drop": 1.0},
        }
    )
    run = tmp_path / "run"
    report, _ = compress(Job(recipe, "step.yaml", 0, run, "mmedge compress …"), Progress())
    again, _ = build_here(run, "onnxruntime", "mmedge build …", Progress(), again=True)
    for each in (report, again):
        for stage, least in zip(each.stages, (0.99999, 0.99), strict=True):
            whole, memory, step = stage.results[0].components
            assert [part.name for part in (whole, memory, step)] == ["writer", "writer_memory", "writer_step"]
            assert min(whole.parity.cosine, step.parity.cosine) >= least
            assert memory.parity is None
            assert memory.reasons["parity"]
            assert all(part.latency_ms.p50 > 0 and part.size_bytes > 0 for part in (whole, memory, step))
            assert "cache" in load_artifact(run / step.artifact).about
