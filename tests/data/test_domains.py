"""Loading domains from every kind of source, without a network."""

from __future__ import annotations

from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from PIL import Image

from hf_ntp.data import EMBEDDED_DOMAINS, dataset_fingerprint, load_domain
from hf_ntp.data.domains import embedded_dataset

COLUMNS = Features({"image": datasets.Image(), "label": Value("string")})
CATS = ("cat", "dog", "eel")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def optdigits() -> DatasetDict:
    return load_domain("optdigits")


def rows(count: int, label: object = CATS, start: int = 0, feature: object = None) -> Dataset:
    """Return ``count`` different images; labels go round ``label`` where it is a tuple."""
    images = [Image.fromarray(np.full((4, 4), start + row, dtype=np.uint8)) for row in range(count)]
    labels = [label[row % len(label)] if isinstance(label, tuple) else label for row in range(count)]
    types = Features({"image": datasets.Image(), "label": feature or Value("string")})
    return Dataset.from_dict({"image": images, "label": labels}, features=types)


def saved(tmp_path: Path, data: Dataset | DatasetDict) -> str:
    data.save_to_disk(tmp_path / "saved")
    return str(tmp_path / "saved")


def pixels(part: Dataset) -> list[bytes]:
    return [image.tobytes() for image in part["image"]]


@pytest.mark.parametrize("name", sorted(EMBEDDED_DOMAINS))
def test_embedded_domains(name):
    domain = load_domain(name, max_samples=400)
    assert list(domain) == ["train", "validation", "test"]
    assert [len(part) for part in domain.values()] == [240, 60, 100]
    for part in domain.values():
        assert list(part.features) == ["image", "label"]
        assert part.features["label"] == ClassLabel(names=[str(digit) for digit in range(10)])
        assert isinstance(part[0]["image"], Image.Image)
        assert set(part["label"]) == set(range(10))
    again = load_domain(name, max_samples=400)
    assert dataset_fingerprint(again["test"]) == dataset_fingerprint(domain["test"])


def test_seed_changes_the_splits(optdigits):
    other = load_domain("optdigits", seed=1)
    assert dataset_fingerprint(other["test"]) != dataset_fingerprint(optdigits["test"])


def test_embedded_bytes_are_the_same_everywhere():
    # Uncompressed, and free of random numbers and fonts, so the value holds on every machine.
    expected = "6b4f18142021f0382679c2d7070d7d1e6b3179bcb9a8fc682e4a2ba176db3978"
    assert dataset_fingerprint(embedded_dataset("optdigits")) == expected


def test_splits_do_not_overlap_and_lose_nothing(optdigits):
    seen = [pixel for part in optdigits.values() for pixel in pixels(part)]
    assert [len(part) for part in optdigits.values()] == [1078, 270, 449]
    assert len(seen) == 1797
    # optdigits has no two equal images, so equal bytes would be one image in two splits.
    assert len(set(seen)) == 1797


def test_splits_are_stratified(optdigits):
    shares = [np.bincount(part["label"][:], minlength=10) / len(part) for part in optdigits.values()]
    assert np.abs(np.array(shares) - shares[0]).max() < 0.01


def test_mnist_and_mnistm_split_alike():
    # Otherwise a digit trained on in one domain would be tested on in the other.
    plain, textured = load_domain("mnist", max_samples=300), load_domain("mnistm", max_samples=300)
    for key in plain:
        assert plain[key]["label"][:] == textured[key]["label"][:]
        digit, blended = (
            np.array(plain[key][0]["image"], float),
            np.array(textured[key][0]["image"], float).mean(-1),
        )
        assert abs(np.corrcoef(digit.ravel(), blended.ravel())[0, 1]) > 0.3


@pytest.mark.parametrize("alias", ["validation", "valid", "val", "dev"])
def test_existing_splits_are_used(tmp_path, alias):
    source = DatasetDict({"train": rows(9), alias: rows(3, start=20), "test": rows(6, start=40)})
    source["extra"] = rows(2)
    domain = load_domain(saved(tmp_path, source))
    assert {key: len(part) for key, part in domain.items()} == {"train": 9, "validation": 3, "test": 6}
    assert pixels(domain["test"]) == pixels(source["test"])
    assert domain["train"].features["label"].names == list(CATS)


def test_missing_validation_is_carved_from_train_only(tmp_path):
    source = DatasetDict({"train": rows(60), "test": rows(6, start=100)})
    domain = load_domain(saved(tmp_path, source), validation_fraction=0.1)
    assert [len(part) for part in domain.values()] == [54, 6, 6]
    assert sorted(pixels(domain["train"]) + pixels(domain["validation"])) == sorted(pixels(source["train"]))
    assert np.bincount(domain["validation"]["label"][:]).tolist() == [2, 2, 2]


