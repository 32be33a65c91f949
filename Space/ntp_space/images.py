"""From what a visitor draws, uploads or picks to the image that the models get."""

from __future__ import annotations

import base64
import io
import logging
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

logger = logging.getLogger(__name__)

DIGITS = [str(digit) for digit in range(10)]
PAPER_SIDE = 280
_PNG_URL = "data:image/png;base64,"
_MAX_DRAWING = 1 << 20
# MNIST's own preparation: the digit fits a box of 20 pixels, its centre of mass is the middle of 28.
_BOX, _SIDE = 20, 28
_FAINTEST = 25
_MAX_PIXELS = 40_000_000
_THUMBNAIL = 96
_PER_DOMAIN = 10


class Example(NamedTuple):
    """A labelled image of a domain."""

    label: str
    path: Path


def read_image(path: str | Path) -> Image.Image:
    """Open an uploaded image as RGB.

    Raises:
        ValueError: If it is not an image, is broken, or is too large.
    """
    from hf_ntp.data.images import to_rgb  # loads torch: seconds, once

    try:
        # These alone: for others, such as PostScript, Pillow would start programs on what a visitor sends.
        with Image.open(path, formats=["PNG", "JPEG", "WEBP", "BMP", "GIF"]) as image:
            if image.width * image.height > _MAX_PIXELS:
                raise ValueError(
                    f"the image has {image.width} x {image.height} pixels; needed: at most "
                    f"{_MAX_PIXELS // 10**6} million. Scale it down."
                )
            return to_rgb(ImageOps.exif_transpose(image))  # as `datasets` turns photographs
    except UnidentifiedImageError as error:
        raise ValueError(
            f"“{Path(path).name}” is not an image that can be read; needed: PNG, JPEG, WebP, BMP or GIF. Convert it."
        ) from error
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"“{Path(path).name}” is damaged or too large to open ({error}); needed: a whole image file. "
            "Save it again."
        ) from error


def read_drawing(drawing: str | None) -> Image.Image | None:
    """Prepare a drawing as MNIST digits were.

    Args:
        drawing: PNG data URL; ink is whatever is darker than the white paper.

    Returns:
        White digit on black, 28 x 28, or None while nothing is drawn.

    Raises:
        ValueError: If it is something else, which only a request that was not made by the page can cause.
    """
    if not drawing:
        return None
    if not isinstance(drawing, str) or not drawing.startswith(_PNG_URL) or len(drawing) > _MAX_DRAWING:
        raise ValueError("found something that is not a drawing; needed: a small PNG. Draw on the paper.")
    try:
        with Image.open(io.BytesIO(base64.b64decode(drawing.removeprefix(_PNG_URL))), formats=["PNG"]) as image:
            if image.size != (PAPER_SIDE, PAPER_SIDE):
                raise ValueError(f"found a drawing of {image.size} pixels; needed: {PAPER_SIDE} x {PAPER_SIDE}.")
            ink = 255 - np.asarray(image.convert("L"))
    except (OSError, SyntaxError) as error:
        raise ValueError(f"the drawing is damaged ({error}); needed: a whole PNG. Draw on the paper.") from error
    return _center(ink) if ink.max(initial=0) >= _FAINTEST else None


def _center(ink: np.ndarray) -> Image.Image:
    """Scale ink to the box and put its centre of mass in the middle."""
    rows, columns = (np.flatnonzero((ink >= _FAINTEST).any(axis)) for axis in (1, 0))
    cut = Image.fromarray(ink).crop((columns[0], rows[0], columns[-1] + 1, rows[-1] + 1))
    scale = _BOX / max(cut.size)
    small = cut.resize([max(1, round(side * scale)) for side in cut.size], Image.Resampling.BOX)
    values = np.asarray(small, dtype=np.float64)
    # Anti-aliased strokes lose contrast when shrunk; MNIST's reach full white.
    values *= 255 / max(values.max(), 1)
    weights = values / values.sum()
    middle_y, middle_x = (
        float((weights.sum(1 - axis) * (np.arange(values.shape[axis]) + 0.5)).sum()) for axis in (0, 1)
    )
    canvas = Image.new("L", (_SIDE, _SIDE))
    left, top = round(_SIDE / 2 - middle_x), round(_SIDE / 2 - middle_y)
    canvas.paste(Image.fromarray(values.astype(np.uint8)), (left, top))
    return canvas.convert("RGB")


def domain_examples(domain: str, cache: Path) -> list[Example]:
    """A few test images of an embedded domain, one per class, kept as files so that later starts are quick.

    Args:
        domain: Name as in the record. Domains that are not embedded have no examples: they would need a download.
        cache: Folder to keep them in.
    """
    folder = cache / "examples" / domain
    if not _plain(domain) or not (folder.is_dir() or _write_examples(domain, folder)):
        return []
    return [Example(path.stem, path) for path in sorted(folder.glob("*.png"))]


def _plain(domain: str) -> bool:
    """Whether the name, which comes from somebody's record, is safe as the name of a folder."""
    return domain.replace("_", "a").replace("-", "a").isalnum()


def _write_examples(domain: str, folder: Path) -> bool:
    from hf_ntp import EMBEDDED_DOMAINS, load_domain  # loads `datasets`: seconds, once
    from hf_ntp.run_folder import whole_folder

    if domain not in EMBEDDED_DOMAINS:
        return False
    try:
        test = load_domain(domain)["test"]
    except ImportError as error:
        logger.warning("no examples of %s: %s", domain, error)
        return False
    labels, names = np.asarray(test["label"]), test.features["label"].names
    with whole_folder(folder) as staged:
        for label in range(min(len(names), _PER_DOMAIN)):
            row = int(np.flatnonzero(labels == label)[0])
            test[row]["image"].save(staged / f"{names[label]}.png")
    return True


def enlarged(image: Image.Image, side: int = _THUMBNAIL) -> Image.Image:
    """Enlarge a small image with visible pixels, so that it is shown as what it is."""
    scale = max(1, side // max(image.size))
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
