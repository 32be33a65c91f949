"""What is fitted, and how: arms of a comparison and the one protocol that all of them share."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class FineTuneProtocol:
    """How every arm is fine-tuned, scratch included: AdamW, all weights, fresh head, warm-up and cosine decay.

    Args:
        steps: Optimizer steps of one fit, whatever the sample size.
        batch_size: Images per step; smaller sets use all their images in every step.
        learning_rates: Grid from which validation accuracy chooses, per arm and sample size.
        weight_decay: AdamW's.
        warmup_steps: Steps of linear warm-up.

    Raises:
        ValueError: For values that cannot work.
    """

    steps: int = 600
    batch_size: int = 32
    learning_rates: tuple[float, ...] = (3e-4, 1e-3)
    weight_decay: float = 0.01
    warmup_steps: int = 20

    def __post_init__(self) -> None:
        """Check the values."""
        object.__setattr__(self, "learning_rates", tuple(sorted(set(self.learning_rates))))
        if self.steps < 1 or self.batch_size < 1 or not 0 <= self.warmup_steps < self.steps or self.weight_decay < 0:
            raise ValueError(
                f"the protocol is {self}; needed: steps >= 1, batch_size >= 1, 0 <= warmup_steps < steps and "
                "weight_decay >= 0."
            )
        if not self.learning_rates or min(self.learning_rates) <= 0:
            raise ValueError(f"learning_rates are {self.learning_rates}; needed: at least one positive rate.")


@dataclass(frozen=True)
class Arm:
    """A starting point that is fine-tuned on the target.

    Args:
        name: Name in results and figures.
        checkpoint: Folder or Hub id that gives the architecture and, unless ``random_init``, the weights.
        random_init: Start from random weights of that architecture (the scratch arm).
        keep_mask: Hold weights that are zero in the checkpoint at zero: the paper's attacker. Otherwise zeros regrow.
    """

    name: str
    checkpoint: str
    random_init: bool = False
    keep_mask: bool = False


def standard_arms(unprotected: str, protected: str) -> list[Arm]:
    """Scratch, unprotected, protected with the mask kept and protected dense: the comparison of every report."""
    return [
        Arm("scratch", unprotected, random_init=True),
        Arm("unprotected", unprotected),
        Arm("protected_mask", protected, keep_mask=True),
        Arm("protected_dense", protected),
    ]
