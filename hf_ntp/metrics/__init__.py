"""The `evaluate` modules that ship with the package: load them with ``evaluate.load(SLC_AUC)``."""

from pathlib import Path

SLC_AUC = str(Path(__file__).parent / "slc_auc")
"""Folder of the `slc_auc` metric."""

__all__ = ["SLC_AUC"]
