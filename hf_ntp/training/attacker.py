"""One simulated attacker: what it is, where it begins, and how it moves. The pool of them is in `attackers.py`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..functional import adam_step_
from ..models import changes
from .arguments import ProtectionArguments

_MOMENTUM = 0.9
# What SGD with momentum needs to move as fast as Adam does at a rate.
_SGD_RATE_FACTOR = 10.0
_HEAD_STD = 0.02

ZEROS = "zeros"


class _Start(NamedTuple):
    """What an informed attacker does first."""

    share: int
    """How many of them do, relative to the others."""
    changes: tuple[Callable[[PreTrainedModel, int], dict[str, float]], ...] = ()


# The first block is what a protection likes to turn into a gate, so it is attacked most.
INFORMED = {
    "norms": _Start(2, (changes.reset_norms,)),
    "rescaled": _Start(1, (changes.renormalize,)),
    "perturbed": _Start(2, (changes.shrink_and_perturb,)),
    "stem": _Start(1, (changes.reinit_stem,)),
    "first_block": _Start(4, (changes.reinit_first_block,)),
    "stem_and_first_block": _Start(2, (changes.reinit_stem, changes.reinit_first_block)),
    ZEROS: _Start(1),
}
_RATE_WARMUP = 5


class Plan(NamedTuple):
    """What one attacker is; drawn from (seed, slot, life), so that a resumed run draws the same."""

    rate: float
    sgd: bool
    lifetime: int
    start: str
    keeps_mask: bool
    seed: int
    keeps_head: bool
    keeps_statistics: bool

    @classmethod
    def draw(cls, options: ProtectionArguments, seed: int, slot: int, life: int) -> Plan:
        """Draw the attacker that is number ``life`` in ``slot``."""
        rng = np.random.default_rng([seed, slot, life])
        shortest, longest = options.attacker_horizon
        lifetime = round(float(np.exp(rng.uniform(np.log(shortest), np.log(longest)))))
        if life == 0:  # staggered: the first ones die early, one after the other
            lifetime = max(shortest, lifetime * (slot + 1) // options.attackers)
        informed = rng.random() < options.attacker_informed
        shares = np.array([start.share for start in INFORMED.values()])
        start = str(rng.choice(list(INFORMED), p=shares / shares.sum())) if informed else "plain"
        return cls(
            rate=float(rng.choice(options.attacker_learning_rates)),
            sgd=bool(rng.random() < options.attacker_sgd),
            lifetime=lifetime,
            start=start,
            # Who regrows zeros keeps no mask.
            keeps_mask=bool(rng.random() < options.attacker_keeps_mask) and start != ZEROS,
            seed=int(rng.integers(2**31)),
            keeps_head=bool(rng.random() < options.attacker_keeps_head),
            # Those of other weights bound nothing: activations explode.
            keeps_statistics=bool(rng.random() < options.attacker_keeps_statistics) and start in ("plain", "norms"),
        )


class Attacker:
    """One simulated attacker: offsets from the encoder's weights, a head, and the optimizer's moments.

    ``kept`` says by which factor it still follows a weight of the encoder, by name; 1 where it is silent. ``masks``
    are pruning masks that it keeps, ``followed`` those of the weights it follows where it has regrown the rest.
    """

    def __init__(self, plan: Plan, weights: Mapping[str, Tensor], num_classes: int, width: int) -> None:
        generator = torch.Generator().manual_seed(plan.seed)
        head = torch.randn(num_classes, width, generator=generator) * _HEAD_STD
        device = next(iter(weights.values())).device
        self.plan = plan
        self.age = 0
        self.kept: dict[str, float] = {}
        self.offsets = {name: torch.zeros_like(weight) for name, weight in weights.items()}
        self.head = {"weight": head.to(device), "bias": torch.zeros(num_classes, device=device)}
        self.masks: dict[str, Tensor] = {}
        self.followed: dict[str, Tensor] = {}
        self.moments = [[torch.zeros_like(tensor) for tensor in self.trained()] for _ in range(1 if plan.sgd else 2)]

    def trained(self) -> list[Tensor]:
        """What its optimizer moves, in place."""
        return [*self.offsets.values(), *self.head.values()]

    def advance(self, gradients: list[Tensor]) -> None:
        """One optimizer step (SGD with momentum, or Adam)."""
        self.age += 1
        rate = self.plan.rate * min(1.0, self.age / _RATE_WARMUP)
        first = self.moments[0]
        if self.plan.sgd:
            torch._foreach_mul_(first, _MOMENTUM)
            torch._foreach_add_(first, gradients)
            torch._foreach_add_(self.trained(), first, alpha=-rate * _SGD_RATE_FACTOR)
            return
        adam_step_(self.trained(), gradients, first, self.moments[1], self.age, rate)

    def tensors(self) -> dict[str, Tensor]:
        """State by name, for a checkpoint."""
        state = {f"offset.{name}": tensor for name, tensor in self.offsets.items()}
        state |= {f"head.{name}": tensor for name, tensor in self.head.items()}
        state |= {f"mask.{name}": tensor for name, tensor in self.masks.items()}
        state |= {f"followed.{name}": tensor for name, tensor in self.followed.items()}
        for i, moments in enumerate(self.moments):
            state |= {f"moment.{i}.{j}": tensor for j, tensor in enumerate(moments)}
        return state
