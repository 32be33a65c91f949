"""RGB conversion, preprocessing once, and pixels equal to the image processor's."""

from __future__ import annotations

import pickle
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoImageProcessor,
    CLIPImageProcessorPil,
    ConvNextImageProcessorPil,
    EfficientNetImageProcessorPil,
    SamImageProcessorPil,
    ViTImageProcessorPil,
)

from hf_ntp.data import PixelDataset, split_owner_attacker, to_rgb

VIT = ViTImageProcessorPil(size={"height": 32, "width": 32})


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def labelled(images: list[Image.Image], labels: list[int] | None = None) -> datasets.Dataset:
    names = ["even", "odd"]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    rows = {"image": images, "label": labels or [row % 2 for row in range(len(images))]}
    return datasets.Dataset.from_dict(rows, features=features)


def random_images(count: int, *shape: int) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)) for _ in range(count)]


GREY = Image.new("L", (2, 3), 100)
RED = (255, 0, 0)


def palette(transparent: bool) -> Image.Image:
    image = Image.new("P", (2, 3), 0)
    image.putpalette([255, 0, 0, 0, 0, 255])
    if transparent:
        image.info["transparency"] = 0
    return image


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (GREY, (100, 100, 100)),
        (Image.new("1", (2, 3), 1), (255, 255, 255)),
        (Image.new("LA", (2, 3), (0, 0)), (255, 255, 255)),
        (Image.new("LA", (2, 3), (0, 255)), (0, 0, 0)),
        (Image.new("La", (2, 3), (0, 0)), (255, 255, 255)),
        (Image.new("RGB", (2, 3), RED), RED),
        (Image.new("RGBA", (2, 3), (255, 0, 0, 0)), (255, 255, 255)),
        (Image.new("RGBA", (2, 3), (0, 0, 0, 128)), (127, 127, 127)),
        (Image.new("RGBa", (2, 3), (0, 0, 0, 0)), (255, 255, 255)),
        (Image.new("PA", (2, 3), (0, 0)), (255, 255, 255)),
        (palette(False), RED),
        (palette(True), (255, 255, 255)),
        (Image.new("CMYK", (2, 3), (0, 255, 255, 0)), RED),
        (Image.new("YCbCr", (2, 3), (128, 128, 128)), (128, 128, 128)),
        (Image.new("HSV", (2, 3), (0, 255, 255)), RED),
        (Image.fromarray(np.full((3, 2), 65535, np.uint16)), (255, 255, 255)),
        (Image.fromarray(np.full((3, 2), 25700, np.uint16)), (100, 100, 100)),
        (Image.new("I;16B", (2, 3), 25700), (100, 100, 100)),
        (Image.new("I", (2, 3), 200), (200, 200, 200)),
        (Image.new("I", (2, 3), 51400), (200, 200, 200)),
        (Image.new("F", (2, 3), 0.2), (51, 51, 51)),
        (Image.new("F", (2, 3), 51.0), (51, 51, 51)),
    ],
)
def test_to_rgb_of_every_mode(image, expected):
    converted = to_rgb(image)
    assert (converted.mode, converted.size) == ("RGB", (2, 3))
    assert set(converted.get_flattened_data()) == {expected}


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (Image.new("F", (2, 3), float("nan")), "6 NaN or infinite pixels in an image of mode F"),
        (Image.new("F", (2, 3), float("inf")), "6 NaN or infinite"),
        (Image.new("F", (2, 3), -0.5), r"from -0.5 to -0.5 .* in \[0, 255\] or \[0, 1\]"),
        (Image.new("F", (2, 3), 300), "from 300 to 300"),
        (Image.new("I", (2, 3), 70000), r"in \[0, 65535\]. Rescale"),
    ],
)
def test_to_rgb_rejects_impossible_pixels(image, message):
    with pytest.raises(ValueError, match=message):
        to_rgb(image)


