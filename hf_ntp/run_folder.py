"""One folder, one run: continuing it is fine, mixing two runs is not."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from time import perf_counter
from typing import Any

import psutil
from filelock import FileLock, Timeout
from safetensors import SafetensorError

RUN_FILE = "run.json"

_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json")
_LOCK = ".training.lock"
_LOCK_WAIT = 10.0
"""Seconds: workers of a process that was killed hold its lock until they notice."""
_NODE = re.sub(r"[^A-Za-z0-9-]", "-", platform.node()) or "here"
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NO_LINKS = {errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP}
_FORBIDDEN = {errno.EROFS, errno.EACCES, errno.EPERM}


def differences(found: Mapping[str, Any], needed: Mapping[str, Any]) -> list[str]:
    """Describe every key whose values differ, as "key: X there, Y here"."""
    needed = json.loads(json.dumps(needed))
    keys = [key for key in sorted(found.keys() | needed.keys()) if found.get(key) != needed.get(key)]
    return [f"{key}: {found.get(key)!r} there, {needed.get(key)!r} here" for key in keys]


def _settings_in(record: Path) -> dict[str, Any]:
    try:
        found = json.loads(record.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{record} cannot be read ({str(error)[:200]}); needed: the file as the run wrote it. Restore it, or "
            "choose another --output_dir."
        ) from error
    return found if isinstance(found, dict) else {RUN_FILE: found}


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
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; needed: a folder for the run. Choose another --output_dir.")
    clear_unfinished(folder)
    # Looked at in this order, and without what is being written, several processes of one run may claim it at once.
    used = folder.exists() and any(not path.name.startswith(f".{RUN_FILE}.") for path in folder.iterdir())
    if record.is_file():
        if differing := differences(_settings_in(record), settings):
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
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with _whole(record) as staged:
        staged.write_text(json.dumps(settings, indent=2))
        with suppress(FileExistsError):  # another process was faster, perhaps with other settings
            _rename_unless_there(staged, record)
    remove(staged)
    return claim_run_folder(folder, settings)


def _rename_unless_there(staged: Path, path: Path) -> None:
    try:
        os.link(staged, path)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        os.replace(staged, path)  # on such a file system, the later of two processes wins


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Refuse a folder that another process trains into; where nothing can be written, saving says so.

    Raises:
        ValueError: If there is such a process.
    """
    lock = FileLock(folder / _LOCK, timeout=_LOCK_WAIT)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise ValueError(
            f"another process trains into {folder}; needed: a folder of its own for each, or to wait until that one "
            "is over. Choose another output_dir, or stop the other process and resume."
        ) from error
    except OSError:
        yield
        return
    try:
        yield
    finally:
        remove(folder / _LOCK)
        lock.release()


def _beside(path: Path) -> Path:
    """Name for something unfinished, of this process alone."""
    return path.with_name(f".{path.name}.{_NODE}-{os.getpid()}.unfinished")


def clear_unfinished(folder: Path, name: str | None = None) -> None:
    """Remove what processes of this machine that are dead have left half-written in a folder.

    Args:
        folder: Where to look; not in its folders. One that is not there holds nothing.
        name: Of the file or folder that they wrote; None for all.
    """
    if not folder.is_dir():
        return
    shape = re.compile(rf"\.{'.+' if name is None else re.escape(name)}\.{re.escape(_NODE)}-(\d+)\.unfinished")
    with os.scandir(folder) as entries:
        found = [(entry.path, shape.fullmatch(entry.name)) for entry in entries]
    for path, match in found:
        if match and not psutil.pid_exists(int(match[1])):
            remove(Path(path))


def remove(path: Path) -> None:
    """Remove a file or a folder; what is not there, or cannot be removed, is no error."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


class NotWrittenError(OSError):
    """A file or folder could not be written: what was found, what is needed, how to go on."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Explain what goes wrong where ``path`` cannot be written: a full disk, a folder that may not be written.

    Raises:
        NotWrittenError: From the original error, with its number. Other errors pass.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        number = _number_of(error)
        elsewhere = isinstance(error, OSError) and not _beneath(error.filename, path.parent)
        if elsewhere or isinstance(error, NotWrittenError) or number not in _FULL | _FORBIDDEN:
            raise
        if number in _FULL:
            free = shutil.disk_usage(next(parent for parent in path.absolute().parents if parent.exists())).free
            remedy = f"needed: more room ({free / 1e6:.1f} MB are free). Make some there, or raise the quota"
        else:
            remedy = "needed: a folder that this user may write to. Change its permissions, or choose another one"
        raise NotWrittenError(
            number,
            f"{path.name} was not written: {os.strerror(number)}; {remedy}, then run the same command again. What was "
            "there before is unchanged",
            str(path),
        ) from error


