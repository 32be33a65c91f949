"""Several authorized domains, weights of domains, and heads whose outputs are no classes."""

from collections import Counter

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

from hf_ntp import NTPConfig, NTPTrainer, load_domain
from hf_ntp.training.attackers import slot_domains
from hf_ntp.training.domains import Joined, shares_of
from hf_ntp.training.paired_data import PairedSampler

from ..conftest import Rows, tiny_vit
from .test_headless import Unlabelled, tiny_encoder
from .test_trainer import Stop, trainer

TWO = {"a": Rows(30, seed=1), "b": Rows(18, seed=2)}


class Named(Rows):
    def __init__(self, names, **options):
        super().__init__(**options)
        self.class_names = names


def test_joined_rows_are_those_of_the_parts():
    joined = Joined(TWO, [part.labels for part in TWO.values()])
    assert len(joined) == 48
    rows = joined.__getitems__([31, 2, 47, 30])
    assert torch.equal(rows[0]["pixel_values"], TWO["b"].images[1])
    assert torch.equal(rows[1]["pixel_values"], TWO["a"].images[2])
    assert [row["labels"] for row in rows] == [1, 2, 17 % 3, 0]
    assert np.array_equal(joined.labels, [*TWO["a"].labels, *TWO["b"].labels])
    mixed = Joined({"a": Rows(4), "b": Unlabelled(4)}, None)
    assert all(set(row) == {"pixel_values"} for row in mixed.__getitems__([0, 7]))


def test_several_authorized_domains_share_a_head_and_resume(tmp_path):
    options = {"source": TWO, "source_weights": {"a": 1, "b": 3}, "save_strategy": "steps", "save_steps": 6}
    whole = trainer(tmp_path / "whole", **options)
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path / "cut", callbacks=[Stop(7)], **options).train()
    resumed = trainer(tmp_path / "cut", **options)
    resumed.train(resume_from_checkpoint=True)
    for (name, a), (_, b) in zip(whole.model.state_dict().items(), resumed.model.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    with pytest.raises(ValueError, match=r"source_weights: .* there"):
        trainer(tmp_path / "cut", **{**options, "source_weights": None}).train(resume_from_checkpoint=True)


def drawn(**options):
    sampler = PairedSampler(48, [5], seed=0, **options)
    epochs = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        epochs.append([source for _, source, _ in sampler])
    return epochs


def test_shares_of_authorized_domains():
    first, second = drawn(source_parts=[(30, 0.25), (18, 0.75)])
    assert first != second
    assert Counter(row >= 30 for row in first) == {False: 12, True: 36}
    assert set(Counter(row for row in first if row >= 30).values()) == {2}, "all of the smaller domain, twice"
    assert len({row for row in first if row < 30}) == 12
    plain, _ = drawn()
    assert sorted(plain) == list(range(48))


def test_slots_follow_the_shares():
    assert slot_domains(["a", "b"], 4) == ["a", "b", "a", "b"]
    assert Counter(slot_domains(["a", "b"], 4, [0.75, 0.25])) == {"a": 3, "b": 1}
    assert Counter(slot_domains(["a", "b", "c"], 4, [0.98, 0.01, 0.01])) == {"a": 2, "b": 1, "c": 1}


def test_weights_of_unauthorized_domains(tmp_path):
    targets = {"four": Rows(20, 4, seed=1), "two": Rows(15, 2, seed=2)}
    losses = {}
    for weights in ({"four": 1, "two": 1e-9}, {"four": 1e-9, "two": 1}, {"four": 1, "two": 1}):
        ours = trainer(
            tmp_path / str(len(losses)), target=targets, target_weights=weights, max_steps=1, logging_steps=1
        )
        ours.train()
        batch = next(iter(ours.get_train_dataloader()))
        losses[tuple(weights.values())] = ours.compute_loss(ours.model.eval(), batch).item()
        assert {len(part["labels"]) for part in batch["attacked"].values()} == {
            3 * 16 if 1e-9 in weights.values() else 32
        }
    one, other, equal = losses.values()
    assert equal != one != other


def test_shares_by_hand():
    assert shares_of({"b": 3, "a": 1}, ["a", "b"], "x") == [0.25, 0.75]
    assert shares_of(None, ["a", "b"], "x") is None
    with pytest.raises(ValueError, match="target_weights are for 'c'; needed: one for each of the domains 'a', 'b'"):
        shares_of({"c": 1}, ["a", "b"], "target_weights")


def test_weights_come_as_json_from_a_command_line(tmp_path):
    config = NTPConfig(output_dir=str(tmp_path), report_to="none", source_weights='{"a": 2, "b": 1}')
    assert config.source_weights == {"a": 2, "b": 1}
    for wrong in ("a=2", "[1]", {"a": 0}, {}, {"a": "much"}):
        with pytest.raises(ValueError, match=r"target_weights is .*needed: a positive number for each domain"):
            NTPConfig(output_dir=str(tmp_path), report_to="none", target_weights=wrong)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({}, "train_dataset is an empty mapping"),
        ({"a": Rows(), "b": Rows(classes=5)}, "train_dataset 'b': row 3 has label 3"),
        (
            {"a": Named(["cat", "dog", "cow"]), "b": Named(["dog", "cat", "cow"])},
            r"classes \(a: cat, dog, cow \(3\); .*source_loss='features'",
        ),
    ],
)
def test_authorized_domains_that_do_not_fit(tmp_path, source, message):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, source=source)


