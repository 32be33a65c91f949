"""From the Hub or a folder: a protected model, checked before any of its files is used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, NamedTuple

import transformers
from transformers import AutoImageProcessor, PreTrainedModel

from .fetching import fetch_checkpoint
from .files import PROCESSOR_FILES
from .hub_requests import REQUEST_TIMEOUT
from .record import RecordError, read_record
from .verify import verify_folder

# Decided here: no code from the repository, safetensors only, and nothing but the verified folder.
_FIXED = {"use_safetensors": True, "local_files_only": True, "output_loading_info": True}
_REFUSED = ("trust_remote_code", *_FIXED)


class Protected(NamedTuple):
    """A protected model with what belongs to it."""

    model: PreTrainedModel
    processor: Any
    """Its image processor, or None if it comes without."""
    record: dict[str, Any] | None
    """Its authorization record; None only with ``verify=False`` and no valid record."""


def load_protected(
    id_or_path: str | Path,
    *,
    revision: str | None = None,
    verify: Literal[True, "digests", False] = True,
    public_key: str | Path | None = None,
    token: str | bool | None = None,
    timeout: float = REQUEST_TIMEOUT,
    **model_kwargs: Any,
) -> Protected:
    """Load a protected model, its processor and its record, after checking that they are what the owner published.

    From the Hub, all files are of one commit; without a connection, or with ``HF_HUB_OFFLINE``, the local cache
    serves. The model is of the class that its config names, one of transformers'; code from the repository never runs.

    Args:
        id_or_path: Folder, or repository on the Hub.
        revision: Branch, tag or commit on the Hub; default: the main branch.
        verify: True checks signature and digests of all files. "digests" checks them against the record only, which
            whoever changed the files may have changed as well. False checks nothing.
        public_key: The owner's key, from a source that you trust; for ``verify=True``.
        token: Token with read access; default: the one of `hf auth login`.
        timeout: Seconds that a request may make no progress.
        model_kwargs: For ``from_pretrained`` of the model.

    Raises:
        RecordError: If there is no record, or the files are not those that the owner signed or recorded.
        ValueError: If arguments do not go together, or the folder holds no model of transformers or only part of one.
        FileNotFoundError: If there is no such folder.
        HubError: If the Hub cannot be reached or refuses, and the cache does not have it.
    """
    _check_arguments(verify, public_key, model_kwargs)
    folder, blobs = fetch_checkpoint(id_or_path, revision, token, timeout)
    record = verify_folder(folder, public_key, links_into=blobs).record if verify else _record_if_valid(folder, blobs)
    try:
        return Protected(_load_model(folder, model_kwargs), _load_processor(folder), record)
    except (LookupError, TypeError, AttributeError, RuntimeError) as error:
        # What transformers raises for settings that it does not expect, or that do not fit the weights.
        raise ValueError(
            f"{folder} cannot be loaded ({type(error).__name__}: {str(error)[:300]}); needed: a model as "
            "save_pretrained writes it. Ask its owner, or check the arguments of from_pretrained."
        ) from error


def _check_arguments(verify: Any, public_key: str | Path | None, model_kwargs: dict[str, Any]) -> None:
    if verify not in (True, "digests", False):
        raise ValueError(f"found verify={verify!r}; needed: True, 'digests' or False")
    if verify is True and public_key is None:
        raise ValueError(
            "found no public_key; needed to check the owner's signature. Pass public_key=... (the owner's key, from a "
            "source that you trust), or verify='digests' to check the files against their record only, which whoever "
            "changed the files could have changed as well."
        )
    if verify is not True and public_key is not None:
        raise ValueError(f"found a public_key with verify={verify!r}, where it is not used; needed: verify=True")
    refused = [name for name in _REFUSED if name in model_kwargs]
    if refused:
        raise ValueError(
            f"found {', '.join(refused)}; load_protected decides that itself: no code from the repository runs, "
            "weights are read as safetensors and from the verified folder alone. Leave it out, or use "
            "from_pretrained, which checks nothing."
        )


def _record_if_valid(folder: Path, links_into: Path | None) -> dict[str, Any] | None:
    try:
        return read_record(folder, links_into)
    except (FileNotFoundError, RecordError):
        return None


def _load_model(folder: Path, model_kwargs: dict[str, Any]) -> PreTrainedModel:
    options: dict[str, Any] = {**model_kwargs, **_FIXED}
    # Typed as the model alone, which it is not with output_loading_info.
    loaded: Any = _model_class(folder).from_pretrained(folder, **options)
    model, report = loaded
    missing = sorted(report["missing_keys"])
    if missing:
        # transformers would go on with random values in their place.
        raise ValueError(
            f"{folder} holds no values for {len(missing)} weights of {type(model).__name__} (first: {missing[0]}); "
            "needed: all. Publish the model as save_pretrained wrote it, and install what its format needs."
        )
    return model


def _model_class(folder: Path) -> type[PreTrainedModel]:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        names = config.get("architectures") or [None]
    except (FileNotFoundError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{folder} holds no readable config.json ({error}); needed: a model saved with save_pretrained"
        ) from error
    found = getattr(transformers, str(names[0]), None)
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
        raise ValueError(
            f"{folder / 'config.json'} names the model class {names[0]!r}; needed: one of transformers' own (version "
            f"{transformers.__version__} here). Upgrade transformers if the class is newer; classes from a repository "
            "are not loaded."
        )
    return found


def _load_processor(folder: Path) -> Any:
    if not any((folder / name).is_file() for name in PROCESSOR_FILES):
        return None
    return AutoImageProcessor.from_pretrained(folder, backend="pil", trust_remote_code=False, local_files_only=True)
