"""The authorization record: what a protected model may be used for, and the evidence, in one validated JSON file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator

from ..run_folder import clear_unfinished, whole_file
from .errors import RecordError, VerificationError, listed
from .files import folder_files, read_bounded, regular_file, sha256_of
from .strict_json import strict_json

RECORD_FILE = "authorization.json"
SIGNATURE_FILE = "model.sig"
SCHEMA_VERSION = 2
# A record is a few pages of text; anything larger is not one.
_MAX_BYTES = 4 << 20


def record_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of the record."""
    return json.loads(files("hf_ntp.publishing").joinpath("authorization.schema.json").read_text(encoding="utf-8"))


def validate_record(record: Any) -> None:
    """Check a record against the schema.

    Raises:
        RecordError: Naming the first place that does not fit.
    """
    version = record.get("schema_version") if isinstance(record, dict) else None
    if type(version) is not int or version != SCHEMA_VERSION:
        raise RecordError(
            f"the authorization record has schema_version {repr(version)[:80]}; needed: {SCHEMA_VERSION}. Upgrade "
            "hf_ntp, or ask the owner for a record that this version reads."
        )
    for error in Draft202012Validator(record_schema()).iter_errors(record):
        place = listed(["/".join(map(str, error.absolute_path)) or "the top level"])
        raise RecordError(
            f"the authorization record does not fit its schema at {place}: {error.message[:300]}. Needed: a record "
            "written by hf_ntp; write it anew with write_record."
        )
    if contradictions := list(_contradictions(record)):
        raise RecordError(
            f"the authorization record contradicts itself: {listed(contradictions, 3)}. Needed: a record written by "
            "hf_ntp; write it anew with hf-ntp report."
        )


def _contradictions(record: Mapping[str, Any]) -> Iterator[str]:
    """What a record says in two places, and differently."""
    sides = [[domain["name"] for domain in record[f"{kind}authorized_domains"]] for kind in ("", "un")]
    names = [name for side in sides for name in side]
    if len(set(names)) < len(names):
        yield f"a domain of {names} is named twice"
    accuracy = record["source_accuracy"] or {}
    measured = [found["domain"] for found in accuracy.get("domains", [])]
    tested = [measurement["domain"] for measurement in record["evidence"]]
    if others := [name for name in measured if name not in sides[0]] + [n for n in tested if n not in sides[1]]:
        yield f"measurements are of {others[0]}, which is not among the domains"
    third = record.get("third_domain")
    for measurement in (*record["evidence"], *([third["measurement"]] if third else [])):
        areas = {name: found["protected"]["normalized"] for name, found in measurement["attacks"].items()}
        worst = measurement["worst_case"]
        if areas.get(worst["attack"]) != worst["slc_auc"] or worst["slc_auc"] != max(areas.values()):
            yield f"{worst['attack']} is no attack on {measurement['domain']}, or not the best one"
    sparsity = record["sparsity"]
    layers = sparsity["layers"].values()
    weights, zeros = (sum(layer[key] for layer in layers) for key in ("weights", "zeros"))
    if any(layer["zeros"] > layer["weights"] for layer in layers) or weights != sparsity["prunable_weights"]:
        yield "the layers do not have as many weights as all together"
    elif abs(zeros - sparsity["achieved"] * weights) > 1 + 1e-6 * weights:
        yield f"the layers have {zeros} zeros of {weights} weights, all together a share of {sparsity['achieved']}"


def write_record(folder: str | Path, record: Mapping[str, Any]) -> None:
    """Write a record into a model folder, as its last file: it holds the digests of all others.

    Args:
        folder: Folder of a protected model, complete but for record and signature.
        record: As the schema says; "files" is filled in here.

    Raises:
        RecordError: If it could not be read again: it does not fit the schema, or the folder holds links or odd names.
    """
    clear_unfinished(Path(folder))
    data = encode_record({**record, "files": file_digests(folder)})
    with whole_file(Path(folder) / RECORD_FILE) as staged:
        staged.write_bytes(data)


def encode_record(record: Mapping[str, Any]) -> bytes:
    """Return a record as it is written.

    Raises:
        RecordError: If it could not be read again.
    """
    try:
        data = (json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8")
    except (TypeError, ValueError, RecursionError) as error:
        raise RecordError(
            f"the record cannot be written as JSON ({error}); needed: text and finite numbers."
        ) from error
    validate_record(_parse(data, "the record to write"))
    return data


def read_record(folder: str | Path, links_into: str | Path | None = None) -> dict[str, Any]:
    """Read the record of a model folder and check it against the schema.

    Whether the files are those it speaks of is what :func:`~hf_ntp.verify_folder` checks.

    Args:
        folder: Folder of a protected model.
        links_into: Folder that the record may be a symbolic link into, as in :func:`~hf_ntp.verify_folder`.

    Raises:
        FileNotFoundError: If there is no record.
        RecordError: If it is not valid, or not a regular file.
    """
    path = Path(folder) / RECORD_FILE
    if not os.path.lexists(path):
        raise FileNotFoundError(
            f"{folder} holds no {RECORD_FILE}; needed: a folder that a recipe or hf_ntp.write_folder has made. Of a "
            "model from the Hub, download the whole repository with huggingface_hub.snapshot_download."
        )
    record = _parse(read_bounded(regular_file(path, links_into), _MAX_BYTES), str(path))
    validate_record(record)
    return record


def _parse(data: bytes, what: str) -> Any:
    if len(data) > _MAX_BYTES:
        raise RecordError(f"{what} is larger than {_MAX_BYTES} bytes, more than an authorization record needs.")
    try:
        return strict_json(data)
    except ValueError as error:
        raise RecordError(
            f"{what} is not valid JSON ({str(error)[:300]}); needed: the file as hf_ntp wrote it."
        ) from error


def file_digests(folder: str | Path) -> dict[str, str]:
    """SHA-256 of every file of a model folder but record and signature, by name in the folder.

    Raises:
        VerificationError: If something there is not a regular file with an unambiguous name.
    """
    found = folder_files(folder)
    return sha256_of({name: path for name, path in found.items() if name not in (RECORD_FILE, SIGNATURE_FILE)})


def check_files(record: Mapping[str, Any], digests: Mapping[str, str]) -> None:
    """Compare the files of a folder with those that its record names.

    Args:
        record: As :func:`read_record` gives it.
        digests: SHA-256 by name; record and signature may be among them.

    Raises:
        VerificationError: Naming changed, missing and added files, each under its own word.
    """
    needed: Mapping[str, str] = record["files"]
    found = {name: digest for name, digest in digests.items() if name not in (RECORD_FILE, SIGNATURE_FILE)}
    differing = {
        "changed": [name for name in needed if name in found and found[name] != needed[name]],
        "missing": [name for name in needed if name not in found],
        "added": [name for name in found if name not in needed],
    }
    if any(differing.values()):
        raise VerificationError(
            "the files are not those of the authorization record: "
            + "; ".join(f"{word}: {listed(names)}" for word, names in differing.items() if names)
            + ". Needed: the very files that the owner recorded. Download them anew; as the owner, write the "
            "record anew (hf-ntp report FOLDER), then sign."
        )
