"""A visitor's own learning curves: reading them from text or files, scoring and drawing them."""

from __future__ import annotations

import csv
import io
import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import numpy as np
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from hf_ntp.functional import Interval

UNITS = {
    "normalized": "mean accuracy gap, comparable across ranges of sizes",
    "decades": "area over log10 of the size",
    "nats": "area over the natural logarithm, as in the NTP paper's notebooks",
}
FORMATS = (
    "a CSV file with the columns size, checkpoint, scratch and (for several seeds) seed, or a JSON file "
    '{"sizes": [10, 100], "checkpoint": [[0.5, 0.7]], "scratch": [[0.3, 0.6]]}'
)
_MAX_BYTES = 1 << 20
_MAX_CELLS = 10_000
_MAX_SIZE = 10**12
_MARKS = str.maketrans(dict.fromkeys(";,\t[]", " "))


class Curves(NamedTuple):
    """Two learning curves on one grid."""

    sizes: list[int]
    checkpoint: list[list[float]]
    """One list per seed."""
    scratch: list[list[float]]


def parse_text(sizes: str, checkpoint: str, scratch: str) -> Curves:
    """Read curves as typed: one line per seed, one accuracy per size, separated by spaces or commas.

    Raises:
        ValueError: If something is not a number or missing.
    """
    rows = _rows(sizes, "sample sizes")
    if len(rows) > 1:
        raise ValueError(f"the sample sizes are {len(rows)} lines; needed: one line, such as 10 30 100.")
    curves = _rows(checkpoint, "checkpoint"), _rows(scratch, "scratch")
    return _checked(rows[0], *curves)


def parse_file(path: str | Path) -> Curves:
    """Read curves from a CSV or JSON file.

    Raises:
        ValueError: If the file is something else.
    """
    path = Path(path)
    if path.stat().st_size > _MAX_BYTES:
        raise ValueError(f"“{path.name}” is larger than 1 MB; needed: {FORMATS}.")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"“{path.name}” is not a text file; needed: {FORMATS}.") from error
    return _from_json(text, path.name) if text.lstrip()[:1] in ("{", "[") else _from_csv(text, path.name)


def score(curves: Curves) -> dict[str, Interval]:
    """SLC-AUC in every unit, with 95 % intervals over seeds.

    Raises:
        ValueError: If the curves cannot be compared.
    """
    from hf_ntp.functional import confidence_interval, slc_auc  # loads torch and SciPy: seconds, once

    areas = slc_auc(curves.checkpoint, curves.scratch, curves.sizes)._asdict()
    return {unit: confidence_interval(areas[unit]) for unit in UNITS}


