"""What an informed attacker changes in a checkpoint before fine-tuning it, by name."""

from __future__ import annotations

from collections.abc import Callable

from transformers import PreTrainedModel

from ..models import changes

CHANGES: dict[str, Callable[[PreTrainedModel, int], object]] = {
    change.__name__: change
    for change in (
        changes.reset_norms,
        changes.keep_statistics,
        changes.renormalize,
        changes.shrink_and_perturb,
        changes.regrow_zeros,
        changes.reinit_stem,
        changes.reinit_first_block,
        changes.reinit_last_block,
    )
}
"""Functions of (model, seed) that change the model in place."""