def test_split_takes_a_slice_and_splits_it(tmp_path):
    path = saved(tmp_path, DatasetDict({"train": rows(60), "extra": rows(40, start=100)}))
    domain = load_domain(path, split="extra[:20]+train[50:]", validation_fraction=0.1, test_fraction=0.2)
    assert [len(part) for part in domain.values()] == [21, 3, 6]
    values = sorted(pixel[0] for part in domain.values() for pixel in pixels(part))
    assert values == [*range(50, 60), *range(100, 120)]
    with pytest.raises(ValueError, match=r"split is 'tran', the splits are \['train', 'extra'\]"):
        load_domain(path, split="tran")


def test_without_train_a_split_must_be_chosen(tmp_path):
    path = saved(tmp_path, DatasetDict({"full": rows(30)}))
    with pytest.raises(ValueError, match=r"has the splits \['full'\]; needed train.*split='full'"):
        load_domain(path)
    assert len(load_domain(path, split="full")["test"]) == 8


def image_folder(root: Path, classes: tuple[str, ...] = CATS) -> Path:
    for number, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for row in range(10):
            Image.new("L", (6, 6), 10 * number + row).save(root / name / f"{row}.png")
    return root


def test_image_folder(tmp_path):
    domain = load_domain(str(image_folder(tmp_path / "pets")), cache_dir=tmp_path / "prepared")
    assert domain["train"].features["label"].names == list(CATS)
    assert [len(part) for part in domain.values()] == [18, 4, 8]
    for row in domain["test"]:
        assert row["image"].getpixel((0, 0)) // 10 == row["label"]
    assert len(dataset_fingerprint(domain["train"])) == 64


def test_a_folder_without_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(image_folder(tmp_path / "pets"))
    assert load_domain(".", cache_dir=tmp_path / "prepared")["train"].features["label"].names == list(CATS)
    with pytest.raises(FileNotFoundError, match="found no file or folder ''"):
        load_domain("")


def test_a_class_that_is_not_trained_on_is_said(tmp_path, caplog):
    parts = {"train": rows(30), "test": rows(30, (*CATS, "lion", "lynx"), 30)}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "digits")
    load_domain(str(tmp_path / "digits"))
    assert "split test has 2 class(es) that train has not (lion, lynx): who is trained on it" in caplog.text


def test_image_folder_with_splits(tmp_path):
    image_folder(tmp_path / "pets" / "train")
    image_folder(tmp_path / "pets" / "test")
    assert [len(part) for part in load_domain(str(tmp_path / "pets")).values()] == [26, 4, 30]


def test_folders_that_only_capitals_keep_from_being_splits(tmp_path):
    """`datasets` would make one split of them, and test images would be trained on."""
    for split in ("Train", "Test"):
        image_folder(tmp_path / "pets" / split)
    with pytest.raises(ValueError, match=r"no splits for their capital letters; .*Rename 'Test' to 'test'"):
        load_domain(str(tmp_path / "pets"))
    assert len(load_domain(str(image_folder(tmp_path / "tests", ("Test", "Other"))))["train"]) == 12


@pytest.mark.parametrize(
    ("folders", "splits", "names"),
    [
        (["train/bullet_train", "train/car", "test/bullet_train", "test/car"], [17, 3, 20], ["bullet_train", "car"]),
        (["train/dev", "train/ops", "test/dev", "test/ops"], [17, 3, 20], ["dev", "ops"]),
        (["images/training/test_tube", "images/training/cup", "images/val/cup", "images/val/test_tube", "extra/cup"],
         [15, 20, 5], ["cup", "test_tube"]),
        (["bullet_train", "steam_train", "car"], [18, 4, 8], ["bullet_train", "car", "steam_train"]),
        (["train", "car"], [12, 3, 5], ["car", "train"]),
        (["test_tube", "cup"], [12, 3, 5], ["cup", "test_tube"]),
    ],
)  # fmt: skip
def test_classes_named_like_splits(tmp_path, folders, splits, names):
    """`datasets` mixes their images into other splits, or loses classes."""
    domain = load_domain(str(image_folder(tmp_path / "pets", folders)), cache_dir=tmp_path / "prepared")
    assert [len(part) for part in domain.values()] == splits
    assert domain["train"].features["label"].names == names
    seen = [{image.tobytes() for image in part["image"]} for part in domain.values()]
    assert sum(map(len, seen)) == sum(splits), "no image is in two of them"


def test_splits_in_the_names_of_files(tmp_path):
    for path in list(image_folder(tmp_path / "pets").rglob("*.png")):
        path.rename(path.with_name(f"{'test' if path.stem < '4' else 'train'}_{path.name}"))
    assert [len(part) for part in load_domain(str(tmp_path / "pets"), cache_dir=tmp_path / "c").values()] == [
        15,
        3,
        12,
    ]


