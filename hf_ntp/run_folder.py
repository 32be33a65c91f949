"""One folder, one run: continuing it is fine, mixing two runs is not."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

RUN_FILE = "run.json"


def differences(found: Mapping[str, Any], needed: Mapping[str, Any]) -> list[str]:
    """Describe every key whose values differ, as "key: X there, Y here"."""
    needed = json.loads(json.dumps(needed))
    keys = [key for key in sorted(found.keys() | needed.keys()) if found.get(key) != needed.get(key)]
    return [f"{key}: {found.get(key)!r} there, {needed.get(key)!r} here" for key in keys]


def claim_run_folder(folder: str | Path, settings: Mapping[str, Any]) -> Path:
    """Make ``folder`` the folder of the run with these settings; the same run may claim it again.

    Args:
        folder: Made when missing.
        settings: JSON-ready; everything that determines the result.

    Returns:
        The folder as a path.

    Raises:
        ValueError: If the folder holds something else, or a run with other settings.
    """
    folder = Path(folder)
    record = folder / RUN_FILE
    # Looked at in this order, and without what is being written, several processes of one run may claim it at once.
    used = folder.exists() and any(not path.name.startswith(f".{RUN_FILE}.") for path in folder.iterdir())
    if record.is_file():
        if differing := differences(json.loads(record.read_text()), settings):
            raise ValueError(
                f"{folder} holds another run ({'; '.join(differing[:8])}); needed: an empty folder, or the same "
                "settings to continue it. Choose another --output_dir, or delete that folder."
            )
        return folder
    if used:
        raise ValueError(
            f"{folder} is not empty and holds no {RUN_FILE}; needed: an empty folder for the run. Choose another "
            "--output_dir."
        )
    folder.mkdir(parents=True, exist_ok=True)
    with whole_file(record) as staged:
        staged.write_text(json.dumps(settings, indent=2))
    return folder


def _beside(path: Path) -> Path:
    """Name for something unfinished, of this process alone."""
    return path.with_name(f".{path.name}.{os.getpid()}.unfinished")


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a path beside ``path`` to write to and rename it at the end: readers see all of it or nothing."""
    staged = _beside(path)
    yield staged
    os.replace(staged, path)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Give an empty folder to fill and rename it to ``path`` at the end: ``path`` exists only when it is whole."""
    staged = _beside(path)
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    yield staged
    if path.exists():
        shutil.rmtree(path)
    os.replace(staged, path)


def file_digest(path: Path) -> str:
    """SHA-256 (hex) of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def weight_digests(folder: str | Path) -> dict[str, str]:
    """SHA-256 of every weight file of a model folder, by file name."""
    return {path.name: file_digest(path) for path in sorted(Path(folder).glob("*.safetensors"))}


class Stopwatch:
    """Wall seconds per stage of a run, kept in a file so that a continued run still knows the whole.

    Args:
        path: JSON file; its folder must exist. None keeps nothing, for all processes but the first.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        known = path is not None and path.is_file()
        self.seconds: dict[str, float] = json.loads(path.read_text()) if path is not None and known else {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Add the time of the block to ``stage``, even when the block is interrupted."""
        start = perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + perf_counter() - start
            if self.path is not None:
                with whole_file(self.path) as staged:
                    staged.write_text(json.dumps(self.seconds))
