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
        ValueError: For folders such as "Train" and "Test", which `datasets` would make one split of, and images whose
            class could not be told.
    """
    root = Path(folder)
    _check_capitals(root)
    card = root / "README.md"
    if card.is_file() and (metadata_load(card) or {}).get("configs"):
        return None
    files = [path.relative_to(root) for path in root.rglob("*") if path.is_file()]
    files = [path for path in files if not any(part.startswith((".", "__")) for part in path.parts)]  # as `datasets`
    images = [path for path in files if path.suffix.lower() in ImageFolder.EXTENSIONS]
    if any(path.stem == "metadata" for path in files) or all(_split_in(path.stem) for path in images):
        return None
    classes = {path.parent for path in images}
    if classes == {Path()} or all(path.name in _SPLIT_OF for path in classes):
        return None
    splits = {path: found for path in classes if (found := _split_above(path))}
    patterns: dict[str, set[str]] = {}
    for split, above in splits.values():
        patterns.setdefault(split, set()).add(f"{glob.escape(above.as_posix())}/**")
    roots = {above for _, above in splits.values()}
    used = [path for path in images if roots.intersection(path.parents)] if splits else images
    _check_classes(folder, used, splits)
    _check_depths(folder, used)
    return {split: sorted(globs) for split, globs in patterns.items()} or {"train": ["**"]}


def _split_above(path: Path) -> tuple[str, Path] | None:
    """Split of a folder of images, and the folder above it whose name says so."""
    found = ((_split_in(above.name), above) for above in reversed(path.parents))
    return next(((split, above) for split, above in found if split), None)


def _check_classes(folder: str, images: list[Path], splits: dict[Path, tuple[str, Path]]) -> None:
    """Refuse folders of one name that do not lie side by side: `datasets` would make one class of them."""
    first: dict[tuple[str, str], Path] = {}
    for path in sorted({image.parent for image in images}):
        split, above = splits.get(path, ("train", Path()))
        if path.parent == above:
            continue
        other = first.setdefault((split, path.name), path)
        if other != path:
            raise ValueError(
                f"{folder!r} has the folders {str(other)!r} and {str(path)!r}: the class of an image is the name of "
                "the folder it is in, so that these would be one; needed: one folder per class and split. Move the "
                "images of each class into one folder."
            )


def _check_depths(folder: str, images: list[Path]) -> None:
    """Refuse folders of whose images `datasets` would take the labels away."""
    shallow, deep = (choose(images, key=lambda path: (len(path.parts), path)) for choose in (min, max))
    if len(shallow.parts) < len(deep.parts):
        raise ValueError(
            f"{folder!r} has images at different depths, such as {str(shallow)!r} and {str(deep)!r}; needed: every "
            "image in a folder that is named after its class, all at one depth. Move or remove those that are not."
        )
    names = {path.parent.name for path in images}
    if len(names) == 1:
        raise ValueError(
            f"all images of {folder!r} are in folders called {names.pop()!r}: the class of an image is the name of "
            "the folder it is in; needed: two classes or more. Move them up if their class is a folder above; "
            "links to folders are not followed."
        )


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
