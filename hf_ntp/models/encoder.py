"""What the library needs to know of a `transformers` vision model: its head, its features, its prunable weights.

Rules instead of a table of architectures; a model that the rules do not fit gets an error that says what to name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import PreTrainedConfig, PreTrainedModel

from .sharding import whole

_WEIGHT_MODULES = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def notes_of(model: PreTrainedModel) -> Mapping[str, Any]:
    """Return what a protected checkpoint notes of its pruning in ``config.ntp``; nothing for any other."""
    return getattr(model.config, "ntp", None) or {}


def find_head(model: PreTrainedModel, head_name: str | None = None) -> tuple[str, nn.Linear]:
    """Find the classification head: the ``nn.Linear`` outside the base model with ``num_labels`` outputs.

    Of several alike, such as that for distillation of a DeiT beside its own, it is the first.

    Args:
        model: Any model with an image-classification head.
        head_name: Dotted module name, where the rule is ambiguous; default what ``config.ntp`` says, if anything.

    Returns:
        The head's dotted name and module.

    Raises:
        ValueError: If there is no such layer, or several that differ.
    """
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    head_name = head_name or notes_of(model).get("head_name")
    if head_name is not None:
        if head_name not in linears:
            raise ValueError(
                f"head_name is {head_name!r}; needed: the dotted name of an nn.Linear of {type(model).__name__}. "
                f"The last ones are {list(linears)[-5:]}."
            )
        return head_name, linears[head_name]
    body = f"{model.base_model_prefix}."
    heads = [
        name
        for name, module in linears.items()
        if module.out_features == model.config.num_labels and not name.startswith(body)
    ]
    shapes = {(linears[name].in_features, linears[name].out_features) for name in heads}
    # Of several alike, the first is what counts: see heads_of. A square one may be any layer.
    if len(shapes) != 1 or (len(heads) > 1 and len(set(*shapes)) == 1):
        raise ValueError(
            f"{type(model).__name__} has {len(heads)} linear layers with num_labels={model.config.num_labels} outputs "
            f"outside its base model ({heads}); needed: exactly one classification head. Load the checkpoint with "
            "AutoModelForImageClassification, or name the layer with head_name."
        )
    return heads[0], linears[heads[0]]


def heads_of(model: PreTrainedModel, head_name: str | None = None) -> dict[str, nn.Linear]:
    """Heads by name: the one of :func:`find_head`, and others beside it, such as the one for distillation of a DeiT.

    Args:
        model: Any model that :func:`find_head` understands.
        head_name: See :func:`find_head`.
    """
    first, head = find_head(model, head_name)
    body = f"{model.base_model_prefix}."
    if not hasattr(model, model.base_model_prefix) or first.startswith(body):
        return {first: head}
    beside = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and not name.startswith(body)
        and (module.in_features, module.out_features) == (head.in_features, head.out_features)
    }
    return {first: head, **beside}


def class_names(config: PreTrainedConfig) -> list[str] | None:
    """Names of a model's classes in the order of its outputs; None where ``id2label`` has placeholders ("LABEL_0")."""
    labels: dict[Any, str] = config.id2label or {}
    names = [str(labels.get(i)) for i in range(len(labels))]
    return None if names == [f"LABEL_{i}" for i in range(len(names))] else names


def replace_head(
    model: PreTrainedModel,
    labels: int | Sequence[str],
    generator: torch.Generator | None = None,
    head_name: str | None = None,
) -> None:
    """Put a fresh linear head on the encoder, in place, or several where it has them.

    Weights are drawn from N(0, initializer_range), as `transformers` does; the bias is zero.

    Args:
        model: Any model that :func:`find_head` understands.
        labels: Number or names of the classes of the new task.
        generator: Source of randomness, for reproducible heads.
        head_name: See :func:`find_head`.
    """
    num_labels = labels if isinstance(labels, int) else len(labels)
    for name, old in heads_of(model, head_name).items():
        model.set_submodule(name, fresh_head(old.in_features, num_labels, model, generator))
    model.config.num_labels = num_labels
    setattr(model, "num_labels", num_labels)  # noqa: B010 (models keep a copy that nn.Module does not declare)
    if not isinstance(labels, int):
        model.config.id2label = dict(enumerate(labels))
        model.config.label2id = {label: i for i, label in enumerate(labels)}