@pytest.mark.parametrize(
    ("processor", "shape"),
    [
        (VIT, (28, 28)),
        (ConvNextImageProcessorPil(size={"shortest_edge": 32}), (40, 56, 3)),
        (
            CLIPImageProcessorPil(size={"shortest_edge": 36}, crop_size={"height": 32, "width": 32}),
            (50, 44, 3),
        ),
        (ViTImageProcessorPil(size={"height": 32, "width": 32}, do_rescale=False), (32, 32)),
        (EfficientNetImageProcessorPil(size={"height": 32, "width": 32}, rescale_offset=False), (28, 28)),
        (ViTImageProcessorPil(size={"height": 32, "width": 32}, do_normalize=False), (32, 32)),
        (
            ViTImageProcessorPil(do_resize=False, image_mean=[0.1, 0.5, 0.9], image_std=[0.2, 0.3, 0.4]),
            (32, 32),
        ),
    ],
)
def test_pixels_equal_the_processor_exactly(processor, shape):
    images = random_images(5, *shape)
    expected = processor([image.convert("RGB") for image in images], return_tensors="pt")["pixel_values"]
    data = PixelDataset.from_dataset(labelled(images), processor)
    values, labels = data.tensors()
    assert values.dtype == torch.float32
    assert torch.equal(values, expected.float())
    assert labels.tolist() == [0, 1, 0, 1, 0]
    assert torch.equal(data[3]["pixel_values"], expected[3].float())


def test_mixed_modes_and_sizes_just_work():
    images = [
        GREY,
        *random_images(1, 40, 20, 4),
        palette(True),
        Image.new("1", (9, 5)),
        Image.new("F", (8, 8), 0.5),
    ]
    images.append(Image.fromarray(np.full((7, 7), 40000, np.uint16)))
    data = PixelDataset.from_dataset(labelled(images), VIT)
    assert data.tensors()[0].shape == (6, 3, 32, 32)
    # Half of full brightness is 0 after normalising with mean and std one half.
    assert data[4]["pixel_values"].abs().max() < 0.01


def test_access_by_row_list_and_loader(monkeypatch):
    monkeypatch.setattr("hf_ntp.data.images.BATCH_ROWS", 4)  # several Arrow chunks
    data = PixelDataset.from_dataset(labelled(random_images(11, 28, 28)), VIT)
    values, labels = data.tensors()
    assert (len(data), data.num_classes, data.class_names) == (11, 2, ["even", "odd"])
    assert data.labels.tolist() == labels.tolist()
    rows = [10, 0, 5, 5, -1]
    batch = data.__getitems__(rows)
    assert all(torch.equal(item["pixel_values"], values[row]) for item, row in zip(batch, rows, strict=True))
    assert [item["labels"] for item in batch] == [0, 0, 1, 1, 0]
    assert type(batch[0]["labels"]) is int
    assert [len(images) for images, _ in data.batches(4)] == [4, 4, 3]
    assert torch.equal(torch.cat([images for images, _ in data.batches(4)]), values)
    part = data.tensors(np.array([3, 1]))
    assert torch.equal(part[0], values[[3, 1]])
    assert part[1].tolist() == [1, 1]
    loaded = [batch["pixel_values"] for batch in torch.utils.data.DataLoader(data, batch_size=4)]
    assert torch.equal(torch.cat(loaded), values)
    with pytest.raises(IndexError):
        data[11]


def test_labels_cannot_be_changed_from_outside():
    data = PixelDataset.from_dataset(labelled(random_images(4, 8, 8)), VIT)
    data.labels[:] = 7
    assert data.labels.tolist() == [0, 1, 0, 1]


def test_pickling_carries_no_pixels():
    data = PixelDataset.from_dataset(labelled(random_images(60, 32, 32)), VIT)
    stored = pickle.dumps(data)
    assert len(stored) < 60 * 3 * 32 * 32
    assert torch.equal(pickle.loads(stored).tensors()[0], data.tensors()[0])


