"""Small models of the families that people bring, and how tests prune them."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmedge.progress import Progress
from mmedge.stages.base import Context, Network, Saved, as_tensors, outputs_of
from mmedge.stages.prune import Prune
from mmedge.stages.structure import count
from mmedge.task import Batch, Metric, Split, Task, accuracy
from mmedge.tensors import Array, TensorSpec

Inputs = Mapping[str, tuple[int, ...]]


def task_of(model: nn.Module, inputs: Inputs, classes: int = 10) -> Task:
    """A task around ``model`` with random data and labels; of ``tokens*`` inputs the entries are integers below 50."""

    def batches(split: Split, seed: int) -> Iterator[Batch]:
        rng = np.random.default_rng([seed, len(split)])
        for _ in range(2):
            arrays = {
                name: rng.integers(0, 50, (4, *shape))
                if name.startswith("tokens")
                else rng.standard_normal((4, *shape), dtype=np.float32)
                for name, shape in inputs.items()
            }
            yield Batch(arrays, rng.integers(0, classes, 4))

    specs = tuple(
        TensorSpec(name, "int64" if name.startswith("tokens") else "float32", ("batch", *shape), name)
        for name, shape in inputs.items()
    )

    def loss(outputs: Mapping[str, Tensor], y: Tensor) -> Tensor:
        logits = outputs["logits"]
        return F.cross_entropy(logits, y) if logits.shape[1:] == (classes,) else logits.square().mean()

    return Task("random", lively(model), specs, ("logits",), batches, loss, Metric("accuracy", accuracy))


def lively(model: nn.Module) -> nn.Module:
    """Weights as after training, not after initialization: norms and statistics differ from channel to channel."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.rand(parameter.shape, generator=generator)
            parameter.copy_(parameter * (0.5 + noise) + 0.1 * (noise - 0.5))
        for name, buffer in model.named_buffers():
            if buffer.is_floating_point() and "running" in name:
                buffer.add_(0.3 * torch.rand(buffer.shape, generator=generator))
    return model.eval()


def context_of(task: Task, progress: Progress | None = None) -> Context:
    return Context(task, task.model, 0, progress or Progress(), lambda name, inputs, compute: compute())


def prune(task: Task, **settings: Any) -> tuple[nn.Module, dict[str, Any]]:
    """Prune, save and load as the pipeline does, restore; checks what must hold of every result."""
    from safetensors.torch import load, save

    context, stage = context_of(task), Prune(Prune.Config(**settings))
    before = {name: value.clone() for name, value in task.model.state_dict().items()}
    saved = stage.run(Network(task.model), context)
    assert all(torch.equal(before[name], value) for name, value in task.model.state_dict().items())
    reloaded = Saved(load(save(dict(saved.tensors))), json.loads(json.dumps(saved.edits)))
    module = stage.restore(Network(blank(task.model)), reloaded, context).module
    assert not module.training
    inputs = as_tensors(task.example().inputs)
    with torch.no_grad():
        expected = outputs_of(task.model, inputs, task.outputs)["logits"]
        found = outputs_of(module, inputs, task.outputs)["logits"]
    assert found.shape == expected.shape
    assert found.isfinite().all()
    assert saved.edits["after"] == count(module, inputs, task.outputs)
    assert saved.edits["after"]["parameters"] < saved.edits["before"]["parameters"]
    assert saved.edits["after"]["macs"] < saved.edits["before"]["macs"]
    return module, dict(saved.edits)


def blank(model: nn.Module) -> nn.Module:
    """A copy that knows nothing: what is restored from it comes from the saved tensors."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.fill_(torch.nan if tensor.is_floating_point() else 0)
    return model


def run_on(task: Task, module: nn.Module) -> Tensor:
    with torch.no_grad():
        return outputs_of(module, as_tensors(task.example().inputs), task.outputs)["logits"]


def assert_exports(task: Task, module: nn.Module) -> None:
    """The engine, at another batch size, says what PyTorch says."""
    found, expected = engine_and_pytorch(task, module)
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=1e-3)
    assert cosine(found, expected) >= 0.9999


def engine_and_pytorch(task: Task, module: nn.Module) -> tuple[Array, Array]:
    """What ONNX Runtime makes of the exported network and what PyTorch does, at another batch size."""
    import onnx_ir
    import onnxruntime

    from mmedge.lower.export import onnx_of

    session = onnxruntime.InferenceSession(onnx_ir.to_proto(onnx_of(Network(module), task)).SerializeToString())
    inputs = {name: array[:3] for name, array in task.example().inputs.items()}
    with torch.no_grad():
        expected = outputs_of(module, as_tensors(inputs), task.outputs)["logits"].numpy()
    return session.run(None, inputs)[0], expected


def cosine(found: Array, expected: Array) -> float:
    """Of all numbers as one vector."""
    found, expected = found.astype(np.float64), expected.astype(np.float64)
    return float((found * expected).sum() / np.linalg.norm(found) / np.linalg.norm(expected))


# --- transformers


class Called(nn.Module):
    """A model of transformers with the names and the one output that a task declares."""

    def __init__(self, model: nn.Module, output: str = "logits", tokens: str = "input_ids", **fixed: Any) -> None:
        super().__init__()
        self.model, self.output, self.tokens, self.fixed = model, output, tokens, fixed

    def forward(self, **inputs: Tensor) -> Tensor:
        named = {self.tokens if name == "tokens" else name: tensor for name, tensor in inputs.items()}
        return getattr(self.model(**named, **self.fixed, return_dict=True), self.output)


class Similarity(nn.Module):
    """CLIP's answer for pairs of an image and a text."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor, tokens: Tensor) -> Tensor:
        result = self.model(pixel_values=pixel_values, input_ids=tokens)
        return (result.image_embeds * result.text_embeds).sum(-1, keepdim=True) * self.model.logit_scale.exp()


