"""Data and options as users bring them."""

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset
from transformers import (
    SiglipVisionConfig,
    SiglipVisionModel,
    TrainerCallback,
    TrainingArguments,
    ViTForImageClassification,
    ViTImageProcessorPil,
    ViTModel,
)

from hf_ntp import NTPTrainer, PixelDataset, read_record, write_folder
from hf_ntp.data import MOST_CLASSES, PixelValues
from hf_ntp.evaluation.measure import measure_sparsity
from hf_ntp.models import load_model, noted_prunable_weights, prunable_weights, zero_fraction
from hf_ntp.training.paired_data import labels_of

from ..conftest import Rows, tiny_resnet, tiny_vit
from .test_trainer import NO_TARGET, trainer

PROCESSOR = ViTImageProcessorPil(size={"height": 8, "width": 8})


def images(labels, **columns):
    """Labels are plain integers, without names."""
    pictures = [Image.fromarray(np.full((8, 8, 3), 60 * label % 256, np.uint8)) for label in labels]
    features = {"image": datasets.Image(), "label": datasets.Value("int64")}
    features |= dict.fromkeys(columns, datasets.ClassLabel(names=["bad", "good"]))
    return datasets.Dataset.from_dict(
        {"image": pictures, "label": labels, **columns}, features=datasets.Features(features)
    )


def with_images(folder, source, evaluation=None, model=None):
    config = trainer(folder, max_steps=2, **NO_TARGET).args
    return NTPTrainer(model or tiny_vit(4), config, source, images([0, 1] * 6), evaluation, processing_class=PROCESSOR)


def test_a_part_may_lack_classes(tmp_path):
    """Numbers stay what they are: encoding them anew would make another class of 3."""
    ours = with_images(tmp_path, images([0, 1, 3] * 4), images([1, 3] * 3))
    assert ours._guard.held_out.labels.tolist() == [1, 3] * 3
    assert ours.train_dataset.source.labels.max() == 3
    with pytest.raises(ValueError, match=r"label 4 .*from 0 to 3.*all parts and splits alike"):
        with_images(tmp_path, images([0, 4] * 4))
    for bad in (-1, MOST_CLASSES):
        with pytest.raises(ValueError, match=f"row 1 has label {bad}"):
            PixelDataset.from_dataset(images([0, bad]), PROCESSOR)


def test_a_column_of_classes_beside_the_label_is_not_taken_for_it(tmp_path):
    with pytest.raises(ValueError, match=r"one of \['label', 'quality'\] 'label' and keep no other"):
        with_images(tmp_path, images([0, 1, 2, 3] * 3, quality=[0, 1] * 6))


def test_evaluation_and_prediction_take_images(tmp_path):
    held_out = images([0, 1, 2, 3] * 2)
    ours = with_images(tmp_path, images([0, 1, 2, 3] * 3), held_out)
    expected = ours.evaluate()["eval_accuracy"]
    assert ours.evaluate(held_out)["eval_accuracy"] == expected
    assert ours.evaluate({"a": held_out})["eval_a_accuracy"] == expected
    found = ours.predict(held_out)
    assert found.predictions.shape == (8, 4)
    unlabelled = held_out.remove_columns("label")
    ids, withheld = list(range(0, 80, 10)), [-1] * 8
    for data in (unlabelled, unlabelled.add_column("when", [0.5] * 8), unlabelled.add_column("label", withheld)):
        without = ours.predict(data)
        assert without.label_ids is None
        assert np.array_equal(without.predictions, found.predictions)
    assert ours.predict(unlabelled.add_column("image_id", ids)).label_ids is None


class Named(Rows):
    """An attribute that is called labels has the names of the classes."""

    def __getitem__(self, index):
        self.labels = torch.arange(100) % 3
        row = super().__getitem__(index)
        self.labels = ["cat"]
        return row