def test_pixels_are_stored_once_and_memory_mapped(monkeypatch):
    images = random_images(6, 28, 28)
    first = PixelDataset.from_dataset(labelled(images), VIT)._pixels
    assert len(first.cache_files) == 1
    monkeypatch.setattr("hf_ntp.data.images._store_pixels", None)  # any new work would fail now
    again = PixelDataset.from_dataset(labelled(images), VIT)._pixels
    assert again.cache_files == first.cache_files
    assert first.features["pixels"] == datasets.Array3D((3, 32, 32), "uint8")


def test_labels_that_get_another_type_or_other_names():
    """As our own messages advise: images stored before are no hindrance, and names are the present ones."""
    data = labelled(random_images(4, 28, 28))
    for feature in (datasets.Value("int32"), datasets.Value("int64"), datasets.ClassLabel(names=["x", "y"])):
        found = PixelDataset.from_dataset(data.cast_column("label", feature), VIT)
        assert found.class_names == getattr(feature, "names", None)
        assert found.labels.tolist() == [0, 1, 0, 1]


def test_two_processes_give_equal_pixels():
    data = labelled(random_images(8, 28, 28))
    one = PixelDataset.from_dataset(data, VIT).tensors()[0]
    datasets.config.HF_DATASETS_CACHE = datasets.config.HF_DATASETS_CACHE / "other"
    two = PixelDataset.from_dataset(data, VIT, num_proc=2).tensors()[0]
    assert torch.equal(one, two)


def test_fingerprint_follows_images_labels_and_settings():
    images = random_images(4, 28, 28)
    data = [labelled(images), labelled(images, [1, 0, 0, 1]), labelled(images[::-1])]
    digests = [PixelDataset.from_dataset(one, VIT).fingerprint for one in [*data, labelled(images)]]
    assert digests[0] == digests[3]
    assert len(set(digests)) == 3
    other = ViTImageProcessorPil(size={"height": 32, "width": 32}, image_mean=[0.4, 0.5, 0.5])
    assert PixelDataset.from_dataset(data[0], other).fingerprint not in digests


@pytest.mark.parametrize("problem", ["nan", "missing"])
def test_bad_images_are_named_by_row(problem):
    bad = Image.new("F", (4, 4), float("nan")) if problem == "nan" else None
    message = "row 2: found 16 NaN" if problem == "nan" else "row 2 has no image"
    with pytest.raises(ValueError, match=message):
        PixelDataset.from_dataset(labelled([GREY, GREY, bad, GREY]), VIT)


