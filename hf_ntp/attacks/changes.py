"""What an informed attacker changes in a checkpoint before fine-tuning it, by name."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import PreTrainedModel

from ..models import changes
from .attack import Loot

_STATISTICS_PASSES = 20

Change = Callable[[PreTrainedModel, Loot, int], object]


def _blind(change: Callable[[PreTrainedModel, int], object]) -> Change:
    """Adapt a change that needs no data."""
    return lambda model, loot, seed: change(model, seed)


@torch.no_grad()
def reestimate_statistics(model: PreTrainedModel, loot: Loot, seed: int) -> None:
    """Re-estimate BatchNorm's running statistics on the target images; nothing to do without BatchNorm."""
    layers = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    if not layers:
        return
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # cumulative average
    model.train()
    for batch in loot.images.split(max(len(loot.images) // _STATISTICS_PASSES, 32)):
        model(pixel_values=batch.to(model.device))
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum


CHANGES: dict[str, Change] = {
    "reset_norms": _blind(changes.reset_norms),
    "renormalize": _blind(changes.renormalize),
    "shrink_and_perturb": _blind(changes.shrink_and_perturb),
    "regrow_zeros": _blind(changes.regrow_zeros),
    "reinit_stem": _blind(changes.reinit_stem),
    "reinit_first_block": _blind(changes.reinit_first_block),
    "reinit_last_block": _blind(changes.reinit_last_block),
    "reestimate_statistics": reestimate_statistics,
}
"""Functions of (model, loot, seed) that change the model in place."""
