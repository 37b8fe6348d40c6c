"""Decoders with a cache, of trained and of known models: the same words step by step, in float and INT8, and pruned."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from decoders import Engines, expected, exported
from families import context_of, prune

from mmedge import plugins
from mmedge.loading import load_task
from mmedge.stages.base import Network
from mmedge.stages.quantize import Quantize
from mmedge.targets.decoding import Decoding, greedy
from mmedge.targets.onnxruntime import OnnxRuntime
from mmedge.targets.openvino import OpenVino
from mmedge.task import Batch, Task
from mmedge.tasks import captions
from mmedge.tasks.captions import data
from mmedge.tensors import Array


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
    stage, context = Quantize(Quantize.Config(calibration={"samples": 32, "observer": "minmax"})), context_of(captioner)
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
    assert len(covered["memory"]) == 4
    assert not covered["memory"] & covered["step"]


def test_a_pruned_decoder_goes_step_by_step_as_well(tmp_path, captioner, images) -> None:
    module, _ = prune(captioner, macs=0.6, round_to=8)
    whole = exported(captioner, tmp_path, Network(module))
    engines = Engines(whole, captioner.components[1], OnnxRuntime(), tmp_path)
    wanted = expected(captioner, dict(images.inputs), module)
    inputs = {"tokens": images.inputs["tokens"], "encoder_hidden": wanted["encoder_hidden"]}
    np.testing.assert_allclose(engines.steps(inputs), wanted["logits"], atol=1e-3)


def test_tensorrt_for_rtx_builds_the_pieces(tmp_path, captioner) -> None:
    pytest.importorskip("tensorrt_rtx")
    target = plugins.target("tensorrt-rtx:compute_capabilities=[8.9]").forms()[-1]
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
