"""Raw samples into the model's inputs, with the processors that lie beside the model."""

from __future__ import annotations

import hashlib
import io
import wave
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from mmedge.errors import TaskError, UsageError
from mmedge.task import Batch
from mmedge.tasks.hf.checkpoint import Checkpoint
from mmedge.tasks.hf.families import IGNORED, TOKENS, Family
from mmedge.tasks.hf.options import Options
from mmedge.tasks.hf.samples import Sample, Source, columns_of
from mmedge.tensors import Array

LENGTH = 128  # tokens, where the model takes that many and the user says nothing


class Encoder:
    """Makes batches of samples.

    Args:
        checkpoint: the model's folder.
        family: of the model.
        names: of the model's inputs.
        source: of the samples.
        options: of the task.
    """

    def __init__(
        self, checkpoint: Checkpoint, family: Family, names: Sequence[str], source: Source, options: Options
    ) -> None:
        self.checkpoint, self.family, self.names = checkpoint, family, names
        self.source, self.options = source, options
        self._columns: dict[str, str] = {}

    def batch(self, samples: Sequence[Sample] | Batch) -> Batch:
        """Samples as arrays; a batch that is ready already stays as it is.

        Raises:
            TaskError: a column is missing, a value is not of its kind, or a label is not the model's.
        """
        if isinstance(samples, Batch):
            return samples
        self._columns = self._columns or columns_of(
            samples[0], self.family.columns, self.options.columns, self.source.name
        )
        inputs: dict[str, Array] = {}
        if "pixel_values" in self.names:
            inputs["pixel_values"] = self._pixels(self._values(samples, "image"))
        if "input_features" in self.names:
            inputs["input_features"] = self._features(self._values(samples, "audio"))
        if "input_ids" in self.names:
            inputs |= self._tokens(samples)
        if "decoder_input_ids" in self.names:
            inputs["decoder_input_ids"], targets = self._shifted(self._values(samples, "text"))
        elif "label" in self.family.columns:
            targets = np.array([self._label(value) for value in self._values(samples, "label")], np.int64)
        else:
            targets = np.array([_identity(text) for text in self._values(samples, "text")], np.int64)
        return Batch({name: inputs[name] for name in self.names}, targets)

    def fill(self, name: str) -> float:
        """What stands for "missing": padding for tokens, and a mask that hides nothing."""
        if name in ("input_ids", "decoder_input_ids"):
            return float(self._pad_id)
        return 1.0 if name == "attention_mask" else 0.0

    def _values(self, samples: Sequence[Sample], kind: str) -> list[Any]:
        column = self._columns[kind]
        missing = next((index for index, sample in enumerate(samples) if sample.get(column) is None), None)
        if missing is not None:
            fix = "leave such samples out, or name another column or split"
            raise TaskError(f"sample {missing} of a batch has no {column!r}", where=self.source.name, fix=fix)
        return [sample[column] for sample in samples]

    # --- images and audio

    @cached_property
    def _image_processor(self) -> Any:
        return self.checkpoint.processor("AutoImageProcessor")

    def _pixels(self, images: Sequence[Any]) -> Array:
        from PIL import Image

        pictures = [_picture(image, self.source.name) for image in images]
        options: dict[str, Any] = {}
        if self.checkpoint.model_type == "vilt":  # an engine has one size: the whole picture, stretched to it
            side = self.checkpoint.config.image_size
            pictures = [picture.resize((side, side), Image.Resampling.BICUBIC) for picture in pictures]
            options = {"do_resize": False, "do_pad": False}
        made = self._image_processor(pictures, return_tensors="np", **options)
        return np.ascontiguousarray(made["pixel_values"], np.float32)

    @cached_property
    def _feature_extractor(self) -> Any:
        return self.checkpoint.processor("AutoFeatureExtractor")

    def _features(self, sounds: Sequence[Any]) -> Array:
        rate = self._feature_extractor.sampling_rate
        waves = [self._samples_of(sound, rate) for sound in sounds]
        made = self._feature_extractor(waves, sampling_rate=rate, return_tensors="np")
        return np.ascontiguousarray(made["input_features"], np.float32)

    def _samples_of(self, sound: Any, rate: int) -> Array:
        """One channel at ``rate``; what does not say its rate is taken to have it."""
        array, own_rate = _decoded(sound, self.source.name) if isinstance(sound, Mapping) else (sound, rate)
        if own_rate != rate:
            fix = f"resample the data to {rate} Hz before"
            raise TaskError(f"audio at {own_rate} Hz, the model takes {rate} Hz", where=self.source.name, fix=fix)
        wave = np.asarray(array, np.float32)
        if wave.ndim != 1 or not wave.size:
            fix = "give one channel of samples: the mean over the channels, say"
            raise TaskError(f"audio has the shape {wave.shape}", where=self.source.name, fix=fix)
        return wave

    # --- text

    @cached_property
    def _tokenizer(self) -> Any:
        tokenizer = self.checkpoint.processor("AutoTokenizer")
        if tokenizer.pad_token_id is None:
            fix = "choose one and save the tokenizer again: tokenizer.pad_token = tokenizer.eos_token"
            raise TaskError("the tokenizer has no padding token", where=str(self.checkpoint.folder), fix=fix)
        tokenizer.padding_side = "right"
        return tokenizer

    @cached_property
    def _pad_id(self) -> int:
        if (own := getattr(self.checkpoint.config, "pad_token_id", None)) is not None:
            return int(own)
        decoder = getattr(self.checkpoint.config, "decoder", None) or getattr(
            self.checkpoint.config, "text_config", None
        )
        return int(getattr(decoder, "pad_token_id", None) or 0)

    @cached_property
    def _length(self) -> int:
        config = self.checkpoint.config
        parts = (config, getattr(config, "text_config", None), getattr(config, "decoder", None))
        sizes = [
            getattr(part, name, None) for part in parts for name in ("max_position_embeddings", "max_target_positions")
        ]
        most = min([int(size) for size in sizes if size] + [int(self._tokenizer.model_max_length)])
        length = self.options.length or min(most, LENGTH)
        if length > most:
            problem = f"length={length}, the model takes {most} tokens"
            raise UsageError(problem, where=str(self.checkpoint.folder), fix=f"length={most} or less")
        return length

    def _encoded(self, texts: Sequence[str], pairs: Sequence[str] | None, length: int) -> Any:
        made = self._tokenizer(
            list(texts),
            list(pairs) if pairs is not None else None,
            padding="max_length",
            truncation=True,
            max_length=length,
            return_token_type_ids=True,
            return_attention_mask=True,
            return_tensors="np",
        )
        if (largest := int(made["input_ids"].max())) >= self._vocabulary:
            raise TaskError(
                f"the tokenizer gives token {largest}, the model has {self._vocabulary} tokens",
                where=str(self.checkpoint.folder),
                fix="save the tokenizer that the model was trained with beside it",
            )
        return made

    @cached_property
    def _vocabulary(self) -> int:
        config = self.checkpoint.config
        parts = (config, getattr(config, "text_config", None), getattr(config, "decoder", None))
        return max(int(getattr(part, "vocab_size", None) or 0) for part in parts)

    def _tokens(self, samples: Sequence[Sample]) -> dict[str, Array]:
        pairs = self._values(samples, "text_pair") if "text_pair" in self._columns else None
        made = self._encoded(self._values(samples, "text"), pairs, self._length)
        return {name: np.asarray(made[name], np.int64) for name in TOKENS if name in self.names}

    def _shifted(self, texts: Sequence[str]) -> tuple[Array, Array]:
        """What the decoder is given, ``(n, length)``, and what it should say next; padding is ``IGNORED`` there.

        As transformers' own training does it: the start token, which some tokenizers write themselves, goes before.
        """
        start = self._start_id
        made = self._encoded(texts, None, self._length + 1)
        tokens, real = np.asarray(made["input_ids"], np.int64), np.asarray(made["attention_mask"], bool)
        if (tokens[:, 0] == start).all():
            tokens, real = tokens[:, 1:], real[:, 1:]
        tokens, real = tokens[:, : self._length], real[:, : self._length]
        given = np.where(real, tokens, self._pad_id)[:, :-1]
        given = np.concatenate([np.full((len(given), 1), start, np.int64), given], axis=1)
        return given, np.where(real, tokens, IGNORED)

    @cached_property
    def _start_id(self) -> int:
        config = self.checkpoint.config
        found = getattr(config, "decoder_start_token_id", None)
        if found is None:
            fix = "set decoder_start_token_id in config.json to what the model was trained with"
            raise TaskError("config.json has no decoder_start_token_id", where=str(self.checkpoint.folder), fix=fix)
        if found >= self._vocabulary:
            fix = "set it in config.json to what the model was trained with"
            problem = f"decoder_start_token_id is {found}, the model has {self._vocabulary} tokens"
            raise TaskError(problem, where=str(self.checkpoint.folder), fix=fix)
        return int(found)

    # --- labels

    def _label(self, value: Any) -> int:
        """The model's index of a class: by name where the data names its classes, else the integer itself."""
        config, column = self.checkpoint.config, self._columns["label"]
        names = self.source.classes.get(column)
        if names is not None and not isinstance(value, str) and 0 <= value < len(names) and self._named(names):
            value = names[value]
        index = self._by_name.get(value.casefold(), -1) if isinstance(value, str) else int(value)
        if 0 <= index < config.num_labels:
            return index
        known = [str(name) for name in list(config.id2label.values())[:8]]
        more = " …" if config.num_labels > len(known) else ""
        raise TaskError(
            f"label {value!r} of column {column!r} is none of the model's {config.num_labels}",
            where=self.source.name,
            fix=f"the model knows {', '.join(known)}{more}; integers count from 0; name another column with label=, "
            "another split with test=",
        )

    @cached_property
    def _by_name(self) -> dict[str, int]:
        return {str(name).casefold(): int(index) for index, name in self.checkpoint.config.id2label.items()}

    def _named(self, names: Sequence[str]) -> bool:
        """Whether the model's classes have names of their own to go by, and not only LABEL_0, LABEL_1 …"""
        generic = all(name == f"label_{index}" for name, index in self._by_name.items())
        return not generic and not all(name.isdigit() for name in names)


