"""The objective on one batch: authorized loss, non-transferable loss and Fisher term (NTP, ECCV 2024, section 3).

Where several processes hold a part of the batch each, every term is that of the whole batch.

L = L_S + kappa * L_D  +  alpha * L_N  +  lambda * R_F  +  gamma * R_C

L_D (distillation from the original model, see `guard.py`) and R_C (collapse of target tokens) are ours. The
ADMM penalty and the simulated attackers join as gradients: see `pruning.py` and `attackers.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from accelerate.utils import gather
from torch import Tensor
from torch.nn import functional as F

from ..functional import (
    clamped_ascent,
    relative_collapse,
    standardized,
    trace_ratio,
    uniform_cross_entropy,
    whitened_discriminant,
)
from .arguments import ProtectionArguments
from .distributed import average, gather_rows
from .target_head import TargetHead

_FISHER = {"trace_ratio": trace_ratio, "whitened": whitened_discriminant}
_WIDTH = 64
"""Of the features for which the weight of the whitened criterion was chosen."""


class TargetBatch(NamedTuple):
    """One unauthorized domain's part of a batch, as far as it lies on this process."""

    features: Tensor
    """What enters the head, [N, D]."""
    tokens: tuple[Tensor, ...]
    """Output of every block, [N, T_i, D_i] each; empty where no term looks at it."""
    labels: Tensor
    """[N]."""


def non_transferable_loss(logits: Tensor, labels: Tensor, options: ProtectionArguments) -> tuple[Tensor, Tensor]:
    """Return the loss to minimise and the attacker's own cross-entropy (detached), both scalars in nats.

    Args:
        logits: Output of the simulated attacker's head, [N, K].
        labels: [N].
        options: ``target_loss`` and ``target_bound``.
    """
    attacker = F.cross_entropy(logits, labels)
    if options.target_loss == "uniform":
        return uniform_cross_entropy(logits), attacker.detach()
    bound = options.target_bound or math.log(logits.shape[-1])
    return clamped_ascent(attacker, bound), attacker.detach()


def fisher_term(batch: TargetBatch, labels: Tensor, num_classes: int, options: ProtectionArguments) -> Tensor:
    """Fisher criterion of the target features, averaged over the levels it acts on: a scalar to be minimised.

    With the stages, class information cannot survive inside the encoder where fine-tuning would bring it out again.
    The whitened criterion grows with the width D of the features, up to D / shrinkage; one ``fisher_weight``
    shall mean the same at any level and in models of any size, so that it is multiplied by 64 / D.

    Args:
        batch: This process's part.
        labels: Those of all processes, [ranks * N].
        num_classes: Classes of the domain.
        options: Those that begin with ``fisher``.
    """
    stages = [tokens.mean(1) for tokens in batch.tokens] if options.fisher_level == "stages" else []
    by_width: dict[int, list[Tensor]] = {}
    for level in gather_rows(*stages, batch.features):
        by_width.setdefault(level.shape[1], []).append(level)
    # Levels of one width are computed together: small matrices one by one are all overhead.
    terms = []
    for levels in by_width.values():
        together, scale = torch.stack(levels), 1.0
        if options.fisher == "whitened":
            # Shrinkage alike in all directions would leave class information in those of small variance.
            together, scale = standardized(together), _WIDTH / together.shape[-1]
        terms.append(scale * _FISHER[options.fisher](together, labels, num_classes, options.fisher_shrinkage))
    return torch.cat(terms).mean()


def collapse_term(target: Sequence[Tensor], source: Sequence[Tensor]) -> Tensor:
    """Collapse of target tokens relative to source tokens, averaged over the blocks: a scalar in nats."""
    pairs = zip(target, source, strict=True)
    return torch.stack([relative_collapse(t, s, average=average) for t, s in pairs]).mean()


def target_terms(
    batches: Mapping[str, TargetBatch],
    source_tokens: Sequence[Tensor],
    heads: Mapping[str, TargetHead],
    options: ProtectionArguments,
    shares: Sequence[float],
) -> tuple[Tensor, dict[str, Tensor]]:
    """Refit the heads and compute what is added to the source loss, averaged over the unauthorized domains.

    Args:
        batches: Target part of the batch by domain.
        source_tokens: Output of every block on the source part, as in :attr:`TargetBatch.tokens`.
        heads: Simulated attacker's head by domain.
        options: Weights and kinds of the terms.
        shares: Of the domains in the average; they sum to 1.

    Returns:
        The weighted sum to minimise and the single terms for the log (detached scalars).
    """
    log: dict[str, Tensor] = {}
    sums: list[Tensor] = []
    for (name, batch), share in zip(batches.items(), shares, strict=True):
        suffix = f"_{name}" if len(batches) > 1 else ""
        head, labels = heads[name], gather(batch.labels)
        if options.target_weight:
            (features,) = gather_rows(batch.features)
            head.refit(features, labels, options.target_head_steps)
            loss, attacker = non_transferable_loss(head(features), labels, options)
            log |= {f"target_loss{suffix}": attacker, f"non_transferable_loss{suffix}": loss.detach()}
            sums.append(share * options.target_weight * loss)
        if options.fisher_weight:
            fisher = fisher_term(batch, labels, head.linear.out_features, options)
            log[f"fisher_loss{suffix}"] = fisher.detach()
            sums.append(share * options.fisher_weight * fisher)
        if options.collapse_weight:
            collapse = collapse_term(batch.tokens, source_tokens)
            log[f"collapse_loss{suffix}"] = collapse.detach()
            sums.append(share * options.collapse_weight * collapse)
    return torch.stack(sums).sum(), log
