"""Arms of a comparison: which checkpoint is attacked, and how."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..attacks import ATTACKS, Attack


@dataclass(frozen=True)
class Arm:
    """A starting point and the attack on it: one learning curve.

    Args:
        name: Name in results and figures.
        checkpoint: Folder or Hub id that gives the architecture and, unless ``random_init``, the weights.
        random_init: Start from random weights of that architecture (the scratch arm).
        attack: How the start becomes a classifier of the target; default dense fine-tuning.
    """

    name: str
    checkpoint: str
    random_init: bool = False
    attack: Attack = field(default_factory=lambda: ATTACKS["dense"])

    def __post_init__(self) -> None:
        """Check the attack.

        Raises:
            TypeError: If it is none.
        """
        if not isinstance(self.attack, Attack):
            raise TypeError(
                f"attack is {self.attack!r}; needed: an Attack, such as ATTACKS['dense'] or one of your own."
            )


def standard_arms(unprotected: str, protected: str) -> list[Arm]:
    """Scratch, unprotected, protected with the mask kept and protected dense: the comparison of every report."""
    return [
        Arm("scratch", unprotected, random_init=True),
        Arm("unprotected", unprotected),
        Arm("protected_mask", protected, attack=ATTACKS["mask_kept"]),
        Arm("protected_dense", protected),
    ]
