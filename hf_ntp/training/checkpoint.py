"""What a checkpoint of a protection run holds besides Trainer's own files, and how it is read back."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.trainer_utils import get_last_checkpoint

from ..models import plain_model
from ..models.sharding import cut_like
from ..run_folder import differences
from .attackers import AttackerPool
from .pruning import ADMMPruner
from .target_head import TargetHead

TENSORS_FILE = "ntp_state.safetensors"
SCALARS_FILE = "ntp_state.json"
# What reading a file raises that another program wrote, or half of one.
_DAMAGE = (LookupError, TypeError, AttributeError, ValueError, ArithmeticError, RuntimeError, SafetensorError)


class RunState(NamedTuple):
    """Numbers that the trainer itself keeps between steps."""

    source_excess: float
    terms: dict[str, tuple[float, int]]
    """Sum and count of every loss term since the last log."""
    pruning_log: dict[str, float]


def last_checkpoint(output_dir: str | Path | None) -> str | None:
    """Checkpoint of the highest step in a run's folder; None where there is none, or no such folder."""
    folder = str(output_dir)
    return get_last_checkpoint(folder) if Path(folder).is_dir() else None


def save_state(
    folder: Path,
    anchors: Mapping[str, Tensor],
    pruner: Mapping[str, float | bool],
    heads: Mapping[str, TargetHead],
    pool: AttackerPool | None,
    state: RunState,
    settings: Mapping[str, Any],
) -> None:
    """Write ADMM state, target heads, simulated attackers, ``state`` and settings into a checkpoint folder.

    One rank does. ``anchors`` and ``pruner`` are what :meth:`ADMMPruner.tensors`, which needs all ranks, and
    :meth:`ADMMPruner.scalars` gave.
    """
    groups = {"pruner": anchors} | {f"head:{name}": head.tensors() for name, head in heads.items()}
    scalars = {**state._asdict(), "pruner": pruner, "settings": settings}
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
    with _undamaged(folder):
        scalars = json.loads(path.read_bytes())
        if not isinstance(scalars["settings"], dict):
            raise TypeError("settings are no object")
        return scalars


@contextmanager
def _undamaged(folder: Path) -> Iterator[None]:
    """Raise ``ValueError`` where the content of a checkpoint is not what this module writes."""
    try:
        yield
    except _DAMAGE as error:
        raise ValueError(
            f"the protection state in {folder} cannot be read ({type(error).__name__}: {str(error)[:200]}); needed: "
            f"{TENSORS_FILE} and {SCALARS_FILE} as this version of hf_ntp writes them. Resume from an earlier one."
        ) from error


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
) -> RunState:
    """Restore what :func:`save_state` wrote and return what is the trainer's own; see :func:`check_settings`.

    Raises:
        ValueError: If the content is damaged.
    """
    scalars = _read_scalars(folder)
    with _undamaged(folder):
        groups: dict[str, dict[str, Tensor]] = {}
        for name, tensor in load_file(folder / TENSORS_FILE).items():
            group, _, key = name.rpartition("/")
            groups.setdefault(group, {})[key] = tensor
        pruner.load(groups.get("pruner", {}), scalars["pruner"])
        if pool is not None:
            pool.load(groups.get("attackers", {}), scalars["attackers"])
        for name, head in heads.items():
            head.load(groups[f"head:{name}"])
        excess, terms, log = scalars["source_excess"], scalars["terms"], scalars["pruning_log"]
        return RunState(
            float(excess),
            {name: (float(total), int(count)) for name, (total, count) in terms.items()},
            {name: float(value) for name, value in log.items()},
        )


def load_weights_strictly(model: PreTrainedModel, folder: str) -> None:
    """Load a checkpoint's weights into ``model`` in place, every tensor accounted for.

    Trainer loads with ``strict=False`` and without key conversion: for ViT and many others nothing would be restored.

    Raises:
        ValueError: If the checkpoint lacks weights of the model.
    """
    own = plain_model(model)
    kind: Any = type(own)  # whose stubs know of no loading information
    saved, found = kind.from_pretrained(folder, dtype=own.dtype, output_loading_info=True)
    present = own.state_dict()
    names = present.keys()
    if lost := sorted(names & found["missing_keys"]):
        raise ValueError(
            f"the weights in {folder} lack {', '.join(lost[:4])}{' ...' if len(lost) > 4 else ''} ({len(lost)} of "
            f"{len(names)} tensors); needed: all of {type(own).__name__}. Resume from an earlier checkpoint."
        )
    tensors = saved.state_dict()
    # A model may have been built without a part that its class has by default, such as a pooler.
    cut = {name: cut_like(tensors[name].to(there.device), there) for name, there in present.items()}
    own.load_state_dict(cut, strict=True)
