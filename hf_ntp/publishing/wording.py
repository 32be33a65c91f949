"""How numbers and names are written on cards, in tables and on the Space. Needs no torch."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from math import isnan
from typing import Any


def percent(share: float | None, none: str = "") -> str:
    """Write a share as a whole number of percent.

    Args:
        share: Fraction of 1, below 0 and above 1 too; None where there is none.
        none: What stands for None.
    """
    return none if share is None else f"{100 * share:.0f} %"


def interval(bounds: Sequence[float | None], none: str = "", digits: int = 3) -> str:
    """Write an interval with the signs of its bounds.

    Args:
        bounds: Lower and upper one, in any unit; None or NaN where one seed gives none.
        none: What stands for no interval.
        digits: Decimals.
    """
    low, high = bounds
    if low is None or high is None or isnan(low):
        return none
    return f"[{low:+.{digits}f}, {high:+.{digits}f}]"


def domain_names(domains: Iterable[Mapping[str, Any]]) -> str:
    """Name domains in a sentence.

    Args:
        domains: As a record has them.
    """
    return " and ".join(domain["name"] for domain in domains)


def plain(text: str) -> str:
    """Text as Matplotlib shows it as it is: between two dollar signs it would read mathematics."""
    return text.replace("$", r"\$")


def markdown_table(rows: Sequence[Sequence[str]], text: Collection[int] = (0,)) -> str:
    """Write a table in Markdown, its numbers aligned right.

    Args:
        rows: Cells, the head first.
        text: Columns that hold text and no numbers, counted from 0.
    """
    head, *body = rows
    alignment = ["---" if column in text else "---:" for column in range(len(head))]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, alignment, *body))