def test_classes_in_another_order_are_not_evaluated(tmp_path):
    """Nor labels that the head has no output for; a stranger's classes are what somebody may want to see."""
    names = list("abcd")
    model = tiny_vit(4)
    model.config.id2label = dict(enumerate(names))
    named = {order: images([0, 1, 2, 3]).cast_column("label", datasets.ClassLabel(names=list(order))) for order in
             ("abcd", "dcba", "wxyz")}  # fmt: skip
    ours = with_images(tmp_path, named["abcd"], model=model)
    for reads in (ours.evaluate, ours.predict):
        reads(named["abcd"])
        reads(named["wxyz"])
        with pytest.raises(ValueError, match=r"different classes .*align_labels_with_mapping"):
            reads(named["dcba"])
        with pytest.raises(ValueError, match=r"label 4 .*from 0 to 3"):
            reads(images([0, 4]))
    pixel_values = named["dcba"].map(
        lambda row: {"pixel_values": PROCESSOR(row["image"])["pixel_values"][0]}, remove_columns="image"
    )
    with pytest.raises(ValueError, match="different classes"):
        ours.predict(pixel_values)
    ours.predict(pixel_values.remove_columns("label"))
    ours.predict(PixelDataset.from_dataset(images([0, 4]), PROCESSOR, labelled=False))
    ours.evaluate(Named())
    features = trainer(tmp_path / "features", tiny_vit(3), source=Rows(), source_loss="features")
    features.evaluate(PixelDataset.from_dataset(images([0, 1]), PROCESSOR))
    for bad in (named["dcba"], images([0, 4])):
        with pytest.raises(ValueError, match="elsewhere"):
            with_images(tmp_path, named["abcd"], {"elsewhere": bad}, model)
    with pytest.raises(ValueError, match="target_dataset is an empty mapping"):
        trainer(tmp_path, target={})


def test_images_on_both_sides(tmp_path, caplog):
    source = images([0, 1, 2, 3] * 3)
    with_images(tmp_path, source, images([0, 1, 2, 3]))
    assert "eval_dataset is train_dataset" not in caplog.text
    with_images(tmp_path, source, source)
    assert "eval_dataset is train_dataset: source_tolerance is judged on images" in caplog.text
    caplog.clear()
    with_images(tmp_path, source, {"a": source})
    assert "eval_dataset is train_dataset" in caplog.text
    caplog.clear()
    with_images(tmp_path, source, source, model=tiny_vit(4).vit)
    assert "eval_dataset is train_dataset" not in caplog.text, "nothing is judged on it"
    same, two = images([0, 1] * 6), tiny_vit(2)
    for data, model in ((same, two), ({"a": same, "b": images([1, 0])}, two), (same.remove_columns("label"), two.vit)):
        with pytest.raises(ValueError, match="train_dataset and the target 'target' have the same images"):
            with_images(tmp_path, data, model=model)


@pytest.mark.parametrize("name", ["labels", "label"])
def test_a_dataset_of_pixel_values(tmp_path, name):
    """The same weights as from a map-style dataset with these rows."""
    source = Rows()
    columns = {"pixel_values": [image.tolist() for image in source.images], name: source.labels.tolist()}
    data = datasets.Dataset.from_dict({**columns, "file": ["a"] * len(source)})
    first, second = trainer(tmp_path / "a", max_steps=3), trainer(tmp_path / "b", source=data, max_steps=3)
    for ours in (first, second):
        ours.train()
    assert all(torch.equal(a, b) for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True))


