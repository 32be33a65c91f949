"""JSON from strangers: one meaning only, bounded in size, depth and numbers."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import Any, NoReturn

# Far beyond what any file of a model folder needs, low enough that parsing and checking stay quick.
_MAX_DEPTH = 64
_MAX_VALUES = 300_000
_MAX_DIGITS = 48


def strict_json(data: bytes) -> Any:
    """Parse JSON that readers cannot understand in two ways.

    Args:
        data: UTF-8; the caller bounds its size.

    Returns:
        Dicts, lists, strings, booleans, None and finite numbers of at most 48 characters.

    Raises:
        ValueError: For anything else: duplicate keys, numbers too large, NaN, deep nesting, too many values.
    """
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_int=_integer,
            parse_float=_float,
            parse_constant=_refuse_constant,
        )
    except RecursionError as error:
        raise ValueError(f"nested deeper than {_MAX_DEPTH} levels") from error
    _check_extent(value)
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"key {key[:80]!r} stands there twice")
        found[key] = value
    return found


def _check_length(digits: str) -> None:
    # Before converting: the time for that grows with the square of the length.
    if len(digits) > _MAX_DIGITS:
        raise ValueError(f"a number of {len(digits)} characters, {digits[:12]}…; at most {_MAX_DIGITS} are read")


def _integer(digits: str) -> int:
    _check_length(digits)
    return int(digits)


def _float(digits: str) -> float:
    _check_length(digits)
    if not math.isfinite(number := float(digits)):
        raise ValueError(f"{digits} is too large a number")
    return number


def _refuse_constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is not a finite number")


def _children(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _check_extent(value: Any) -> None:
    """Level by level rather than recursively, so that depth is refused in the same place by every interpreter."""
    level, values = [value], 1
    for _ in range(_MAX_DEPTH):
        level = [child for parent in level for child in _children(parent)]
        values += len(level)
        if values > _MAX_VALUES:
            raise ValueError(f"more than {_MAX_VALUES} values")
        if not level:
            return
    raise ValueError(f"nested deeper than {_MAX_DEPTH} levels")