def named_vit(names):
    model = tiny_vit(len(names))
    model.config.id2label = dict(enumerate(names))
    return model


def test_names_of_classes_tell_what_a_label_means(tmp_path):
    """A model with its classes in another order would be trained to give wrong answers."""
    animals, other = ["cat", "dog", "cow"], ["dog", "cat", "cow"]
    source, held_out = Named(animals), Named(animals, size=9)
    trainer(tmp_path, named_vit(animals), source=source, evaluation=held_out)
    trainer(tmp_path, named_vit(animals), source=Rows(), evaluation=Rows(9))
    with pytest.raises(ValueError, match=r"\(train_dataset: cat, dog, cow \(3\); the head: dog, cat, cow \(3\)\)"):
        trainer(tmp_path, named_vit(other), source=source)
    with pytest.raises(ValueError, match=r"the head: a, b, c, d, e, f \(9\)"):
        trainer(tmp_path, named_vit(list("abcdefghi")), source=source)
    for domains in (source, {"zoo": source, "farm": source}):
        evaluation = Named(other, size=9) if domains is source else {"zoo": Named(other, size=9)}
        with pytest.raises(ValueError, match=r"dog, cat, cow \(3\); the head: cat, dog, cow \(3\)"):
            trainer(tmp_path, source=domains, evaluation=evaluation)
    trainer(tmp_path, named_vit(other), source=source, source_loss="features")


def test_the_splits_of_a_dataset_are_no_domains(tmp_path):
    """They would be trained on, the test split among them."""
    parts = load_domain("optdigits", max_samples=20)
    processor = ViTImageProcessorPil(size={"height": 8, "width": 8})
    config = NTPConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    message = r"_dataset is a DatasetDict with the splits 'train', 'validation', 'test'.*_dataset=data\['train'\]"
    for source, target in ((parts, parts["train"]), (parts["train"], parts)):
        with pytest.raises(ValueError, match=message):
            NTPTrainer(tiny_vit(10), config, source, target, processing_class=processor)


def test_without_a_head_labels_may_differ(tmp_path):
    domains = {"a": Named(["cat", "dog", "cow"]), "b": Unlabelled(20)}
    ours = trainer(tmp_path, tiny_encoder(), source=domains, max_steps=2)
    ours.train()
    assert ours.settings()["data"]["source"] == [["a", "48 rows"], ["b", "20 rows"]]


class Vectors(Rows):
    """Several labels per image, or a number."""

    def __init__(self, width):
        super().__init__()
        self.values = F.one_hot(self.labels, width).float() if width > 1 else self.labels.float()[:, None]
        del self.labels

    def __len__(self):
        return len(self.values)

    def __getitem__(self, index):
        return {"pixel_values": self.images[index], "labels": self.values[index]}


@pytest.mark.parametrize(
    ("width", "task"), [(3, "multi_label_classification"), (3, "regression"), (1, None)], ids=["labels", "many", "one"]
)
def test_heads_without_classes(tmp_path, width, task):
    config = ViTConfig(**{**tiny_vit().config.to_dict(), "num_labels": width, "problem_type": task})
    model = ViTForImageClassification(config)
    with pytest.raises(ValueError, match=rf"the head has {width} output.*problem_type is {task!r}.*'features'"):
        trainer(tmp_path, model, source=Vectors(width))
    before = model.classifier.weight.clone()
    ours = trainer(
        tmp_path, model, source=Vectors(width), evaluation=Vectors(width), source_loss="features", max_steps=4
    )
    ours.train()
    assert torch.equal(before, model.classifier.weight)
    metrics = ours.evaluate()
    assert metrics["eval_loss"] > 0
    assert "eval_accuracy" not in metrics
