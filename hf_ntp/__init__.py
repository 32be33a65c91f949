"""Pretrained vision encoders that only work where their owner allows."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .attacks import ATTACKS, Attack, FineTuneProtocol
    from .data import (
        EMBEDDED_DOMAINS,
        DomainReference,
        PixelDataset,
        load_domain,
        nested_subsets,
        split_owner_attacker,
    )
    from .evaluation.arms import Arm, standard_arms
    from .evaluation.measure import Measurement, measure_protection
    from .evaluation.runner import AttackData, LearningCurves, sample_wise_learning_curves
    from .evaluation.summary import summarize
    from .publishing.hub import push_folder, push_metric
    from .publishing.loading import Protected, load_protected
    from .publishing.record import read_record
    from .training.config import NTPConfig
    from .training.trainer import NTPTrainer

__version__ = version("hf-ntp")

# Names load on first use: `import hf_ntp` and command-line help stay instant.
_HOMES = {
    "EMBEDDED_DOMAINS": "data",
    "ATTACKS": "attacks",
    "Arm": "evaluation.arms",
    "Attack": "attacks",
    "AttackData": "evaluation.runner",
    "DomainReference": "data",
    "FineTuneProtocol": "attacks",
    "LearningCurves": "evaluation.runner",
    "Measurement": "evaluation.measure",
    "NTPConfig": "training.config",
    "NTPTrainer": "training.trainer",
    "PixelDataset": "data",
    "Protected": "publishing.loading",
    "load_domain": "data",
    "load_protected": "publishing.loading",
    "measure_protection": "evaluation.measure",
    "nested_subsets": "data",
    "push_folder": "publishing.hub",
    "push_metric": "publishing.hub",
    "read_record": "publishing.record",
    "sample_wise_learning_curves": "evaluation.runner",
    "split_owner_attacker": "data",
    "standard_arms": "evaluation.arms",
    "summarize": "evaluation.summary",
}

__all__ = [
    "ATTACKS",
    "EMBEDDED_DOMAINS",
    "Arm",
    "Attack",
    "AttackData",
    "DomainReference",
    "FineTuneProtocol",
    "LearningCurves",
    "Measurement",
    "NTPConfig",
    "NTPTrainer",
    "PixelDataset",
    "Protected",
    "load_domain",
    "load_protected",
    "measure_protection",
    "nested_subsets",
    "push_folder",
    "push_metric",
    "read_record",
    "sample_wise_learning_curves",
    "split_owner_attacker",
    "standard_arms",
    "summarize",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'hf_ntp' has no attribute {name!r}; it offers {', '.join(__all__)}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
