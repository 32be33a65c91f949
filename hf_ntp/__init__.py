"""Pretrained vision encoders that only work where their owner allows."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from types import ModuleType
from typing import TYPE_CHECKING

from wrapt import register_post_import_hook

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
    from .models.lora_merge import merge_lora
    from .models.sparse_storage import compress_folder, expand_folder
    from .publishing.from_trainer import write_folder
    from .publishing.hub import push_folder, push_metric
    from .publishing.loading import Protected, load_protected
    from .publishing.record import read_record
    from .publishing.signing import sign_folder
    from .publishing.verify import verify_folder
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
    "compress_folder": "models.sparse_storage",
    "expand_folder": "models.sparse_storage",
    "load_domain": "data",
    "load_protected": "publishing.loading",
    "measure_protection": "evaluation.measure",
    "merge_lora": "models.lora_merge",
    "nested_subsets": "data",
    "push_folder": "publishing.hub",
    "push_metric": "publishing.hub",
    "read_record": "publishing.record",
    "sample_wise_learning_curves": "evaluation.runner",
    "sign_folder": "publishing.signing",
    "split_owner_attacker": "data",
    "standard_arms": "evaluation.arms",
    "summarize": "evaluation.summary",
    "verify_folder": "publishing.verify",
    "write_folder": "publishing.from_trainer",
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
    "compress_folder",
    "expand_folder",
    "load_domain",
    "load_protected",
    "measure_protection",
    "merge_lora",
    "nested_subsets",
    "push_folder",
    "push_metric",
    "read_record",
    "sample_wise_learning_curves",
    "sign_folder",
    "split_owner_attacker",
    "standard_arms",
    "summarize",
    "verify_folder",
    "write_folder",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'hf_ntp' has no attribute {name!r}; it offers {', '.join(__all__)}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__


def _register_storage(transformers_loader: ModuleType) -> None:
    import_module(f"{__name__}.models.sparse_storage")


# So that from_pretrained loads compressed models, whichever library is imported first. Not on the module of the
# quantizers: modeling_utils imports that one, and what we import needs modeling_utils complete.
register_post_import_hook(_register_storage, "transformers.modeling_utils")
