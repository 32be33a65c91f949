"""What a model folder may hold: data only, so that loading it runs nobody's code."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors import SafetensorError, safe_open

from .errors import VerificationError, listed
from .files import folder_files, read_bounded
from .record import RECORD_FILE, SIGNATURE_FILE
from .strict_json import strict_json

_NAMES = {RECORD_FILE, SIGNATURE_FILE, "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE"}
# No .svg: browsers run the scripts in it.
_TYPES = {".json", ".jpeg", ".jpg", ".md", ".png", ".safetensors", ".txt", ".yaml", ".yml"}
# Known to run code when loaded: named as such, since these are what a poisoned model comes as.
_PICKLES = (
    ".bin .ckpt .dill .h5 .hdf5 .joblib .keras .msgpack .npy .npz .onnx .pb .pickle .pkl .pt .pt2 .pte .pth .tflite"
)
_PROGRAMS = (
    ".7z .bat .bz2 .class .cmd .dll .dylib .egg .exe .gz .html .ipynb .jar .jinja .js .lua .php .pl .ps1 .py .pyc "
    ".pyd .pyi .pyx .rar .rb .sh .so .svg .tar .tgz .whl .xz .zip"
)
# Entries by which transformers or diffusers fetch Python files and run them.
_REMOTE_CODE = {"auto_map", "custom_generate", "custom_pipeline", "custom_pipelines", "trust_remote_code"}
# Values with a slash name a repository of compiled kernels, which would be fetched and run.
_KERNELS = ("attn_implementation", "experts_implementation")
# Enough for a tokenizer; a hostile file of this size still parses within a few hundred MB of memory.
_MAX_JSON_BYTES = 8 << 20


def check_contents(folder: str | Path, links_into: str | Path | None = None) -> dict[str, Path]:
    """Refuse a model folder with anything but data in it; file types are judged before any file is opened.

    Args:
        folder: Folder of a model.
        links_into: Folder that symbolic links may lead into, as in :func:`~hf_ntp.verify_folder`.

    Returns:
        Path to read by name in the folder, record and signature included.

    Raises:
        VerificationError: For files that are not plain data, and for configurations that ask for code.
    """
    files = folder_files(folder, links_into)
    _check_types(folder, files)
    for name, path in files.items():
        suffix = _suffix(name)
        if suffix == ".json" and name != RECORD_FILE:
            _check_json(name, path, files)
        elif suffix == ".safetensors":
            _check_safetensors(name, path)
    return files


def _suffix(name: str) -> str:
    return PurePosixPath(name).suffix.lower()


def _check_types(folder: str | Path, names: Collection[str]) -> None:
    refused = [name for name in names if name not in _NAMES and _suffix(name) not in _TYPES]
    kinds = {
        "pickle-based or in another format that can run code when loaded": _PICKLES,
        "programs, scripts or archives": _PROGRAMS,
    }
    for kind, suffixes in kinds.items():
        if found := [name for name in refused if _suffix(name) in suffixes.split()]:
            raise VerificationError(
                f"{folder} holds files that are {kind}: {listed(found)}; needed: weights as *.safetensors, no code. "
                "Do not load this folder; as the owner, write what is published with hf_ntp.write_folder, or remove "
                "these files."
            )
    if refused:
        raise VerificationError(
            f"{folder} holds files that a model folder does not need: {listed(refused)}; needed: only "
            f"{', '.join(sorted(_TYPES))}, {SIGNATURE_FILE} and a licence. Remove them; verify a download of "
            "snapshot_download rather than a git clone."
        )


def _check_json(name: str, path: Path, files: Mapping[str, Path]) -> None:
    try:
        value = strict_json(read_bounded(path, _MAX_JSON_BYTES))
    except VerificationError:
        raise
    except ValueError as error:
        raise VerificationError(
            f"{name} is not valid JSON ({str(error)[:300]}); needed: a file as save_pretrained writes it."
        ) from error
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, list):
            pending.extend(item)
        elif isinstance(item, dict):
            pending.extend(item.values())
            _check_entries(name, item, files)


def _check_entries(name: str, entries: Mapping[str, Any], files: Mapping[str, Path]) -> None:
    for key, value in entries.items():
        kernel = key.endswith(_KERNELS) and "/" in str(value)
        if (key in _REMOTE_CODE and value) or kernel:
            raise VerificationError(
                f"{name} asks for code from elsewhere, {key}: {listed([str(value)])}; needed: a model that "
                "transformers knows by itself. Do not load this folder; as the owner, remove the entry."
            )
        if key == "weight_map":
            shards = value.values() if isinstance(value, dict) else [value]
            # transformers joins these to the folder's path as they are: "../x" would leave the folder.
            inside = {str(PurePosixPath(name).parent / str(shard)): str(shard) for shard in shards}
            if wrong := [shard for shard_name, shard in inside.items() if not _is_shard(shard, shard_name, files)]:
                raise VerificationError(
                    f"{name} names weights in {listed(wrong)}; needed: *.safetensors files beside it. Download the "
                    "folder anew; as the owner, save the model again with save_pretrained."
                )


def _is_shard(shard: str, shard_name: str, files: Mapping[str, Path]) -> bool:
    return "/" not in shard and shard_name in files and _suffix(shard) == ".safetensors"


def _check_safetensors(name: str, path: Path) -> None:
    try:
        with safe_open(path, framework="numpy") as tensors:
            tensors.keys()
    except (SafetensorError, ValueError, OSError) as error:
        raise VerificationError(
            f"{name} is not a whole safetensors file ({str(error)[:200]}). Download it anew; as the owner, save the "
            "model again with save_pretrained."
        ) from error