def _beneath(name: Any, folder: Path) -> bool:
    """Whether a file that an error names is in a folder; errors that name none are taken to mean it."""
    return not isinstance(name, (str, Path)) or Path(name).absolute().is_relative_to(folder.absolute())


def _number_of(error: Exception) -> int:
    """Number of an operating system's error, which libraries hide in their messages or leave out; 0 for none."""
    if isinstance(error, OSError):
        return error.errno or 0
    if match := re.search(r"\(os error (\d+)\)", str(error)):
        return int(match[1])
    # torch.save says only that its zip file did not come out.
    return errno.ENOSPC if "inline_container" in str(error) else 0


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """Give a name beside ``path`` and remove what was written there if it does not become ``path``."""
    staged = _beside(path)
    try:
        with writing(path):
            clear_unfinished(path.parent, path.name)
            yield staged
    except BaseException:
        remove(staged)
        raise


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a path beside ``path`` to write to and rename it at the end: readers see all of it or nothing.

    Raises:
        OSError: See :func:`writing`.
    """
    with _whole(path) as staged:
        yield staged
        os.replace(staged, path)


@contextmanager
def _staged_folder(path: Path) -> Iterator[Path]:
    """Give an empty folder beside ``path``, which is removed if something goes wrong."""
    with _whole(path) as staged:
        remove(staged)
        staged.mkdir(parents=True)
        yield staged


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Give an empty folder to fill and rename it to ``path`` at the end: ``path`` exists only when it is whole.

    Raises:
        OSError: See :func:`writing`.
    """
    with _staged_folder(path) as staged:
        yield staged
        if path.exists():
            # Aside as a whole: deleted piece by piece, it could be taken for one.
            replaced = _beside(path.with_name(f"{path.name}.replaced"))
            os.replace(path, replaced)
            os.replace(staged, path)
            remove(replaced)
        else:
            os.replace(staged, path)


@contextmanager
def whole_model(folder: Path) -> Iterator[Path]:
    """Give an empty folder to save a model to, whose files replace those of one that was saved to ``folder`` before.

    Weights are removed first, and come last: no mixture of two models ever loads. Other files in ``folder`` stay.

    Raises:
        OSError: See :func:`writing`.
    """
    with _staged_folder(folder / "model") as staged:
        yield staged
        for path in folder.iterdir():
            if _WEIGHTS.fullmatch(path.name):
                remove(path)
        # Last, what a model is loaded by: one file of weights, or the index of several.
        for path in sorted(
            staged.iterdir(), key=lambda path: (bool(_WEIGHTS.fullmatch(path.name)), "-" not in path.name)
        ):
            os.replace(path, folder / path.name)
        staged.rmdir()


def file_digest(path: Path) -> str:
    """SHA-256 (hex) of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def weight_files(folder: str | Path) -> list[Path]:
    """Weight files of a model folder, sorted."""
    return sorted(Path(folder).glob("*.safetensors"))


def weight_digests(folder: str | Path) -> dict[str, str]:
    """SHA-256 of every weight file of a model folder, by file name."""
    return {path.name: file_digest(path) for path in weight_files(folder)}


class Stopwatch:
    """Wall seconds per stage of a run, kept in a file so that a continued run still knows the whole.

    Args:
        path: JSON file; its folder must exist. None keeps nothing, for all processes but the first.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.seconds: dict[str, float] = {}
        if path is not None and path.is_file():
            with suppress(ValueError, AttributeError, TypeError, RecursionError):  # a time that is lost is no disaster
                known = json.loads(path.read_bytes())
                self.seconds = {stage: float(seconds) for stage, seconds in known.items()}

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
