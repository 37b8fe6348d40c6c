"""The settings of a training: a weight per loss, and how the training runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

from pydantic import Field, GetJsonSchemaHandler, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema
from torch import Tensor

from mmedge.stages.base import StageConfig

LAST = ""  # in place of a layer's name: the last hidden features, the last attention


class Loss(StageConfig):
    """One loss. In a recipe a number stands for its weight alone: ``features: 3.0``.

    Attributes:
        weight: factor in the sum of all losses; 0 leaves the loss out.
    """

    weight: float = Field(1.0, ge=0)

    @model_validator(mode="before")
    @classmethod
    def _from_number(cls, value: Any) -> Any:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return {"weight": value}
        if isinstance(value, dict):  # behind this validator, pydantic no longer takes a list for a tuple
            return {name: tuple(item) if isinstance(item, list) else item for name, item in value.items()}
        return value

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {"anyOf": [{"type": "number", "minimum": 0}, handler(core)]}


class OutputsLoss(Loss):
    """A loss on the network's outputs.

    Attributes:
        outputs: their names; empty for all that suit, hidden features between two components not among them. None suits
            that holds whole numbers: these have no gradient.
    """

    outputs: tuple[str, ...] = ()


class FeaturesLoss(Loss):
    """The distance between hidden features, through a linear projection that is trained along and thrown away.

    Attributes:
        layers: module path of the student to module path of the teacher whose outputs are compared; empty for what
            enters the last linear layer or convolution of each.
        distance: ``cosine``, or ``mse`` relative to the teacher's spread.
        pool: average over tokens or pixels; False compares place by place, of which both must then have equally many.
    """

    layers: dict[str, str] = Field(default_factory=dict)
    distance: Literal["cosine", "mse"] = "cosine"
    pool: bool = True


class AttentionLoss(Loss):
    """Where the network looks: its attention maps, averaged over heads.

    Attributes:
        layers: module path of the student's attention to that of the teacher's; empty for the last one of each.
    """

    layers: dict[str, str] = Field(default_factory=dict)


class PairLoss(OutputsLoss):
    """A loss on two embeddings of a dual encoder.

    Attributes:
        outputs: the two outputs; may be left empty where the task has exactly two.
        temperature: divides cosine similarities.
    """

    temperature: float = Field(0.05, gt=0)


class SequenceLoss(Loss):
    """The sequence that the teacher itself generates is what the student learns to continue.

    Attributes:
        tokens: the input that carries the tokens so far, ``(batch, length)``.
        output: the output with a score per next token, ``(batch, length, vocabulary)``; empty where the task has one.
        prompt: how many tokens at the beginning are given, not generated.
        end: the token that ends a sequence, None where all are of full length.
    """

    tokens: str = ""
    output: str = ""
    prompt: int = Field(1, ge=1)
    end: int | None = Field(None, ge=0)


class Tracking(StageConfig):
    """Where the course of a training is shown.

    Attributes:
        tools: ``tensorboard``, ``wandb`` (sends the figures to its server, or where its own settings say).
        folder: for their files.
    """

    tools: tuple[Literal["tensorboard", "wandb"], ...] = Field(("tensorboard",), min_length=1)
    folder: str = "tracking"


class Training(StageConfig):
    """How a student is trained.

    Attributes:
        epochs: passes over ``samples``; every pass sees the same samples, so that the teacher answers only once.
        samples: how much of the training split the teacher answers; None is all of it.
        fresh: fraction of the batches that are new training data instead (another seed). The teacher has not answered
            them, so the student learns from their labels alone: keeps it from memorising ``samples`` where the task
            varies its data.
        answers: ``kept`` asks the teacher once and keeps what it said, ``live`` asks it for every batch: slower, but
            nothing is stored, and ``fresh`` batches are answered too.
        learning_rate: peak of a one-cycle schedule (AdamW).
        weight_decay: decoupled weight decay.
        max_grad_norm: gradients are clipped to this norm.
        accumulate: batches whose gradients are averaged for one step of the optimizer.
        patience: after every epoch the metric is taken on the calibration split; training ends after this many epochs
            without a better one, and the best epoch's weights are kept. None trains on and keeps the last.
        labels: weight of the task's own loss.
        logits: the distance to the teacher's outputs.
        match: that distance: ``kl`` for class scores ``(batch, …, classes)``, ``mse`` relative to the teacher's spread
            for anything.
        temperature: softens both distributions of ``kl`` (Hinton et al., 2015).
        regression: the distance for heads that give values, not scores; what it names is left out of ``logits``.
        features: hidden features.
        attention: attention maps.
        relations: how samples lie to each other in the space of the hidden features.
        contrastive: student's and teacher's embeddings of a pair find each other (dual encoders).
        affinity: which pairs of a batch resemble each other (dual encoders).
        sequence: what the teacher generates (generators).
        modality_dropout: probability that a sample reaches the student without one of its modalities: its inputs are
            then the fill values that stand for a lost sensor. The teacher sees everything.
        precision: ``auto`` trains in bfloat16 where the processor multiplies it natively, else in float32; ``fp16``
            needs a GPU.
        shard_teacher: with several processes, each holds a part of the teacher's weights (FSDP).
        track: show the course of the training; None does not.
    """

    epochs: int = Field(3, ge=1, le=10_000)
    samples: int | None = Field(None, ge=1)
    fresh: float = Field(0.0, ge=0, le=1)
    answers: Literal["kept", "live"] = "kept"
    learning_rate: float = Field(1e-3, gt=0, le=1)
    weight_decay: float = Field(0.01, ge=0, le=1)
    max_grad_norm: float = Field(1.0, gt=0)
    accumulate: int = Field(1, ge=1)
    patience: int | None = Field(None, ge=1)

    labels: float = Field(0.3, ge=0)
    logits: OutputsLoss = OutputsLoss()
    match: Literal["kl", "mse"] = "kl"
    temperature: float = Field(2.0, gt=0)
    regression: OutputsLoss = OutputsLoss(weight=0.0)
    features: FeaturesLoss = FeaturesLoss()
    attention: AttentionLoss = AttentionLoss(weight=0.0)
    relations: Loss = Loss(weight=0.0)
    contrastive: PairLoss = PairLoss(weight=0.0)
    affinity: PairLoss = PairLoss(weight=0.0)
    sequence: SequenceLoss = SequenceLoss(weight=0.0)
    modality_dropout: float = Field(0.0, ge=0, le=1)

    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    # Neither changes the result: not part of what an artifact is found by, nor of the recipe that is kept.
    shard_teacher: bool = Field(False, exclude=True)
    track: Tracking | None = Field(None, exclude=True)

    def has_scores(self, output: Tensor) -> bool:
        """Whether ``logits`` can compare an output: ``kl`` needs classes beside the samples."""
        return output.is_floating_point() and (self.match == "mse" or output.ndim > 1)

    def scored(self, outputs: Mapping[str, Tensor]) -> tuple[str, ...]:
        """The outputs that ``logits`` compares, of all ``outputs``."""
        values = self.valued(outputs) if self.regression.weight else ()
        suit = (name for name, output in outputs.items() if name not in values and self.has_scores(output))
        return self.logits.outputs or tuple(suit)

    def valued(self, outputs: Mapping[str, Tensor]) -> tuple[str, ...]:
        """The outputs that ``regression`` compares."""
        return self.regression.outputs or tuple(name for name, each in outputs.items() if each.is_floating_point())

    def naming(self, outputs: Mapping[str, Tensor]) -> Training:
        """These settings, with what ``logits`` and ``regression`` compare of ``outputs`` written out.

        A loss that has nothing to compare gets the weight 0.
        """
        found = {"logits": self.scored(outputs), "regression": self.valued(outputs)}
        return self.model_copy(update={name: self._on(name, outputs) for name, outputs in found.items()})

    def _on(self, loss: str, outputs: tuple[str, ...]) -> OutputsLoss:
        own: OutputsLoss = getattr(self, loss)
        return own.model_copy(update={"outputs": outputs, "weight": own.weight if outputs else 0.0})

    def feature_layers(self) -> tuple[tuple[str, str], ...]:
        """Layers whose features are compared: the student's and the teacher's."""
        if not (self.features.weight or self.relations.weight):
            return ()
        return tuple(self.features.layers.items()) or ((LAST, LAST),)

    def attention_layers(self) -> tuple[tuple[str, str], ...]:
        """Attentions whose maps are compared: the student's and the teacher's."""
        if not self.attention.weight:
            return ()
        return tuple(self.attention.layers.items()) or ((LAST, LAST),)


def pair_of(settings: PairLoss, outputs: Iterable[str]) -> tuple[str, ...]:
    """The outputs that a loss on a pair of embeddings compares; two of them in settings that were checked."""
    return settings.outputs or tuple(outputs)


def generated(settings: SequenceLoss, outputs: Iterable[str]) -> str:
    """The output that scores the next token."""
    return settings.output or next(iter(outputs))