def pixel_values(names, seed=0, count=12):
    rows = {"pixel_values": np.random.default_rng(seed).random((count, 3, 8, 8), np.float32).tolist()}
    feature = datasets.ClassLabel(names=names)
    return datasets.Dataset.from_dict(rows).add_column("label", [0, 1, 2] * (count // 3), feature=feature)


def test_what_is_known_of_pixel_values(tmp_path):
    """Names of classes are compared, and images told apart, as where images are pre-processed here."""
    animals = ["cat", "dog", "fox"]
    model, other = tiny_vit(), pixel_values(["x", "y", "z"], 1)
    model.config.id2label = dict(enumerate(animals))
    ours = NTPTrainer(model, trainer(tmp_path / "a").args, pixel_values(animals), other)
    assert ours.train_dataset.source.class_names == animals
    assert isinstance(ours.train_dataset.source[1]["pixel_values"], torch.Tensor)
    same, another = PixelValues(pixel_values(animals)), PixelValues(pixel_values(animals, 2))
    assert same.fingerprint == ours.train_dataset.source.fingerprint != another.fingerprint
    for source, target, message in (
        (pixel_values(["dog", "cat", "fox"]), other, "different classes .*dog, cat, fox"),
        (pixel_values(animals), pixel_values(["x", "y", "z"]), "have the same images"),
    ):
        with pytest.raises(ValueError, match=message):
            NTPTrainer(model, trainer(tmp_path / "a").args, source, target)


class Rewritten(Dataset):
    """Rows that are changed as they are read; counts how often."""

    def __init__(self, change, **options):
        self.rows, self.change, self.read = Rows(**options), change, 0

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        self.read += 1
        return self.change(self.rows[index])


@pytest.mark.parametrize("kind", [np.int32, np.uint8, lambda label: torch.tensor(label, dtype=torch.int32)])
def test_labels_and_pixels_of_other_types_go_all_the_way(tmp_path, kind):
    """Labels of 32 bits, pixels of 64 as numpy makes them; a ConvNet does not cast them itself."""

    def change(row):
        return {"pixel_values": row["pixel_values"].numpy().astype(np.float64), "labels": kind(row["labels"])}

    data = {"source": Rewritten(change), "target": Rewritten(change, seed=1), "evaluation": Rewritten(change, seed=2)}
    ours = trainer(tmp_path / "run", tiny_resnet(), **data, max_steps=2, **NO_TARGET)
    ours.train()
    assert ours.evaluate()["eval_loss"] > 0
    write_folder(ours, tmp_path / "published")


def test_an_attribute_with_names_of_classes_is_not_taken_for_labels(tmp_path):
    named = Rewritten(dict)
    named.labels = ["abc"[label] for label in named.rows.labels]
    assert labels_of(named, "train_dataset").tolist() == named.rows.labels.tolist()


def test_rows_are_read_once_for_their_labels(tmp_path):
    parts = [Rewritten(dict, seed=seed) for seed in range(4)]
    a, b, target, evaluation = parts
    NTPTrainer(tiny_vit(), trainer(tmp_path).args, {"a": a, "b": b}, target, {"a": evaluation})
    assert all(part.read < 1.2 * len(part) for part in parts)


def test_rows_that_are_no_dicts(tmp_path):
    with pytest.raises(ValueError, match="rows are of type tuple; needed: 'pixel_values' and 'labels'"):
        trainer(tmp_path, source=[(image, 0) for image in Rows().images])


def test_arguments_of_another_trainer(tmp_path):
    with pytest.raises(TypeError, match="args is TrainingArguments; needed: NTPConfig"):
        NTPTrainer(tiny_vit(), TrainingArguments(str(tmp_path), report_to="none"), Rows(), Rows())


def test_several_evaluation_sets_of_an_authorized_domain_without_a_name(tmp_path, caplog):
    evaluation = {"a": Rows(size=9), "b": Rows(size=9, seed=2)}
    trainer(tmp_path, evaluation=evaluation)
    assert "and train_dataset as a dict with that name, such as {'a': ...}" in caplog.text
    assert trainer(tmp_path, source={"a": Rows()}, evaluation=evaluation)._guard.held_out is not None


def test_frozen_layers_are_said(tmp_path, caplog):
    trainer(tmp_path)
    assert "frozen" not in caplog.text
    model = tiny_vit()
    model.vit.layers[0].requires_grad_(False)
    trainer(tmp_path, model)
    assert "6 layers are frozen (vit.layers.0" in caplog.text


@pytest.mark.parametrize("whole", [True, False])
def test_frozen_layers_are_no_part_of_the_sparsity(tmp_path, whole):
    """In the record and for who measures the folder, where nothing is frozen any more."""
    model = tiny_vit() if whole else tiny_vit().vit
    (model.vit if whole else model).layers[0].requires_grad_(False)
    ours = trainer(tmp_path / "run", model, **NO_TARGET)
    ours.train()
    write_folder(ours, folder := tmp_path / "published")
    recorded, measured = read_record(folder)["sparsity"], measure_sparsity(load_model(folder), Rows())
    assert measured.achieved == recorded["achieved"] == pytest.approx(0.6, abs=1e-3)
    assert measured.prunable_weights == recorded["prunable_weights"]


def test_frozen_projections_of_an_attention_are_no_part_of_the_sparsity(tmp_path, caplog):
    sizes = {"image_size": 8, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = SiglipVisionModel(SiglipVisionConfig(**sizes, intermediate_size=24))
    model.head.requires_grad_(False)
    ours = trainer(tmp_path / "run", model, **NO_TARGET)
    assert "4 layers are frozen" in caplog.text
    ours.train()
    write_folder(ours, folder := tmp_path / "published")
    measured = measure_sparsity(load_model(folder), Rows())
    assert measured.prunable_weights == read_record(folder)["sparsity"]["prunable_weights"]


def test_what_has_no_part_in_features_is_not_called_frozen(tmp_path, caplog):
    """An unused pooler: unfreezing it, as the warning advises, would change nothing."""
    encoder = ViTModel(tiny_vit().config)
    for _ in range(2):
        trainer(tmp_path, encoder)
        assert "frozen" not in caplog.text
    assert not encoder.pooler.dense.weight.requires_grad
    encoder.layers[0].requires_grad_(False)
    ours = trainer(tmp_path, encoder)
    assert "6 layers are frozen (encoder.layers.0" in caplog.text
    assert not encoder.layers[0].attention.q_proj.weight.requires_grad
    assert ours.model.unused == {"pooler.dense.weight", "pooler.dense.bias"}


class Keeper(TrainerCallback):
    """Saves the model when training ends, as users' callbacks do."""

    def __init__(self, folder, stop_at=None):
        self.folder, self.stop_at = folder, stop_at

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop |= state.global_step == self.stop_at

    def on_train_end(self, args, state, control, model=None, **kwargs):
        model.save_pretrained(self.folder)


@pytest.mark.parametrize("stop_at", [None, 3])
def test_what_a_callback_saves_at_the_end_is_protected(tmp_path, stop_at):
    ours = trainer(tmp_path / "run", callbacks=[Keeper(tmp_path / "kept", stop_at)])
    ours.train()
    kept = ViTForImageClassification.from_pretrained(tmp_path / "kept")
    assert zero_fraction(list(prunable_weights(kept).values())) == pytest.approx(0.6, abs=0.01)
    assert kept.config.ntp == ours.model.config.ntp


def test_the_last_checkpoint_notes_what_was_pruned(tmp_path):
    ours = trainer(tmp_path, save_strategy="steps", save_steps=6, prune_exclude=["mlp"])
    ours.train()
    saved = [ViTForImageClassification.from_pretrained(tmp_path / f"checkpoint-{step}") for step in (6, 12)]
    assert not hasattr(saved[0].config, "ntp")  # still dense
    assert saved[1].config.ntp == ours.model.config.ntp
    assert noted_prunable_weights(saved[1]).keys() == ours.prunable.keys()


@pytest.mark.parametrize("logging", [{"logging_steps": 500}, {"logging_strategy": "no"}])
def test_a_short_run_logs_its_terms_at_the_end(tmp_path, logging, caplog):
    """Fewer steps than between two logs: what README tells to read is there, and the warning that rests on it."""
    ours = trainer(tmp_path, source_tolerance=[1e-9, 1e-9], learning_rate=0.3, **{"logging_steps": 500} | logging)
    ours.train()
    rows = [row for row in ours.state.log_history if "loss" in row]
    if "logging_strategy" in logging:
        assert rows == []
    else:
        (row,) = rows
        assert {"target_strength", "collapse_loss", "sparsity"} <= row.keys()
        assert row["step"] == 12
        assert ("Everything aimed at the target had" in caplog.text) == (row["target_strength"] < 0.1)
