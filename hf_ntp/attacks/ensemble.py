"""Several small models as one: on an accelerator a step of all of them takes hardly longer than a step of one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.func import functional_call, vmap
from torch.nn import functional as F
from transformers import PreTrainedModel

from .attack import Loot


def joint_cross_entropy(
    models: Sequence[PreTrainedModel],
    loots: Sequence[Loot],
    batches: Callable[[], Sequence[Tensor]],
) -> Callable[[], Tensor]:
    """Return a function that gives the sum of every model's cross-entropy on its own next batch, for ever.

    The models' weights and buffers become slices of tensors that hold those of all models, and ``.grad`` of every
    weight a slice of theirs: optimizers of the models work as ever, as long as they leave ``.grad`` in place.

    Args:
        models: Of one architecture, on one device, without dropout.
        loots: What the attacker of each holds.
        batches: Gives the rows of every model's next batch in its own images: as many tensors [B] as models.

    Raises:
        RuntimeError: From the first call, if the model does something that `torch.func.vmap` cannot.
    """
    device = models[0].device
    for model in models:
        model.set_attn_implementation("eager")  # what is fused can be combined no further
    weights = {
        name: _side_by_side([m.get_parameter(name) for m in models]) for name, _ in models[0].named_parameters()
    }
    buffers = {name: _side_by_side([m.get_buffer(name) for m in models]) for name, _ in models[0].named_buffers()}
    # Fits of one size and seed hold the same images.
    held = {id(loot.images): loot for loot in loots}
    begins = dict(zip(held, [0, *torch.tensor([len(loot.labels) for loot in held.values()]).cumsum(0)], strict=False))
    images = torch.cat([loot.images for loot in held.values()]).to(device)
    labels = torch.cat([loot.labels for loot in held.values()]).to(device)

    def one(weights: dict[str, Tensor], buffers: dict[str, Tensor], images: Tensor, labels: Tensor) -> Tensor:
        outputs = functional_call(models[0], (weights, buffers), kwargs={"pixel_values": images})
        return F.cross_entropy(outputs.logits, labels)

    def loss() -> Tensor:
        rows = torch.stack([begins[id(loot.images)] + batch for loot, batch in zip(loots, batches(), strict=True)])
        rows = rows.to(device)
        return vmap(one)(weights, buffers, images[rows], labels[rows]).sum()

    return loss


def _side_by_side(tensors: Sequence[Tensor]) -> Tensor:
    """Stack tensors [...] of several models to [M, ...], of which they and their gradients become slices."""
    stacked = torch.stack([tensor.detach() for tensor in tensors])
    for tensor, part in zip(tensors, stacked, strict=True):
        tensor.data = part
    if tensors[0].requires_grad:
        stacked.requires_grad_()
        stacked.grad = torch.zeros_like(stacked)
        for tensor, part in zip(tensors, stacked.grad, strict=True):
            tensor.grad = part
    return stacked
