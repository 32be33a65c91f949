"""Encoders without a classification head: pooled features by rule, and a linear head on them for whoever needs one.

Rules instead of a table of architectures; a model that the rules do not fit gets an error that says what to name.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.utils import CONFIG_NAME, cached_file, extract_commit_hash

from .encoder import fresh_head, heads_of, notes_of

_CLASSIFIER = "ForImageClassification"
# "ViTMAEForPreTraining" is a task around an encoder, "PoolFormerModel" is an encoder.
_TASK = re.compile(r"For[A-Z]")
_CLASS_TOKENS = ("cls_token", "class_token", "class_embedding")
# Where a config says nothing: enough for every ConvNet, whose features do not depend on the size.
_USUAL_SIZE = 64


def has_head(model: PreTrainedModel, head_name: str | None = None) -> bool:
    """Whether a model comes with a classification head: by the name of its class, else by a forward with labels.

    Args:
        model: Any model.
        head_name: Dotted name of a head, where the user or ``config.ntp`` has named one.
    """
    if isinstance(model, EncoderWithHead):
        return False
    name = type(model).__name__
    if head_name or notes_of(model).get("head_name") or _CLASSIFIER in name:
        return True
    return not _TASK.search(name) and "labels" in inspect.signature(model.forward).parameters


def with_head(
    model: PreTrainedModel, head_name: str | None = None, encoder_name: str | None = None
) -> PreTrainedModel:
    """Return the model itself where it has a head, else the same weights with a linear head on the pooled features."""
    if isinstance(model, EncoderWithHead) or has_head(model, head_name):
        return model
    return EncoderWithHead(model, encoder_name)


def plain_model(model: PreTrainedModel) -> PreTrainedModel:
    """Return what is saved of a model: the encoder without the head that :func:`with_head` put on it."""
    return model.encoder if isinstance(model, EncoderWithHead) else model


def load_model(
    checkpoint: str,
    head_name: str | None = None,
    encoder_name: str | None = None,
    random_init: bool = False,
    revision: str | None = None,
) -> PreTrainedModel:
    """Load a checkpoint in float32 as the class that it names, with a head where it has none.

    Args:
        checkpoint: Folder or Hub id.
        head_name: See :func:`~hf_ntp.models.find_head`.
        encoder_name: See :class:`EncoderWithHead`.
        random_init: Draw the weights from the global generator instead of loading them.
        revision: Branch, tag or commit on the Hub.
    """
    config = AutoConfig.from_pretrained(checkpoint, revision=revision)
    kind: Any = _class_of(config)
    if not random_init:
        options: Any = {"revision": revision, "dtype": torch.float32}
        with readable(checkpoint):
            model, report = kind.from_pretrained(checkpoint, output_loading_info=True, **options)
        # Where nothing but the type of the model says that there is a head, there may be none.
        guessed = kind is AutoModelForImageClassification and _CLASSIFIER not in str(config.architectures)
        if guessed and lacks_head(model, report["missing_keys"], head_name):
            model = AutoModel.from_pretrained(checkpoint, **options)
    elif hasattr(kind, "from_config"):
        model = kind.from_config(config, dtype=torch.float32)
    else:
        model = untrained(kind, config).float()
    return with_head(model, head_name, encoder_name)


def lacks_head(model: PreTrainedModel, missing_keys: Iterable[str], head_name: str | None = None) -> bool:
    """Whether a head was not in the checkpoint that a model was loaded from, and is random, by what was missing."""
    heads = heads_of(model, head_name)
    return any(key.rpartition(".")[0] in heads for key in missing_keys)


@contextmanager
def readable(checkpoint: str) -> Iterator[None]:
    """Say which checkpoint it is whose weights turn out to be unreadable.

    Raises:
        ValueError: Instead of what safetensors raises, which names neither.
    """
    try:
        yield
    except SafetensorError as error:
        raise ValueError(
            f"the weights of {checkpoint} cannot be read ({error}); needed: whole files. They may be cut off, or "
            "pointers of Git LFS in their place: download them again."
        ) from error


def hub_id(checkpoint: str | None) -> str | None:
    """Return what a checkpoint was loaded by, where that is an id of the Hub: not a path, and not nothing.

    A relative path that is gone reads like an id: ask while it is there.
    """
    if not checkpoint or Path(checkpoint).exists():
        return None
    try:
        validate_repo_id(checkpoint)
    except HFValidationError:
        return None
    return checkpoint


def hub_commit(checkpoint: str, revision: str | None = None) -> str | None:
    """Commit on the Hub of a checkpoint that was loaded by id; None for a folder.

    Args:
        checkpoint: Folder or Hub id.
        revision: Branch, tag or commit it was loaded by.
    """
    if hub_id(checkpoint) is None:
        return None
    return extract_commit_hash(cached_file(checkpoint, CONFIG_NAME, revision=revision), None)


def untrained(kind: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """Return a model with weights drawn from the global generator.

    Releases of transformers 5 leave the fixed positions (sine and cosine) of a ViTMAE at zero where it is not loaded
    from a checkpoint: it would never know where a patch is, and be a weaker scratch baseline than it should. They are
    filled in here.

    Args:
        kind: Class of the model.
        config: Its configuration; not copied.
    """
    model: Any = kind(config)
    parts: Mapping[str, Any] = {type(module).__name__: module for module in model.modules()}
    embeddings, decoder = parts.get("ViTMAEEmbeddings"), parts.get("ViTMAEDecoder")
    if embeddings is not None and _all_zero(embeddings.position_embeddings):
        embeddings.patch_embeddings.projection._is_hf_initialized = False  # what made it skip them
        embeddings.initialize_weights()
    if decoder is not None and _all_zero(decoder.decoder_pos_embed):
        decoder.initialize_weights(decoder.decoder_pos_embed.shape[1] - 1)
    return model


def _all_zero(tensor: Tensor) -> bool:
    """Whether a tensor holds zeros alone; one without values holds none."""
    return not tensor.is_meta and not tensor.any()


def _class_of(config: PreTrainedConfig) -> type:
    name = (config.architectures or [_CLASSIFIER])[0]
    own = None if _CLASSIFIER in name else getattr(transformers, name, None)
    if own is not None:
        return own
    # The usual way for classifiers, for configs that name nothing, and for classes that only their authors have.
    known = type(config) in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING
    return AutoModelForImageClassification if known else AutoModel


def pooled_features(outputs: Mapping[str, Any], pooler: bool = True, class_token: bool = False) -> Tensor:
    """Pooled features [N, D] of what a vision encoder returns.

    The first of these that there is:

    1. ``image_embeds``: a projection that the encoder was trained through (CLIP with projection).
    2. ``pooler_output``, flattened: CLIP, SigLIP, DINOv2, DINOv3, ConvNeXt, ResNet, Swin, ...
    3. The class token beside the mean of the other tokens, as DINOv2's classification head takes them: ViT, MSN, MAE.
       Which of the two was trained differs between checkpoints of one architecture.
    4. The mean over tokens or positions: I-JEPA.

    Args:
        outputs: By name; ``last_hidden_state`` is [N, T, D] or [N, D, H, W].
        pooler: Whether ``pooler_output`` may be used.
        class_token: Whether the first token is a class token.

    Raises:
        KeyError: If none of them is there.
    """
    embeds, pooled = outputs.get("image_embeds"), outputs.get("pooler_output")
    if embeds is not None:
        return embeds
    if pooler and pooled is not None:
        return pooled.flatten(1)
    tokens = outputs["last_hidden_state"]
    if tokens.dim() == 4:
        tokens = tokens.flatten(2).mT
    if class_token:
        return torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], -1)
    return tokens.mean(1)


@contextmanager
def _unmasked(body: nn.Module, images: Tensor) -> Iterator[dict[str, Tensor]]:
    """Let a masked autoencoder see every patch, in order; gives what else its forward takes. The config stays."""
    config: Any = getattr(body, "config", None)
    if not hasattr(config, "mask_ratio") or "noise" not in inspect.signature(body.forward).parameters:
        yield {}
        return
    published, config.mask_ratio = config.mask_ratio, 0.0
    try:
        # Patches are shuffled in the order of the noise: this one leaves them where they are.
        yield {"noise": torch.arange(_patches(config, images), device=images.device).float().expand(len(images), -1)}
    finally:
        config.mask_ratio = published


def _patches(config: Any, images: Tensor) -> int:
    patch = config.patch_size if isinstance(config.patch_size, int) else config.patch_size[0]
    return (images.shape[-2] // patch) * (images.shape[-1] // patch)


def reconstructs(encoder: nn.Module) -> bool:
    """Whether a model is a masked autoencoder with its decoder: its forward takes noise and gives a loss."""
    parameters = inspect.signature(encoder.forward).parameters
    return bool(_TASK.search(type(encoder).__name__)) and {"noise", "pixel_values"} <= parameters.keys()


def mask_noise(encoder: nn.Module, images: Tensor, seed: int) -> Tensor:
    """Noise [N, patches] that decides which patches a masked autoencoder hides; equal for equal seeds."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(len(images), _patches(encoder.config, images), generator=generator).to(images.device)


