"""The authorization record: what a protected model may be used for, and the evidence, in one validated JSON file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any, NoReturn

from jsonschema import Draft202012Validator

from ..run_folder import file_digest, whole_file

RECORD_FILE = "authorization.json"
SIGNATURE_FILE = "model.sig"
SCHEMA_VERSION = 2
# A record is a few pages of text; anything larger is not one.
_MAX_BYTES = 4 << 20


class RecordError(ValueError):
    """An authorization record that cannot be trusted: what was found, what is needed, how to mend it."""


def record_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of the record."""
    return json.loads(files("hf_ntp.publishing").joinpath("authorization.schema.json").read_text())


def validate_record(record: Any) -> None:
    """Check a record against the schema.

    Raises:
        RecordError: Naming the first place that does not fit.
    """
    version = record.get("schema_version") if isinstance(record, dict) else None
    if version != SCHEMA_VERSION:
        raise RecordError(
            f"the authorization record has schema_version {version!r}; needed: {SCHEMA_VERSION}. Upgrade hf_ntp, or "
            "ask the owner for a record that this version reads."
        )
    for error in Draft202012Validator(record_schema()).iter_errors(record):
        place = "/".join(map(str, error.absolute_path)) or "the top level"
        raise RecordError(
            f"the authorization record does not fit its schema at {place}: {error.message[:300]}. Needed: a record "
            "written by hf_ntp; write it anew with write_record."
        )


def write_record(folder: str | Path, record: Mapping[str, Any]) -> None:
    """Write a record into a model folder, as its last file: it holds the digests of all others.

    Args:
        folder: Folder of a protected model, complete but for record and signature.
        record: As the schema says; "files" is filled in here.

    Raises:
        RecordError: If it does not fit the schema.
    """
    record = json.loads(json.dumps({**record, "files": file_digests(folder)}, allow_nan=False))
    validate_record(record)
    with whole_file(Path(folder) / RECORD_FILE) as staged:
        staged.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_record(folder: str | Path) -> dict[str, Any]:
    """Read the record of a model folder and check it against the schema.

    Whether the files are those it speaks of is what :func:`~hf_ntp.verify_folder` checks.

    Raises:
        FileNotFoundError: If there is no record.
        RecordError: If it is not valid.
    """
    path = Path(folder) / RECORD_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} holds no {RECORD_FILE}; needed: the folder of a model protected with hf_ntp. Download the "
            "whole repository with huggingface_hub.snapshot_download."
        )
    if path.stat().st_size > _MAX_BYTES:
        raise RecordError(f"{path} is larger than {_MAX_BYTES} bytes: not an authorization record.")
    try:
        record = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise RecordError(f"{path} is not valid JSON ({error}); needed: the file as hf_ntp wrote it.") from error
    validate_record(record)
    return record


def file_digests(folder: str | Path) -> dict[str, str]:
    """SHA-256 of every file of a model folder but record and signature, by path in the folder."""
    folder = Path(folder)
    paths = sorted(path for path in folder.rglob("*") if not path.is_dir())
    names = [path.relative_to(folder).as_posix() for path in paths]
    return {
        name: file_digest(path)
        for name, path in zip(names, paths, strict=True)
        if name not in (RECORD_FILE, SIGNATURE_FILE)
    }


def _refuse_constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is not a finite number")
