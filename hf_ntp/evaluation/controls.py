"""Controls: what pruning alone, without any protection, does to transfer."""

from __future__ import annotations

from pathlib import Path

import torch

from ..functional import cardinality_mask
from ..models import load_model, noted_prunable_weights, notes_of, zero_fraction
from ..run_folder import whole_folder


def prune_without_protection(
    checkpoint: str | Path, folder: str | Path, like: str | Path, kind: str = "magnitude", seed: int = 0
) -> None:
    """Save a copy of ``checkpoint`` that has as many zeros in every layer as the protected model ``like``.

    Args:
        checkpoint: Unprotected model.
        folder: Where to save the copy.
        like: Protected model of the same architecture.
        kind: "magnitude" (the smallest weights go) or "random" (any).
        seed: Of the random choice.

    Raises:
        ValueError: For another kind.
    """
    if kind not in ("magnitude", "random"):
        raise ValueError(f"kind is {kind!r}; needed: 'magnitude' or 'random'.")
    model, protected = (load_model(str(path)) for path in (checkpoint, like))
    model.config.ntp = {**notes_of(protected), "method": f"{kind}-pruning-control"}
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, zeros in noted_prunable_weights(protected).items():
            weight = model.get_parameter(name)
            score = weight if kind == "magnitude" else torch.rand(weight.shape, generator=generator)
            weight.mul_(cardinality_mask(score, int((zeros == 0).sum())))
    model.config.ntp["sparsity"] = zero_fraction(list(noted_prunable_weights(model).values()))
    with whole_folder(Path(folder)) as staged:
        model.save_pretrained(staged)
