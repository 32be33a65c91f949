"""Several small models as one: on an accelerator a step of all of them takes hardly longer than a step of one."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, vmap
from torch.nn import functional as F
from transformers import PreTrainedModel

from .attack import Loot


class Ensemble:
    """Models whose weights are slices of common tensors [M, ...]: what is done to these is done to all models.

    Args:
        models: Of one architecture, on one device, without dropout. Their weights and buffers become slices.
        loots: What the attacker of each holds.

    Raises:
        RuntimeError: If a model differs in shape from the others.
    """

    def __init__(self, models: Sequence[PreTrainedModel], loots: Sequence[Loot]) -> None:
        for model in models:
            model.set_attn_implementation("eager")  # what is fused can be combined no further
        self._model, self._loots = models[0], loots
        self._weights = {
            name: _side_by_side([model.get_parameter(name) for model in models])
            for name, _ in models[0].named_parameters()
        }
        self._buffers = {
            name: _side_by_side([model.get_buffer(name) for model in models]) for name, _ in models[0].named_buffers()
        }
        # Fits of one size and seed hold the same images.
        held = {id(loot.images): loot for loot in loots}
        ends = torch.tensor([len(loot.labels) for loot in held.values()]).cumsum(0).tolist()
        self._begins = dict(zip(held, [0, *ends], strict=False))
        device = models[0].device
        self._images = torch.cat([loot.images for loot in held.values()]).to(device)
        self._labels = torch.cat([loot.labels for loot in held.values()]).to(device)

    def parameter_groups(self, rates: Sequence[float]) -> list[dict[str, Any]]:
        """Groups for an optimizer, one for every run of equal rates: slices of what is trained, ``.grad`` included.

        Args:
            rates: Learning rate of every model.
        """
        groups, begin = [], 0
        for rate, run in groupby(rates):
            end = begin + len(list(run))
            parts = []
            for weight in self._weights.values():
                if weight.requires_grad:
                    part = weight.detach()[begin:end].requires_grad_()
                    assert weight.grad is not None
                    part.grad = weight.grad[begin:end]
                    parts.append(part)
            groups.append({"params": parts, "lr": rate})
            begin = end
        return groups

    def loss(self, batches: Sequence[Tensor]) -> Tensor:
        """Sum over the models of every one's cross-entropy on its own batch.

        Args:
            batches: Rows of every model's batch in its own images, as many tensors [B] as models. Where their lengths
                differ, rows of no weight are added, which BatchNorm would see.

        Raises:
            RuntimeError: If the model does something that `torch.func.vmap` cannot.
        """
        longest = max(map(len, batches))
        rows = torch.zeros(len(batches), longest, dtype=torch.long)
        shares = torch.zeros(len(batches), longest)
        for i, (loot, batch) in enumerate(zip(self._loots, batches, strict=True)):
            rows[i, : len(batch)] = self._begins[id(loot.images)] + batch
            shares[i, : len(batch)] = 1 / len(batch)
        rows, shares = rows.to(self._images.device), shares.to(self._images.device)
        return vmap(self._one)(self._weights, self._buffers, self._images[rows], self._labels[rows], shares).sum()

    def _one(
        self, weights: dict[str, Tensor], buffers: dict[str, Tensor], images: Tensor, labels: Tensor, shares: Tensor
    ) -> Tensor:
        outputs = functional_call(self._model, (weights, buffers), kwargs={"pixel_values": images})
        return (shares * F.cross_entropy(outputs.logits, labels, reduction="none")).sum()


def _side_by_side(tensors: Sequence[Tensor]) -> Tensor:
    """Stack tensors [...] of several models to [M, ...], of which they become slices."""
    stacked = torch.stack([tensor.detach() for tensor in tensors])
    for tensor, part in zip(tensors, stacked, strict=True):
        tensor.data = part
    if tensors[0].requires_grad:
        stacked.requires_grad_()
        stacked.grad = torch.zeros_like(stacked)
    return stacked