def test_image_folder_without_classes(tmp_path):
    flat = image_folder(tmp_path / "pets") / "cat"
    with pytest.raises(ValueError, match=r"found columns image \(Image\); needed a label column"):
        load_domain(str(flat))


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (["cats/big", "cats/small", "dogs/big"], "has the folders 'cats/big' and 'dogs/big'"),
        (["train/a/images", "train/b/images"], "has the folders 'train/a/images' and 'train/b/images'"),
        (["cat", "dog/small"], "images at different depths, such as 'cat/0.png' and 'dog/small/9.png'"),
        (["train/cat/images", "test/cat/images"], "are in folders called 'images'.*two classes or more"),
    ],
)
def test_folders_whose_classes_cannot_be_told(tmp_path, folders, message):
    with pytest.raises(ValueError, match=message):
        load_domain(str(image_folder(tmp_path / "pets", folders)), cache_dir=tmp_path / "prepared")


def test_one_stray_image(tmp_path):
    Image.new("L", (6, 6)).save(image_folder(tmp_path / "pets") / "preview.png")
    with pytest.raises(ValueError, match=r"different depths, such as 'preview\.png' and .*Move or remove"):
        load_domain(str(tmp_path / "pets"))


def test_a_path_that_reads_like_a_pattern(tmp_path):
    with pytest.raises(ValueError, match=r"has one of \* \? \[, which datasets takes for a pattern"):
        load_domain(str(image_folder(tmp_path / "pets [1]")))


def test_parquet_file_and_folder(tmp_path):
    (tmp_path / "data").mkdir()
    rows(30).to_parquet(tmp_path / "data" / "train-00000-of-00001.parquet")
    rows(9, start=100).to_parquet(tmp_path / "data" / "test-00000-of-00001.parquet")
    assert [len(part) for part in load_domain(str(tmp_path / "data")).values()] == [26, 4, 9]
    file = tmp_path / "data" / "train-00000-of-00001.parquet"
    assert [len(part) for part in load_domain(str(file)).values()] == [18, 4, 8]


def test_parquet_written_by_pandas(tmp_path):
    stored = rows(30).with_format("arrow")[:]["image"].to_pylist()
    frame = pd.DataFrame({"photo": stored, "target": [row % 3 + 5 for row in range(30)]})
    frame.to_parquet(tmp_path / "a.parquet")
    domain = load_domain(str(tmp_path / "a.parquet"))
    assert domain["train"].features["label"].names == ["5", "6", "7"]
    assert {row["label"] for row in domain["test"]} == {0, 1, 2}
    assert domain["train"][0]["image"].size == (4, 4)


def test_integer_labels_are_numbered_in_order_over_all_splits(tmp_path):
    number = Value("int32")
    parts = {"train": rows(4, (10, 2), feature=number), "validation": rows(1, 2, 50, number)}
    domain = load_domain(saved(tmp_path, DatasetDict(parts | {"test": rows(2, (7, 10), 60, number)})))
    assert domain["test"].features["label"].names == ["2", "7", "10"]
    assert [part["label"][:] for part in domain.values()] == [[2, 0, 2, 0], [0], [1, 2]]


def test_class_labels_are_merged_by_name(tmp_path):
    one, two = ClassLabel(names=["dog", "cat"]), ClassLabel(names=["cat", "dog", "eel"])
    parts = {
        "train": rows(2, (0, 1), feature=one),
        "validation": rows(1, 0, 9, two),
        "test": rows(2, (1, 2), 20, two),
    }
    domain = load_domain(saved(tmp_path, DatasetDict(parts)))
    assert domain["train"].features["label"].names == ["dog", "cat", "eel"]
    assert [part["label"][:] for part in domain.values()] == [[0, 1], [1], [0, 2]]


@pytest.mark.parametrize("hidden", [-1, None])
def test_unlabelled_test_split_is_replaced(tmp_path, hidden, caplog):
    classes = ClassLabel(names=list(CATS))
    train, test = rows(60, (0, 1, 2), feature=classes), rows(5, hidden, 90, classes)
    source = DatasetDict({"train": train, "test": test})
    domain = load_domain(saved(tmp_path, source))
    assert "split test is empty or unlabelled" in caplog.text
    assert [len(part) for part in domain.values()] == [36, 9, 15]
    with pytest.raises(ValueError, match="no labelled train split"):
        load_domain(str(tmp_path / "saved"), split="test")


