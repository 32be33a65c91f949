"""A pool of simulated attackers who fine-tune the encoder while it is being protected.

Each attacker is an offset from the present weights with a head of its own (new, or begun as the model's), optimizer,
rate, lifetime and kind of start. One forward and backward pass at the attacker's weights W + offset gives two things:
the attacker's own next step, which descends its cross-entropy L_T, and the defender's first-order gradient, which
ascends it there (the idea of SOPHON, Deng et al. 2024, and TAR, Tamirisa et al. 2024: simulate the attack, then raise
the loss where it leads):

    offset <- Optimizer(offset, grad L_T(W + offset)),      g -= unit(grad L_T(W + offset)),      W <- Adam(W, g)

The defender's direction g has an Adam of its own: with a shared one its noise would drown the steps of the source.

Lifetimes are staggered, so that young and old attackers act side by side and a long horizon costs no unrolling. An
attacker who begins with part of the encoder re-initialised, shrunk or rescaled is at c W + offset there; the
defender's gradient has the factor c.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from transformers import PreTrainedModel

from ..models import (
    changes,
    fixed_batch_norms,
    frozen_batch_norm_statistics,
    has_batch_norm,
    has_head,
    recorded_features,
)
from .arguments import ProtectionArguments
from .attacker import INFORMED, ZEROS, Attacker, Plan

# An attacker this close to chance has nothing to be denied.
_MARGIN = 0.02


class AttackerStep(NamedTuple):
    """One step of one attacker, for the log."""

    loss: Tensor
    last: bool


class _Attack(nn.Module):
    """The gradients of an attacker's cross-entropy, as a forward pass.

    Called with other weights, it has them in place during the backward pass too: gradient checkpointing computes there
    what it did not keep.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        images: Tensor,
        labels: Tensor,
        total: int,
        head: nn.Linear,
        leaves: list[Tensor],
        statistics: AbstractContextManager[Any],
        autocast: AbstractContextManager[Any],
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the sum of the cross-entropies over ``total`` (detached), and its gradients at ``leaves``.

        Args:
            images: Pixel values [N, 3, H, W].
            labels: [N].
            total: Images on all processes.
            head: The model's own head, in front of which the features are.
            leaves: The weights in place, and weight [K, D] and bias [K] of the attacker's head.
            statistics: Context that says what BatchNorm normalises with.
            autocast: Context of the forward pass.
        """
        with statistics, recorded_features(head) as features, autocast:
            self.model(pixel_values=images)
        logits = F.linear(features[-1].float(), *leaves[-2:])
        loss = F.cross_entropy(logits, labels) * (len(labels) / total)
        return loss.detach(), list(torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True))


def _summed(loss: Tensor, gradients: list[Tensor]) -> Callable[[], tuple[Tensor, list[Tensor]]]:
    """Begin to add up loss and gradients over all processes, in one message; what is returned waits for the sums."""
    if PartialState().num_processes == 1:
        return lambda: (loss, gradients)
    flat = torch.cat([loss.reshape(1), *(gradient.flatten() for gradient in gradients)])
    message = dist.all_reduce(flat, async_op=True)

    def wait() -> tuple[Tensor, list[Tensor]]:
        message.wait()
        total, *parts = flat.split([1, *(gradient.numel() for gradient in gradients)])
        return total[0], [part.view_as(gradient) for part, gradient in zip(parts, gradients, strict=True)]

    return wait


def _entropy(labels: np.ndarray) -> float:
    _, counts = np.unique(labels, return_counts=True)
    shares = counts / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def slot_domains(names: Sequence[str], slots: int, shares: Sequence[float] | None = None) -> list[str]:
    """Unauthorized domain that each slot attacks: one each, then whichever is furthest below its share.

    Args:
        names: Of the domains.
        slots: Number of simulated attackers, at least one per domain.
        shares: Of the domains; equal by default.
    """
    wanted = dict(zip(names, shares or [1.0] * len(names), strict=True))
    domains = list(names)
    while len(domains) < slots:
        domains.append(min(names, key=lambda name: (domains.count(name) + 1) / wanted[name]))
    return domains


class AttackerPool:
    """Simulated attackers of all unauthorized domains, in slots; a slot belongs to one domain.

    Memory: per attacker three copies of the encoder's trainable weights (offset and Adam's two moments) and, while it
    keeps the mask, one byte per prunable weight; for the defender another three (direction and Adam's moments). For a
    moment, two copies of the model when an informed attacker begins, and with several processes one of the weights per
    attacker. Cost per optimizer step: one pass forth and back on ``attacker_batch_size`` target images per attacker,
    shared out over the processes.

    Args:
        model: The encoder under protection, unwrapped.
        head_name: Dotted name of its head, which is not attacked: the attackers have their own.
        head: That head.
        labels: Labels [N] of every unauthorized domain, by name.
        options: Options that begin with ``attacker``; at least one attacker per domain.
        seed: Seed of all plans; the same on every rank.
        shares: Of the domains in the slots; equal by default.
        num_classes: Classes of every domain, with those that have no image; by default up to the largest label.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        head_name: str,
        head: nn.Linear,
        labels: Mapping[str, np.ndarray],
        options: ProtectionArguments,
        seed: int,
        shares: Sequence[float] | None = None,
        num_classes: Mapping[str, int] | None = None,
    ) -> None:
        self.model, self.head, self.options, self.seed = model, head, options, seed
        self.num_classes = num_classes or {name: int(values.max()) + 1 for name, values in labels.items()}
        self._domains = slot_domains(list(labels), options.attackers, shares)
        # Cross-entropy of somebody who knows how frequent the classes are and nothing else, in nats.
        self.chance = {name: _entropy(values) for name, values in labels.items()}
        self.weights = {
            name: parameter
            for name, parameter in model.named_parameters()
            if parameter.requires_grad and not name.startswith(f"{head_name}.")
        }
        # The learning rate comes with every step.
        self.optimizer = torch.optim.Adam(self.weights.values(), lr=torch.tensor(0.0), fused=True)
        self.push = [torch.zeros_like(weight) for weight in self.weights.values()]
        self.lives = [0] * options.attackers
        self.attackers: list[Attacker | None] = [None] * options.attackers
        self._attack = _Attack(model)
        self._has_batch_norm = has_batch_norm(model)
        # What stands in for the head of an encoder without one is nobody's to keep.
        self._head_classes = head.out_features if has_head(model, options.head_name) else None

    def domain(self, slot: int) -> str:
        """Name of the unauthorized domain that a slot attacks."""
        return self._domains[slot]

    def step(
        self,
        batches: Mapping[str, Sequence[tuple[Tensor, Tensor]]],
        masks: Callable[[], Mapping[str, Tensor]],
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> list[AttackerStep]:
        """Let every attacker take a step, and collect the defender's direction in :attr:`push`.

        Args:
            batches: Pixel values [N, 3, H, W] and labels [N] of every micro-batch on this process, by domain.
            masks: Gives the present boolean pruning mask by weight name, for attackers that are born now.
            autocast: Gives the context of a forward pass.

        Returns:
            One entry per attacker.
        """
        torch._foreach_zero_(self.push)
        steps = []
        attacks = (self._begin(slot, batches[self.domain(slot)], masks, autocast) for slot in range(len(self.lives)))
        # All messages are under way before the first is waited for: ranks compute different attackers meanwhile.
        for attack in attacks if PartialState().num_processes == 1 else list(attacks):
            if attack is None:
                continue
            slot, attacker, result = attack
            loss, gradients = result()
            # One that diverges stands still until its life ends: nothing of it reaches encoder, log or checkpoint.
            for gradient in gradients:
                gradient.nan_to_num_(0.0, 0.0, 0.0)
            loss = torch.where(loss.isfinite(), loss, self.chance[self.domain(slot)])
            # A newborn one only fits its head, unless it has kept the model's.
            if attacker.age >= self.options.attacker_patience or attacker.plan.keeps_head:
                # A factor instead of a branch: no wait for the device.
                denied = loss < self.chance[self.domain(slot)] - _MARGIN
                self._deny(attacker, gradients, denied)
            attacker.advance(gradients)
            steps.append(AttackerStep(loss, attacker.age >= attacker.plan.lifetime))
            if attacker.age >= attacker.plan.lifetime:
                self.attackers[slot] = None
                self.lives[slot] += 1
        return steps

    def _begin(
        self,
        slot: int,
        batches: Sequence[tuple[Tensor, Tensor]],
        masks: Callable[[], Mapping[str, Tensor]],
        autocast: Callable[[], AbstractContextManager[Any]],
    ) -> tuple[int, Attacker, Callable[[], tuple[Tensor, list[Tensor]]]] | None:
        """Compute a slot's gradients on this process and send them on their way; None where there are too few images.

        The last batch of an epoch may be too small for all slots.
        """
        own = [self._rows(slot, len(labels)) for _, labels in batches]
        total = sum(count for _, count in own)
        if not total or self._one_image_somewhere(slot, [len(labels) for _, labels in batches]):
            return None
        attacker = self._living(slot, masks)
        parts = [(images[rows], labels[rows]) for (images, labels), (rows, _) in zip(batches, own, strict=True)]
        images, labels = map(torch.cat, zip(*parts, strict=True))
        return slot, attacker, _summed(*self._gradients(attacker, images, labels, total, autocast))

    def _one_image_somewhere(self, slot: int, rows: Sequence[int]) -> bool:
        """Whether a process would have a single image, which BatchNorm cannot average; all processes agree.

        Args:
            slot: Attacker.
            rows: Images of its domain in every micro-batch of a process.
        """
        if not self._has_batch_norm:
            return False
        for process in range(PartialState().num_processes):
            parts = [self._rows(slot, size, process)[0] for size in rows]
            if sum(part.stop - part.start for part in parts) == 1:
                return True
        return False

    def check_shares(self, rows: int, micro_batches: int) -> None:
        """Check that whole batches leave no attacker without a step.

        Args:
            rows: Images of a domain in a micro-batch of a process.
            micro_batches: Micro-batches of an optimizer step.

        Raises:
            ValueError: If some attacker never had enough images for BatchNorm.
        """
        if any(self._one_image_somewhere(slot, [rows] * micro_batches) for slot in range(len(self.lives))):
            raise ValueError(
                f"{len(self.lives)} attackers share out {rows} images of each of {PartialState().num_processes} "
                "process(es) in a way that leaves one of them a single image on a process, which BatchNorm cannot "
                "average; needed: two at least. Change per_device_train_batch_size, attacker_batch_size or attackers."
            )

    def _rows(self, slot: int, rows: int, process: int | None = None) -> tuple[slice, int]:
        """Rows on this (or another) process that belong to a slot, and how many do on all, if every one has ``rows``.

        The attackers of a domain share the rows of all processes out among them, in order: which images an attacker
        gets does not depend on how many processes there are.
        """
        state, domain = PartialState(), self._domains[slot]
        places, place = self._domains.count(domain), self._domains[:slot].count(domain)
        size, longer = divmod(state.num_processes * rows, places)
        begin = place * size + min(place, longer)
        count = size + (place < longer)
        first = (state.process_index if process is None else process) * rows
        return slice(*(min(max(end - first, 0), rows) for end in (begin, begin + count))), count

    def _living(self, slot: int, masks: Callable[[], Mapping[str, Tensor]]) -> Attacker:
        attacker = self.attackers[slot]
        if attacker is None:
            attacker = self.attackers[slot] = self._born(slot, masks)
        return attacker

    def _new(self, slot: int) -> Attacker:
        """Return the present attacker of a slot, as it is before anything has moved it."""
        plan, classes = Plan.draw(self.options, self.seed, slot, self.lives[slot]), self.num_classes[self.domain(slot)]
        plan = plan._replace(keeps_head=plan.keeps_head and self._head_classes == classes)
        return Attacker(plan, self.weights, classes, self.head.in_features)

    @torch.no_grad()
    def _born(self, slot: int, masks: Callable[[], Mapping[str, Tensor]]) -> Attacker:
        attacker = self._new(slot)
        plan = attacker.plan
        if plan.keeps_head:
            for name, tensor in self.head.named_parameters():
                attacker.head[name].copy_(tensor)
        if plan.keeps_mask:
            attacker.masks = {name: mask.clone() for name, mask in masks().items()}
        if plan.start != "plain":
            changed = copy.deepcopy(self.model)
            devices = [self.head.weight.device] if self.head.weight.is_cuda else []
            with torch.random.fork_rng(devices):  # re-initialisation draws from the global generator
                for change in INFORMED[plan.start].changes:
                    for name, share in change(changed, plan.seed).items():
                        attacker.kept[name] = share * attacker.kept.get(name, 1.0)
                if plan.start == ZEROS:
                    attacker.followed = {name: mask.clone() for name, mask in masks().items()}
                    changes.regrow(changed, attacker.followed, plan.seed)
            starts = self._following(attacker)
            for (name, offset), start in zip(attacker.offsets.items(), starts, strict=True):
                offset.copy_(changed.get_parameter(name) - start)
        return attacker

    def _gradients(
        self,
        attacker: Attacker,
        images: Tensor,
        labels: Tensor,
        total: int,
        autocast: Callable[[], AbstractContextManager[Any]],
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the attacker's cross-entropy at its own weights, and the gradients of those and of its head.

        Both are this process's part of the mean over ``total`` images: 0 where it has none of them.
        """
        if not len(labels):
            return self.head.weight.new_zeros(()), [torch.zeros_like(tensor) for tensor in attacker.trained()]
        values = {f"model.{name}": value.requires_grad_() for name, value in self._values(attacker).items()}
        leaves = [*values.values(), *(tensor.detach().requires_grad_() for tensor in attacker.head.values())]
        statistics = fixed_batch_norms if attacker.plan.keeps_statistics else frozen_batch_norm_statistics
        arguments = (images, labels, total, self.head, leaves, statistics(self.model), autocast())
        loss, gradients = functional_call(self._attack, values, arguments)
        self._mask(gradients, attacker.masks)
        return loss, gradients

    @torch.no_grad()
    def _values(self, attacker: Attacker) -> dict[str, Tensor]:
        """Weights at which the attacker is, by name."""
        moved = self._following(attacker)
        torch._foreach_add_(moved, list(attacker.offsets.values()))
        self._mask(moved, attacker.masks)
        return dict(zip(self.weights, moved, strict=True))

    @torch.no_grad()
    def _following(self, attacker: Attacker) -> list[Tensor]:
        """Part of the present weights that the attacker follows: c W."""
        factors = [attacker.kept.get(name, 1.0) for name in self.weights]
        parts = list(torch._foreach_mul(list(self.weights.values()), factors))
        self._mask(parts, attacker.followed)
        return parts

    def _mask(self, tensors: Sequence[Tensor], masks: Mapping[str, Tensor]) -> None:
        """Multiply those of ``tensors``, which begin with one per weight, that have a mask by it, in place."""
        masked = [(tensor, masks[name]) for name, tensor in zip(self.weights, tensors, strict=False) if name in masks]
        if masked:
            torch._foreach_mul_(*map(list, zip(*masked, strict=True)))

    def _deny(self, attacker: Attacker, gradients: Sequence[Tensor], denied: Tensor) -> None:
        """Add the direction of W in which the attacker's loss rises, at length 1 (written as steps that descend)."""
        factors = [attacker.kept.get(name, 1.0) for name in self.weights]
        felt = list(torch._foreach_mul(list(gradients[: len(factors)]), factors))
        self._mask(felt, attacker.followed)
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(felt)))
        torch._foreach_sub_(self.push, torch._foreach_mul(felt, denied / norm.clamp_min(1e-6)))

    @torch.no_grad()
    def push_back(self, learning_rate: Tensor | float) -> None:
        """Move the encoder along :attr:`push` by a step of Adam; no step where no attacker had to be denied."""
        any_denied = torch.stack(torch._foreach_norm(self.push)).sum() > 0
        self.optimizer.param_groups[0]["lr"] = learning_rate * any_denied.float()
        for weight, push in zip(self.weights.values(), self.push, strict=True):
            weight.grad = push
        self.optimizer.step()

    # State

    def tensors(self) -> dict[str, Tensor]:
        """State tensors by name, for a checkpoint; with :meth:`scalars` they are the whole state."""
        living = {slot: attacker for slot, attacker in enumerate(self.attackers) if attacker is not None}
        state = {f"{slot}.{name}": t for slot, attacker in living.items() for name, t in attacker.tensors().items()}
        for name, weight in self.weights.items():
            state |= {f"adam.{key}.{name}": value for key, value in self.optimizer.state[weight].items()}
        return state

    def scalars(self) -> dict[str, Any]:
        """JSON part of the state."""
        return {
            "lives": self.lives,
            "ages": [None if attacker is None else attacker.age for attacker in self.attackers],
            "kept": [{} if attacker is None else attacker.kept for attacker in self.attackers],
        }

    def load(self, tensors: Mapping[str, Tensor], scalars: Mapping[str, Any]) -> None:
        """Restore what :meth:`tensors` and :meth:`scalars` gave."""
        self.lives = list(scalars["lives"])
        for slot, age in enumerate(scalars["ages"]):
            self.attackers[slot] = None
            if age is None:
                continue
            attacker = self._new(slot)
            attacker.age, attacker.kept = age, dict(scalars["kept"][slot])
            prefix = f"{slot}."
            saved = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
            device = next(iter(self.weights.values())).device
            attacker.masks, attacker.followed = (
                {name.removeprefix(kind): t.to(device) for name, t in saved.items() if name.startswith(kind)}
                for kind in ("mask.", "followed.")
            )
            for name, tensor in attacker.tensors().items():
                tensor.copy_(saved[name])
            self.attackers[slot] = attacker
        for name, weight in self.weights.items():
            moments = {key: tensors.get(f"adam.{key}.{name}") for key in ("step", "exp_avg", "exp_avg_sq")}
            self.optimizer.state[weight] = {
                key: value.clone().to(weight.device) for key, value in moments.items() if value is not None
            }
