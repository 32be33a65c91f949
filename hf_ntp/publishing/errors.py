"""What may be wrong with a model folder, as exceptions."""

from __future__ import annotations


class RecordError(ValueError):
    """An authorization record that cannot be trusted: what was found, what is needed, how to mend it."""


class VerificationError(RecordError):
    """A model folder that is not what its record or its signature says, or that may hold code."""


def listed(names: list[str], most: int = 8) -> str:
    """Names for a message: without control characters, cut where there are too many."""
    shown = ", ".join(ascii(name)[1:-1][:200] for name in names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
