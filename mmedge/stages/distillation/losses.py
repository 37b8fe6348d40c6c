"""The losses of distillation: one function each, all of one form, in one table.

A loss takes what the student and the teacher made of the same batch and the settings, and returns a scalar that is 0
where the student does all that the loss asks for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from mmedge.stages.distillation.settings import PairLoss, SequenceLoss, Training, pair_of
from mmedge.stages.distillation.watch import Seen
from mmedge.task import Task

Loss = Callable[[Seen, Seen, Training], Tensor]
TINY = 1e-12


def total(settings: Training, task: Task, student: Seen, teacher: Seen | None, targets: Tensor) -> Tensor:
    """The sum of all losses by their weights; without a teacher's answers the task's own loss alone.

    Args:
        settings: what ``logits`` and ``regression`` compare is written out (``naming``), else it is all outputs.
        task: for its own loss.
        student: what it made of the batch.
        teacher: likewise.
        targets: of the batch.
    """
    if teacher is None:
        return task.loss(student.outputs, targets)
    loss = (
        settings.labels * task.loss(student.outputs, targets)
        if settings.labels
        else torch.zeros((), device=targets.device)
    )
    for name, distance in LOSSES.items():
        if weight := getattr(settings, name).weight:
            loss = loss + weight * distance(student, teacher, settings)
    return loss


def logits(student: Seen, teacher: Seen, settings: Training) -> Tensor:
    """The mean distance of the outputs: Kullback-Leibler between softened scores, or relative squares (``match``)."""
    distance = _relative_squares if settings.match == "mse" else _softened(settings.temperature)
    names = settings.scored(student.outputs)
    return _mean([distance(student.outputs[name], teacher.outputs[name]) for name in names])


def _softened(temperature: float) -> Callable[[Tensor, Tensor], Tensor]:
    def divergence(student: Tensor, teacher: Tensor) -> Tensor:
        # The factor T^2 keeps gradients independent of the temperature (Hinton et al., 2015, section 2).
        soft = F.log_softmax(student / temperature, -1).flatten(0, -2)
        goal = F.log_softmax(teacher / temperature, -1).flatten(0, -2)
        return F.kl_div(soft, goal, reduction="batchmean", log_target=True) * temperature**2

    return divergence


def _relative_squares(student: Tensor, teacher: Tensor) -> Tensor:
    # In units of the teacher's own spread, so that the weight means the same for logits and for unit vectors.
    return F.mse_loss(student, teacher) / teacher.var(unbiased=False).clamp(min=TINY)


def _mean(terms: list[Tensor]) -> Tensor:
    return sum((term / len(terms) for term in terms), torch.zeros(()))


def regression(student: Seen, teacher: Seen, settings: Training) -> Tensor:
    """The mean Huber distance of values, in units of the teacher's spread: a few wild answers do not rule the rest."""
    terms = []
    for name in settings.valued(student.outputs):
        spread = teacher.outputs[name].std(unbiased=False).clamp(min=TINY**0.5)
        terms.append(F.huber_loss(student.outputs[name] / spread, teacher.outputs[name] / spread))
    return _mean(terms)


def features(student: Seen, teacher: Seen, settings: Training) -> Tensor:
    """The mean distance of the student's projected features to the teacher's: one minus cosine, or relative squares."""
    terms = []
    for mine, theirs in settings.feature_layers():
        projected, goal = student.projected[mine], teacher.features[theirs]
        if settings.features.distance == "mse":
            terms.append(_relative_squares(projected, goal))
        else:
            terms.append((1 - F.cosine_similarity(projected, goal, dim=-1)).mean())
    return _mean(terms)


def attention(student: Seen, teacher: Seen, settings: Training) -> Tensor:
    """The mean divergence of the student's attention from the teacher's, row by row (MiniLM, Wang et al., 2020)."""
    terms = []
    for mine, theirs in settings.attention_layers():
        soft, goal = (seen.clamp(min=TINY).log() for seen in (student.maps[mine], teacher.maps[theirs]))
        terms.append(F.kl_div(soft.flatten(0, 1), goal.flatten(0, 1), reduction="batchmean", log_target=True))
    return _mean(terms)


def relations(student: Seen, teacher: Seen, settings: Training) -> Tensor:
    """How far apart samples lie, relative to the mean distance in the batch (RKD-D, Park et al., 2019)."""
    return _mean(
        [
            F.huber_loss(_distances(student.features[mine]), _distances(teacher.features[theirs]))
            for mine, theirs in settings.feature_layers()
        ]
    )


def _distances(features: Tensor) -> Tensor:
    """Euclidean distances of all pairs of samples, their mean being 1."""
    points = features.flatten(1)
    square = points.square().sum(dim=1)
    apart = (square[:, None] + square - 2 * points @ points.T).clamp(min=TINY).sqrt()
    first, second = torch.triu_indices(len(points), len(points), offset=1, device=points.device)
    pairs = apart[first, second]
    return pairs / pairs.mean().clamp(min=TINY)


def contrastive(student: Seen, teacher: Seen, settings: Training) -> Tensor:
    """Interactive contrastive learning: each student tower finds its pair among the other tower's teacher embeddings.

    Symmetric InfoNCE between one network and the other (CLIP-KD, Yang et al., 2024).
    """
    mine, theirs = (_embeddings(seen, settings.contrastive) for seen in (student, teacher))
    own = torch.arange(len(mine[0]), device=mine[0].device)
    temperature = settings.contrastive.temperature
    return _mean([F.cross_entropy(mine[tower] @ theirs[1 - tower].T / temperature, own) for tower in (0, 1)])


def affinity(student: Seen, teacher: Seen, settings: Training) -> Tensor:
    """Affinity mimicking: which pairs of the batch the student finds alike, in both directions.

    The cross-entropy of TinyCLIP (Wu et al., 2023) less the teacher's entropy, which has no gradient.
    """
    temperature = settings.affinity.temperature
    near, goal = (
        first @ second.T / temperature
        for first, second in (_embeddings(seen, settings.affinity) for seen in (student, teacher))
    )
    return _mean([_softened(1.0)(near, goal), _softened(1.0)(near.T, goal.T)])


def _embeddings(seen: Seen, settings: PairLoss) -> list[Tensor]:
    return [F.normalize(seen.outputs[name], dim=-1) for name in pair_of(settings, seen.outputs)]


def sequence(student: Seen, teacher: Seen, settings: Training) -> Tensor:
    """Cross-entropy of the teacher's own sequence, per token (sequence-level distillation, Kim and Rush, 2016)."""
    prompt = settings.sequence.prompt
    scores, tokens = student.sequence["scores"][:, prompt - 1 : -1], teacher.sequence["tokens"][:, prompt:]
    counted = ~_after_the_end(tokens, settings.sequence)
    return F.cross_entropy(scores[counted], tokens[counted])


def _after_the_end(tokens: Tensor, settings: SequenceLoss) -> Tensor:
    """True at every position behind the token that ends a sequence."""
    if settings.end is None:
        return torch.zeros_like(tokens, dtype=torch.bool)
    ends = (tokens == settings.end).long()
    return (ends.cumsum(dim=1) - ends) > 0


# In the order in which they are added up; the names are those of the settings.
LOSSES: Mapping[str, Loss] = {
    "logits": logits,
    "regression": regression,
    "features": features,
    "attention": attention,
    "relations": relations,
    "contrastive": contrastive,
    "affinity": affinity,
    "sequence": sequence,
}
