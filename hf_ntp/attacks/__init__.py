"""Attacks: what somebody who has the checkpoint and some labelled target images may try.

Trainer-free (torch, peft, scikit-learn) and unaware of how a checkpoint was protected. A new attack is one file and
one line below.
"""

from __future__ import annotations

from .as_published import AsPublished
from .attack import Attack, FineTuneProtocol, Loot, Predict
from .distillation import Distillation
from .fine_tuning import FineTuning
from .peft_tuning import PeftTuning
from .probes import Probe
from .shot import Shot
from .source_tuning import SourceTuning, TransNTL

ATTACKS: dict[str, Attack] = {
    # nothing
    "as_published": AsPublished(),
    # all weights
    "mask_kept": FineTuning(keep_mask=True),
    "dense": FineTuning(),
    "dense_3x": FineTuning(longer=3),
    "dense_sgd": FineTuning(optimizer="sgd"),
    "head_kept": FineTuning(keep_head=True),
    "bias_only": FineTuning(trained="bias"),
    # informed
    "zeros_regrown": FineTuning(changes=("regrow_zeros",)),
    "statistics_kept": FineTuning(changes=("keep_statistics",)),
    "all_kept": FineTuning(keep_head=True, changes=("keep_statistics",)),
    "norms_reset": FineTuning(changes=("reset_norms",)),
    "renormalized": FineTuning(changes=("renormalize", "reset_norms")),
    "shrink_perturb": FineTuning(changes=("shrink_and_perturb",)),
    "stem_reinit": FineTuning(changes=("reinit_stem",)),
    "first_block_reinit": FineTuning(changes=("reinit_first_block",)),
    "last_block_reinit": FineTuning(changes=("reinit_last_block",)),
    # few weights
    "lora": PeftTuning("lora"),
    "dora": PeftTuning("dora"),
    "ia3": PeftTuning("ia3"),
    # frozen features
    "linear_probe": Probe("linear"),
    "whitened_probe": Probe("whitened"),
    "ridge_probe": Probe("ridge"),
    "knn": Probe("knn"),
    "linear_probe_statistics": Probe("linear", target_statistics=True),
    # fresh weights
    "distillation": Distillation(),
    # through the authorized domain
    "source_all_kept": SourceTuning("all", "kept"),
    "source_all_new": SourceTuning("all", "new"),
    "source_last_kept": SourceTuning("last", "kept"),
    "source_last_new": SourceTuning("last", "new"),
    "transntl": TransNTL(),
    # without labels
    "shot": Shot(),
}
"""Every attack by name."""

DECISIVE = (
    "as_published",
    "mask_kept",
    "dense",
    "dense_3x",
    "head_kept",
    "statistics_kept",
    "all_kept",
    "stem_reinit",
    "first_block_reinit",
    "lora",
    "linear_probe",
)
"""The ones that broke protections in our experiments and need no authorized images, or that every table of the field
has; attacks that begin with authorized images can be better (README)."""

__all__ = ["ATTACKS", "DECISIVE", "Attack", "FineTuneProtocol", "FineTuning", "Loot", "Predict"]
