"""Checkpoints by folder or by name on the Hub: all files of one commit, or the record alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, RemoteEntryNotFoundError

from .errors import RecordError
from .hub_requests import REQUEST_TIMEOUT, bounded_requests, explained
from .record import RECORD_FILE, read_record
from .verify import Verification, verify_folder


class Fetched(NamedTuple):
    """A checkpoint on this machine."""

    folder: Path
    links_into: Path | None
    """Where symbolic links in it may lead: the Hugging Face cache; None for a plain folder."""


def fetch_checkpoint(
    id_or_path: str | Path,
    revision: str | None = None,
    token: str | bool | None = None,
    timeout: float = REQUEST_TIMEOUT,
) -> Fetched:
    """Find a checkpoint's folder, downloading all files of one commit if it is a name on the Hub.

    Raises:
        ValueError: If a revision is given with a folder.
        FileNotFoundError: If it is neither folder nor name.
        HubError: If the Hub cannot be reached or refuses, and the cache does not have it.
    """
    if Path(id_or_path).is_dir():
        _refuse_revision(id_or_path, revision)
        return Fetched(Path(id_or_path), None)
    with _connection(id_or_path, timeout):
        fetched = _in_cache(Path(snapshot_download(str(id_or_path), revision=revision, token=token)))
        _check_download(str(id_or_path), fetched, token)
        return fetched


def verify_checkpoint(
    id_or_path: str | Path,
    revision: str | None = None,
    public_key: str | Path | None = None,
    token: str | bool | None = None,
    timeout: float = REQUEST_TIMEOUT,
) -> Verification:
    """Check a folder or a repository on the Hub as :func:`~hf_ntp.verify_folder` does.

    Raises:
        RecordError: If there is no record, or the files are not those that the owner signed or recorded.
        ValueError: See :func:`fetch_checkpoint`, as for the following.
        FileNotFoundError: If it is neither folder nor name.
        HubError: If it cannot be downloaded.
    """
    fetched = fetch_checkpoint(id_or_path, revision, token, timeout)
    return verify_folder(fetched.folder, public_key, links_into=fetched.links_into)


def fetch_record(
    id_or_path: str | Path,
    revision: str | None = None,
    token: str | bool | None = None,
    timeout: float = REQUEST_TIMEOUT,
) -> dict[str, Any]:
    """Read the record of a folder or repository, of the latter without its weights; nothing is verified.

    Raises:
        RecordError: If there is no valid record.
        ValueError: See :func:`fetch_checkpoint`, as for the following.
        FileNotFoundError: If it is neither folder nor name, or a folder without a record.
        HubError: If it cannot be downloaded.
    """
    if Path(id_or_path).is_dir():
        _refuse_revision(id_or_path, revision)
        return read_record(id_or_path)
    with _connection(id_or_path, timeout):
        try:
            path = hf_hub_download(str(id_or_path), RECORD_FILE, revision=revision, token=token)
        except EntryNotFoundError as error:
            # Raised for what is on the Hub without this file; without a connection, there is a cause.
            if error.__cause__ is not None and not hasattr(error, "response"):
                raise
            raise RecordError(
                f"{id_or_path} holds no {RECORD_FILE}; needed: a model protected with hf_ntp. Check name and revision."
            ) from error
    fetched = _in_cache(Path(path).parent)
    return read_record(fetched.folder, fetched.links_into)


def _check_download(repo_id: str, fetched: Fetched, token: str | bool | None) -> None:
    """Raise an error of the connection where files are missing because the cache, without one, had not all of them.

    Those that the repository itself lacks are for whoever verifies it.
    """
    try:
        names = read_record(*fetched)["files"]
    except (FileNotFoundError, RecordError):
        return
    # The first answer that there is no such file tells that the Hub can be reached.
    with suppress(RemoteEntryNotFoundError):
        for name in names:
            if not (fetched.folder / name).exists():
                hf_hub_download(repo_id, name, revision=fetched.folder.name, token=token)


def _in_cache(snapshot: Path) -> Fetched:
    # The cache keeps <repository>/snapshots/<commit>/ of links into blobs/, of the repository or of the whole cache.
    return Fetched(snapshot, snapshot.parents[2])


def _refuse_revision(id_or_path: str | Path, revision: str | None) -> None:
    if revision is not None:
        raise ValueError(f"found revision={revision!r} with the folder {id_or_path}; needed: a repository's name")


@contextmanager
def _connection(id_or_path: str | Path, timeout: float) -> Iterator[None]:
    try:
        with bounded_requests(timeout), explained(f"loading {id_or_path}"):
            yield
    except HFValidationError as error:
        raise FileNotFoundError(
            f"{id_or_path} is neither a folder nor a name on the Hub; needed: the folder of a protected model, or a "
            "name such as 'org/model'. Check the path."
        ) from error
