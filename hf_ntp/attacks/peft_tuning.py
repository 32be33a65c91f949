"""Parameter-efficient fine-tuning with the `peft` library: the weights stay, small trained adapters steer them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from peft import IA3Config, LoraConfig, PeftConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from ..models import heads_of, layers_with_weights, replace_head
from .attack import Attack, FineTuneProtocol, Loot, Predict
from .fine_tuning import cross_entropy_on, predictor, train

# Layers that all kinds of adapter know; LoRA and DoRA would also need a rank divisible by a convolution's groups.
_ADAPTABLE_MODULES = (nn.Linear, nn.Conv2d, nn.Conv3d)
# Adapters start at zero effect and only move a small factor of each weight, so the best rate lies above that of full
# fine-tuning, for LoRA about tenfold. The grid is log-spaced by about 3: this shifts it by one point.
_PEFT_RATE_FACTOR = 3.0
# Of the spread of a layer's weights: small beside every other channel.
_REVIVED = 1e-3


@dataclass(frozen=True)
class PeftTuning(Attack):
    """Train adapters on every linear and (ungrouped) convolutional layer of the encoder, and a fresh head in full.

    The checkpoint's own weights are frozen, its zeros included; LoRA and DoRA add a dense update on top of them.
    BatchNorm layers keep their scale and shift and follow the target in their running statistics.

    Args:
        kind: "lora" (Hu et al., 2022), "dora" (Liu et al., 2024: magnitude and direction apart) or "ia3"
            (Liu et al., 2022: one factor per output channel).
        rank: Of the updates of LoRA and DoRA.

    Raises:
        ValueError: For unknown kinds and ranks below one.
    """

    kind: str = "lora"
    rank: int = 8

    def __post_init__(self) -> None:
        """Check the values."""
        if self.kind not in ("lora", "dora", "ia3") or self.rank < 1:
            raise ValueError(f"{self} cannot run; needed: kind 'lora', 'dora' or 'ia3', and rank >= 1.")

    def grid(self, protocol: FineTuneProtocol) -> tuple[float, ...]:
        """Learning rates, three times higher than those of full fine-tuning."""
        return tuple(_PEFT_RATE_FACTOR * rate for rate in protocol.learning_rates)

    def unsuitable(self, model: PreTrainedModel, num_labels: int) -> str | None:
        """Say so where the encoder has no layer that takes an adapter."""
        return None if adaptable_modules(model) else "no linear or ungrouped convolutional layer takes an adapter"

    def fit(self, model: PreTrainedModel, loot: Loot, protocol: FineTuneProtocol, value: float, seed: int) -> Predict:
        """Train adapters and head at peak rate ``value``; see :class:`Attack`."""
        replace_head(model, loot.num_labels, torch.Generator().manual_seed(seed))
        torch.manual_seed(seed)  # adapters are drawn from the global generator
        modules = adaptable_modules(model)
        if self.kind == "dora":
            revive_dead_channels(model, modules)
        inject_adapter_in_model(self._config(modules), model)
        _keep_readable(model)
        for head in heads_of(model).values():
            head.requires_grad_(True)
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        loss = cross_entropy_on(model, loot.images, loot.labels, protocol.batch_size, seed)
        train(model, parameters, loss, protocol, value, seed)
        return predictor(model)

    def _config(self, modules: list[str]) -> PeftConfig:
        if self.kind == "ia3":
            # No feed-forward modules: their inputs would be scaled, which needs names that differ by architecture.
            return IA3Config(target_modules=modules, feedforward_modules=[])
        return LoraConfig(r=self.rank, lora_alpha=2 * self.rank, target_modules=modules, use_dora=self.kind == "dora")


def _keep_readable(model: PreTrainedModel) -> None:
    """Let a wrapped convolution still say how it moves: some models pad by it themselves (MobileNetV2)."""
    for module in model.modules():
        if isinstance(module, BaseTunerLayer) and isinstance(layer := module.get_base_layer(), nn.Conv2d):
            for name in ("stride", "kernel_size", "padding", "dilation"):
                setattr(module, name, getattr(layer, name))


@torch.no_grad()
def revive_dead_channels(model: PreTrainedModel, modules: list[str]) -> None:
    """Give output channels whose weights are all zero tiny random ones, drawn from the global generator.

    DoRA divides by the norm of every channel: one that was pruned altogether would make all outputs NaN, and no
    attacker stops at that.

    Args:
        model: Changed in place.
        modules: Dotted names of its layers.
    """
    for name in modules:
        weight: Any = model.get_submodule(name).weight
        dead = weight.flatten(1).norm(dim=1) == 0
        spread = float(weight.norm()) / weight.numel() ** 0.5 or 1.0
        weight[dead] = _REVIVED * spread * torch.randn_like(weight[dead])


def adaptable_modules(model: PreTrainedModel) -> list[str]:
    """Dotted names of the encoder's layers that take an adapter, by type; the stem is one of them, the head is not."""
    heads = heads_of(model)
    return [
        name
        for name, layer in layers_with_weights(model).items()
        if name not in heads and isinstance(layer, _ADAPTABLE_MODULES) and getattr(layer, "groups", 1) == 1
    ]