@pytest.mark.parametrize(
    ("labels", "feature", "message"),
    [
        ((0, -1), ClassLabel(names=["a", "b"]), "split train: row 1 has label -1 .*from 0 to 1"),
        ((0, -1), Value("int64"), "split train: row 1 has label -1; every row needs a class"),
        (("a", None), Value("string"), "split train: row 1 has label None"),
        ((0.5, 1.0), Value("float32"), r"label \(float32\); needed a label column"),
        ((True, False), Value("bool"), r"label \(bool\); needed a label column"),
    ],
)
def test_unusable_labels(tmp_path, labels, feature, message):
    with pytest.raises(ValueError, match=message):
        load_domain(saved(tmp_path, rows(20, labels, feature=feature)))


def test_label_types_must_agree(tmp_path):
    source = DatasetDict({"train": rows(6), "test": rows(6, (0, 1), feature=Value("int64"))})
    with pytest.raises(ValueError, match=r"'train': .*string.*'test': .*int64.*one type is needed"):
        load_domain(saved(tmp_path, source))


def test_rare_classes_stay_in_train(tmp_path, caplog):
    labels = ("a",) * 19 + ("b",) * 20 + ("rare",)
    domain = load_domain(saved(tmp_path, rows(40, labels)))
    assert domain["train"]["label"][:].count(2) == 1
    assert "Classes [2] have too few rows to be in the carved test split" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"test_fraction": 0}, "would leave a split empty"),
        ({"test_fraction": 0.9}, "would leave a split empty"),
        ({"validation_fraction": 0.0001}, "would leave a split empty"),
        ({"validation_fraction": float("nan")}, "would leave a split empty"),
        ({"max_samples": 0}, "max_samples is 0; at least 1"),
        ({"revision": "main"}, "revision 'main' is given for 'optdigits'"),
        ({"config": "big"}, "config='big' was given for 'optdigits'"),
        ({"image_column": "picture"}, "'picture' to be a column of type Image"),
    ],
)
def test_arguments_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        load_domain("optdigits", **options)


def test_unknown_paths_and_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"found no file or folder './nowhere'; needed one of \['mn"):
        load_domain("./nowhere")
    (tmp_path / "a.csv").write_text("label\n1\n")
    with pytest.raises(ValueError, match=r"a.csv'; needed a .parquet file"):
        load_domain(str(tmp_path / "a.csv"))


def test_a_file_has_no_configurations(tmp_path):
    rows(30).to_parquet(tmp_path / "images.parquet")
    with pytest.raises(ValueError, match=r"config='big' was given for '.*images.parquet', which has no conf"):
        load_domain(str(tmp_path / "images.parquet"), config="big")


def test_unreachable_hub_fails_at_once(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match=r"could not reach dataset 'nobody/nothing' .*embedded domain"):
        load_domain("nobody/nothing", config="plain", revision="main")


def test_unknown_hub_dataset(monkeypatch):
    def not_found(*_, **__):
        raise datasets.exceptions.DatasetNotFoundError("doesn't exist on the Hub or cannot be accessed")

    monkeypatch.setattr(datasets, "load_dataset", not_found)
    with pytest.raises(FileNotFoundError, match=r"found no dataset 'nobody/nothing' .*hf auth login"):
        load_domain("nobody/nothing")

    def not_kept(*_, **__):
        raise ValueError("Couldn't find cache for nothing")

    monkeypatch.setattr(datasets, "load_dataset", not_kept)
    with pytest.raises(FileNotFoundError, match="found no dataset 'nothing'"):
        load_domain("nothing")


def test_hub_arguments_are_passed_on(monkeypatch, tmp_path):
    calls = []

    def hub(*args: object, **options: object) -> DatasetDict:
        calls.append((args, options))
        return DatasetDict({"train": rows(30)})

    monkeypatch.setattr(datasets, "load_dataset", hub)
    load_domain("owner/name", config="plain", revision="abc", cache_dir=tmp_path)
    assert calls == [(("owner/name", "plain"), {"revision": "abc", "cache_dir": str(tmp_path)})]


def test_folders_that_are_not_looked_into(tmp_path):
    root = image_folder(tmp_path / "pets")
    for hidden in ("cat/.ipynb_checkpoints", "__MACOSX/cat"):
        (root / hidden).mkdir(parents=True)
        Image.new("L", (6, 6)).save(root / hidden / "x.png")
    domain = load_domain(str(root), cache_dir=tmp_path / "prepared")
    assert sum(map(len, domain.values())) == 30
    assert domain["train"].features["label"].names == list(CATS)


def test_a_stray_image_beside_the_classes_of_a_split(tmp_path):
    root = image_folder(tmp_path / "pets", ("train/cat", "train/dog", "test/cat", "test/dog"))
    Image.new("L", (6, 6)).save(root / "train" / "overview.png")
    with pytest.raises(ValueError, match=r"different depths, such as 'train/overview\.png'"):
        load_domain(str(root))