class FixedSize(nn.Module):
    """ViLT for images of one size: its own code for mixed sizes depends on the pixels and cannot be exported."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor, tokens: Tensor) -> Tensor:
        embeddings = self.model.vilt.embeddings
        patches = embeddings.patch_embeddings(pixel_values).flatten(2).transpose(1, 2)
        patches = torch.cat([embeddings.cls_token.expand(patches.shape[0], -1, -1), patches], 1)
        patches = patches + embeddings.position_embeddings
        mask = torch.ones_like(patches[..., 0], dtype=torch.long)
        return self.model(input_ids=tokens, image_embeds=patches, pixel_mask=mask).logits


VISION = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128,
          "image_size": 32, "patch_size": 8, "num_labels": 10}  # fmt: skip
TEXT = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128,
        "vocab_size": 50, "max_position_embeddings": 32, "num_labels": 10}  # fmt: skip
IMAGE, TOKENS = {"pixel_values": (3, 32, 32)}, {"tokens": (8,)}


def clip(tf: Any) -> tuple[nn.Module, Inputs]:
    text = {**TEXT, "bos_token_id": 0, "eos_token_id": 49, "pad_token_id": 1}
    vision = {**VISION, "hidden_size": 96, "intermediate_size": 192, "num_attention_heads": 6}
    config = tf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=48)
    return Similarity(tf.CLIPModel(config)), {**IMAGE, **TOKENS}


def vit(tf: Any) -> tuple[nn.Module, Inputs]:
    return Called(tf.ViTForImageClassification(tf.ViTConfig(**VISION))), IMAGE


def bert(tf: Any) -> tuple[nn.Module, Inputs]:
    return Called(tf.BertForSequenceClassification(tf.BertConfig(**TEXT))), TOKENS


def tied_bert(tf: Any) -> tuple[nn.Module, Inputs]:
    return Called(tf.BertForMaskedLM(tf.BertConfig(**TEXT))), TOKENS


def vilt(tf: Any) -> tuple[nn.Module, Inputs]:
    return FixedSize(tf.ViltForQuestionAnswering(tf.ViltConfig(**{**VISION, **TEXT}))), {**IMAGE, **TOKENS}


def vision_encoder_decoder(tf: Any) -> tuple[nn.Module, Inputs]:
    decoder = tf.BertConfig(**{**TEXT, "hidden_size": 96}, is_decoder=True, add_cross_attention=True)
    config = tf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(tf.ViTConfig(**VISION), decoder)
    model = tf.VisionEncoderDecoderModel(config)
    return Called(model, tokens="decoder_input_ids", use_cache=False), {**IMAGE, **TOKENS}


def whisper(tf: Any) -> tuple[nn.Module, Inputs]:
    sizes = {f"{side}_{name}": value for side in ("encoder", "decoder")
             for name, value in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 128))}  # fmt: skip
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    config = tf.WhisperConfig(
        vocab_size=50, num_mel_bins=16, d_model=64, max_source_positions=32, max_target_positions=16, **sizes, **tokens
    )
    model = tf.WhisperForConditionalGeneration(config)
    return Called(model, tokens="decoder_input_ids", use_cache=False), {"input_features": (16, 64), **TOKENS}


def llama(tf: Any) -> tuple[nn.Module, Inputs]:
    config = tf.LlamaConfig(**{**TEXT, "num_attention_heads": 8}, num_key_value_heads=4)
    return Called(tf.LlamaForCausalLM(config), use_cache=False), TOKENS


def distilbert(tf: Any) -> tuple[nn.Module, Inputs]:
    sizes = {"dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 128}
    config = tf.DistilBertConfig(vocab_size=50, max_position_embeddings=32, num_labels=10, **sizes)
    return Called(tf.DistilBertForSequenceClassification(config)), TOKENS


def deit(tf: Any) -> tuple[nn.Module, Inputs]:
    return Called(tf.DeiTForImageClassificationWithTeacher(tf.DeiTConfig(**VISION))), IMAGE


def audio_spectrogram(tf: Any) -> tuple[nn.Module, Inputs]:
    sizes = {name: value for name, value in VISION.items() if name != "image_size"}
    config = tf.ASTConfig(**sizes, max_length=64, num_mel_bins=32)
    return Called(tf.ASTForAudioClassification(config)), {"input_values": (64, 32)}


TRANSFORMERS: dict[str, Callable[[Any], tuple[nn.Module, Inputs]]] = {
    "clip": clip,
    "vit": vit,
    "bert": bert,
    "tied_bert": tied_bert,
    "vilt": vilt,
    "vision_encoder_decoder": vision_encoder_decoder,
    "whisper": whisper,
    "llama": llama,
    "distilbert": distilbert,
    "deit": deit,
    "audio_spectrogram": audio_spectrogram,
}
