"""Is this folder what its owner published, and safe to load?"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from .contents import check_contents
from .errors import RecordError, VerificationError
from .files import sha256_of
from .record import SIGNATURE_FILE, check_files, read_record
from .signing import check_public_key, check_signature


class Verification(NamedTuple):
    """A folder that passed.

    Attributes:
        record: The authorization record.
        signed: Whether the signature was checked with the key given. Without it, digests show damage but not who wrote
            the record.
        files: Number of files whose digests were compared, record included.
    """

    record: dict[str, Any]
    signed: bool
    files: int


def verify_folder(
    folder: str | Path, public_key: str | Path | None = None, links_into: str | Path | None = None
) -> Verification:
    """Check a model folder before loading it; nothing in it is run or unpickled.

    In this order: it holds only data (by type, before any file is opened; then configurations that ask for code and
    broken safetensors files are refused), its files are those of its record, and its signature is by the owner's key
    over exactly these files. The folder must not change between this and loading.

    Args:
        folder: Folder of a protected model.
        public_key: PEM file of the owner, got from the owner and not from the folder; None: no signature is checked.
        links_into: Folder that symbolic links may lead into; None: no links. For a snapshot in the Hugging Face cache
            give the cache folder, ``huggingface_hub.constants.HF_HUB_CACHE``.

    Returns:
        Record, whether a signature was checked, and how much was compared.

    Raises:
        VerificationError: Saying what was found, what was needed and what to do.
    """
    try:
        if public_key is not None:
            # First, so that a mistyped path does not cost a pass over all the weights.
            check_public_key(public_key)
        files = check_contents(folder, links_into)
        files.pop(SIGNATURE_FILE, None)
        record = read_record(folder, links_into)
        digests = sha256_of(files)
        check_files(record, digests)
        if public_key is not None:
            check_signature(folder, public_key, digests, links_into)
    except VerificationError:
        raise
    except FileNotFoundError as error:
        raise VerificationError(str(error)) from error
    except OSError as error:
        raise VerificationError(f"{folder} cannot be read ({error}). Download it anew.") from error
    except RecordError as error:
        raise VerificationError(str(error)) from error
    return Verification(record, public_key is not None, len(files))
