"""Models that carry a LoRA adapter: what of them is protected, with the adapter merged or kept."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraModel, PeftModel
from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from .encoder import check_precision

# Initialisations that leave the weights of the base model alone; others change them again whenever it is loaded.
_INITS_BESIDE_THE_BASE = (True, False, "gaussian", "eva", "orthogonal")


def lora_base(model: nn.Module) -> PreTrainedModel:
    """Return the model around which a LoRA adapter is, with the adapter's layers inside.

    Raises:
        TypeError: If ``model`` is no ``PeftModel`` around a `transformers` model.
        ValueError: If the adapter is no LoRA, or merged already.
    """
    if not isinstance(model, PeftModel) or not isinstance(base := model.get_base_model(), PreTrainedModel):
        raise TypeError(
            f"the model is {type(model).__name__}; needed: a peft.PeftModel around a transformers model. Load the "
            "adapter with PeftModel.from_pretrained(base_model, adapter)."
        )
    if not isinstance(model.base_model, LoraModel):
        raise ValueError(
            f"the adapter is {model.active_peft_config.peft_type}; needed: LoRA. Put it into the weights with "
            "merge_and_unload(), where it has that, and protect what comes out."
        )
    if any(isinstance(module, BaseTunerLayer) and module.merged for module in model.modules()):
        raise ValueError(
            "the adapter is merged already; needed: base model and adapter apart. "
            "Load both anew and leave out merge_adapter()."
        )
    return base


def with_adapter(
    model: PreTrainedModel | PeftModel, choice: str | None, device: torch.device
) -> tuple[PreTrainedModel, list[Tensor]]:
    """Return the model to protect, where one may carry a LoRA adapter, and what is kept of the adapter.

    "merge" adds the adapter's update to the weights, all of which can be trained then; the adapter is used up.

    "keep" gives the base model under its ordinary names, with the adapter at work in its forward pass but no part of
    it: neither trained, nor pruned, nor saved, and without its dropout. Weights and buffers are those of ``model``,
    in place, so that ``model`` stays what it was, around other weights. All of them can be trained but those whose
    place a module that the adapter trained in full has taken (``modules_to_save``, a head for example): these stay.

    Args:
        model: Any model; one that carries no adapter is returned as it is.
        choice: "merge", "keep", or None where there is no adapter.
        device: Where ``model`` goes where its adapter is kept.

    Returns:
        The model, and tensors that tell one kept adapter from another.

    Raises:
        TypeError: If adapter layers were put into a model without a ``PeftModel`` around it.
        ValueError: If ``choice`` does not fit the model, or it cannot be done with this adapter.
    """
    if not isinstance(model, PeftModel) and not _tuner_layers(model):
        if choice is not None:
            raise ValueError(
                f"adapter is {choice!r} and the model, {type(model).__name__}, carries no adapter; needed: a "
                "peft.PeftModel. Leave the option out."
            )
        return model, []
    base = lora_base(model)
    if choice is None:
        raise ValueError(
            "the model carries a LoRA adapter; needed: what to do with it. Set adapter='merge' to protect the model "
            "that it makes of the base model, or adapter='keep' to protect the base model with the adapter beside it."
        )
    adapted: Any = model  # a PeftModel, whose attributes are those of several classes
    off = any(layer.disable_adapters for layer in _tuner_layers(model))
    if off or len(adapted.active_adapters) != 1:
        raise ValueError(
            f"the active adapters are {adapted.active_adapters}{', switched off' if off else ''}; needed: one, "
            "switched on. Choose it with set_adapter(name) and enable_adapter_layers() of the PeftModel's base_model."
        )
    if choice == "merge":
        return adapted.merge_and_unload(safe_merge=True).requires_grad_(True), []
    _check_keepable(adapted)
    check_precision(base)
    adapted.requires_grad_(False).to(device)
    return _with_adapter_beside(base, adapted.active_adapters[0])


def _tuner_layers(model: nn.Module) -> list[Any]:
    kinds = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    return [module for module in model.modules() if isinstance(module, kinds)]


def _check_keepable(model: PeftModel) -> None:
    """Raise ``ValueError`` for an adapter that is more than factors beside linear and convolutional layers."""
    config: Any = model.active_peft_config
    name, found = model.active_adapters[0], []
    if config.bias != "none":
        found.append(f"bias={config.bias!r}")
    if config.init_lora_weights not in _INITS_BESIDE_THE_BASE:
        found.append(f"init_lora_weights={config.init_lora_weights!r}")
    for layer in _tuner_layers(model):
        if type(layer) not in (lora.Linear, lora.Conv2d, ModulesToSaveWrapper):
            found.append(f"a layer {type(layer).__module__}.{type(layer).__name__}")
        elif name in getattr(layer, "lora_variant", ()) or getattr(layer, "use_dora", {}).get(name):
            found.append("a variant of LoRA, such as DoRA")
    if found:
        raise ValueError(
            f"adapter is 'keep' and the adapter has {found[0]}; needed: plain LoRA on linear and 2-d convolutional "
            "layers, which leaves everything else of the base model alone. Use adapter='merge'."
        )


def _with_adapter_beside(base: PreTrainedModel, name: str) -> tuple[PreTrainedModel, list[Tensor]]:
    """Return the base model without adapter layers, whose forward hooks do what these did, and their tensors."""
    model = _sharing_copy(base)
    kept: list[Tensor] = []
    replaced: list[nn.Module] = []
    for place, layer in list(model.named_modules()):
        if isinstance(layer, lora.LoraLayer):
            plain = layer.get_base_layer()
            if name in layer.lora_A:
                down, up, scaling = layer.lora_A[name], layer.lora_B[name], layer.scaling[name]
                plain.register_forward_hook(_add_update(down, up, scaling))
                kept += [*down.parameters(), *up.parameters(), torch.tensor(scaling)]
        elif isinstance(layer, ModulesToSaveWrapper):
            plain = layer.original_module
            if name in layer.modules_to_save:
                trained = layer.modules_to_save[name].eval()
                plain.register_forward_hook(_replace_output(trained), with_kwargs=True)
                kept += trained.state_dict().values()
                replaced.append(plain)
        else:
            continue
        model.set_submodule(place, plain)
    model.requires_grad_(True)
    for module in replaced:
        module.requires_grad_(False)
    return model, kept


def _sharing_copy(model: PreTrainedModel) -> PreTrainedModel:
    """Return modules of their own (hooks, modes, children) with the same parameters, buffers and configuration."""
    shared: list[Any] = [model.config]
    for module in model.modules():
        shared += [module._parameters, module._buffers]
    return copy.deepcopy(model, {id(part): part for part in shared})


# Copies of a model (a teacher, a simulated attacker's) share the adapter: deepcopy leaves functions alone.


def _add_update(down: nn.Module, up: nn.Module, scaling: float) -> Callable[..., Tensor]:
    def hook(layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return output + up(down(args[0])) * scaling

    return hook


def _replace_output(trained: nn.Module) -> Callable[..., Any]:
    def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        return trained(*args, **kwargs)

    return hook
