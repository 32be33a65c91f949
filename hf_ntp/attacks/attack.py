"""What an attack is: a way to turn a checkpoint and a few labelled target images into a classifier of the target."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from dataclasses import asdict, dataclass, is_dataclass, replace
from typing import Any, ClassVar, NamedTuple, cast

from torch import Tensor
from transformers import PreTrainedModel

from ..data import PixelDataset
from ..models import has_head

Predict = Callable[[Tensor], Tensor]
"""Classes [N], int64, for pixel values [N, 3, H, W]."""


@dataclass(frozen=True)
class FineTuneProtocol:
    """Budget that all arms of a comparison share, scratch included: warm-up, cosine decay, one grid of rates.

    Args:
        steps: Optimizer steps of one fit, whatever the sample size.
        batch_size: Images per step; smaller sets use all their images in every step.
        learning_rates: Grid from which validation accuracy chooses, per arm and sample size.
        weight_decay: Of the optimizer.
        warmup_steps: Steps of linear warm-up.
        extensions: Where the highest rate of the grid is the best, how many more are tried above it, one after another
            for as long as each is better than all before. Not below the lowest: all fits have the same number of
            steps, in which lower rates get less far. Becomes 0 for grids of one or two rates, which have no end.

    Raises:
        ValueError: For values that cannot work.
    """

    steps: int = 600
    batch_size: int = 32
    learning_rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3, 1e-2)
    weight_decay: float = 0.01
    warmup_steps: int = 20
    extensions: int = 2

    def __post_init__(self) -> None:
        """Check the values."""
        if isinstance(self.learning_rates, (int, float, str)):
            raise ValueError(f"learning_rates is {self.learning_rates!r}; needed: a sequence, such as (1e-3,).")
        object.__setattr__(self, "learning_rates", tuple(sorted(set(self.learning_rates))))
        if (
            not isinstance(self.steps, int)
            or not 0 <= self.warmup_steps < self.steps
            or self.batch_size < 1
            or min(self.weight_decay, self.extensions) < 0
        ):
            raise ValueError(
                f"the protocol is {self}; needed: a whole number of steps >= 1, batch_size >= 1, 0 <= warmup_steps < "
                "steps, weight_decay >= 0 and extensions >= 0."
            )
        if not self.learning_rates or not all(0 < rate < math.inf for rate in self.learning_rates):
            raise ValueError(
                f"learning_rates are {self.learning_rates}; needed: at least one, each positive and finite."
            )
        if len(self.learning_rates) < 3:
            object.__setattr__(self, "extensions", 0)

    def extended(self, times: int) -> FineTuneProtocol:
        """Return the protocol with ``times`` higher rates, which go on in the grid's own steps (of three at least)."""
        rates = list(self.learning_rates)
        for _ in range(times):  # 1, 3, 10 is followed by 30
            rates.append(float(f"{rates[-1] * rates[-2] / rates[-3]:.3g}"))
        return replace(self, learning_rates=tuple(rates))


class Loot(NamedTuple):
    """What an attacker holds besides the checkpoint."""

    images: Tensor
    """Target images, pixel values [n, 3, H, W], float32."""
    labels: Tensor
    """[n], int64."""
    num_labels: int
    """Classes of the target."""
    source: tuple[Tensor, Tensor] | None = None
    """A small labelled set of the authorized domain, for attacks that begin there."""
    pool: PixelDataset | None = None
    """All target images of the attacker, for attacks that need no labels and must not look at those in it."""


NO_HEAD = "the checkpoint has no head of its own"


def head_mismatch(model: PreTrainedModel, num_labels: int) -> str | None:
    """Say why a checkpoint's own head cannot name the target's classes, or None where it may."""
    if not has_head(model):
        return NO_HEAD
    if model.config.num_labels != num_labels:
        return f"the head has {model.config.num_labels} classes, the target {num_labels}"
    return None


class Attack(ABC):
    """One way to attack. Subclasses are frozen dataclasses: their fields are what a cached result depends on.

    To add one: subclass in a file of its own, and give it a line in `hf_ntp/attacks/__init__.py`.
    """

    needs_source: ClassVar[bool] = False
    """Whether :attr:`Loot.source` has to be there."""
    uses_head: ClassVar[bool] = False
    """Whether the checkpoint's own head names the target's classes, which then have to be its own."""

    def settings(self) -> dict[str, Any]:
        """JSON-ready fields: what a cached result depends on."""
        if not is_dataclass(self):
            raise TypeError(f"{type(self).__name__} is no dataclass; needed: @dataclass(frozen=True) above its class.")
        return asdict(cast(Any, self))

    def grid(self, protocol: FineTuneProtocol) -> tuple[float, ...]:
        """Values of the one hyperparameter that validation accuracy chooses: learning rates, unless said otherwise."""
        return protocol.learning_rates

    def unsuitable(self, model: PreTrainedModel, num_labels: int) -> str | None:
        """Say why the attack makes no sense for this model and number of target classes, or None where it does."""
        return head_mismatch(model, num_labels) if self.uses_head else None

    @abstractmethod
    def fit(self, model: PreTrainedModel, loot: Loot, protocol: FineTuneProtocol, value: float, seed: int) -> Predict:
        """Run the attack.

        Args:
            model: The checkpoint as it was loaded, with its own head, on its device; may be changed in place.
            loot: Data of the attacker.
            protocol: The common budget.
            value: One value of :meth:`grid`.
            seed: Seed of everything random.

        Returns:
            The attacker's classifier.
        """

    def joint_key(self) -> Hashable:
        """Attacks of one class and equal keys can be trained as one by :meth:`fit_together`; None where it cannot."""
        return None

    @classmethod
    def fit_together(
        cls,
        attacks: Sequence[Any],
        models: Sequence[PreTrainedModel],
        loots: Sequence[Loot],
        protocol: FineTuneProtocol,
        values: Sequence[float],
        seeds: Sequence[int],
    ) -> list[Predict]:
        """Run attacks, each on a model of its own, all of one architecture; each gives what :meth:`fit` would."""
        raise NotImplementedError(f"{cls.__name__} has a joint_key and no fit_together; needed: both or neither.")
