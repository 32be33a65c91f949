"""Which images of a local folder are which split, from the names of the folders above their class.

`datasets` looks for the words of splits in the name of any folder, also of a class: it takes "bullet_train" and
"test_tube" for splits.
"""

from __future__ import annotations

import glob
import re
from pathlib import Path

from datasets.data_files import SPLIT_KEYWORDS
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from huggingface_hub import metadata_load

# What `datasets` splits names at.
_BETWEEN_WORDS = re.compile("[-._ 0-9]+")
_SPLIT_OF = {word: str(split) for split, words in SPLIT_KEYWORDS.items() for word in words}


def split_patterns(folder: str) -> dict[str, list[str]] | None:
    """Files of every split of a folder with one subfolder of images per class, as ``data_files`` of `load_dataset`.

    Args:
        folder: Path of the folder.

    Returns:
        Patterns relative to the folder, by split; None for everything else (no images in subfolders, a metadata file,
        a card that says which files are which, splits in the names of all files), where `datasets` has its own rules.

    Raises:
        ValueError: For folders such as "Train" and "Test", which `datasets` would make one split of.
    """
    root = Path(folder)
    _check_capitals(root)
    card = root / "README.md"
    if card.is_file() and (metadata_load(card) or {}).get("configs"):
        return None
    files = [path.relative_to(root) for path in root.rglob("*") if path.is_file()]
    images = [path for path in files if path.suffix.lower() in ImageFolder.EXTENSIONS]
    if any(path.stem == "metadata" for path in files) or all(_split_in(path.stem) for path in images):
        return None
    classes = {path.parent for path in images}
    if Path() in classes or all(path.name in _SPLIT_OF for path in classes):
        return None
    patterns: dict[str, set[str]] = {}
    for path in classes:
        for above in reversed(path.parents):
            if split := _split_in(above.name):
                patterns.setdefault(split, set()).add(f"{glob.escape(above.as_posix())}/**")
                break
    return {split: sorted(found) for split, found in patterns.items()} or {"train": ["**"]}


def _split_in(name: str) -> str | None:
    return next((_SPLIT_OF[word] for word in _BETWEEN_WORDS.split(name) if word in _SPLIT_OF), None)


def _check_capitals(root: Path) -> None:
    names = sorted(path.name for path in root.iterdir() if path.is_dir())
    capitals = [name for name in names if name.lower() in _SPLIT_OF and name != name.lower()]
    if capitals and any(name.lower().startswith("train") for name in names):
        raise ValueError(
            f"{str(root)!r} has the folders {names}, of which {capitals} are no splits for their capital letters; "
            f"needed: lower case, or their images would be one split. Rename {capitals[0]!r} to "
            f"{capitals[0].lower()!r}."
        )
