"""Fine-tuning, plain and informed: the attacks that decide whether protection holds."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel, get_scheduler

from ..models import has_batch_norm, heads_of, noted_prunable_weights, replace_head
from .attack import Attack, FineTuneProtocol, Loot, Predict
from .changes import CHANGES
from .ensemble import Ensemble

# SGD with momentum needs rates about this much higher than Adam's for steps of a similar length.
_SGD_RATE_FACTOR = 10.0
_MOMENTUM = 0.9


@dataclass(frozen=True)
class FineTuning(Attack):
    """Fine-tune on the labelled target images.

    Args:
        keep_mask: Hold weights that are zero in the checkpoint at zero: the NTP paper's attacker. Otherwise zeros
            regrow.
        keep_head: Start from the checkpoint's own head instead of a fresh one; needs the same number of classes.
        changes: Names of :data:`~hf_ntp.attacks.changes.CHANGES`, made to the model first, in this order.
        trained: "all" weights, or "bias" (biases, norm layers and the head, after BitFit).
        optimizer: "adamw", or "sgd" with Nesterov momentum 0.9 and tenfold rates.
        longer: Factor on the protocol's steps.

    Raises:
        ValueError: For unknown names.
    """

    keep_mask: bool = False
    keep_head: bool = False
    changes: tuple[str, ...] = ()
    trained: str = "all"
    optimizer: str = "adamw"
    longer: int = 1

    def __post_init__(self) -> None:
        """Check the names."""
        if unknown := sorted(set(self.changes) - CHANGES.keys()):
            raise ValueError(f"changes are {unknown}; needed: names among {', '.join(CHANGES)}.")
        if self.trained not in ("all", "bias") or self.optimizer not in ("adamw", "sgd") or self.longer < 1:
            raise ValueError(
                f"{self} cannot run; needed: trained 'all' or 'bias', optimizer 'adamw' or 'sgd', longer >= 1."
            )

    def grid(self, protocol: FineTuneProtocol) -> tuple[float, ...]:
        """Learning rates, ten times higher for SGD."""
        factor = _SGD_RATE_FACTOR if self.optimizer == "sgd" else 1.0
        return tuple(factor * rate for rate in protocol.learning_rates)

    def unsuitable(self, model: PreTrainedModel, num_labels: int) -> str | None:
        """Say so where a mask, a head or statistics would have to be kept that are not there."""
        needs_zeros = self.keep_mask or "regrow_zeros" in self.changes
        if needs_zeros and all(bool(mask.all()) for _, mask in zero_masks(model)):
            return "the checkpoint has no zeros"
        if "keep_statistics" in self.changes and not has_batch_norm(model):
            return "the checkpoint has no BatchNorm"
        return super().unsuitable(model, num_labels)

    @property
    def uses_head(self) -> bool:  # type: ignore[override]  # of most attacks it is an attribute of the class
        """Whether the own head is kept."""
        return self.keep_head

    def fit(self, model: PreTrainedModel, loot: Loot, protocol: FineTuneProtocol, value: float, seed: int) -> Predict:
        """Fine-tune ``model`` in place at peak rate ``value``; see :class:`Attack`."""
        parameters, masks = self._prepare(model, loot, seed)
        loss = cross_entropy_on(model, loot.images, loot.labels, protocol.batch_size, seed)
        steps = self.longer * protocol.steps
        train(model, parameters, loss, protocol, value, seed, steps, self.optimizer, masks)
        return predictor(model)

    def joint_key(self) -> Hashable:
        """What attacks have to have in common to be run as one."""
        return self.optimizer, self.longer, self.trained, "keep_statistics" in self.changes

    @classmethod
    def fit_together(
        cls,
        attacks: Sequence[FineTuning],
        models: Sequence[PreTrainedModel],
        loots: Sequence[Loot],
        protocol: FineTuneProtocol,
        values: Sequence[float],
        seeds: Sequence[int],
    ) -> list[Predict]:
        """Fine-tune all models in place at once; see :class:`Attack`.

        The results are those of single fits up to rounding. Models have no dropout, and those with BatchNorm batches
        of one size.
        """
        fits = zip(attacks, models, loots, seeds, strict=True)
        masks = [pair for attack, model, loot, seed in fits for pair in attack._prepare(model, loot, seed)[1]]
        batches = [
            batches_of(len(loot.labels), protocol.batch_size, seed) for loot, seed in zip(loots, seeds, strict=True)
        ]
        first = attacks[0]
        batch_norm = has_batch_norm(models[0]) and "keep_statistics" not in first.changes
        if batch_norm and len({min(protocol.batch_size, len(loot.labels)) for loot in loots}) > 1:
            raise RuntimeError(
                "BatchNorm would see rows that fill up the smaller batches; needed: batches of one size."
            )
        # Equal rates side by side: an optimizer has few tensors then.
        order = sorted(range(len(models)), key=values.__getitem__)
        together = Ensemble([models[i] for i in order], [loots[i] for i in order])
        groups = together.parameter_groups([values[i] for i in order])
        train(
            nn.ModuleList(models),
            groups,
            lambda: together.loss([next(batches[i]) for i in order]),
            protocol,
            values[0],
            seeds[0],
            first.longer * protocol.steps,
            first.optimizer,
            masks,
            keep_grad=True,
        )
        return [predictor(model) for model in models]

    def _prepare(
        self, model: PreTrainedModel, loot: Loot, seed: int
    ) -> tuple[list[nn.Parameter], list[tuple[nn.Parameter, Tensor]]]:
        """Change the model as the attack begins; return what is trained, and weights with the masks they keep."""
        masks = zero_masks(model) if self.keep_mask else []
        for change in self.changes:
            CHANGES[change](model, seed)
        if not self.keep_head:
            replace_head(model, loot.num_labels, torch.Generator().manual_seed(seed))
        return bias_parameters(model) if self.trained == "bias" else list(model.parameters()), masks


def zero_masks(model: PreTrainedModel) -> list[tuple[nn.Parameter, Tensor]]:
    """Pruning masks that a checkpoint came with: the zeros of its prunable weights (patterns of ``config.ntp``)."""
    return [(weight, weight.detach() != 0) for weight in noted_prunable_weights(model).values()]


def bias_parameters(model: PreTrainedModel) -> list[nn.Parameter]:
    """Biases, weights of norm layers and the (fresh) head; everything else is frozen in place."""
    chosen = {id(parameter): parameter for head in heads_of(model).values() for parameter in head.parameters()}
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or parameter.dim() == 1:
            chosen[id(parameter)] = parameter
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in chosen)
    return list(chosen.values())


def cross_entropy_on(
    model: nn.Module, images: Tensor, labels: Tensor, batch_size: int, seed: int
) -> Callable[[], Tensor]:
    """Return a function that gives the cross-entropy on the next batch, for ever."""
    device = next(model.parameters()).device
    images, labels = images.to(device), labels.to(device)
    batches = batches_of(len(labels), batch_size, seed)

    def loss() -> Tensor:
        batch = next(batches).to(device)
        return F.cross_entropy(model(pixel_values=images[batch]).logits, labels[batch])

    return loss


def train(
    model: nn.Module,
    parameters: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
    loss: Callable[[], Tensor],
    protocol: FineTuneProtocol,
    learning_rate: float,
    seed: int,
    steps: int | None = None,
    optimizer: str = "adamw",
    masks: Sequence[tuple[nn.Parameter, Tensor]] = (),
    keep_grad: bool = False,
) -> None:
    """Minimise ``loss()`` in place with the protocol's schedule: what every gradient attack shares.

    Args:
        model: Put in training mode.
        parameters: What is updated; as an optimizer's groups where rates differ.
        loss: Gives the loss of the next batch, a scalar.
        protocol: Weight decay, warm-up and, unless ``steps`` is given, the number of steps.
        learning_rate: Peak rate.
        seed: Seed of dropout.
        steps: Number of optimizer steps.
        optimizer: "adamw" or "sgd".
        masks: Weights and the boolean masks they are held to.
        keep_grad: Zero gradients in place instead of dropping them.
    """
    steps = protocol.steps if steps is None else steps
    if optimizer == "sgd":
        # Decay passes through momentum and the higher rate here; scaled, it shrinks weights as much as AdamW's.
        decay = protocol.weight_decay * (1 - _MOMENTUM) / _SGD_RATE_FACTOR
        updates: torch.optim.Optimizer = torch.optim.SGD(
            parameters, learning_rate, _MOMENTUM, weight_decay=decay, nesterov=True, fused=True
        )
    else:
        updates = torch.optim.AdamW(parameters, learning_rate, weight_decay=protocol.weight_decay, fused=True)
    schedule = get_scheduler("cosine", updates, protocol.warmup_steps, steps)
    torch.manual_seed(seed)
    model.train()
    held = [list(part) for part in zip(*masks, strict=True)]
    for _ in range(steps):
        value = loss()
        updates.zero_grad(set_to_none=not keep_grad)
        value.backward()
        updates.step()
        schedule.step()
        if held:
            with torch.no_grad():
                torch._foreach_mul_(*held)


def batches_of(size: int, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Yield index batches for ever: a new order every pass, incomplete batches left out."""
    rng, batch_size = np.random.default_rng(seed), min(size, batch_size)
    while True:
        order = torch.from_numpy(rng.permutation(size))
        yield from (part for part in order.split(batch_size) if len(part) == batch_size)


def predictor(model: nn.Module) -> Predict:
    """Return the function that classifies with ``model`` in eval mode; it raises ``FloatingPointError`` on NaN.

    NaN is the largest value to argmax: a fit that broke would count as one that learned a single class.
    """

    @torch.no_grad()
    def predict(images: Tensor) -> Tensor:
        model.eval()
        device = next(model.parameters()).device
        logits = model(pixel_values=images.to(device)).logits
        if not logits.isfinite().all():
            raise FloatingPointError("the model's outputs are not finite; needed: a model that has not diverged.")
        return logits.argmax(-1).cpu()

    return predict
