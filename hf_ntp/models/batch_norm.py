"""BatchNorm: with whose statistics it normalises, and whose it keeps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm


def batch_norms(model: nn.Module) -> list[_BatchNorm]:
    """Layers that normalise with the statistics of a batch in training."""
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]


def has_batch_norm(model: nn.Module) -> bool:
    """Whether any layer keeps running statistics of its batches."""
    return bool(batch_norms(model))


def scale_free_weights(model: nn.Module) -> dict[str, Tensor]:
    """Convolution weights without bias that BatchNorm follows, by name: their length changes nothing in the output.

    By rule: the layer and the norm come one after the other among the children of one module.
    """
    found = {}
    for name, module in model.named_modules():
        children = list(module.named_children())
        for (child, layer), (_, after) in pairwise(children):
            if isinstance(layer, nn.Conv2d) and layer.bias is None and isinstance(after, _BatchNorm):
                found[f"{name}.{child}.weight".lstrip(".")] = layer.weight
    return found


@contextmanager
def frozen_batch_norm_statistics(model: nn.Module) -> Iterator[None]:
    """Normalise with batch statistics as in training, but leave the running statistics as they are.

    Unauthorized data must not leak into the statistics that the published model uses in eval mode.
    """
    tracking = [norm for norm in batch_norms(model) if norm.track_running_stats]
    for module in tracking:
        module.track_running_stats = False
    try:
        yield
    finally:
        for module in tracking:
            module.track_running_stats = True


@contextmanager
def fixed_batch_norms(model: nn.Module) -> Iterator[None]:
    """Normalise with the running statistics, as in evaluation, and leave them as they are."""
    training = [norm for norm in batch_norms(model) if norm.training]
    for norm in training:
        norm.eval()
    try:
        yield
    finally:
        for norm in training:
            norm.train()


def interleaved(parts: Sequence[Tensor]) -> Tensor:
    """Put parts of a batch together, [N, ...] each: the first row of every part, then the second, [N * parts, ...]."""
    return torch.stack(list(parts), 1).flatten(0, 1)


def parts_of(batch: Tensor, count: int) -> tuple[Tensor, ...]:
    """Take apart what :func:`interleaved` has put together."""
    return batch.unflatten(0, (-1, count)).unbind(1)


@contextmanager
def separate_batch_norms(norms: Sequence[_BatchNorm], images: int, parts: int) -> Iterator[None]:
    """Let BatchNorm normalise the parts of a batch each by itself; only the first moves the running statistics.

    One pass over several domains is then what a pass per domain would be, the later ones with statistics that stay as
    they are.

    Args:
        norms: Layers of a model (:func:`batch_norms`) that takes :func:`interleaved` batches inside the block.
        images: Images of every part.
        parts: Number of parts.
    """
    norms = norms if parts > 1 else ()
    before = [vars(norm).get("forward") for norm in norms]  # hooks of Accelerate lie there
    for norm in norms:
        vars(norm)["forward"] = partial(_apart, norm, norm.forward, images, parts)
    try:
        yield
    finally:
        for norm, forward in zip(norms, before, strict=True):
            del vars(norm)["forward"]
            if forward is not None:
                vars(norm)["forward"] = forward


def _apart(norm: _BatchNorm, forward: Callable[[Tensor], Tensor], images: int, parts: int, batch: Tensor) -> Tensor:
    own = getattr(forward, "__func__", None) is _BatchNorm.forward  # neither another kind of norm nor hooked
    plain = own and norm.training and norm.track_running_stats
    if plain and norm.momentum is not None and len(batch) == images * parts and batch.is_contiguous():
        return _side_by_side(norm, norm.momentum, parts, batch)
    # Tokens may have been put in the place of images, those of an image one after another.
    first, *others = (part.flatten(0, 1) for part in batch.unflatten(0, (images, parts, -1)).unbind(1))
    normalised = [forward(first)]
    # As in frozen_batch_norm_statistics, which would search for layers once per norm and step.
    tracks, norm.track_running_stats = norm.track_running_stats, False
    try:
        normalised += map(forward, others)
    finally:
        norm.track_running_stats = tracks
    return torch.stack([part.unflatten(0, (images, -1)) for part in normalised], 1).flatten(0, 2)


def _side_by_side(norm: _BatchNorm, momentum: float, parts: int, batch: Tensor) -> Tensor:
    """One call for all parts, which costs what one for the whole batch does, and no copy of it.

    As the images of the parts alternate, the channels of a row of them lie one after another in memory: to BatchNorm,
    they are the channels of one image.
    """
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert norm.num_batches_tracked is not None
    mean, variance = norm.running_mean.repeat(parts), norm.running_var.repeat(parts)
    scale, shift = (None if each is None else each.repeat(parts) for each in (norm.weight, norm.bias))
    rows = batch.unflatten(0, (-1, parts)).flatten(1, 2)
    rows = functional.batch_norm(rows, mean, variance, scale, shift, True, momentum, norm.eps)
    norm.running_mean.copy_(mean[: norm.num_features])
    norm.running_var.copy_(variance[: norm.num_features])
    norm.num_batches_tracked.add_(1)
    return rows.view_as(batch)