class EncoderWithHead(PreTrainedModel):
    """An encoder without a head, and a linear head on its pooled features: what the rest of the library works on.

    The head is fixed, frozen and never saved: training looks at what enters it, and attackers bring their own.
    Parameters that have no part in the pooled features (a decoder, an unused pooler, a text tower) are frozen.

    Args:
        encoder: Any vision model of `transformers`; kept, not copied.
        encoder_name: Dotted name of the module inside it that turns pixel values into features, where the rule (the
            model itself; its base model, where it is a task such as pre-training) does not fit. Default what
            ``config.ntp`` says, if anything.

    Raises:
        ValueError: If no features come out.
    """

    base_model_prefix = "encoder"
    main_input_name = "pixel_values"
    # Attention is the encoder's own: whatever it has chosen is fine here.
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(self, encoder: PreTrainedModel, encoder_name: str | None = None) -> None:
        super().__init__(encoder.config)
        self.encoder = encoder
        self.encoder_name = encoder_name or notes_of(encoder).get("encoder_name")
        self.body_name = self._find_body()
        self.supports_gradient_checkpointing = encoder.supports_gradient_checkpointing
        self._no_split_modules = encoder._no_split_modules
        body = self.get_submodule(self.body_name)
        # Dense poolers (ViT, DeiT) are missing in many checkpoints, and drawn at random when these are loaded.
        self._pooler = not any(
            name.rpartition(".")[2] == "pooler" and any(isinstance(part, nn.Linear) for part in module.modules())
            for name, module in body.named_modules()
        )
        self._class_token = any(name.rpartition(".")[2] in _CLASS_TOKENS for name, _ in body.named_parameters())
        self.head = fresh_head(self._probe(), self.config.num_labels or 0, encoder, torch.Generator().manual_seed(0))
        self.head.requires_grad_(False)

    def _find_body(self) -> str:
        if self.encoder_name is not None:
            names = [name for name, _ in self.encoder.named_modules() if name]
            if self.encoder_name not in names:
                raise ValueError(
                    f"encoder_name is {self.encoder_name!r}; needed: the dotted name of a module of "
                    f"{type(self.encoder).__name__} that takes pixel_values, such as one of {names[:5]}."
                )
            return f"encoder.{self.encoder_name}"
        task = _TASK.search(type(self.encoder).__name__)
        body = self.encoder.base_model if task else self.encoder
        towers = dict(self.encoder.named_children())
        if {"text_model", "vision_model"} <= towers.keys():  # CLIP, SigLIP
            body = towers["vision_model"]
        return next(name for name, module in self.named_modules() if module is body)

    def _probe(self) -> int:
        """Try the encoder on an empty image, freeze what has no part in its features, and return their width."""
        training = self.encoder.training
        self.encoder.eval()
        parameters = {n: p for n, p in self.encoder.named_parameters() if p.is_floating_point()}
        trained = [parameter.requires_grad for parameter in parameters.values()]
        config: Any = getattr(self.get_submodule(self.body_name), "config", self.config)
        size = getattr(config, "image_size", None) or _USUAL_SIZE
        height, width = (size, size) if isinstance(size, int) else size
        images = torch.zeros(1, getattr(config, "num_channels", 3), height, width, device=self.device)
        try:
            with torch.enable_grad():
                for parameter in parameters.values():
                    parameter.requires_grad_(True)  # what the user froze has a part all the same
                features, _ = self._encode(images.to(self.dtype), output_hidden_states=False)
                if features.dim() != 2:
                    raise ValueError(f"features of shape {list(features.shape)} instead of [N, D]")
                used = torch.autograd.grad(features.sum(), list(parameters.values()), allow_unused=True)
        except Exception as error:  # whatever an unknown architecture does with an image
            raise ValueError(
                f"{type(self.encoder).__name__} has no classification head, and no pooled features [N, D] could be "
                f"found at {self.body_name!r} ({type(error).__name__}: {error}); needed: a module that takes "
                "pixel_values and returns pooler_output or last_hidden_state. Name it with encoder_name, such as "
                "'vision_model', or load the encoder alone."
            ) from error
        finally:
            for parameter, was in zip(parameters.values(), trained, strict=True):
                parameter.requires_grad_(was)
            # By way of training: LeViT keeps in evaluation what it has computed, with its graph.
            self.encoder.train().train(training)
        # Names of what has no part in the features.
        self.unused = {name for name, gradient in zip(parameters, used, strict=True) if gradient is None}
        for name in self.unused:
            parameters[name].requires_grad_(False)
        return features.shape[1]

    def _encode(self, images: Tensor, output_hidden_states: bool) -> tuple[Tensor, Any]:
        body = self.get_submodule(self.body_name)
        with _unmasked(body, images) as inputs:
            outputs = body(pixel_values=images, output_hidden_states=output_hidden_states, **inputs)
        return pooled_features(outputs, self._pooler, self._class_token), outputs.get("hidden_states")

    def forward(self, pixel_values: Tensor, output_hidden_states: bool = False) -> ImageClassifierOutput:
        """Logits [N, K] of the head and, where asked for, the output of every block of the encoder."""
        features, hidden_states = self._encode(pixel_values, output_hidden_states)
        return ImageClassifierOutput(logits=self.head(features), hidden_states=hidden_states)

    def fresh(self) -> EncoderWithHead:
        """Return the same with weights drawn from the global generator."""
        return EncoderWithHead(untrained(type(self.encoder), copy.deepcopy(self.config)), self.encoder_name)

    def save_pretrained(
        self, save_directory: Any, *args: Any, state_dict: Mapping[str, Tensor] | None = None, **options: Any
    ) -> None:
        """Write the encoder as its own class does, without the head: `from_pretrained` needs nothing of ours."""
        if state_dict is not None:
            prefix = f"{self.base_model_prefix}."
            own = {n.removeprefix(prefix): t for n, t in state_dict.items() if n.startswith(prefix)}
            options["state_dict"] = own
        self.encoder.save_pretrained(save_directory, *args, **options)
