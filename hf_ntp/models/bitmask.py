"""Tensors with many zeros in a safetensors file: one bit per entry says whether it is there, then what is there.

"Zero" is the bit pattern 0, so that -0.0 and NaN come back bit for bit. The file is an ordinary safetensors file,
which cannot run code. Its metadata lists the packed tensors with their shapes; readers check all of it.

A packed tensor's values have the name of the tensor itself: whoever takes the file for an ordinary one gets an error
about sizes, not a model with random weights.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

_METADATA_KEY = "ntp_bitmask"
_VERSION = 1
_MASK = ".ntp_mask"
# Bytes that one more tensor costs in the file's header, roughly: its name, dtype, shape and offsets.
_ENTRY_BYTES = 256
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class PackedTensor(NamedTuple):
    """A tensor without its zeros."""

    mask: Tensor
    """uint8 [ceil(N / 8)]: bit i % 8 (1 is the lowest) of byte i // 8 is set where flat entry i is not zero."""
    values: Tensor
    """[K] in the tensor's dtype: what is not zero, in row-major order."""


def _as_integers(tensor: Tensor) -> Tensor:
    return tensor.view(_INTEGERS[tensor.element_size()])


def pack_nonzeros(tensor: Tensor) -> PackedTensor:
    """Split a tensor of any shape and real dtype into a mask of bits and the values whose bits are not all zero."""
    flat = tensor.detach().cpu().flatten()
    present = _as_integers(flat) != 0
    mask = torch.from_numpy(np.packbits(present.numpy(), bitorder="little"))
    # Chosen as integers: not every dtype can be indexed.
    return PackedTensor(mask, _as_integers(flat)[present].view(flat.dtype))


def positive_zeros(tensor: Tensor) -> Tensor:
    """Return a copy with 0.0 for every -0.0, and all other bits as they are."""
    return torch.where(tensor == 0, torch.zeros_like(tensor), tensor)


def unpack_nonzeros(packed: PackedTensor, shape: Sequence[int]) -> Tensor:
    """Put the tensor together again, bit for bit.

    Args:
        packed: What :func:`pack_nonzeros` gave, or what somebody claims it gave.
        shape: Of the tensor.

    Raises:
        ValueError: If mask, values and shape do not fit each other, or bits behind the last entry are set.
    """
    mask, values = packed
    if not all(type(size) is int and size >= 0 for size in shape) or math.prod(filter(None, shape)) >= 2**63:
        raise ValueError(f"the shape is {str(list(shape))[:80]}; needed: sizes of a tensor.")
    entries = math.prod(shape)
    if mask.dtype != torch.uint8 or list(mask.shape) != [-(-entries // 8)]:
        raise ValueError(
            f"the mask is {mask.dtype} {list(mask.shape)}; needed: torch.uint8 [{-(-entries // 8)}], a bit for each "
            f"of the {entries} entries."
        )
    if entries % 8 and int(mask[-1]) >> entries % 8:
        raise ValueError(f"the mask has bits set behind its {entries} entries; needed: zeros there.")
    present = np.unpackbits(mask.numpy(), count=entries, bitorder="little")
    if list(values.shape) != [int(present.sum())]:
        raise ValueError(f"the values are {list(values.shape)}; needed: [{present.sum()}], one for each bit set.")
    flat = torch.zeros(entries, dtype=values.dtype)
    _as_integers(flat)[torch.from_numpy(present).bool()] = _as_integers(values)
    return flat.reshape(tuple(shape))


def _pays(tensor: Tensor, packed: PackedTensor) -> bool:
    return packed.mask.nbytes + packed.values.nbytes + _ENTRY_BYTES < tensor.nbytes


def write_bitmask_file(tensors: Mapping[str, Tensor], path: Path) -> int:
    """Write tensors by name, packed where that makes the file smaller; only floating-point tensors are packed.

    Returns:
        How many tensors were packed.

    Raises:
        ValueError: If a tensor has a name that means something in the file.
    """
    if reserved := [name for name in tensors if name.endswith(_MASK)]:
        raise ValueError(f"tensors are named {reserved[:3]}; needed: names that do not end in {_MASK}.")
    stored: dict[str, Tensor] = {}
    shapes: dict[str, list[int]] = {}
    for name, tensor in tensors.items():
        packed = pack_nonzeros(tensor) if tensor.is_floating_point() else None
        if packed is not None and _pays(tensor, packed):
            stored[name + _MASK], stored[name] = packed
            shapes[name] = list(tensor.shape)
        else:
            stored[name] = tensor
    notes = json.dumps({"version": _VERSION, "shapes": shapes})
    save_file(stored, path, metadata={"format": "pt", _METADATA_KEY: notes})
    return len(shapes)


def read_bitmask_file(path: Path) -> dict[str, Tensor]:
    """Read all tensors of a file that :func:`write_bitmask_file` wrote, dense, on the CPU.

    A file cannot ask for more memory than 64 times its own size: every entry has its bit in the file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, of another kind, or was not written by :func:`write_bitmask_file`.
    """
    try:
        with safe_open(path, framework="pt") as file:
            notes = (file.metadata() or {}).get(_METADATA_KEY)
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}). Download or write it anew.") from error
    try:
        tensors = {name: _take(stored, name, shape) for name, shape in _noted_shapes(notes).items()}
        if left := sorted(name for name in stored if name.endswith(_MASK)):
            raise ValueError(f"{left[:3]} belong to no tensor that the file lists; needed: every packed one listed.")
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error} Download it or write it (compress_folder) anew.") from error
    return tensors | stored


def _noted_shapes(notes: str | None) -> dict[str, list[Any]]:
    if notes is None:
        raise ValueError(f"its metadata has no {_METADATA_KEY!r}; needed: a file that compress_folder wrote.")
    try:
        found = json.loads(notes)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its list of packed tensors is no JSON ({error}).") from error
    if not isinstance(found, dict) or found.get("version") != _VERSION:
        raise ValueError(f"its list of packed tensors begins with {notes[:40]!r}; needed: version {_VERSION}.")
    shapes = found.get("shapes")
    if not isinstance(shapes, dict) or not all(isinstance(shape, list) for shape in shapes.values()):
        raise ValueError("its list of packed tensors has no shapes by name.")
    return shapes


def _take(stored: dict[str, Tensor], name: str, shape: Sequence[Any]) -> Tensor:
    """Unpack one tensor and take its two parts out of ``stored``."""
    if missing := [part for part in (name + _MASK, name) if part not in stored]:
        raise ValueError(f"{' and '.join(missing)} missing; needed: {name + _MASK} (mask) and {name} (values).")
    packed = PackedTensor(stored.pop(name + _MASK), stored.pop(name))
    if not packed.values.is_floating_point():
        raise ValueError(f"the values of {name} are {packed.values.dtype}; needed: a floating-point type.")
    try:
        return unpack_nonzeros(packed, shape)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