def test_broken_files_are_named(tmp_path):
    """One truncated file among thousands: which?"""
    for name in ("good", "bad"):
        random_images(1, 40, 40, 3)[0].save(tmp_path / f"{name}.png")
    whole = (tmp_path / "bad.png").read_bytes()
    paths = [str(tmp_path / f"{name}.png") for name in ("good", "good", "bad")]
    for content in (whole[: len(whole) // 2], b"", b"no image"):
        (tmp_path / "bad.png").write_bytes(content)
        with pytest.raises(ValueError, match=r"row 2 \(.*bad.png\): the image cannot be read .*Repair or remove it"):
            PixelDataset.from_dataset(labelled(paths), VIT)


def test_an_image_too_large_to_decode_is_named(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match=r"row 1: the image is too large .*MAX_IMAGE_PIXELS"):
        PixelDataset.from_dataset(labelled([random_images(1, 8, 8, 3)[0], random_images(1, 20, 20, 3)[0]]), VIT)


def test_images_are_resized_one_at_a_time(monkeypatch):
    """Decoded photos are large."""
    sizes, plain = [], VIT.__class__.__call__

    def counted(self, images, *args, **options):
        sizes.append(len(images))
        return plain(self, images, *args, **options)

    monkeypatch.setattr(VIT.__class__, "__call__", counted)
    assert len(PixelDataset.from_dataset(labelled(random_images(7, 40, 30, 3)), VIT)) == 7
    assert set(sizes) == {1}


def test_the_mode_of_a_column_is_that_of_its_images():
    data = labelled(random_images(3, 8, 8, 3))
    grey = data.cast_column(data.column_names[0], datasets.Image(mode="L"))
    first, second = (PixelDataset.from_dataset(each, VIT) for each in (data, grey))
    assert first.fingerprint != second.fingerprint
    red, green, blue = second.tensors()[0].unbind(1)
    assert torch.equal(red, green)
    assert torch.equal(green, blue)
    assert not torch.equal(first.tensors()[0][:, 0], first.tensors()[0][:, 1])


def test_several_splits_and_streams_are_refused():
    data = labelled([GREY, GREY], [0, 1])
    for wrong in (datasets.DatasetDict(train=data), data.to_iterable_dataset()):
        with pytest.raises(TypeError, match=rf"the dataset is {type(wrong).__name__}; needed: a datasets\.Dataset"):
            PixelDataset.from_dataset(wrong, VIT)
        with pytest.raises(TypeError, match=rf"train is {type(wrong).__name__}; needed"):
            split_owner_attacker(wrong)


def test_labels_are_checked_before_any_work():
    with pytest.raises(ValueError, match=r"row 1 has label -1 .*from 0 to 1"):
        PixelDataset.from_dataset(labelled([GREY, GREY], [0, -1]), VIT)
    with pytest.raises(ValueError, match="without rows"):
        PixelDataset.from_dataset(labelled([]), VIT)
    with pytest.raises(ValueError, match=r"'pixels' \(Array3D\) and 'label' are needed"):
        PixelDataset(labelled([GREY]), VIT, fingerprint="")


def test_transforms_that_would_not_be_applied_are_refused():
    data = labelled([GREY, GREY], [0, 1])
    with pytest.raises(ValueError, match=r"set_transform, with_transform.*source_transform of NTPTrainer"):
        PixelDataset.from_dataset(data.with_transform(lambda rows: rows), VIT)
    assert len(PixelDataset.from_dataset(data.with_format("torch"), VIT)) == 2


class Torchvision(ViTImageProcessorPil):
    """Says that it uses the other backend."""

    backend = "torchvision"


def without_mean() -> ViTImageProcessorPil:
    processor = ViTImageProcessorPil()
    processor.image_mean = None
    return processor


@pytest.mark.parametrize(
    ("processor", "message"),
    [
        (Torchvision(), r"backend 'torchvision'; the PIL backend is needed. .*backend=\"pil\""),
        (object(), "found object with backend None"),
        (without_mean(), "has no image_mean"),
        (
            EfficientNetImageProcessorPil(include_top=False, rescale_offset=True),
            "does more than resize",
        ),
        (SamImageProcessorPil(size={"longest_edge": 32}, pad_size={"height": 32, "width": 32}), "does more than"),
    ],
)
def test_unsuitable_processors_are_refused(processor, message):
    with pytest.raises(ValueError, match=message):
        PixelDataset.from_dataset(labelled([GREY, GREY]), processor)


def test_auto_class_gives_the_pil_backend_that_errors_recommend(tmp_path):
    VIT.save_pretrained(tmp_path)
    loaded = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    assert len(PixelDataset.from_dataset(labelled([GREY, GREY]), loaded)) == 2


@pytest.mark.parametrize("shapes", [((40, 20), (20, 20)), ((20, 20),) * 3 + ((40, 20),)])
def test_images_must_come_out_in_one_size(shapes, monkeypatch):
    monkeypatch.setattr("hf_ntp.data.images.BATCH_ROWS", 3)  # the odd one also in a batch of its own
    processor = CLIPImageProcessorPil(size={"shortest_edge": 16}, do_center_crop=False)
    images = [random_images(1, *shape)[0] for shape in shapes]
    with pytest.raises(ValueError, match=r"uint8 images of one shape .*do_center_crop=True"):
        PixelDataset.from_dataset(labelled(images), processor)
