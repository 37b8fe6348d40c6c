"""The families of models that ``hf:`` knows: what goes in, what comes out, what is learned and measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from mmedge.errors import TaskError
from mmedge.task import Component, Metric, accuracy
from mmedge.tasks.hf import modules
from mmedge.tasks.hf.checkpoint import Checkpoint, quiet
from mmedge.tensors import Array

IGNORED = -100  # transformers' label of a position that does not count
ROWS = 1024  # compared with everything at a time

Loss = Callable[[Mapping[str, Tensor], Tensor], Tensor]

TOKENS = ("input_ids", "attention_mask", "token_type_ids")
MODALITIES = {"pixel_values": "image", "input_features": "audio", "decoder_input_ids": "text"}
MODALITIES |= dict.fromkeys(TOKENS, "text")


@dataclass(frozen=True)
class Family:
    """Models that are used alike.

    Attributes:
        title: for people.
        task: optimum's name of the task.
        model_types: transformers' names of the models; empty for every model that optimum can export for the task.
        module: wraps the model.
        columns: kinds of data a sample has (``image``, ``text``, ``audio``, ``label``).
        outputs: in order.
        metric: what is reported.
        loss: makes the loss, from the model.
        components: parts with a graph of their own.
        inputs: names, where optimum has no ONNX configuration that gives them.
    """

    title: str
    task: str
    model_types: tuple[str, ...]
    module: Callable[[Any], nn.Module]
    columns: tuple[str, ...]
    outputs: tuple[str, ...]
    metric: Metric
    loss: Callable[[Any], Loss]
    components: tuple[Component, ...] = ()
    inputs: tuple[str, ...] = ()


def cross_entropy(model: Any) -> Loss:
    """Cross-entropy of the class."""
    return lambda outputs, targets: F.cross_entropy(outputs["logits"], targets)


def answer_scores(model: Any) -> Loss:
    """Binary cross-entropy of every answer, times their number: what transformers trains ViLT with."""

    def loss(outputs: Mapping[str, Tensor], targets: Tensor) -> Tensor:
        logits = outputs["logits"]
        right = F.one_hot(targets, logits.shape[-1]).to(logits.dtype)
        return F.binary_cross_entropy_with_logits(logits, right) * logits.shape[-1]

    return loss


def contrastive(model: Any) -> Loss:
    """Symmetric InfoNCE within the batch at the model's own temperature; pairs with the same text are all positives."""
    scale = float(model.logit_scale.detach().exp())

    def loss(outputs: Mapping[str, Tensor], targets: Tensor) -> Tensor:
        near = outputs["image_embeds"] @ outputs["text_embeds"].T * scale
        same = (targets[:, None] == targets).to(near.dtype)
        same = same / same.sum(dim=1, keepdim=True)
        return -(same * (near.log_softmax(dim=1) + near.T.log_softmax(dim=1))).sum(dim=1).mean() / 2

    return loss


def token_cross_entropy(model: Any) -> Loss:
    """Cross-entropy of the next token, over all that is not padding."""

    def loss(outputs: Mapping[str, Tensor], targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs["logits"].flatten(0, 1), targets.flatten(), ignore_index=IGNORED)

    return loss


def recall_at_1(outputs: Mapping[str, Array], targets: Array) -> float:
    """How often the nearest of all is right, from images to texts and back.

    Args:
        outputs: ``image_embeds`` and ``text_embeds``, ``(n, dim)``, of unit length.
        targets: identities of the texts, ``(n,)``; another pair with the same text counts as right.
    """
    hits = 0
    pair = outputs["image_embeds"], outputs["text_embeds"]
    for one, other in (pair, pair[::-1]):
        for first in range(0, len(targets), ROWS):
            nearest = (one[first : first + ROWS] @ other.T).argmax(axis=1)
            hits += int((targets[nearest] == targets[first : first + ROWS]).sum())
    return hits / (2 * len(targets))


def token_accuracy(outputs: Mapping[str, Array], targets: Array) -> float:
    """The fraction of tokens whose largest logit is right, given the right ones before; padding does not count."""
    counts = targets != IGNORED
    return float((outputs["logits"].argmax(axis=-1) == targets)[counts].mean()) if counts.any() else float("nan")


def _encoder_decoder(modality_input: str) -> tuple[Component, ...]:
    return (
        Component("encoder", (modality_input,), ("encoder_hidden",)),
        Component("decoder", ("decoder_input_ids", "encoder_hidden"), ("logits",), cache="decoder_input_ids"),
    )


