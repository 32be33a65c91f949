"""Source-then-target: loosen what protection has done with a little data of the authorized domain, then fine-tune.

The target stage has the whole budget of the other attacks; a third as many steps on the source come first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from ..functional import softened_divergence
from ..models import find_head, has_head, heads_of, replace_head
from .attack import NO_HEAD, Attack, FineTuneProtocol, Loot, Predict
from .fine_tuning import FineTuning, batches_of, cross_entropy_on, train
from .perturbations import perturb

_SOURCE_SHARE = 1 / 3


@dataclass(frozen=True)
class SourceTuning(Attack):
    """Fine-tune on the source, then on the target: the SourceFT attacks of NTLBench (2025) with a target stage.

    Their names there: FTAL (all, kept), RTAL (all, new), FTLL (last, kept), RTLL (last, new). The target stage keeps
    the head that the source stage has trained, where the numbers of classes agree.

    Args:
        layers: What the source stage trains: "all", or "last" for the head alone.
        head: "kept", or "new" to begin the source stage with a fresh head.

    Raises:
        ValueError: For other values.
    """

    layers: str = "all"
    head: str = "kept"
    needs_source = True

    def __post_init__(self) -> None:
        """Check the values."""
        if self.layers not in ("all", "last") or self.head not in ("kept", "new"):
            raise ValueError(f"{self} cannot run; needed: layers 'all' or 'last', and head 'kept' or 'new'.")

    def unsuitable(self, model: PreTrainedModel, num_labels: int) -> str | None:
        """Say so where all that learns from the source is a head that the target cannot use."""
        if not has_head(model) and (self.layers == "last" or self.head == "kept"):
            return NO_HEAD
        if self.layers == "last" and model.config.num_labels != num_labels:
            return f"only the head learns from the source; it has {model.config.num_labels} classes, not {num_labels}"
        return None

    def fit(self, model: PreTrainedModel, loot: Loot, protocol: FineTuneProtocol, value: float, seed: int) -> Predict:
        """Run both stages at peak rate ``value``; see :class:`Attack`."""
        images, labels = source_of(loot)
        if self.head == "new":
            classes = find_head(model)[1].out_features if has_head(model) else int(labels.max()) + 1
            replace_head(model, classes, torch.Generator().manual_seed(seed))
        if self.layers == "last":
            model.requires_grad_(False)
            for head in heads_of(model).values():
                head.requires_grad_(True)
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        loss = cross_entropy_on(model, images, labels, protocol.batch_size, seed)
        train(model, parameters, loss, part_of(protocol, _SOURCE_SHARE), value, seed)
        model.requires_grad_(True)
        return target_stage(model, loot, protocol, value, seed)


@dataclass(frozen=True)
class TransNTL(Attack):
    """Repair on perturbed source images, then fine-tune on the target (Hong et al., CVPR 2024, TransNTL).

    A protection holds only near the target domain; close to the source it leaves gaps. The source stage minimises
    cross-entropy on clean source images + ``repair_weight`` * KL(prediction on perturbed || on clean ones), with the
    clean prediction as a constant: the model teaches itself to be as good off the source as on it.

    Args:
        repair_weight: >= 0.

    Raises:
        ValueError: If it is negative.
    """

    repair_weight: float = 1.0
    needs_source = True

    def __post_init__(self) -> None:
        """Check the weight."""
        if self.repair_weight < 0:
            raise ValueError(f"repair_weight is {self.repair_weight}; needed: a number >= 0.")

    def unsuitable(self, model: PreTrainedModel, num_labels: int) -> str | None:
        """Say so where there is no head whose predictions could be repaired."""
        return None if has_head(model) else NO_HEAD

    def fit(self, model: PreTrainedModel, loot: Loot, protocol: FineTuneProtocol, value: float, seed: int) -> Predict:
        """Run both stages at peak rate ``value``; see :class:`Attack`."""
        loss = self._repair_loss(model, *source_of(loot), protocol.batch_size, seed)
        train(model, model.parameters(), loss, part_of(protocol, _SOURCE_SHARE), value, seed)
        return target_stage(model, loot, protocol, value, seed)

    def _repair_loss(
        self, model: PreTrainedModel, images: Tensor, labels: Tensor, batch_size: int, seed: int
    ) -> Callable[[], Tensor]:
        images, labels = images.to(model.device), labels.to(model.device)
        batches = batches_of(len(labels), batch_size, seed)
        generator = torch.Generator().manual_seed(seed)

        def loss() -> Tensor:
            batch = next(batches).to(model.device)
            clean = model(pixel_values=images[batch]).logits
            perturbed = model(pixel_values=perturb(images[batch], generator)).logits
            repair = softened_divergence(perturbed, clean.detach())
            return F.cross_entropy(clean, labels[batch]) + self.repair_weight * repair

        return loss


def source_of(loot: Loot) -> tuple[Tensor, Tensor]:
    """Source images and labels of the loot.

    Raises:
        ValueError: If it has none.
    """
    if loot.source is None:
        raise ValueError(
            "the attacker has no source data; needed: labelled images of the authorized domain. Pass `source` to "
            "AttackData, or leave this attack out."
        )
    return loot.source


def part_of(protocol: FineTuneProtocol, share: float) -> FineTuneProtocol:
    """Return the protocol with a share of its steps and warm-up, at least one step."""
    steps = max(round(share * protocol.steps), 1)
    return replace(protocol, steps=steps, warmup_steps=min(round(share * protocol.warmup_steps), steps - 1))


def target_stage(model: PreTrainedModel, loot: Loot, protocol: FineTuneProtocol, rate: float, seed: int) -> Predict:
    """Fine-tune on the target, from the model's own head where it fits."""
    return FineTuning(keep_head=model.config.num_labels == loot.num_labels).fit(model, loot, protocol, rate, seed)
