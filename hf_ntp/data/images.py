"""Images as a model takes them: in RGB, resized once by the model's own processor, normalised on access."""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
import torch
from PIL import Image

from .columns import (
    MOST_CLASSES,
    Content,
    check_labels,
    column_values,
    dataset_content,
    find_columns,
    find_image_column,
)

if TYPE_CHECKING:  # slow to import, and needed for annotations only
    from transformers.image_processing_utils import BaseImageProcessor

# Part of the cache key: raise it whenever the stored pixels change for equal input.
PIXELS_VERSION = 1
BATCH_ROWS = 500
# Stored in place of the labels of images that have none.
NO_LABEL = -1
SHAPE = tuple[int, ...]


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any Pillow mode to RGB without clipping deep images or colouring transparent parts.

    16-bit images are scaled down to 8 bits; 32-bit integer ones count as 8-bit if no value exceeds 255, else
    as 16-bit; floating-point ones may range over [0, 1] or [0, 255]. Transparency is composited on white.

    Args:
        image: Image of any mode and size.

    Returns:
        The image in mode RGB, of equal size.

    Raises:
        ValueError: If a floating-point image has NaN or infinite pixels, or values are out of range.
    """
    if image.mode.startswith(("I", "F")):
        return Image.fromarray(_to_uint8(np.asarray(image), image.mode)).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    # Premultiplied modes convert to their plain counterparts only.
    plain = {"La": "LA", "RGBa": "RGBA"}.get(image.mode, image.mode)
    opaque = image.convert(plain).convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, opaque).convert("RGB")


def _to_uint8(values: np.ndarray, mode: str) -> np.ndarray:
    """Scale the values of a deep image to 8 bits."""
    if not np.isfinite(values).all():
        raise ValueError(
            f"found {int((~np.isfinite(values)).sum())} NaN or infinite pixels in an image of mode {mode}; "
            "pixels must be finite. Repair or remove the image."
        )
    low, high = float(values.min()), float(values.max())
    limit = 255 if mode == "F" else 65535
    if low < 0 or high > limit:
        raise ValueError(
            f"found pixels from {low:g} to {high:g} in an image of mode {mode}; they must lie in [0, {limit}]"
            f"{' or [0, 1]' if mode == 'F' else ''}. Rescale the image."
        )
    white = {"F": 1 if high <= 1 else 255, "I": 255 if high <= 255 else 65535}.get(mode, 65535)
    return np.rint(values.astype(np.float64) * (255 / white)).astype(np.uint8)


class PixelScaling:
    """The last two steps of an image processor, rescaling and normalising, on batches of uint8 pixels.

    The steps are done in the processor's own order and precision, so results are equal and not merely close.

    Args:
        image_processor: Image processor with the PIL backend.

    Raises:
        ValueError: If the processor has another backend, lacks settings, or does anything else after resizing
            and cropping.
    """

    def __init__(self, image_processor: BaseImageProcessor) -> None:
        """Read the settings, and try them on one image."""
        check_processor(image_processor)
        settings: Any = image_processor
        self.factor = float(settings.rescale_factor) if settings.do_rescale else 1.0
        mean, std = (settings.image_mean, settings.image_std) if settings.do_normalize else (0.0, 1.0)
        self.mean, self.std = (
            torch.tensor(np.broadcast_to(np.asarray(value, dtype=np.float32), 3).reshape(3, 1, 1).copy())
            for value in (mean, std)
        )
        if _divides_twice(image_processor):
            self.std = self.std * self.std
        self._check_against(image_processor)

    def __call__(self, pixels: np.ndarray) -> torch.Tensor:
        """Return float32 ``[..., 3, height, width]`` model input for uint8 ``pixels`` of equal shape."""
        # Rescaling happens in double precision in transformers, too.
        rescaled = torch.from_numpy(pixels).to(torch.float64).mul_(self.factor)
        return rescaled.to(torch.float32).sub_(self.mean).div_(self.std)

    def _check_against(self, image_processor: BaseImageProcessor) -> None:
        for shape in ((16, 16, 3), (16, 24, 3)):  # who pads may do so after normalising
            levels = np.random.default_rng(0).integers(0, 256, size=shape, dtype=np.uint8)
            probe = Image.fromarray(levels)
            expected = np.asarray(image_processor([probe])["pixel_values"][0], dtype=np.float32)
            found = self(_resized(probe, image_processor)).numpy()
            if found.shape != expected.shape or not np.allclose(found, expected, atol=1e-5):
                raise ValueError(
                    f"{type(image_processor).__name__} does more than resize, crop, rescale and normalise; its "
                    "pixels cannot be stored before normalisation. Use a plain processor of equal size, mean and "
                    "std, such as ViTImageProcessorPil."
                )


def check_processor(image_processor: BaseImageProcessor) -> None:
    """Check that an image processor has the PIL backend and the settings that are needed here.

    Args:
        image_processor: Any image processor.

    Raises:
        ValueError: If it has another backend or lacks settings.
    """
    name, backend = type(image_processor).__name__, getattr(image_processor, "backend", None)
    fix = 'Load it with AutoImageProcessor.from_pretrained(..., backend="pil"), or as a ...ImageProcessorPil.'
    if backend != "pil":
        raise ValueError(f"found {name} with backend {backend!r}; the PIL backend is needed. {fix}")
    needed = ("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")
    if missing := [setting for setting in needed if getattr(image_processor, setting, None) is None]:
        raise ValueError(f"{name} has no {', '.join(missing)}; all of {needed} are needed. Set them. {fix}")


def _divides_twice(image_processor: Any) -> bool:
    """Whether a processor divides by the standard deviation once more, whatever else it does (EfficientNet)."""
    return bool(getattr(image_processor, "include_top", False))


def _resized(image: Image.Image, image_processor: BaseImageProcessor) -> np.ndarray:
    """Return the image resized and cropped by the processor, uint8 ``[3, height, width]``."""
    steps: dict[str, Any] = {"do_rescale": False, "do_normalize": False}
    if _divides_twice(image_processor):
        steps["include_top"] = False
    pixels = np.array(image_processor([image], **steps)["pixel_values"][0])
    if pixels.ndim != 3 or pixels.shape[0] != 3 or pixels.dtype != np.uint8:
        raise ValueError(_shape_problem(image_processor, [pixels.shape], str(pixels.dtype)))
    return pixels


def _shape_problem(image_processor: BaseImageProcessor, shapes: list[SHAPE], dtype: str = "uint8") -> str:
    return (
        f"{type(image_processor).__name__} gives {dtype} images of the shapes {shapes}; uint8 images of one "
        "shape (3, height, width) are needed. Set a fixed size (height and width) or do_center_crop=True, "
        "or use a plain processor such as ViTImageProcessorPil."
    )


def _preprocess(
    dataset: datasets.Dataset, image_processor: BaseImageProcessor, fingerprint: str, num_proc: int | None
) -> datasets.Dataset:
    """Resize and crop all images once, and store them as uint8 pixels.

    The result, with the columns ``pixels`` (``Array3D``, uint8 ``[3, height, width]``) and ``label``, lies in an Arrow
    file in the cache of ``datasets`` and is memory-mapped, so it may exceed memory. The file is named after the
    content and the settings, and found again by later runs.
    """
    if len(dataset) == 0:
        raise ValueError("found a dataset without rows; one image at least is needed. Check its filters.")
    columns = list(find_columns(dataset))
    mode = dataset.features[columns[0]].mode
    # Decoded row by row here, so that an error can say which.
    dataset = dataset.select_columns(columns).with_format(None).cast_column(columns[0], datasets.Image(decode=False))
    shape = _resized(_rgb_row(dataset[0][columns[0]], 0, mode), image_processor).shape
    label = dataset.features[columns[1]]
    features = datasets.Features({"pixels": datasets.Array3D(shape, "uint8"), "label": label})
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "hf_ntp_pixels"
    folder.mkdir(parents=True, exist_ok=True)
    return dataset.map(
        _store_pixels,
        fn_kwargs={"image_processor": image_processor, "shape": shape, "mode": mode},
        input_columns=columns,
        with_indices=True,
        batched=True,
        batch_size=BATCH_ROWS,
        remove_columns=columns,
        features=features,
        num_proc=num_proc,
        # The fingerprint knows values of labels, the file also their type and names.
        cache_file_name=str(folder / f"{fingerprint}-{hashlib.sha256(repr(label).encode()).hexdigest()[:8]}.arrow"),
        new_fingerprint=fingerprint[:32],
        desc="Resizing images",
    )


def _store_pixels(
    images: list[dict[str, Any] | None],
    labels: list[Any],
    rows: list[int],
    image_processor: BaseImageProcessor,
    shape: SHAPE,
    mode: str | None,
) -> dict[str, Any]:
    pixels = np.empty((len(images), *shape), np.uint8)
    # One at a time: decoded photos are large.
    for i, (image, row) in enumerate(zip(images, rows, strict=True)):
        resized = _resized(_rgb_row(image, row, mode), image_processor)
        if resized.shape != shape:
            raise ValueError(_shape_problem(image_processor, [shape, resized.shape]))
        pixels[i] = resized
    return {"pixels": pixels, "label": labels}


def _rgb_row(stored: dict[str, Any] | None, row: int, mode: str | None) -> Image.Image:
    """Decode an image and return ``to_rgb`` of it; errors name the row, and the file where there is one."""
    if stored is None:
        raise ValueError(f"row {row} has no image; every row needs one. Filter such rows out first.")
    place = f"row {row} ({stored['path']})" if stored["path"] else f"row {row}"
    try:
        image = datasets.Image(mode=mode).decode_example(stored)
    except Image.DecompressionBombError as error:
        raise ValueError(
            f"{place}: the image is too large ({error}); needed: fewer pixels. Shrink it, or, if you trust its "
            "source, raise PIL.Image.MAX_IMAGE_PIXELS."
        ) from error
    except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises for broken files
        raise ValueError(f"{place}: the image cannot be read ({error}). Repair or remove it.") from error
    try:
        return to_rgb(image)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error


def check_pixels(data: object, name: str) -> None:
    """Raise ``TypeError`` unless the data, which errors call ``name``, is a :class:`PixelDataset`."""
    if not isinstance(data, PixelDataset):
        raise TypeError(
            f"{name} is {type(data).__name__}; needed: a PixelDataset, whose images are resized once. Make one with "
            "PixelDataset.from_dataset(dataset, image_processor)."
        )


def _pixels_fingerprint(dataset: datasets.Dataset, content: Content, image_processor: BaseImageProcessor) -> str:
    mode = dataset.features[find_image_column(dataset)].mode
    described = [PIXELS_VERSION, image_processor.to_dict(), *([] if mode is None else [mode])]
    settings = json.dumps(described, sort_keys=True, default=str)
    return hashlib.sha256(f"{content.labelled} {settings}".encode()).hexdigest()


class PixelDataset(torch.utils.data.Dataset[dict[str, Any]]):
    """Map-style dataset over stored pixels, normalised on access as the image processor would.

    Args:
        pixels: Dataset with ``pixels`` (``Array3D``, uint8 ``[3, height, width]``) and ``label``, as
            :meth:`from_dataset` makes it.
        image_processor: The image processor that made them.
        fingerprint: Identity of the content and the processor's settings, for records and cache keys.
        content: What images and labels are, without the processor, where known.

    Raises:
        ValueError: If the columns are others, or the processor cannot be used.
    """

    def __init__(
        self,
        pixels: datasets.Dataset,
        image_processor: BaseImageProcessor,
        *,
        fingerprint: str,
        content: Content | None = None,
    ) -> None:
        """Check the columns and view the stored pixels."""
        if not isinstance(pixels.features.get("pixels"), datasets.Array3D) or "label" not in pixels.features:
            raise ValueError(
                f"found columns {list(pixels.features)}; 'pixels' (Array3D) and 'label' are needed. "
                "Use PixelDataset.from_dataset(dataset, image_processor)."
            )
        self.fingerprint = fingerprint
        self.contents = frozenset(() if content is None else (content,))
        self._pixels = pixels
        self._scaling = PixelScaling(image_processor)
        self._labels = np.asarray(column_values(pixels, "label"), dtype=np.int64)
        self.labelled = bool((self._labels != NO_LABEL).all())
        self._map_chunks()

    @classmethod
    def from_dataset(
        cls,
        dataset: datasets.Dataset,
        image_processor: BaseImageProcessor,
        *,
        num_proc: int | None = None,
        labelled: bool = True,
    ) -> PixelDataset:
        """Check the columns and labels of a dataset, resize its images and wrap the result.

        Args:
            dataset: Dataset with an image column and an integer label column, such as a split of
                ``load_domain``.
            image_processor: Image processor with the PIL backend.
            num_proc: Number of processes for resizing.
            labelled: Whether the images have labels. If not, no other column is looked at, and rows have no "labels".

        Returns:
            The pixel dataset.

        Raises:
            TypeError: If it is no dataset but several, or a stream.
            ValueError: If columns, labels, images or the processor cannot be used.
        """
        check_processor(image_processor)
        if not isinstance(dataset, datasets.Dataset):
            raise TypeError(
                f"the dataset is {type(dataset).__name__}; needed: a datasets.Dataset, one split and no stream. "
                "Pass dataset['train'], or read a stream into one with datasets.Dataset.from_list(list(stream))."
            )
        if dataset.format["type"] == "custom":
            raise ValueError(
                "the dataset has a transform of its own (set_transform, with_transform), which would not be applied: "
                "images are resized once and kept; needed: a dataset without one. Remove it with reset_format(); "
                "augmentation goes into source_transform of NTPTrainer."
            )
        if labelled:
            label_column = find_columns(dataset)[1]
            feature, labels = dataset.features[label_column], column_values(dataset, label_column)
            num_labels = feature.num_classes if isinstance(feature, datasets.ClassLabel) else MOST_CLASSES
            check_labels(labels, num_labels, f"dataset with label column {label_column!r}")
        else:
            images = dataset.select_columns(find_image_column(dataset))
            dataset = images.add_column("label", [NO_LABEL] * len(images))
        content = dataset_content(dataset)
        fingerprint = _pixels_fingerprint(dataset, content, image_processor)
        pixels = _preprocess(dataset, image_processor, fingerprint, num_proc)
        return cls(pixels, image_processor, fingerprint=fingerprint, content=content)

    @property
    def labels(self) -> np.ndarray:
        """Labels of all rows, int64 ``[n]`` (a copy)."""
        return self._labels.copy()

    @property
    def class_names(self) -> list[str] | None:
        """Names of the classes, or None where the labels are plain integers."""
        feature = self._pixels.features["label"]
        return list(feature.names) if isinstance(feature, datasets.ClassLabel) else None

    @property
    def num_classes(self) -> int:
        """Number of classes: of names where known, else the largest label plus one."""
        names = self.class_names
        return len(names) if names is not None else int(self._labels.max(initial=-1)) + 1

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self._labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return one row: ``pixel_values``, float32 ``[3, height, width]``, and, if it has one, ``labels``, int."""
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Return several rows at once, much faster than one by one; data loaders call this."""
        pixels = self._scaling(self._read(indices))
        if not self.labelled:
            return [{"pixel_values": image} for image in pixels]
        return [
            {"pixel_values": image, "labels": int(self._labels[index])}
            for image, index in zip(pixels, indices, strict=True)
        ]

    def batches(self, size: int = 256) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """All rows as :meth:`tensors` gives them, ``size`` at a time: as float32 a whole set may exceed memory."""
        for begin in range(0, len(self), size):
            yield self.tensors(range(begin, min(begin + size, len(self))))

    def tensors(self, indices: Sequence[int] | np.ndarray | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return many rows as two tensors.

        Args:
            indices: The rows wanted, in this order; all rows by default.

        Returns:
            Pixel values, float32 ``[n, 3, height, width]``, and labels, int64 ``[n]``.
        """
        rows = np.arange(len(self)) if indices is None else np.asarray(indices, dtype=np.int64)
        values = torch.empty((len(rows), *self._pixels.features["pixels"].shape))
        for start in range(0, len(rows), BATCH_ROWS):
            values[start : start + BATCH_ROWS] = self._scaling(self._read(rows[start : start + BATCH_ROWS]))
        return values, torch.from_numpy(self._labels[rows])

    def _read(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return stored pixels, uint8 ``[n, 3, height, width]``."""
        pixels = np.empty((len(indices), *self._pixels.features["pixels"].shape), dtype=np.uint8)
        every = range(len(self))
        for place, index in enumerate(indices):
            row = every[int(index)]  # a range resolves negative indices and raises IndexError
            chunk = bisect_right(self._starts, row) - 1
            pixels[place] = self._chunks[chunk][row - self._starts[chunk]]
        return pixels

    def _map_chunks(self) -> None:
        """View the chunks of the Arrow table as arrays, without copying them."""
        column = self._pixels.with_format("arrow")[:]["pixels"]
        shape = self._pixels.features["pixels"].shape
        self._chunks = [
            chunk.storage.flatten().flatten().flatten().to_numpy(zero_copy_only=True).reshape(-1, *shape)
            for chunk in column.chunks
        ]
        self._starts = np.cumsum([0, *(len(chunk) for chunk in self._chunks)]).tolist()

    def __getstate__(self) -> dict[str, Any]:
        """Leave the views out: pickling them would copy the pixels into every worker process."""
        return {key: value for key, value in self.__dict__.items() if key not in ("_chunks", "_starts")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore the state and view the pixels again."""
        self.__dict__.update(state)
        self._map_chunks()
