"""What every benchmark does with what it found: files that are whole, and tables in the README."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hf_ntp.run_folder import whole_file

README = Path(__file__).parents[1] / "README.md"


def write_results(results: dict[str, Any], rows: str, out: Path) -> None:
    """Write results.json and table.md, each whole or not at all: what every benchmark does after every run."""
    out.mkdir(parents=True, exist_ok=True)
    for name, text in (("results.json", json.dumps(results, indent=1, allow_nan=False)), ("table.md", rows)):
        with whole_file(out / name) as staged:
            staged.write_text(text + "\n")


def into_readme(name: str, rows: str) -> None:
    """Replace the table of a name in the README: what stands between ``<!-- name table -->`` and its end."""
    marks = f"<!-- {name} table -->\n", f"<!-- end of {name} table -->"
    before, begin, rest = README.read_text().partition(marks[0])
    _, end, after = rest.partition(marks[1])
    if not (begin and end):
        raise ValueError(f"{README} has no place for the table {name}; needed: {' and '.join(map(str.strip, marks))}.")
    with whole_file(README) as staged:
        staged.write_text(f"{before}{begin}{rows}\n\n{end}{after}")


def rounded(value: Any) -> Any:
    """Round every number of a JSON tree to four digits: seeds scatter by far more."""
    if isinstance(value, dict):
        return {key: rounded(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(part) for part in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value
