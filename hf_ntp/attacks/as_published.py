"""The simplest attack: use the checkpoint as it was published."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from transformers import PreTrainedModel

from .attack import Attack, FineTuneProtocol, Loot, Predict
from .fine_tuning import predictor


@dataclass(frozen=True)
class AsPublished(Attack):
    """Classify the target with the checkpoint's own head, weights and statistics; nothing is trained.

    Where authorized and unauthorized domain have the same classes, this is what protection has to take away first.
    """

    uses_head: ClassVar[bool] = True

    def grid(self, protocol: FineTuneProtocol) -> tuple[float, ...]:
        """Nothing to tune: one value that means nothing."""
        return (0.0,)

    def fit(self, model: PreTrainedModel, loot: Loot, protocol: FineTuneProtocol, value: float, seed: int) -> Predict:
        """Return the model's own predictions; see :class:`Attack`."""
        return predictor(model)
