"""One fit of a sweep, and the key under which its result is kept."""

from __future__ import annotations

import inspect
from collections.abc import Hashable, Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from secrets import token_hex
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from transformers import AutoConfig, PreTrainedModel

from ..attacks import FineTuneProtocol
from ..models import has_batch_norm, load_model
from .arms import Arm
from .cache import checkpoint_digest, content_key

if TYPE_CHECKING:
    from .runner import AttackData

NOT_ARCHITECTURE = ("id2label", "label2id", "_name_or_path", "transformers_version", "ntp")
"""Keys of a checkpoint's config that say nothing of its architecture."""

# Stands for code that cannot be read: nothing of it is found again by another process.
_UNREADABLE = token_hex()


class Fit(NamedTuple):
    """A point of a curve at one value of what is tuned."""

    arm: Arm
    size: int
    seed: int
    value: float

    def __str__(self) -> str:
        return f"{self.arm.name}, {self.size} images, seed {self.seed}, tuned value {self.value:g}"


def _drops(config: Mapping[str, Any]) -> bool:
    """Whether any kind of dropout is switched on in a config, or in one of its parts (the vision tower of CLIP)."""
    return any(
        _drops(value) if isinstance(value, dict) else "drop" in str(key) and isinstance(value, float) and value > 0
        for key, value in config.items()
    )


def _identity(attack: type) -> object:
    """What tells a kind of attack from others: the name of one of ours, of a user's own also its code."""
    if attack.__module__.startswith("hf_ntp."):
        return attack.__name__
    own = [kind for kind in attack.__mro__ if not kind.__module__.startswith(("hf_ntp.", "builtins", "abc"))]
    try:
        code = [inspect.getsource(kind) for kind in own]
    except (OSError, TypeError):
        code = [_UNREADABLE]
    return [attack.__module__, attack.__qualname__, *code]


class Describer:
    """Keys of fits: everything that determines a result, nothing that does not (names, paths, other grid points).

    Args:
        data: Target data of the attacker.
        protocol: How to fine-tune.
    """

    def __init__(self, data: AttackData, protocol: FineTuneProtocol) -> None:
        settings = asdict(protocol)
        del settings["learning_rates"], settings["extensions"]
        self._common = {
            "protocol": settings,
            "device": str(torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"),
            "versions": [version(name) for name in ("torch", "transformers", "peft", "scikit-learn")],
            "data": [part.fingerprint for part in (data.train, data.validation, data.test)],
        }
        self._source = None if data.source is None else data.source.fingerprint
        self._starts: dict[Arm, dict[str, object]] = {}
        self._configs: dict[str, dict[str, Any]] = {}
        self._architectures: dict[str, str] = {}
        self._models: dict[str, PreTrainedModel] = {}

    def _config(self, arm: Arm) -> dict[str, Any]:
        if arm.checkpoint not in self._configs:
            self._configs[arm.checkpoint] = AutoConfig.from_pretrained(arm.checkpoint).to_dict()
        return self._configs[arm.checkpoint]

    def architecture(self, arm: Arm) -> str:
        """Digest of the config of an arm's checkpoint, without what is not part of the architecture."""
        if arm.checkpoint not in self._architectures:
            config = {key: value for key, value in self._config(arm).items() if key not in NOT_ARCHITECTURE}
            self._architectures[arm.checkpoint] = content_key(config)
        return self._architectures[arm.checkpoint]

    def _model(self, arm: Arm) -> PreTrainedModel:
        """Model of an arm's architecture without values."""
        key = self.architecture(arm)
        if key not in self._models:
            with torch.device("meta"):
                self._models[key] = load_model(arm.checkpoint, random_init=True)
        return self._models[key]

    def weights(self, arm: Arm) -> int:
        """Number of weights of an arm's architecture, however they are stored."""
        return sum(parameter.numel() for parameter in self._model(arm).parameters())

    def has_batch_norm(self, arm: Arm) -> bool:
        """Whether a fit depends on which other images are in a batch."""
        return has_batch_norm(self._model(arm))

    def forward(self, arm: Arm) -> Hashable:
        """What decides how an arm's model computes, besides its weights."""
        notes = self._config(arm).get("ntp") or {}
        return self.architecture(arm), notes.get("encoder_name"), notes.get("head_name")

    def has_dropout(self, arm: Arm) -> bool:
        """Whether the config of an arm's checkpoint has any kind of dropout switched on."""
        return _drops(self._config(arm))

    def _start(self, arm: Arm) -> dict[str, object]:
        notes = self._config(arm).get("ntp") or {}
        weights: object = None if arm.random_init else checkpoint_digest(Path(arm.checkpoint))
        if arm.random_init and arm.attack.needs_source:  # trained on the source, a head of its classes
            weights = {"classes": len(self._config(arm).get("id2label") or ())}
        # The patterns decide what a mask is, the names where things are; the rest of the note changes nothing.
        telling = ("head_name", "encoder_name", *(() if arm.random_init else ("prune_include", "prune_exclude")))
        patterns = {key: value for key, value in notes.items() if key in telling}
        return {
            "config": self.architecture(arm),
            "weights": weights,
            "attack": [_identity(type(arm.attack)), arm.attack.settings()],
            "patterns": patterns,
            "source": self._source if arm.attack.needs_source else None,
        }

    def __call__(self, fit: Fit) -> str:
        """Key of a fit."""
        if fit.arm not in self._starts:
            self._starts[fit.arm] = self._start(fit.arm)
        point = {"size": fit.size, "seed": fit.seed, "value": fit.value}
        return content_key({**self._common, **self._starts[fit.arm], **point})
