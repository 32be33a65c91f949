"""What a checkpoint of a protection run holds besides Trainer's own files, and how it is read back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from ..models import plain_model
from ..run_folder import differences
from .attackers import AttackerPool
from .pruning import ADMMPruner
from .target_head import TargetHead

TENSORS_FILE = "ntp_state.safetensors"
SCALARS_FILE = "ntp_state.json"


def save_state(
    folder: Path,
    pruner: ADMMPruner,
    heads: Mapping[str, TargetHead],
    pool: AttackerPool | None,
    scalars: Mapping[str, Any],
) -> None:
    """Write ADMM state, target heads, simulated attackers and JSON-ready ``scalars`` into a checkpoint folder."""
    groups = {"pruner": pruner.tensors()} | {f"head:{name}": head.tensors() for name, head in heads.items()}
    scalars = {**scalars, "pruner": pruner.scalars()}
    if pool is not None:
        groups["attackers"], scalars["attackers"] = pool.tensors(), pool.scalars()
    tensors = {f"{group}/{name}": tensor for group, part in groups.items() for name, tensor in part.items()}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / TENSORS_FILE)
    (folder / SCALARS_FILE).write_text(json.dumps(scalars, indent=2))


def _read_scalars(folder: Path) -> dict[str, Any]:
    path = folder / SCALARS_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} has no {SCALARS_FILE}: it is not a checkpoint of NTPTrainer. Pass a checkpoint-N folder that a "
            "protection run wrote, or start anew without resume_from_checkpoint."
        )
    return json.loads(path.read_text())


def check_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Check that a checkpoint belongs to a run with these settings, before anything of it is loaded.

    Raises:
        FileNotFoundError: If the folder is not a checkpoint of a protection run.
        ValueError: If it was written under other settings, data or architecture.
    """
    if differing := differences(_read_scalars(folder)["settings"], settings):
        raise ValueError(
            f"{folder} was written under other settings ({'; '.join(differing[:8])}); needed: the same, or the run "
            "could not end as if it had not been interrupted. Restore them, or start anew in another output_dir."
        )


def load_state(
    folder: Path, pruner: ADMMPruner, heads: Mapping[str, TargetHead], pool: AttackerPool | None
) -> dict[str, Any]:
    """Restore what :func:`save_state` wrote and return the scalars; see :func:`check_settings`."""
    groups: dict[str, dict[str, Tensor]] = {}
    for name, tensor in load_file(folder / TENSORS_FILE).items():
        group, _, key = name.rpartition("/")
        groups.setdefault(group, {})[key] = tensor
    scalars = _read_scalars(folder)
    pruner.load(groups.get("pruner", {}), scalars["pruner"])
    if pool is not None:
        pool.load(groups.get("attackers", {}), scalars["attackers"])
    for name, head in heads.items():
        head.load(groups[f"head:{name}"])
    return scalars


def load_weights_strictly(model: PreTrainedModel, folder: str) -> None:
    """Load a checkpoint's weights into ``model`` in place, every tensor accounted for.

    Trainer loads with ``strict=False`` and without key conversion: for ViT and many others nothing would be restored.
    """
    own = plain_model(model)
    saved = type(own).from_pretrained(folder, dtype=own.dtype)
    own.load_state_dict(saved.state_dict(), strict=True)
