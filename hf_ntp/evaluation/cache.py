"""Content-addressed store of finished fits: nothing is fitted twice, an interrupted sweep continues."""

from __future__ import annotations

import errno
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

from ..run_folder import weight_digests, whole_file

# Raise it when a change to an attack or to its loop changes results.
FIT_VERSION = 4


def content_key(content: Mapping[str, Any]) -> str:
    """SHA-256 (hex) of a JSON-ready description of everything that determines a result."""
    return hashlib.sha256(json.dumps({"version": FIT_VERSION, **content}, sort_keys=True).encode()).hexdigest()


def local_folder(checkpoint: str) -> str:
    """Return a folder with config and weights: the one given, or a snapshot of the Hub id.

    Raises:
        FileNotFoundError: If it is neither.
    """
    if Path(checkpoint).is_dir():
        return checkpoint
    patterns = ["config.json", "*.safetensors", "*.safetensors.index.json"]
    try:
        return snapshot_download(checkpoint, allow_patterns=patterns)
    except (HFValidationError, RepositoryNotFoundError, LocalEntryNotFoundError) as error:
        raise FileNotFoundError(
            f"{checkpoint} is neither a folder nor a name on the Hub that can be read here; needed: a checkpoint. "
            "Check the path; for a private or gated repository log in (hf auth login) and ask for access; offline, "
            "only what is in the cache is found."
        ) from error


def checkpoint_digest(folder: Path) -> str:
    """SHA-256 over the weight files of a checkpoint folder.

    Raises:
        FileNotFoundError: If the folder holds no weights.
    """
    digests = weight_digests(folder)
    if not digests:
        raise FileNotFoundError(
            f"{folder} holds no *.safetensors file; needed: a checkpoint saved with save_pretrained. Convert older "
            "pickled weights by loading and saving them once."
        )
    return content_key(digests)


class ResultCache:
    """Small JSON results in a folder, one file per key, written atomically.

    Args:
        folder: Where to keep them; made when needed. None keeps nothing.
    """

    def __init__(self, folder: str | Path | None) -> None:
        self.folder = None if folder is None else Path(folder)

    def get(self, key: str) -> dict[str, Any] | None:
        """Return the result of ``key``, or None where it is not known (an unreadable file counts as unknown)."""
        if self.folder is None:
            return None
        try:
            found = json.loads((self.folder / f"{key}.json").read_bytes())
        except (FileNotFoundError, ValueError, RecursionError):
            return None
        except OSError as error:
            if error.errno != errno.ESTALE:  # replaced on a file server while it was open
                raise
            return None
        return found if isinstance(found, dict) else None

    def put(self, key: str, result: Mapping[str, Any]) -> None:
        """Store a result; a reader sees all of it or nothing."""
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with whole_file(self.folder / f"{key}.json") as staged:
            staged.write_text(json.dumps(result))