def fresh_head(
    in_features: int, num_labels: int, model: PreTrainedModel, generator: torch.Generator | None = None
) -> nn.Linear:
    """Return a linear head with a model's own spread of initial weights, on its device and in its precision."""
    # Drawn on the CPU, where the generator is: a seed gives the same head on every device.
    head = nn.Linear(in_features, num_labels, dtype=model.dtype)
    nn.init.normal_(head.weight, std=getattr(model.config, "initializer_range", 0.02), generator=generator)
    nn.init.zeros_(head.bias)
    return head.to(model.device)


def check_precision(model: PreTrainedModel) -> None:
    """Raise ``ValueError`` for half-precision weights: small updates and the ADMM penalty would round away."""
    if found := {str(p.dtype) for p in model.parameters() if p.dtype in (torch.float16, torch.bfloat16)}:
        raise ValueError(
            f"the model's weights are {', '.join(sorted(found))}; needed: float32. Load it with dtype=torch.float32; "
            "for speed, set bf16=True in NTPConfig: the computation is then in bfloat16 and the weights stay exact."
        )


def prunable_weights(
    model: PreTrainedModel,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    head_name: str | None = None,
) -> dict[str, nn.Parameter]:
    """Weights that pruning may touch: those of linear and convolutional layers of the encoder.

    Biases, norms, embeddings (any module with "embed" in its name, a ConvNet's stem included) and the head stay dense
    unless ``include`` names them.

    Args:
        model: Any model that :func:`find_head` understands.
        include: Regular expressions; parameters whose name matches (``re.search``) are pruned as well.
        exclude: Regular expressions; parameters whose name matches are not pruned, whatever the rest says.
        head_name: See :func:`find_head`.

    Returns:
        Parameters by name, in the model's order.

    Raises:
        ValueError: If nothing is left to prune.
    """
    heads = heads_of(model, head_name)
    default = {name for name in layer_weights(model) if "embed" not in name and name.rpartition(".")[0] not in heads}
    chosen = {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
        and (name in default or any(re.search(pattern, name) for pattern in include))
        and not any(re.search(pattern, name) for pattern in exclude)
    }
    if not chosen:
        raise ValueError(
            f"{type(model).__name__} has no prunable weight left (include={list(include)}, exclude={list(exclude)}); "
            "needed: trainable linear or convolutional layers in the encoder. Loosen prune_exclude or unfreeze layers."
        )
    return chosen


