"""The model on show: its folder and what its record says. The classifiers themselves are in `classifiers.py`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from .settings import Settings

RESULTS_FILE = "results.json"


@dataclass(frozen=True)
class Showcase:
    """What the page shows.

    Args:
        settings: Where it came from.
        folder: Local folder of the protected model, or None.
        links_into: Where links in it may lead: the Hugging Face cache, for a download.
        record: Its authorization record, verified, or None.
        signed: Whether the owner's signature was checked and is valid.
        problem: Why there is no verified model, or None.
        labels: Classes of the model; empty for an encoder without a classifier.
        results: Content of ``results.json``, or None.
    """

    settings: Settings
    folder: Path | None = None
    links_into: Path | None = None
    record: dict[str, Any] | None = None
    signed: bool = False
    problem: str | None = None
    labels: tuple[str, ...] = ()
    results: dict[str, Any] | None = None


def open_showcase(settings: Settings) -> Showcase:
    """Fetch and verify what the settings name.

    A model that does not match its record is not shown: the page then says why, and its other parts work.
    """
    from hf_ntp import verify_folder
    from hf_ntp.publishing.fetching import fetch_checkpoint

    folder, links = None, None
    try:
        folder, links = fetch_checkpoint(settings.model, settings.revision)
        verified = verify_folder(folder, settings.public_key, links)
    except (OSError, ValueError) as error:
        return Showcase(settings, folder, links, problem=str(error))
    return Showcase(
        settings, folder, links, verified.record, verified.signed, None, labels(folder), read_results(folder)
    )


def labels(folder: Path) -> tuple[str, ...]:
    """Classes as the configuration names them; none for an encoder without a trained head."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if "ForImageClassification" not in config["architectures"][0]:
            return ()
        return tuple(str(config["id2label"][str(index)]) for index in range(len(config["id2label"])))
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return ()


def read_results(folder: Path) -> dict[str, Any] | None:
    """Content of the ``results.json``, or None where there is none that can be read."""
    try:
        content = json.loads((folder / RESULTS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def learning_curves(results: dict[str, Any]) -> bytes:
    """Picture of the learning curves, PNG.

    Raises:
        KeyError, TypeError, ValueError: If these are not the results of a protected model.
    """
    from hf_ntp.publishing.figure import plot_learning_curves

    with TemporaryDirectory() as folder:
        path = Path(folder) / "slc.png"
        plot_learning_curves(results, path)
        return path.read_bytes()
