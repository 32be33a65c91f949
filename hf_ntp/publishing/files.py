"""The files of a model folder: regular ones only, by unambiguous names, read within bounds, hashed on all cores."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ..run_folder import file_digest
from .errors import VerificationError, listed

# As in authorization.schema.json: no way up, no hidden second meaning on another system.
_NAME = re.compile(r"\.?[A-Za-z0-9_][A-Za-z0-9_.-]*(/\.?[A-Za-z0-9_][A-Za-z0-9_.-]*)*")
_MAX_NAME = 255
PROCESSOR_FILES = frozenset({"preprocessor_config.json", "processor_config.json"})
"""One of which is there where a model comes with an image processor."""
_MAX_ENTRIES = 10_000


def folder_files(folder: str | Path, links_into: str | Path | None = None) -> dict[str, Path]:
    """Every file of a model folder, found without opening any.

    Left out is what a download adds and no loader reads: ``.gitattributes``, which the Hub writes and edits by itself,
    and the notes of ``snapshot_download(local_dir=...)`` in ``.cache/huggingface``.

    Args:
        folder: Folder of a model.
        links_into: Folder that symbolic links may lead into; None: no links. For a snapshot in the Hugging Face cache
            this is the cache folder (``huggingface_hub.constants.HF_HUB_CACHE``).

    Returns:
        Path to read by name in the folder, sorted by name.

    Raises:
        VerificationError: For links, devices, pipes, odd names, names that differ only in case, or too many files.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise VerificationError(f"{folder} is not a folder; needed: the folder of a model protected with hf_ntp.")
    files: dict[str, Path] = {}
    spellings: dict[str, str] = {}
    pending = [folder]
    while pending:
        with os.scandir(pending.pop()) as entries:
            for entry in entries:
                path = Path(entry.path)
                name = path.relative_to(folder).as_posix()
                _check_name(name, spellings)
                if entry.is_dir(follow_symlinks=False):
                    pending.append(path)
                else:
                    files[name] = regular_file(path, links_into)
    return {name: files[name] for name in sorted(files) if not _left_by_download(name)}


def _check_name(name: str, spellings: dict[str, str]) -> None:
    if len(name) > _MAX_NAME or not _NAME.fullmatch(name):
        raise VerificationError(
            f"file name {listed([name])!r} found; needed: at most {_MAX_NAME} of the characters A-Z a-z 0-9 _ . - "
            "and / between folders. Rename or remove it."
        )
    if (other := spellings.setdefault(name.casefold(), name)) != name:
        raise VerificationError(
            f"{other} and {name} differ only in case and are one file on some systems. Rename or remove one."
        )
    if len(spellings) > _MAX_ENTRIES:
        raise VerificationError(
            f"more than {_MAX_ENTRIES} files found; needed: a model folder and nothing else in it."
        )


def _left_by_download(name: str) -> bool:
    if name == ".gitattributes":
        return True
    listing = name.startswith(".cache/huggingface/trees/") and name.endswith(".json")
    notes = name.endswith((".metadata", ".lock", "/.gitignore", "/CACHEDIR.TAG"))
    return listing or (name.startswith(".cache/huggingface/") and notes)


def regular_file(path: Path, links_into: str | Path | None = None) -> Path:
    """The regular file at ``path``, or the one that a permitted link leads to; nothing is opened.

    Args:
        path: Anything that exists.
        links_into: As in :func:`folder_files`.

    Raises:
        VerificationError: If it is not a regular file.
    """
    mode = path.lstat().st_mode
    if stat.S_ISLNK(mode):
        if links_into is None:
            raise VerificationError(
                f"{path} is a symbolic link; needed: a regular file. Download with snapshot_download(..., local_dir="
                "...), or give links_into=huggingface_hub.constants.HF_HUB_CACHE for a snapshot in its cache."
            )
        try:
            target = Path(os.path.realpath(path, strict=True))
        except OSError as error:
            raise VerificationError(f"{path} is a symbolic link to nowhere. Download the folder anew.") from error
        if not target.is_relative_to(os.path.realpath(links_into)):
            raise VerificationError(
                f"{path} is a symbolic link to {target}; needed: one into {links_into}. Download the folder anew."
            )
        path, mode = target, target.lstat().st_mode
    if not stat.S_ISREG(mode):
        raise VerificationError(f"{path} is a folder, pipe, socket or device; needed: a regular file. Remove it.")
    return path


def read_bounded(path: Path, max_bytes: int) -> bytes:
    """Content of a regular file, never waiting for a pipe and never more than ``max_bytes``.

    Raises:
        VerificationError: If it is no regular file, or larger.
    """
    # Without O_NONBLOCK, opening a pipe that took the file's place would wait for ever.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    with open(os.open(regular_file(path), flags), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise VerificationError(f"{path} is no longer a regular file. Download the folder anew.")
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise VerificationError(f"{path} is larger than {max_bytes} bytes, more than such a file needs.")
    return data


def sha256_of(files: Mapping[str, Path]) -> dict[str, str]:
    """SHA-256 (hex) by name, of several files at a time."""
    # Largest first: one large file at the end would leave the other cores idle.
    names = sorted(files, key=lambda name: files[name].stat().st_size, reverse=True)
    with ThreadPoolExecutor(max_workers=min(16, os.cpu_count() or 1)) as pool:
        found = dict(zip(names, pool.map(file_digest, [files[name] for name in names]), strict=True))
    return {name: found[name] for name in files}