def layers_with_weights(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Every linear and convolutional layer by dotted name, stem and head included, whatever the checkpoint notes."""
    return {name: module for name, module in model.named_modules() if isinstance(module, _WEIGHT_MODULES)}


def layer_weights(model: PreTrainedModel) -> list[str]:
    """Names of the weights of these layers, and of the projections that an `nn.MultiheadAttention` holds itself."""
    return [
        f"{name}.{own}"
        for name, module in model.named_modules()
        for own, _ in module.named_parameters(recurse=False)
        if (isinstance(module, _WEIGHT_MODULES) and own == "weight")
        or (isinstance(module, nn.MultiheadAttention) and own.endswith("proj_weight"))
    ]


def noted_prunable_weights(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """Prunable weights by the patterns that a protected checkpoint notes in ``config.ntp``; by rule for any other."""
    notes = notes_of(model)
    return prunable_weights(model, notes.get("prune_include") or (), notes.get("prune_exclude") or ())


def blocks_of(model: PreTrainedModel) -> list[str]:
    """Dotted names of the encoder's blocks (a transformer's layers, a ConvNet's stages), from input to output.

    A list some of whose entries have no parameters is not one of blocks.

    Raises:
        ValueError: If the encoder has no list of blocks.
    """
    body = getattr(model, "body_name", "")  # beside an encoder there may be a decoder, or one of texts
    lists = [
        (name.count("."), -len(module), name)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) > 1
        and name.startswith(body)
        and all(any(True for _ in block.parameters()) for block in module)
    ]
    if not lists:
        raise ValueError(
            f"{type(model).__name__} has no nn.ModuleList with two or more blocks; needed: an encoder made of blocks. "
            "Leave out the attacks that re-initialise blocks (in training: attacker_informed=0)."
        )
    _, size, name = min(lists)  # the outermost list, the longest of several
    return [f"{name}.{i}" for i in range(-size)]


def zero_fraction(weights: Sequence[Tensor]) -> float:
    """Sparsity: the share of exact zeros among all entries of ``weights``, which may be shards."""
    zeros = sum(int(whole((weight == 0).sum())) for weight in weights)
    return zeros / sum(weight.numel() for weight in weights)


@contextmanager
def recorded_features(head: nn.Module) -> Iterator[list[Tensor]]:
    """Give a list that receives what enters the classification head, [N, D], differentiable.

    A forward pre-hook on the head gives the pooled features of any architecture without knowing its pooling. The hook
    lives as long as the block: nothing stays on the user's model.
    """
    features: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda module, args: features.append(args[0]))
    try:
        yield features
    finally:
        handle.remove()


@torch.no_grad()
def features_and_logits(
    model: PreTrainedModel, images: Tensor, batch_size: int = 256, head: nn.Module | None = None
) -> tuple[Tensor, Tensor]:
    """Features [N, D] that enter the head, and logits [N, K], for pixel values [N, 3, H, W]; on the model's device.

    Computed in eval mode (no dropout, running statistics of BatchNorm); the model's own mode is given back.

    Args:
        model: With a head.
        images: Pixel values, on any device.
        batch_size: Images per forward pass.
        head: Default what :func:`find_head` finds.
    """
    training = model.training
    model.eval()
    with recorded_features(head or find_head(model)[1]) as features:
        logits = [model(pixel_values=batch.to(model.device)).logits for batch in images.split(batch_size)]
    model.train(training)
    return torch.cat(features), torch.cat(logits)


def stage_tokens(hidden_states: Sequence[Tensor] | None, blocks: int = 0) -> tuple[Tensor, ...]:
    """Output of every block as [N, T, D]: the tokens of a transformer, or the positions of a feature map [N, D, H, W].

    Args:
        hidden_states: What a model returns with ``output_hidden_states=True``; the first one, the embeddings, is
            left out, where there is one more than there are blocks.
        blocks: Number of blocks; 0 where it is not known.

    Raises:
        ValueError: If the model returns none.
    """
    if not hidden_states:
        raise ValueError(
            "the model returns no hidden_states; needed: the output of every block. Use fisher_level='pooled' and "
            "collapse_weight=0, or a model that supports output_hidden_states=True."
        )
    states = hidden_states[1:] if len(hidden_states) > blocks else hidden_states
    return tuple(state.flatten(2).mT if state.dim() == 4 else state for state in states)


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Let no gradient reach the parameters of a module."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    module.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_()


@contextmanager
def without_randomness(model: nn.Module) -> Iterator[None]:
    """Let a model in training draw nothing at random: no dropout, no dropped paths, no shifted positions (DINOv3).

    BatchNorm goes on as in training, and so does gradient checkpointing, which asks the blocks for their mode.
    """
    random = [
        module
        for module in model.modules()
        if module.training and not isinstance(module, _BatchNorm) and not hasattr(module, "gradient_checkpointing")
    ]
    for module in random:
        module.training = False
    try:
        yield
    finally:
        for module in random:
            module.training = True


class LiveWeights(NamedTuple):
    """How much of the pruning is real: weights that get no gradient cost nothing to remove."""

    fraction: float
    """Share of the prunable weights that get any gradient."""
    sparsity: float
    """Share of zeros among those."""


def live_weights(
    model: PreTrainedModel, weights: Mapping[str, nn.Parameter], batches: Iterable[Mapping[str, Tensor]]
) -> LiveWeights:
    """Sparsity over the weights that receive a gradient of the classification loss, in eval mode.

    Where batches have no labels, the gradient is that of a head's output, a projection of the features.

    A 3x3 kernel that only ever sees a 1x1 map, for example, has eight weights that never get a gradient.

    Args:
        model: Model with a classification head.
        weights: Prunable weights, as :func:`prunable_weights` gives them.
        batches: "pixel_values" and "labels", if any; a few hundred images are enough. Gradients are left empty.
    """
    model.zero_grad(set_to_none=True)
    for batch in batches:
        model.train().eval()  # LeViT keeps in evaluation what it has computed, with its graph, until it is trained
        logits = model(pixel_values=batch["pixel_values"].to(model.device)).logits
        labels = batch.get("labels")
        (logits.sum() if labels is None else functional.cross_entropy(logits, labels.to(model.device))).backward()
    live = zeros = total = 0
    for weight in weights.values():
        total += weight.numel()
        if weight.grad is not None:
            alive = weight.grad != 0
            live += int(alive.sum())
            zeros += int((alive & (weight == 0)).sum())
    model.zero_grad(set_to_none=True)
    return LiveWeights(live / total, zeros / max(live, 1))
