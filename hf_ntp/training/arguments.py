"""Options of the method itself. No heavy imports: command lines build their help from this file."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from typing import Any, get_args, get_origin, get_type_hints


def parse_n_m(pattern: str) -> tuple[int, int] | None:
    """Return (n, m) for a pattern such as "2:4", and None for any other word."""
    found = re.fullmatch(r"([0-9]+):([0-9]+)", pattern)
    return (int(found[1]), int(found[2])) if found else None


def _weights(given: dict[str, float] | str | None, option: str) -> dict[str, float] | None:
    """Read weights by domain from a dict or JSON, and check them."""
    try:
        weights = json.loads(given) if isinstance(given, str) else given
        fine = weights is None or (weights and all(0 < value < math.inf for value in weights.values()))
    except (AttributeError, TypeError, ValueError):
        fine = False
    if not fine:
        raise ValueError(
            f"{option} is {given!r}; needed: a positive number for each domain by name, as a dict or as JSON such as "
            '\'{"a": 2, "b": 1}\'.'
        )
    return weights


_LEAST_SHRINKAGE = 1e-2
"""Of the whitened criterion: with less, that of collapsed features in float32 is rounding error."""
_OURS_OFF: dict[str, Any] = {
    "source_distillation": 0.0,
    "source_tolerance": [],
    "feature_tolerance": [],
    "collapse_weight": 0.0,
    "attackers": 0,
}

PRESETS: dict[str, dict[str, Any]] = {
    "adaptive": {},
    "adaptive_convnet": {
        "sparsity": 0.8,
        "rho": 0.1,
        "target_warmup": 0.05,
        "attacker_batch_size": 32,
        "attacker_learning_rates": [1e-3, 3e-3, 1e-2],
        "attacker_horizon": [10, 150],
        "collapse_weight": 0.0,
        "fisher_weight": 0.0,
    },
    "paper": {
        **_OURS_OFF,
        "sparsity": 0.9,
        "rho": 0.05,
        "target_loss": "ascent",
        "target_weight": 0.1,
        "fisher": "trace_ratio",
        "fisher_level": "pooled",
        "fisher_weight": 1.0,
    },
    "published": {
        **_OURS_OFF,
        "sparsity": 0.95,
        "prune_pattern": "l1",
        "rho": 5e-3,
        "l1_weight": 1e-4,
        "target_loss": "ascent",
        "target_weight": 1.0,
        "target_warmup": 0.0,
        "fisher": "trace_ratio",
        "fisher_level": "pooled",
        "fisher_weight": 1e3,
    },
}
"""Options by name of the preset.

