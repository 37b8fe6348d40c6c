"""Decoders with a cache: one token at a time gives what all tokens at once give, and what cannot is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from families import context_of, lively, prune
from torch import Tensor, nn
from torch.nn import functional as F

from mmedge.artifact import load_artifact
from mmedge.errors import StageError, TaskError, UsageError
from mmedge.lower.export import onnx_of, write
from mmedge.lower.shape import shape_for
from mmedge.lower.step import check, piece_of, step_of
from mmedge.pipeline.compress import Job, compress
from mmedge.pipeline.device import build_here
from mmedge.progress import Progress
from mmedge.recipe import Recipe
from mmedge.stages.base import Network, as_tensors, outputs_of
from mmedge.stages.quantize import Quantize
from mmedge.targets.base import Target
from mmedge.targets.decoding import Cache, Decoding, greedy
from mmedge.targets.onnxruntime import OnnxRuntime
from mmedge.targets.openvino import OpenVino
from mmedge.task import Batch, Component, Metric, Task, check_declarations
from mmedge.tasks import captions
from mmedge.tasks.captions import data
from mmedge.tensors import Array, TensorSpec

HERE = f"{Path(__file__).resolve()}:writer"
WORDS, PLACES, WIDTH, HEADS = 11, 6, 16, 2
INT8 = {"quantize": {"calibration": {"samples": 32, "observer": "minmax"}}}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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


def everything(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value)


def one_ahead(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, attn_mask=PAST | PAST.roll(1, dims=1).tril(1))


def running_sum(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return value.cumsum(dim=2)


def average(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return value - value.mean(dim=2, keepdim=True)


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


def exported(task: Task, folder: Path, network: Network | None = None) -> Path:
    write(onnx_of(network or Network(task.model), task), folder / "whole.onnx")
    return folder / "whole.onnx"


class Engines:
    """The pieces of a component, lowered and built for a target, and what they make."""

    def __init__(self, whole: Path, component: Component, target: Target, folder: Path) -> None:
        self.target, self.component, self.folder, self.coverage = target, component, folder, {}
        for piece in component.pieces:
            place = folder / piece.role
            place.mkdir(parents=True)
            model, cache = piece_of(whole, piece)
            write(model, place / "portable.onnx")
            shape_for(place / "portable.onnx", target.lowering, place / "lowered.onnx")
            (place / "engine").mkdir()
            self.coverage[piece.role] = target.build(place / "lowered.onnx", place / "engine").coverage
            self.cache = cache or getattr(self, "cache", None)

    def run(self, role: str, inputs: dict[str, Array]) -> dict[str, Array]:
        with self.target.runner(self.folder / role / "engine", 1) as run:
            return run(inputs)

    def memory(self, inputs: dict[str, Array]) -> dict[str, Array]:
        others = {name: inputs[name] for name in self.component.inputs if name != self.component.cache}
        return self.run("memory", others) if others else {}

    def steps(self, inputs: dict[str, Array]) -> Array:
        """``logits`` as if all tokens had been read at once."""
        tokens = inputs[self.component.cache]
        with self.target.runner(self.folder / "step" / "engine", 1) as run:
            decoding = Decoding(run, self.cache, self.memory(inputs), len(tokens))
            return np.stack([decoding.next(tokens[:, i])["logits"] for i in range(tokens.shape[1])], axis=1)


def expected(task: Task, inputs: dict[str, Array], module: Any = None) -> dict[str, Array]:
    with torch.no_grad():
        found = outputs_of(module or task.model, as_tensors(inputs), task.outputs)
    return {name: value.numpy() for name, value in found.items()}


@pytest.mark.parametrize("attend", [masked, causal, by_hand])
@pytest.mark.parametrize("notes", [True, False])
def test_steps_give_what_all_tokens_at_once_give(tmp_path, attend, notes) -> None:
    task = writer(attend, notes)
    engines = Engines(exported(task, tmp_path), task.components[0], OnnxRuntime(), tmp_path)
    inputs = dict(task.example().inputs)
    np.testing.assert_allclose(engines.steps(inputs), expected(task, inputs)["logits"], atol=1e-5)
    assert (tmp_path / "memory").exists() == notes
    assert [len(engines.cache.past), engines.cache.length] == [2, PLACES]


@pytest.mark.parametrize(
    ("attend", "problem"),
    [
        (everything, "looks ahead"),
        (one_ahead, "looks ahead"),
        (running_sum, "no rule for CumSum"),
        (average, "reduces over places"),
        (unweighed, "no softmax has weighed"),
    ],
)
def test_a_decoder_that_needs_other_places_is_refused(tmp_path, attend, problem) -> None:
    task = writer(attend)
    with pytest.raises(StageError, match=problem) as caught:
        piece_of(exported(task, tmp_path), task.components[0].pieces[-1])
    assert caught.value.where == "component writer: cache"
    assert "leave `cache` out" in str(caught.value.fix)


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
    assert seen[1]["tokens"].tolist() == [[2], [2]] and seen[1]["tokens"].dtype == np.int32
    assert seen[1]["past_0"].tolist() == [[[1, 0, 0, 0]]] * 2
    decoding = Decoding(step, cache, {}, 1)
    with pytest.raises(UsageError, match="4 places and all are taken"):
        greedy(decoding, begin=0, end=8, length=5)


# --- captions: trained, in float and INT8, pruned


@pytest.fixture(scope="module")
def captioner() -> Task:
    return captions.task()


@pytest.fixture(scope="module")
def images(captioner: Task) -> Batch:
    return next(iter(captioner.stream("test")))


def written(engines: Engines, hidden: Array, whole: bool) -> Array:
    with engines.target.runner(engines.folder / ("whole" if whole else "step") / "engine", 1) as run:
        if whole:
            return data.greedy(run, hidden)
        memory = engines.memory({"encoder_hidden": hidden})
        return greedy(Decoding(run, engines.cache, memory, len(hidden)), data.BEGIN, data.END, data.LENGTH)


@pytest.mark.parametrize("target", [OnnxRuntime(), OpenVino()], ids=lambda target: target.name)
def test_the_same_captions_are_written_step_by_step(tmp_path, captioner, images, target) -> None:
    engines = Engines(exported(captioner, tmp_path), captioner.components[1], target, tmp_path)
    wanted = expected(captioner, dict(images.inputs))
    inputs = {"tokens": images.inputs["tokens"], "encoder_hidden": wanted["encoder_hidden"]}
    np.testing.assert_allclose(engines.steps(inputs), wanted["logits"], atol=1e-3)
    one, all_at_once = (written(engines, wanted["encoder_hidden"], whole) for whole in (False, True))
    assert np.array_equal(one, all_at_once)
    assert float((one == images.targets).all(axis=1).mean()) > 0.8
    step = ir.load(tmp_path / "step" / "portable.onnx")
    assert not any("cross.key" in str(node.name) or "cross.value" in str(node.name) for node in step.graph)


def test_int8_steps_have_the_scales_and_kernels_of_the_whole(tmp_path, captioner, images) -> None:
    stage, context = Quantize(Quantize.Config(**INT8["quantize"])), context_of(captioner)
    network = stage.restore(Network(captioner.model), stage.run(Network(captioner.model), context), context)
    engines = Engines(exported(captioner, tmp_path, network), captioner.components[1], OnnxRuntime(), tmp_path)
    hidden = expected(captioner, dict(images.inputs))["encoder_hidden"]
    inputs = {"tokens": images.inputs["tokens"], "encoder_hidden": hidden}
    np.testing.assert_allclose(engines.steps(inputs), engines.run("whole", inputs)["logits"], atol=1.0)
    one, all_at_once = (written(engines, hidden, whole) for whole in (False, True))
    assert float((one == all_at_once).mean()) > 0.98
    covered = {role: set(found.int8) for role, found in engines.coverage.items()}
    assert len(covered["whole"]) > 10
    assert covered["memory"] | covered["step"] == covered["whole"]
    assert len(covered["memory"]) == 4 and not covered["memory"] & covered["step"]


def test_a_pruned_decoder_goes_step_by_step_as_well(tmp_path, captioner, images) -> None:
    module, _ = prune(captioner, macs=0.6, round_to=8)
    whole = exported(captioner, tmp_path, Network(module))
    engines = Engines(whole, captioner.components[1], OnnxRuntime(), tmp_path)
    wanted = expected(captioner, dict(images.inputs), module)
    inputs = {"tokens": images.inputs["tokens"], "encoder_hidden": wanted["encoder_hidden"]}
    np.testing.assert_allclose(engines.steps(inputs), wanted["logits"], atol=1e-3)


# --- through the line, and on devices


def test_rows_of_the_report_here_and_on_a_device(tmp_path) -> None:
    recipe = Recipe.model_validate(
        {
            "task": HERE,
            "targets": ["onnxruntime"],
            "stages": [INT8],
            "profile": {"queries": 64, "health_samples": 32},
            "twin": {"queries": 64, "min_speedup": 0.0, "max_drop": 1.0},
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
            assert memory.parity is None and memory.reasons["parity"]
            assert all(part.latency_ms.p50 > 0 and part.size_bytes > 0 for part in (whole, memory, step))
            assert "cache" in load_artifact(run / step.artifact).about


@pytest.mark.parametrize("form", [0, 1])
def test_tensorrt_for_rtx_builds_the_pieces(tmp_path, captioner, form) -> None:
    pytest.importorskip("tensorrt_rtx")
    from mmedge import plugins

    target = plugins.target("tensorrt-rtx:compute_capabilities=[8.9]").forms()[form]
    engines = Engines(exported(captioner, tmp_path), captioner.components[1], target, tmp_path)
    assert set(engines.coverage) == {"whole", "memory", "step"}


# --- models of transformers


def gpt2(folder: Path) -> None:
    """An image captioner whose decoder is of the older kind, with products of merged dimensions."""
    import hf_models as hf

    config = hf.tf.GPT2Config(
        **{"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 16, "vocab_size": hf.VOCABULARY},
        **{"bos_token_id": hf.START, "eos_token_id": hf.END, "is_decoder": True, "add_cross_attention": True},
    )
    vision = hf.tf.ViTConfig(**hf.VISION)
    both = hf.tf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(vision, config)
    both.decoder_start_token_id, both.pad_token_id = hf.START, hf.PAD
    hf.lively(hf.tf.VisionEncoderDecoderModel(both)).save_pretrained(folder)
    hf.image_processor().save_pretrained(folder)
    hf.tokenizer().save_pretrained(folder)


@pytest.mark.parametrize("name", ["vision_encoder_decoder", "gpt2", "whisper"])
def test_decoders_of_transformers(tmp_path, monkeypatch, name) -> None:
    pytest.importorskip("transformers")
    import hf_models

    from mmedge.task import load_task

    for config in (hf_models.VISION, hf_models.TEXT):
        monkeypatch.setitem(config, "num_hidden_layers", 1)
    if name == "gpt2":
        monkeypatch.setitem(hf_models.MODELS, "vision_encoder_decoder", gpt2)
    made = hf_models.made("whisper" if name == "whisper" else "vision_encoder_decoder", tmp_path)
    task = load_task(made, {})
    batch = next(iter(task.stream("test")))
    wanted = expected(task, dict(batch.inputs))
    decoder = task.components[1]
    assert decoder.cache == "decoder_input_ids"
    engines = Engines(exported(task, tmp_path), decoder, OnnxRuntime(), tmp_path)
    inputs = {**batch.inputs, "encoder_hidden": wanted["encoder_hidden"]}
    np.testing.assert_allclose(engines.steps(inputs), wanted["logits"], atol=1e-4)