def draw(curves: Curves) -> Figure:
    """Draw both curves and the area between them."""
    figure = Figure(figsize=(7, 4.2), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    styles = {"checkpoint": ("#00798c", "-", "o"), "scratch": ("#555555", "--", "s")}
    for name, (color, line, marker) in styles.items():
        rows = np.asarray(getattr(curves, name))
        axes.plot(curves.sizes, rows.mean(0), line, color=color, marker=marker, label=name)
        if len(rows) > 1:
            axes.fill_between(curves.sizes, rows.min(0), rows.max(0), color=color, alpha=0.12, linewidth=0)
    ours, scratch = (np.mean(rows, axis=0) for rows in (curves.checkpoint, curves.scratch))
    for helps, color in ((ours >= scratch, "#d1495b"), (ours <= scratch, "#30a46c")):
        axes.fill_between(curves.sizes, ours, scratch, where=helps, interpolate=True, color=color, alpha=0.3)
    axes.set_xscale("log")
    axes.set_xticks(curves.sizes, [f"{size:,}" for size in curves.sizes])
    axes.minorticks_off()
    axes.set_xlabel("labelled samples")
    axes.set_ylabel("accuracy")
    axes.set_title("red: the checkpoint helps · green: it is worse than training from scratch", fontsize=10)
    axes.grid(alpha=0.25)
    axes.legend(loc="lower right", fontsize=9, title="mean, min-max of seeds" if len(curves.scratch) > 1 else None)
    return figure


def _rows(text: str, what: str) -> list[list[float]]:
    lines = [line.translate(_MARKS).split() for line in (text or "").splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"no {what} given; needed: numbers, such as 0.31 0.52 0.80, a line per seed.")
    return [[_number(word, what) for word in line] for line in lines]


def _number(word: Any, what: str) -> float:
    if isinstance(word, bool) or not isinstance(word, (str, int, float)):
        raise ValueError(f"{what}: found {str(word)[:40]!r}; needed: a number, such as 0.52.")
    try:
        value = float(word)
    except (ValueError, OverflowError) as error:
        raise ValueError(
            f"{what}: found {str(word)[:40]!r}; needed: a number with a decimal point, such as 0.52."
        ) from error
    if not math.isfinite(value):
        raise ValueError(f"{what}: found {value}; needed: a finite number. Drop failed runs.")
    return value


def _checked(sizes: Sequence[float], checkpoint: list[list[float]], scratch: list[list[float]]) -> Curves:
    """Check shapes here, where a message can speak of lines and seeds."""
    if any(size != int(size) or size > _MAX_SIZE for size in sizes):
        raise ValueError(f"the sample sizes are {_short(sizes)}; needed: whole numbers of labelled samples.")
    if len(sizes) * (len(checkpoint) + len(scratch)) > _MAX_CELLS:
        raise ValueError(f"these are more than {_MAX_CELLS:,} accuracies; needed: fewer. Average over some seeds.")
    for name, rows in (("checkpoint", checkpoint), ("scratch", scratch)):
        for seed, row in enumerate(rows, start=1):
            if len(row) != len(sizes):
                raise ValueError(
                    f"{name}, seed {seed}: found {len(row)} accuracies for {len(sizes)} sample sizes; needed: one "
                    "accuracy per size. Measure both curves on the same sizes."
                )
            if outside := [value for value in row if not 0 <= value <= 1]:
                raise ValueError(
                    f"{name}, seed {seed}: found {outside[0]:g}; needed: accuracies between 0 and 1. Divide "
                    "percentages by 100."
                )
    if len(checkpoint) != len(scratch):
        raise ValueError(
            f"found {len(checkpoint)} seed(s) of the checkpoint and {len(scratch)} of scratch; needed: the same "
            "seeds of both, so that they can be compared pair by pair."
        )
    return Curves([int(size) for size in sizes], checkpoint, scratch)


def _short(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values[:12])


def _from_json(text: str, name: str) -> Curves:
    try:
        content = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"“{name}” is not valid JSON ({error}); needed: {FORMATS}.") from error
    if not isinstance(content, Mapping) or not {"sizes", "checkpoint", "scratch"} <= content.keys():
        found = ", ".join(map(str, list(content)[:8])) if isinstance(content, Mapping) else type(content).__name__
        raise ValueError(f"“{name}” holds {found[:200] or 'nothing'}; needed: {FORMATS}.")
    sizes = [_number(value, "sample sizes") for value in _list(content["sizes"], "sizes")]
    return _checked(sizes, *(_seeds(content[key], key) for key in ("checkpoint", "scratch")))


def _seeds(rows: Any, name: str) -> list[list[float]]:
    """Read one curve, or a list of one curve per seed."""
    rows = _list(rows, name)
    nested = rows if rows and isinstance(rows[0], list) else [rows]
    return [[_number(value, name) for value in _list(row, name)] for row in nested]


def _list(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"{name}: found {str(value)[:40]!r}; needed: a list of numbers, such as [0.31, 0.52, 0.80].")
    return value


def _from_csv(text: str, name: str) -> Curves:
    first = text.partition("\n")[0]
    mark = max(",;\t", key=first.count)
    # seed -> size -> (checkpoint, scratch), in the order of the file
    points: dict[str, dict[float, tuple[float, float]]] = defaultdict(dict)
    try:
        # Excel for the Macintosh ends lines with \r.
        table = csv.DictReader(io.StringIO(text, newline=None), delimiter=mark, skipinitialspace=True)
        columns = [str(column).strip().lower() for column in table.fieldnames or []]
        if not {"size", "checkpoint", "scratch"} <= set(columns):
            raise ValueError(f"“{name}” has the columns {', '.join(columns)[:200] or '(none)'}; needed: {FORMATS}.")
        table.fieldnames = columns
        for line, row in enumerate(table, start=2):
            size = _number(row["size"], f"line {line}, size")
            seed = (row.get("seed") or "").strip()
            if size in points[seed]:
                raise ValueError(
                    f"line {line}: size {size:g} comes twice for seed {seed or '(none)'}; needed: one line per seed "
                    "and size. Add a column “seed”."
                )
            pair = [_number(row[key], f"line {line}, {key}") for key in ("checkpoint", "scratch")]
            points[seed][size] = (pair[0], pair[1])
    except csv.Error as error:
        raise ValueError(f"“{name}” is not valid CSV ({error}); needed: {FORMATS}.") from error
    if not points:
        raise ValueError(f"“{name}” has no lines below its header; needed: {FORMATS}.")
    sizes = sorted({size for rows in points.values() for size in rows})
    for seed, rows in points.items():
        if missing := [size for size in sizes if size not in rows]:
            raise ValueError(
                f"seed {seed or '(none)'} lacks the sizes {_short(missing)}; needed: the same sizes for all seeds."
            )
    curves = [[[rows[size][side] for size in sizes] for rows in points.values()] for side in (0, 1)]
    return _checked(sizes, *curves)


def _refuse_constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is not a finite number")