_ACCURACY = Metric("accuracy", accuracy)
_TOKEN_ACCURACY = Metric("token_accuracy", token_accuracy, outputs=("logits",))
FAMILIES = (
    Family(
        title="image classification",
        task="image-classification",
        model_types=(),
        module=modules.ImageClassifier,
        columns=("image", "label"),
        outputs=("logits",),
        metric=_ACCURACY,
        loss=cross_entropy,
    ),
    Family(
        title="text classification",
        task="text-classification",
        model_types=(),
        module=modules.TextClassifier,
        columns=("text", "label"),
        outputs=("logits",),
        metric=_ACCURACY,
        loss=cross_entropy,
    ),
    Family(
        title="image-text dual encoder",
        task="feature-extraction",
        model_types=("clip",),
        module=modules.DualEncoder,
        columns=("image", "text"),
        outputs=("image_embeds", "text_embeds"),
        metric=Metric("recall@1", recall_at_1),
        loss=contrastive,
        components=(
            Component("image", ("pixel_values",), ("image_embeds",)),
            Component("text", ("input_ids", "attention_mask"), ("text_embeds",)),
        ),
    ),
    Family(
        title="visual question answering",
        task="visual-question-answering",
        model_types=("vilt",),
        module=modules.ImageQuestion,
        columns=("image", "text", "label"),
        outputs=("logits",),
        metric=_ACCURACY,
        loss=answer_scores,
        inputs=(*TOKENS, "pixel_values"),
    ),
    Family(
        title="image captioning",
        task="image-to-text",
        model_types=("vision-encoder-decoder",),
        module=modules.ImageToText,
        columns=("image", "text"),
        outputs=("encoder_hidden", "logits"),
        metric=_TOKEN_ACCURACY,
        loss=token_cross_entropy,
        components=_encoder_decoder("pixel_values"),
    ),
    Family(
        title="speech recognition",
        task="automatic-speech-recognition",
        model_types=("whisper",),
        module=modules.SpeechToText,
        columns=("audio", "text"),
        outputs=("encoder_hidden", "logits"),
        metric=_TOKEN_ACCURACY,
        loss=token_cross_entropy,
        components=_encoder_decoder("input_features"),
    ),
)


def family_of(checkpoint: Checkpoint) -> Family:
    """The family of a model, from its class and type.

    Raises:
        TaskError: it is of none, or is trained for something else than one class of several.
    """
    task = _task_of(checkpoint)
    for family in FAMILIES:
        fits = checkpoint.model_type in family.model_types if family.model_types else _exportable(checkpoint, task)
        if family.task == task and fits:
            _check_problem(checkpoint, family)
            return family
    supported = "; ".join(f"{each.title} ({', '.join(each.model_types or _types(each.task))})" for each in FAMILIES)
    kind = f"task {task}, type {checkpoint.model_type}" if task else f"no task of optimum, type {checkpoint.model_type}"
    raise TaskError(
        f"{checkpoint.architecture.__name__} ({kind}) is not supported",
        where=str(checkpoint.folder / "config.json"),
        fix=f"supported: {supported}; write a task of your own for others (mmedge task new)",
    )


def _task_of(checkpoint: Checkpoint) -> str | None:
    """optimum's task for the model's class; where it does not know a class, what transformers' own tables say."""
    from optimum.exporters.tasks import TasksManager
    from transformers.models.auto import modeling_auto as auto

    try:
        with quiet():
            return str(TasksManager.infer_task_from_model(checkpoint.architecture))
    except (ValueError, KeyError):  # it says so with either
        pass
    for task, table in (
        ("image-classification", auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES),
        ("text-classification", auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES),
    ):
        usual = table.get(checkpoint.model_type, ())
        if checkpoint.architecture.__name__ == (usual if isinstance(usual, str) else (*usual, "")[0]):
            return task
    return None


def _types(task: str) -> list[str]:
    """The types of models that optimum can export for a task."""
    from optimum.exporters.tasks import TasksManager

    return sorted(TasksManager.get_supported_model_type_for_task(task, "onnx"))


def _exportable(checkpoint: Checkpoint, task: str | None) -> bool:
    from optimum.exporters.tasks import TasksManager

    try:
        with quiet():
            known = TasksManager.get_supported_tasks_for_model_type(
                checkpoint.model_type, "onnx", library_name="transformers"
            )
    except KeyError:
        return False
    return task in known


def _check_problem(checkpoint: Checkpoint, family: Family) -> None:
    problem = getattr(checkpoint.config, "problem_type", None)
    several = checkpoint.config.num_labels > 1
    if family.loss is cross_entropy and (problem not in (None, "single_label_classification") or not several):
        raise TaskError(
            f"the model is trained for {problem or 'a single value'}, not for one class of several",
            where=str(checkpoint.folder / "config.json"),
            fix="write a task of your own, with its loss and metric (mmedge task new)",
        )


def onnx_config_of(checkpoint: Checkpoint, family: Family) -> Any:
    """optimum's ONNX configuration of a model: names, axes and example inputs.

    Raises:
        TaskError: it has none for this combination of parts.
    """
    from optimum.exporters.tasks import TasksManager

    try:
        with quiet():
            constructor = TasksManager.get_exporter_config_constructor(
                "onnx", task=family.task, model_type=checkpoint.model_type, library_name="transformers"
            )
            return constructor(checkpoint.config)
    except (KeyError, ValueError) as err:
        raise TaskError(f"optimum cannot export it: {err!s:.300}", where=str(checkpoint.folder)) from err


def input_names(checkpoint: Checkpoint, family: Family) -> tuple[str, ...]:
    """The graph's inputs, named and ordered as optimum names them.

    Raises:
        TaskError: the model wants an input that the family does not have.
    """
    import inspect

    names = family.inputs or tuple(onnx_config_of(checkpoint, family).inputs)
    taken = inspect.signature(family.module.forward).parameters  # type: ignore[attr-defined]
    if strangers := [name for name in names if name not in taken]:
        problem = f"{checkpoint.model_type} wants {', '.join(strangers)}, which {family.title} does not give"
        raise TaskError(problem, where=str(checkpoint.folder), fix="write a task of your own (mmedge task new)")
    return names