def _picture(image: Any, where: str) -> Any:
    """An image in 8-bit RGB; of 16-bit greys the upper eight."""
    from PIL import Image

    try:
        picture = image if hasattr(image, "convert") else Image.fromarray(image)
    except TypeError as err:
        problem = f"an image is {image.dtype} {image.shape}"
        fix = "give uint8 (height, width) or (height, width, 3), or PIL images"
        raise TaskError(problem, where=where, fix=fix) from err
    if picture.mode.startswith("I;16"):  # PIL itself would clip at 255: white
        picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    elif picture.mode in ("I", "F"):
        problem = f"an image is of mode {picture.mode}: its range is not known"
        raise TaskError(problem, where=where, fix="convert the data to 8-bit images")
    return picture.convert("RGB")


def _identity(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def _decoded(sound: Mapping[str, Any], where: str) -> tuple[Any, int]:
    """Samples and rate of ``datasets``' audio: an array, or the bytes (or path) of a 16-bit WAV file."""
    if sound.get("array") is not None:
        return sound["array"], int(sound["sampling_rate"])
    try:
        with wave.open(io.BytesIO(sound["bytes"]) if sound.get("bytes") else str(sound["path"]), "rb") as file:
            if file.getsampwidth() != 2:
                raise wave.Error(f"{8 * file.getsampwidth()} bits per sample")
            values = np.frombuffer(file.readframes(file.getnframes()), "<i2").reshape(-1, file.getnchannels())
            return values.mean(axis=1) / 32768, file.getframerate()
    except (wave.Error, EOFError, OSError) as err:
        fix = "convert the data to 16-bit WAV, or to columns of floats"
        raise TaskError(f"audio cannot be read: {err}", where=where, fix=fix) from err