"adaptive" (the defaults, found on a small ViT) and "adaptive_convnet" (found on a small ResNet) train against
simulated attackers. "paper" has NTP's published terms alone, with weights that leave the source alive; "published"
has the published weights too, which destroyed it on our small models (schedule, batch, `fisher_shrinkage` are ours).
"""


_WORDS = {str: "text", int: "an integer", float: "a number", bool: "True or False"}


def _fits(value: Any, kind: type) -> bool:
    """Whether a value is of a kind; an integer is a number too, and NaN is none."""
    if isinstance(value, bool) or kind is bool:
        return isinstance(value, kind) and kind is bool
    return isinstance(value, (int, float) if kind is float else kind) and value == value


@dataclass
class ProtectionArguments:
    """Options of Non-Transferable Pruning, next to those of `transformers.TrainingArguments`.

    The defaults are the preset "adaptive"; see :data:`PRESETS`.
    """

    sparsity: float = field(
        default=0.6, metadata={"help": "Fraction of zeros among the prunable weights at the end, in [0, 1)."}
    )
    prune_pattern: str = field(
        default="layer",
        metadata={
            "help": "Which weights go: 'layer' (smallest of every layer), 'global' (smallest of all), 'N:M' such as "
            "'2:4', or 'l1' (soft threshold while training, as published; smallest of every layer at the end)."
        },
    )
    prune_include: list[str] = field(
        default_factory=list,
        metadata={"help": "Regular expressions of parameters to prune besides linear and convolutional weights."},
    )
    prune_exclude: list[str] = field(
        default_factory=list, metadata={"help": "Regular expressions of parameters to keep dense."}
    )
    target_access: str = field(
        default="labelled",
        metadata={
            "help": "What is known of the unauthorized domains: 'labelled' images, 'unlabelled' images (classes are "
            "clusters of the original model's features), or 'none' (a neighbourhood of the source is made from its "
            "own images; target_dataset is None)."
        },
    )
    pseudo_classes: int = field(
        default=20, metadata={"help": "Clusters that stand for classes where images have no labels, >= 2."}
    )
    source_weights: dict[str, float] | str | None = field(
        default=None,
        metadata={
            "help": "Shares of several authorized domains in the batches by name, as a dict or JSON such as "
            '\'{"a": 2, "b": 1}\'; default in proportion to their images.'
        },
    )
    target_weights: dict[str, float] | str | None = field(
        default=None,
        metadata={
            "help": "The same for unauthorized domains: shares of the attackers and of the terms; default equal."
        },
    )
    head_name: str | None = field(
        default=None, metadata={"help": "Dotted name of the classification head, where it cannot be found by rule."}
    )
    encoder_name: str | None = field(
        default=None,
        metadata={
            "help": "Dotted name of the vision encoder inside a model without classification head, where it cannot be "
            "found by rule."
        },
    )
    rho: float = field(
        default=0.02, metadata={"help": "ADMM penalty parameter, > 0; added to the gradient after clipping."}
    )
    l1_weight: float = field(default=1e-4, metadata={"help": "Weight of the L1 norm for prune_pattern='l1', > 0."})
    admm_interval: int = field(default=16, metadata={"help": "Optimizer steps between two Z-steps, >= 1."})
    pruning_begin: float = field(default=0.0, metadata={"help": "Share of all steps after which pruning begins."})
    pruning_end: float = field(
        default=0.6, metadata={"help": "Share of all steps after which the mask is fixed; the rest is repair."}
    )
    target_loss: str = field(
        default="uniform",
        metadata={
            "help": "Non-transferable loss on the simulated attacker's head: 'uniform' (cross-entropy to uniform, no "
            "dead zone) or 'ascent' (its cross-entropy is raised up to target_bound, as published)."
        },
    )
    target_weight: float = field(
        default=0.0,
        metadata={
            "help": "Weight alpha of the non-transferable loss, >= 0. Off by default: fooling one head left "
            "fine-tuning untouched, or made the Fisher term weaker, in our runs. Published: 1 (with 'ascent')."
        },
    )
    target_bound: float | None = field(
        default=None, metadata={"help": "Bound beta of target_loss='ascent', nats; default log(target classes)."}
    )
    target_warmup: float = field(
        default=0.2,
        metadata={
            "help": "Share of all steps over which everything aimed at the target, terms and attackers, rises from 0: "
            "at full strength from the start it can destroy the source before that adapts."
        },
    )
    target_head_steps: int = field(
        default=1, metadata={"help": "Adam steps that refit the simulated attacker's head before every step, >= 1."}
    )
    target_head_learning_rate: float = field(default=1e-2, metadata={"help": "Adam's rate for that head, > 0."})
    attackers: int = field(
        default=4,
        metadata={"help": "Simulated attackers who fine-tune the encoder during protection; 0 is off (published)."},
    )
    attacker_batch_size: int = field(
        default=16,
        metadata={
            "help": "Target images of one attacker's step, at least, over all processes and accumulated batches; its "
            "own, beside those of the objective."
        },
    )
    attacker_weight: float = field(
        default=1.0,
        metadata={"help": "Learning rate of the steps that deny attackers progress, as a share of learning_rate."},
    )
    attacker_learning_rates: list[float] = field(
        default_factory=lambda: [3e-4, 1e-3, 3e-3],
        metadata={
            "help": "Rates that attackers draw from. Large pretrained models are usually fine-tuned at 1e-5 to 1e-4: "
            "take such rates for yours."
        },
    )
    attacker_horizon: list[int] = field(
        default_factory=lambda: [20, 500],
        metadata={"help": "Shortest and longest life of an attacker in steps; drawn evenly on a log scale."},
    )
    attacker_patience: int = field(
        default=2, metadata={"help": "Steps an attacker takes before the defender reacts: the first fit its head."}
    )
    attacker_informed: float = field(
        default=0.5,
        metadata={"help": "Share of attackers who first reset, rescale, perturb or re-initialise parts of it."},
    )
    attacker_keeps_mask: float = field(
        default=0.1, metadata={"help": "Share of attackers who keep the present pruning mask."}
    )
    attacker_keeps_head: float = field(
        default=0.25,
        metadata={
            "help": "Share of attackers who begin with the model's own head, where there are as many unauthorized "
            "classes; the defender reacts to them from their first step."
        },
    )
    attacker_keeps_statistics: float = field(
        default=0.5,
        metadata={
            "help": "Share of attackers whose BatchNorm layers keep the model's statistics of the authorized domain, "
            "instead of normalising with those of their batch; of those who begin with the model's own weights. "
            "Without such layers it changes nothing."
        },
    )
    attacker_sgd: float = field(
        default=0.0, metadata={"help": "Share of attackers with SGD and momentum (10-fold rates) instead of Adam."}
    )
    source_loss: str = field(
        default="auto",
        metadata={
            "help": "What keeps the source alive: 'labels' (cross-entropy of the head, and source_distillation), "
            "'features' (distance to the original model's pooled features; needs no labels and no head), "
            "'reconstruction' (a masked autoencoder's own loss; its decoder stays as it is), or 'auto' (labels where "
            "there is a head, else features)."
        },
    )
    source_distillation: float = field(
        default=1.0,
        metadata={
            "help": "Weight of the distance to the original model's predictions on the source, >= 0; costs a "
            "frozen copy of the model and its forward pass. Only with source_loss='labels'."
        },
    )
    source_tolerance: list[float] = field(
        default_factory=lambda: [0.3, 0.001],
        metadata={
            "help": "How many more authorized images than the original the model may classify wrongly, as a share of "
            "all, at the first and at the last step: beyond it everything aimed at the target gets weaker, and stops "
            "at twice as many. Judged on eval_dataset, where there is one. Empty: no limit."
        },
    )
    feature_tolerance: list[float] = field(
        default_factory=lambda: [0.3, 0.03],
        metadata={
            "help": "The same limit for source_loss='features': mean squared distance to the original's features "
            "over their variance. 0 is equal, 1 as bad as one feature vector for all images. With 'reconstruction': "
            "the increase of that loss over the original's, relatively. Empty: no limit."
        },
    )
    collapse_weight: float = field(
        default=0.3,
        metadata={"help": "Weight of the collapse of target tokens relative to source tokens, >= 0."},
    )
    fisher: str = field(
        default="whitened",
        metadata={"help": "Fisher-space regularization of target features: 'trace_ratio' or 'whitened'."},
    )
    fisher_level: str = field(
        default="stages",
        metadata={
            "help": "Where the Fisher term acts: 'pooled' (features that enter the head, as published) or 'stages' "
            "(these and the mean output of every block)."
        },
    )
    fisher_weight: float = field(default=2.0, metadata={"help": "Weight lambda of the Fisher term, >= 0."})
    fisher_shrinkage: float = field(
        default=0.1, metadata={"help": "Share of the total scatter that regularises the Fisher term, in [0, 1]."}
    )

    @property
    def simulated_attackers(self) -> int:
        """How many attackers there are: none where their weight is 0."""
        return self.attackers if self.attacker_weight else 0

    def __post_init__(self) -> None:
        """Check every option, alone and together.

        Raises:
            ValueError: With the value found, what is needed and how to fix it.
        """
        self._check_types()
        if not 0 <= self.sparsity < 1:
            raise ValueError(f"sparsity is {self.sparsity}; needed: a fraction of zeros in [0, 1), such as 0.7.")
        for name in ("rho", "l1_weight", "target_head_learning_rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; needed: a positive, finite number.")
        for name in ("target_weight", "fisher_weight", "attacker_weight", "source_distillation", "collapse_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; needed: 0 (off) or a positive, finite number.")
        for name in ("admm_interval", "target_head_steps", "attacker_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; needed: an integer >= 1.")
        for name, words in (
            ("target_loss", ("uniform", "ascent")),
            ("source_loss", ("auto", "labels", "features", "reconstruction")),
            ("target_access", ("labelled", "unlabelled", "none")),
            ("fisher", ("trace_ratio", "whitened")),
            ("fisher_level", ("pooled", "stages")),
        ):
            if getattr(self, name) not in words:
                raise ValueError(f"{name} is {getattr(self, name)!r}; needed: one of {', '.join(map(repr, words))}.")
        if self.pseudo_classes < 2:
            raise ValueError(f"pseudo_classes is {self.pseudo_classes}; needed: an integer >= 2, such as 20.")
        if self.target_bound is not None and self.target_bound <= 0:
            raise ValueError(f"target_bound is {self.target_bound}; needed: a positive number of nats, or null.")
        shares = (
            "attacker_informed",
            "attacker_keeps_mask",
            "attacker_keeps_head",
            "attacker_keeps_statistics",
            "attacker_sgd",
        )
        for name in ("fisher_shrinkage", "target_warmup", *shares):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; needed: a value in [0, 1].")
        if self.fisher == "whitened" and self.fisher_shrinkage < _LEAST_SHRINKAGE:
            raise ValueError(
                f"fisher is 'whitened' and fisher_shrinkage is {self.fisher_shrinkage}; needed: a share of "
                f"{_LEAST_SHRINKAGE:g} or more, such as 0.1. The scatter matrix of a batch smaller than the feature "
                "width cannot be inverted, nor, in float32, one next to it."
            )
        if not 0 <= self.pruning_begin < self.pruning_end <= 1:
            raise ValueError(
                f"pruning_begin is {self.pruning_begin} and pruning_end is {self.pruning_end}; needed: "
                "0 <= pruning_begin < pruning_end <= 1, shares of all optimizer steps."
            )
        self.source_weights = _weights(self.source_weights, "source_weights")
        self.target_weights = _weights(self.target_weights, "target_weights")
        self._check_attackers()
        self._check_pattern()

    def _check_types(self) -> None:
        """In Python, anything can be passed."""
        for name, hint in get_type_hints(ProtectionArguments).items():
            value, kinds = getattr(self, name), get_args(hint)
            if any(get_origin(kind) is dict for kind in kinds):
                continue  # see _weights
            if get_origin(hint) is list:
                fits = isinstance(value, (list, tuple)) and all(_fits(item, kinds[0]) for item in value)
                needed = f"a list, each of it {_WORDS[kinds[0]]}"
            else:
                fits = _fits(value, kinds[0] if kinds else hint) or (value is None and type(None) in kinds)
                needed = _WORDS[kinds[0] if kinds else hint]
            if not fits:
                raise ValueError(f"{name} is {value!r}; needed: {needed}.")
        for pattern in (*self.prune_include, *self.prune_exclude):
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(
                    f"prune_include or prune_exclude holds {pattern!r}; needed: regular expressions ({error})."
                ) from error

    def _check_attackers(self) -> None:
        if self.attackers < 0:
            raise ValueError(f"attackers is {self.attackers}; needed: 0 (off) or the number of simulated attackers.")
        rates = self.attacker_learning_rates
        if not rates or not all(0 < rate < math.inf for rate in rates):
            raise ValueError(f"attacker_learning_rates are {rates}; needed: at least one rate, positive and finite.")
        if self.attacker_patience < 0:
            raise ValueError(f"attacker_patience is {self.attacker_patience}; needed: a number of steps, 0 or more.")
        for name, unit in (("source_tolerance", "error rate"), ("feature_tolerance", "relative feature error")):
            tolerance = getattr(self, name)
            if tolerance and (len(tolerance) != 2 or not all(0 < limit < math.inf for limit in tolerance)):
                raise ValueError(
                    f"{name} is {tolerance}; needed: two positive, finite numbers of {unit}, like 0.3 0.05, or none."
                )
        if len(self.attacker_horizon) != 2 or not 0 < self.attacker_horizon[0] <= self.attacker_horizon[1]:
            raise ValueError(
                f"attacker_horizon is {self.attacker_horizon}; needed: two numbers of steps, shortest and longest, "
                "such as 10 100."
            )
        if self.attackers and self.attacker_horizon[1] <= self.attacker_patience:
            raise ValueError(
                f"attacker_horizon is {self.attacker_horizon} and attacker_patience is {self.attacker_patience}; "
                "needed: attackers who live longer than that, or none is ever denied anything."
            )

    def _check_pattern(self) -> None:
        if self.prune_pattern in ("layer", "global", "l1"):
            return
        n, m = parse_n_m(self.prune_pattern) or (0, 0)
        if not 0 < n <= m:
            raise ValueError(
                f"prune_pattern is {self.prune_pattern!r}; needed: 'layer', 'global', 'l1', or 'N:M' with "
                "0 < N <= M, such as '2:4'."
            )
        implied = 1 - n / m
        if abs(self.sparsity - implied) > 1e-9:
            raise ValueError(
                f"prune_pattern {self.prune_pattern!r} leaves {implied:g} zeros but sparsity is {self.sparsity}; "
                f"needed: the same. Set sparsity={implied:g}."
            )
