"""Merge a LoRA adapter into a protected model without filling its zeros."""

from __future__ import annotations

import re

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from .adapters import lora_base
from .encoder import noted_prunable_weights, notes_of
from .headless import with_head

# What adapters put between a layer and its weights, in the names of parameters.
_WRAPPERS = re.compile(r"\.(base_layer|original_module)(?=\.)")


def merge_lora(model: PeftModel) -> PreTrainedModel:
    """Merge the active LoRA adapter and set the pruned weights of the base model to zero again.

    The adapter's update is dense, so that plain ``merge_and_unload`` undoes the pruning. Here, what the update adds at
    pruned weights is dropped: the merged model answers somewhat differently from the model with the adapter. Modules
    that the adapter trained in full (``modules_to_save``, a new head for example) come along as they were trained,
    except that their prunable weights keep the zeros too.

    Args:
        model: A protected model with an adapter, as ``peft.get_peft_model`` or ``PeftModel.from_pretrained`` gives it.
            It is used up: the result holds its weights.

    Returns:
        The `transformers` model with exactly the zeros of the base model among its prunable weights; all of its
        parameters are trainable.

    Raises:
        TypeError: If ``model`` is no ``PeftModel`` around a `transformers` model.
        ValueError: If the adapter is no LoRA or is merged already, or the base model notes no pruning or has no zeros.
    """
    base = lora_base(model)
    notes = notes_of(base)
    if not notes:
        raise ValueError(
            "the base model's config has no ntp; needed: the notes of a protected model. Merge adapters of other "
            "models with merge_and_unload()."
        )
    zeros = _base_zeros(base)
    plain = model.merge_and_unload(safe_merge=True)
    plain.requires_grad_(True)
    # An encoder without a head is protected inside a model with one, whose parameters have longer names.
    names = {weight: name for name, weight in plain.named_parameters()}
    prunable = {names[weight]: weight for weight in noted_prunable_weights(with_head(plain)).values()}
    plain.requires_grad_(True)  # again: what has no part in the features of an encoder was frozen
    if not any(bool(zeros[name].any()) for name in prunable):
        raise ValueError(
            f"none of the base model's prunable weights is zero; needed: the sparsity that config.ntp notes {notes}. "
            "The base model was changed after it was loaded, or saved with a merged adapter: load the protected one."
        )
    with torch.no_grad():
        for name, weight in prunable.items():
            weight.masked_fill_(zeros[name].to(weight.device), 0)
    return plain


def _base_zeros(base: PreTrainedModel) -> dict[str, Tensor]:
    """Where the parameters of a model with adapters are zero, under the names that they have without adapters."""
    return {
        _WRAPPERS.sub("", name): parameter == 0
        for name, parameter in base.named_parameters()
        if ".modules_to_save." not in name
    }
