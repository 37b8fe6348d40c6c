"""Small models of transformers with data, written as users have them: ``save_pretrained`` and ``save_to_disk``.

Weights are random but lively (norms and biases differ from channel to channel, as after training). Nothing is
downloaded.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmedge.tasks.hf.checkpoint import need_packages, quiet

pytest.importorskip("transformers")
need_packages()  # quietly, before they are imported below

import datasets  # noqa: E402
import transformers as tf  # noqa: E402
from PIL import Image  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers, processors  # noqa: E402

COLOURS = {"red": (220, 40, 40), "green": (40, 200, 60), "blue": (50, 60, 220), "white": (240, 240, 240)}
SIZES = ("small", "large")
WORDS = (
    "[PAD]",
    "[START]",
    "[END]",
    "[UNK]",
    "a",
    "square",
    "which",
    "colour",
    "is",
    "it",
    "the",
    *COLOURS,
    *SIZES,
    "say",
)
PAD, START, END, VOCABULARY = 0, 1, 2, 48
SIDE, RATE, MELS = 32, 640, 16
VISION = {
    **{"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128},
    **{"image_size": SIDE, "patch_size": 8},
}
TEXT = {
    **{"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128},
    **{"vocab_size": VOCABULARY, "max_position_embeddings": 16, "pad_token_id": PAD},
}
LABELS = {"id2label": dict(enumerate(COLOURS)), "label2id": {name: i for i, name in enumerate(COLOURS)}}
SAMPLES = {"train": 96, "test": 40}


def lively(model: Any) -> Any:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "logit_scale" not in name:
                noise = torch.rand(parameter.shape, generator=generator)
                parameter.copy_(parameter * (0.5 + noise) + 0.1 * (noise - 0.5))
    return model.eval()


def tokenizer() -> Any:
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="[START] $A [END]",
        pair="[START] $A [END] $B:1 [END]:1",
        special_tokens=[("[START]", START), ("[END]", END)],
    )
    special = {"pad_token": "[PAD]", "bos_token": "[START]", "eos_token": "[END]", "unk_token": "[UNK]"}
    return tf.PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=16, **special)


def image_processor(kind: Any = tf.ViTImageProcessor) -> Any:
    return kind(size={"height": SIDE, "width": SIDE})


def vit(folder: Path) -> None:
    lively(tf.ViTForImageClassification(tf.ViTConfig(**VISION, **LABELS))).save_pretrained(folder)
    image_processor().save_pretrained(folder)


def bert(folder: Path) -> None:
    lively(tf.BertForSequenceClassification(tf.BertConfig(**TEXT, **LABELS))).save_pretrained(folder)
    tokenizer().save_pretrained(folder)


def clip(folder: Path) -> None:
    text = {**TEXT, "bos_token_id": START, "eos_token_id": END}
    vision = {**VISION, "hidden_size": 96, "intermediate_size": 192, "num_attention_heads": 6}
    config = tf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=48)
    lively(tf.CLIPModel(config)).save_pretrained(folder)
    tf.CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}).save_pretrained(
        folder
    )
    tokenizer().save_pretrained(folder)


def vilt(folder: Path) -> None:
    lively(tf.ViltForQuestionAnswering(tf.ViltConfig(**{**VISION, **TEXT}, **LABELS))).save_pretrained(folder)
    tf.ViltImageProcessor(size={"shortest_edge": SIDE}, size_divisor=8).save_pretrained(folder)
    tokenizer().save_pretrained(folder)


def vision_encoder_decoder(folder: Path) -> None:
    decoder = tf.BertConfig(**{**TEXT, "hidden_size": 96}, is_decoder=True, add_cross_attention=True)
    config = tf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(tf.ViTConfig(**VISION), decoder)
    config.decoder_start_token_id, config.pad_token_id = START, PAD
    lively(tf.VisionEncoderDecoderModel(config)).save_pretrained(folder)
    image_processor().save_pretrained(folder)
    tokenizer().save_pretrained(folder)


def whisper(folder: Path) -> None:
    sizes = {
        f"{side}_{name}": value
        for side in ("encoder", "decoder")
        for name, value in (("layers", TEXT["num_hidden_layers"]), ("attention_heads", 4), ("ffn_dim", 128))
    }
    tokens = {"pad_token_id": PAD, "bos_token_id": START, "eos_token_id": END, "decoder_start_token_id": START}
    config = tf.WhisperConfig(
        **{"vocab_size": VOCABULARY, "num_mel_bins": MELS, "d_model": 64},
        **{"max_source_positions": 32, "max_target_positions": 16},
        **sizes,
        **tokens,
    )
    lively(tf.WhisperForConditionalGeneration(config)).save_pretrained(folder)
    # A second in steps of 10 values is 64 frames, twice as many as the encoder has positions.
    sound = {"sampling_rate": RATE, "hop_length": 10, "chunk_length": 1, "n_fft": 64}
    tf.WhisperFeatureExtractor(feature_size=MELS, **sound).save_pretrained(folder)
    tokenizer().save_pretrained(folder)


MODELS: dict[str, Callable[[Path], None]] = {
    "vit": vit,
    "bert": bert,
    "clip": clip,
    "vilt": vilt,
    "vision_encoder_decoder": vision_encoder_decoder,
    "whisper": whisper,
}


# --- data: squares, and tones for the audio; every sample differs by its noise


def picture(colour: str, size: str, rng: np.random.Generator) -> Image.Image:
    pixels = rng.integers(0, 60, (40, 40, 3)).astype(np.uint8)
    half = 6 if size == "small" else 14
    pixels[20 - half : 20 + half, 20 - half : 20 + half] = COLOURS[colour]
    return Image.fromarray(pixels)


def tone(colour: str, rng: np.random.Generator) -> list[float]:
    pitch = 60 * (1 + list(COLOURS).index(colour))
    wave = np.sin(2 * np.pi * pitch * np.arange(RATE) / RATE) + 0.1 * rng.standard_normal(RATE)
    return [float(value) for value in wave]


def columns(name: str, colours: list[str], sizes: list[str], rng: np.random.Generator) -> dict[str, list[Any]]:
    pairs = list(zip(colours, sizes, strict=True))
    images = [picture(colour, size, rng) for colour, size in pairs] if name not in ("bert", "whisper") else []
    labels = [list(COLOURS).index(colour) for colour in colours]
    captions = [f"a {size} {colour} square" for colour, size in pairs]
    return {
        "vit": {"image": images, "label": labels},
        "bert": {"text": [" ".join(rng.choice(WORDS[4:], 6)) + f" {colour}" for colour in colours], "label": labels},
        "clip": {"image": images, "caption": captions},
        "vilt": {
            "image": images,
            "question": [f"which colour is the {size} square" for size in sizes],
            "answer": colours,
        },
        "vision_encoder_decoder": {"image": images, "text": captions},
        "whisper": {
            "audio": [tone(colour, rng) for colour in colours] if name == "whisper" else [],
            "text": [f"say {colour}" for colour in colours],
        },
    }[name]


def data(name: str, folder: Path, samples: dict[str, int] | None = None) -> None:
    """Write the data set of a family with splits ``train`` and ``test``."""
    rng = np.random.default_rng(0)
    splits = {}
    for split, count in (samples or SAMPLES).items():
        colours, sizes = list(rng.choice(list(COLOURS), count)), list(rng.choice(SIZES, count))
        found = datasets.Dataset.from_dict(columns(name, colours, sizes, rng))
        if "label" in found.column_names:
            found = found.cast_column("label", datasets.ClassLabel(names=list(COLOURS)))
        splits[split] = found
    with quiet():
        datasets.DatasetDict(splits).save_to_disk(str(folder))


def made(name: str, folder: Path, samples: dict[str, int] | None = None) -> str:
    """Write model and data of a family, quietly; returns the specification of the task."""
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        MODELS[name](folder / name)
        data(name, folder / f"{name}-data", samples)
    return f"hf:{folder / name}:data={folder / f'{name}-data'}"
