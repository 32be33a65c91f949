"""Distillation: take over what the checkpoint knows and leave its weights, with their obstacles, behind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from ..functional import softened_divergence, standardized
from ..models import features_and_logits, find_head, recorded_features
from ..models.changes import fresh_model
from .attack import Attack, FineTuneProtocol, Loot, Predict
from .fine_tuning import FineTuning, batches_of, predictor, train


@dataclass(frozen=True)
class Distillation(Attack):
    """Fine-tune a teacher, then train a student from random weights on labels, the teacher's logits and features.

    The loss is cross-entropy + ``logit_weight`` * T^2 KL(teacher || student) at temperature T (Hinton, Vinyals and
    Dean, 2015) + ``feature_weight`` * the squared distance of linearly mapped pooled features of the student to the
    teacher's (FitNets, Romero et al., 2015), standardised.

    The student gets all of the protocol's steps, so that it differs from the scratch arm in its targets alone; the
    teacher's come on top.

    Args:
        temperature: T > 0.
        logit_weight: >= 0.
        feature_weight: >= 0.

    Raises:
        ValueError: For values that cannot work.
    """

    temperature: float = 4.0
    logit_weight: float = 1.0
    feature_weight: float = 1.0

    def __post_init__(self) -> None:
        """Check the values."""
        if self.temperature <= 0 or self.logit_weight < 0 or self.feature_weight < 0:
            raise ValueError(f"{self} cannot run; needed: temperature > 0 and weights >= 0.")

    def fit(self, model: PreTrainedModel, loot: Loot, protocol: FineTuneProtocol, value: float, seed: int) -> Predict:
        """Fine-tune ``model`` and train a student of it, both at peak rate ``value``; see :class:`Attack`."""
        FineTuning().fit(model, loot, protocol, value, seed)
        # Nothing is augmented: the teacher's answers are the same at every step.
        features, logits = features_and_logits(model, loot.images)
        student = fresh_model(model, seed)
        find_head(student)[1].requires_grad_()  # that of an encoder without one is fixed while it is protected
        mapping = nn.Linear(features.shape[1], features.shape[1]).to(model.device)
        loss = self._loss(student, mapping, loot, logits, standardized(features), protocol.batch_size, seed)
        train(student, [*student.parameters(), *mapping.parameters()], loss, protocol, value, seed)
        return predictor(student)

    def _loss(
        self,
        student: PreTrainedModel,
        mapping: nn.Linear,
        loot: Loot,
        teacher_logits: Tensor,
        features: Tensor,
        batch_size: int,
        seed: int,
    ) -> Callable[[], Tensor]:
        images, labels = loot.images.to(student.device), loot.labels.to(student.device)
        batches = batches_of(len(labels), batch_size, seed)
        _, head = find_head(student)

        def loss() -> Tensor:
            batch = next(batches).to(student.device)
            with recorded_features(head) as recorded:
                logits = student(pixel_values=images[batch]).logits
            return (
                F.cross_entropy(logits, labels[batch])
                + self.logit_weight * softened_divergence(teacher_logits[batch], logits, self.temperature)
                + self.feature_weight * F.mse_loss(mapping(recorded[0]), features[batch])
            )

        return loss
