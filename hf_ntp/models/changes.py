"""What somebody may change in a checkpoint before training it, to undo what protection did to it.

Functions of (model, seed), in place. They return how much of its old value a parameter still has, by name; parameters
that are not named have all of it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import PreTrainedModel

from .batch_norm import batch_norms
from .encoder import blocks_of, layer_weights, noted_prunable_weights
from .headless import EncoderWithHead

# Half of the old weights and half of fresh ones (Ash & Adams, 2020, "shrink and perturb").
_KEPT_SHARE = 0.5


def fresh_model(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """Return a randomly initialised model of the same architecture, on the same device."""
    torch.manual_seed(seed)
    fresh = model.fresh() if isinstance(model, EncoderWithHead) else type(model)(copy.deepcopy(model.config))
    # nn.Module.to, because from_pretrained-style wrappers restrict PreTrainedModel.to
    return nn.Module.to(fresh, model.device)


@torch.no_grad()
def _reinitialise(model: PreTrainedModel, names: Iterable[str], seed: int) -> dict[str, float]:
    fresh = fresh_model(model, seed).state_dict()
    own = model.state_dict(keep_vars=True)
    for name in names:
        own[name].data.copy_(fresh[name])
    return {name: 0.0 for name in names if isinstance(own[name], nn.Parameter)}


def _belongs(model: PreTrainedModel, module: str) -> list[str]:
    return [name for name in model.state_dict() if name.startswith(f"{module}.")]


def reset_norms(model: PreTrainedModel, seed: int) -> dict[str, float]:
    """Give every norm layer (layer, batch, group, root mean square) its initial scale, shift and statistics."""
    left: dict[str, float] = {}
    bare: list[str] = []
    for name, module in model.named_modules():
        # By the name of its class: norm layers have no common base class.
        if "norm" not in type(module).__name__.lower():
            continue
        own = [f"{name}.{parameter}" for parameter, _ in module.named_parameters(recurse=False)]
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
            left |= dict.fromkeys(own, 0.0)
        else:
            bare += own
    return left | (_reinitialise(model, bare, seed) if bare else {})


def keep_statistics(model: PreTrainedModel, seed: int) -> dict[str, float]:
    """Let BatchNorm normalise with the statistics that the checkpoint came with, in training too ("frozen")."""
    for norm in batch_norms(model):
        vars(norm)["forward"] = partial(_as_in_evaluation, norm)
    return {}


def _as_in_evaluation(norm: _BatchNorm, batch: Tensor) -> Tensor:
    return F.batch_norm(batch, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)


@torch.no_grad()
def renormalize(model: PreTrainedModel, seed: int) -> dict[str, float]:
    """Scale every linear and convolutional weight to the norm that a fresh one has: undoes rescaling tricks."""
    fresh = fresh_model(model, seed)
    left = {}
    for name in layer_weights(model):
        weight, length = model.get_parameter(name), fresh.get_parameter(name).norm()
        left[name] = float(length / weight.norm().clamp_min(1e-12))
        weight.mul_(left[name])
    return left


@torch.no_grad()
def shrink_and_perturb(model: PreTrainedModel, seed: int) -> dict[str, float]:
    """Move every weight halfway to a fresh initialisation."""
    fresh = dict(fresh_model(model, seed).named_parameters())
    for name, weight in model.named_parameters():
        weight.lerp_(fresh[name], 1 - _KEPT_SHARE)
    return {name: _KEPT_SHARE for name, _ in model.named_parameters()}


@torch.no_grad()
def regrow(model: PreTrainedModel, masks: Mapping[str, Tensor], seed: int) -> None:
    """Give every weight that a boolean mask (by name) leaves out the value that a fresh one has."""
    fresh = dict(fresh_model(model, seed).named_parameters())
    for name, mask in masks.items():
        weight = model.get_parameter(name)
        weight.copy_(torch.where(mask, weight, fresh[name]))


def regrow_zeros(model: PreTrainedModel, seed: int) -> dict[str, float]:
    """Give every pruned weight the value that a fresh one has."""
    regrow(model, {name: weight != 0 for name, weight in noted_prunable_weights(model).items()}, seed)
    return {}


def reinit_stem(model: PreTrainedModel, seed: int) -> dict[str, float]:
    """Re-initialise what comes before the first block: patch or stem convolution, position and class embeddings.

    Where nothing does, the stem is what the first block begins with.
    """
    first = blocks_of(model)[0]
    names = list(model.state_dict())
    start = next(i for i, name in enumerate(names) if name.startswith(f"{first}."))
    if start == 0:
        children = model.get_submodule(first).named_children()
        stem = next(name for name, child in children if any(True for _ in child.parameters()))
        return _reinitialise(model, _belongs(model, f"{first}.{stem}"), seed)
    # What belongs to later stages may come before the first block, too: patch embeddings of a PVT.
    home = first.rpartition(".")[0].rpartition(".")[0]
    beside = model.get_submodule(home).named_children()
    lists = {f"{home}.{name}".lstrip("."): len(part) for name, part in beside if isinstance(part, nn.ModuleList)}
    later = tuple(f"{name}.{i}." for name, size in lists.items() for i in range(1, size))
    return _reinitialise(model, [name for name in names[:start] if not name.startswith(later)], seed)


def reinit_first_block(model: PreTrainedModel, seed: int) -> dict[str, float]:
    """Re-initialise the first block (the first stage of a ConvNet)."""
    return _reinitialise(model, _belongs(model, blocks_of(model)[0]), seed)


def reinit_last_block(model: PreTrainedModel, seed: int) -> dict[str, float]:
    """Re-initialise the last block (the last stage of a ConvNet)."""
    return _reinitialise(model, _belongs(model, blocks_of(model)[-1]), seed)
