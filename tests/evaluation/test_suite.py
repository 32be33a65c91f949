import json
from dataclasses import replace

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageClassification, ViTImageProcessorPil

from hf_ntp import Arm, AttackData, FineTuneProtocol, PixelDataset, compress_folder, sample_wise_learning_curves
from hf_ntp.attacks import ATTACKS, FineTuning
from hf_ntp.evaluation import runner
from hf_ntp.evaluation import suite as suite_module
from hf_ntp.evaluation.controls import prune_without_protection
from hf_ntp.evaluation.measure import measure_source, measure_sparsity, measure_transfer
from hf_ntp.evaluation.suite import run_attacks
from hf_ntp.models import prunable_weights

from ..conftest import tiny_resnet
from .conftest import pixels

QUICK = FineTuneProtocol(steps=5, batch_size=8, learning_rates=(1e-3, 1e-2), warmup_steps=1)


def suite(checkpoints, attack, attacks, **options):
    unprotected, protected = checkpoints
    starts = {"protected": protected, "unprotected": unprotected}
    return run_attacks(starts, attack, attacks, [6, 24], options.pop("seeds", [0, 1]), QUICK, jobs=1, **options)


def test_figures_by_hand(checkpoints, attack, monkeypatch):
    """Scratch .2, three times longer .3; unprotected dense .6; mask kept .2, dense .4, three times longer .7."""
    unprotected, protected = checkpoints

    def run(fits, *rest):
        (fit,) = fits
        arm = fit.arm
        longer = getattr(arm.attack, "longer", 1) == 3
        if arm.random_init:
            value = 0.3 if longer else 0.2
        elif arm.checkpoint == unprotected:
            value = 0.6
        else:
            value = 0.2 if arm.attack.keep_mask else 0.7 if longer else 0.4
        return {fit: runner.Accuracies(value, value)}

    monkeypatch.setattr(runner, "_run", run)
    results = suite(checkpoints, attack, ["mask_kept", "dense", "dense_3x"])
    protected = results["starts"]["protected"]
    assert protected["mask_kept"]["normalized"] == pytest.approx(0.0)
    assert protected["dense"]["normalized"] == pytest.approx(0.2)
    assert protected["dense_3x"]["normalized"] == pytest.approx(0.4)  # against scratch that trained as long
    assert results["not_run"]["unprotected"] == {"mask_kept": "the checkpoint has no zeros"}
    assert results["retained_transfer"]["protected"] == pytest.approx(
        {"mask_kept": 0.0, "dense": 0.2 / 0.4, "dense_3x": 0.4 / 0.3}
    )
    assert results["worst_case"]["protected"]["attack"] == "dense_3x"
    assert results["worst_case"]["protected"]["retained_transfer"] == pytest.approx(0.4 / 0.4)
    assert results["scratch"]["15"]["accuracies"] == [[0.3, 0.3], [0.3, 0.3]]
    json.dumps(results, allow_nan=False)


def test_the_worst_case_is_of_the_same_attacks_on_both(checkpoints, attack, monkeypatch):
    """More of them on the unprotected model would flatter the protection. Dense stands there for mask_kept alone."""

    def run(fits, *rest):
        (fit,) = fits
        kind, start = type(fit.arm.attack).__name__, fit.arm.checkpoint == checkpoints[0]
        value = 0.2 if fit.arm.random_init else {"FineTuning": (0.4, 0.9), "Probe": (0.3, 0.5)}[kind][start]
        return {fit: runner.Accuracies(value, value)}

    monkeypatch.setattr(runner, "_run", run)
    for attacks, best in ((["knn"], 0.3), (["knn", "mask_kept"], 0.7)):
        worst = suite(checkpoints, attack, attacks)["worst_case"]
        assert worst["unprotected"]["slc_auc"] == pytest.approx(best)
        after = worst["protected"]["slc_auc"]
        assert worst["protected"]["retained_transfer"] == pytest.approx(after / best)


def test_what_authorized_images_are_worth_to_anybody_is_not_the_checkpoints(checkpoints, attack, monkeypatch):
    """An attack through the source is compared with random weights that take the same way: here .4, without it .2."""
    unprotected, _ = checkpoints

    def run(fits, *rest):
        (fit,) = fits
        through_the_source = 0.2 if fit.arm.attack.needs_source else 0.0
        value = 0.2 if fit.arm.random_init else 0.5 if fit.arm.checkpoint == unprotected else 0.25
        return {fit: runner.Accuracies(value + through_the_source, value + through_the_source)}

    monkeypatch.setattr(runner, "_run", run)
    results = suite(checkpoints, replace(attack, source=attack.validation), ["dense", "transntl", "source_all_new"])
    assert set(results["scratch"]) == {"5", "transntl", "source_all_new"}
    for entry in results["starts"]["protected"].values():
        assert entry["normalized"] == pytest.approx(0.05)
    assert results["retained_transfer"]["protected"] == pytest.approx(
        dict.fromkeys(["dense", "transntl", "source_all_new"], 0.05 / 0.3)
    )


def test_who_has_authorized_images_is_compared_with_who_has_them(checkpoints, attack, monkeypatch):
    """Protected .3 over scratch with them, unprotected .4 so; without them nothing, and .6."""

    def run(fits, *rest):
        (fit,) = fits
        areas = {True: (0.3, 0.4), False: (0.0, 0.6)}[fit.arm.attack.needs_source]
        value = 0.2 + (0 if fit.arm.random_init else areas[fit.arm.checkpoint == checkpoints[0]])
        return {fit: runner.Accuracies(value, value)}

    monkeypatch.setattr(runner, "_run", run)
    results = suite(checkpoints, replace(attack, source=attack.validation), ["dense", "source_all_new"])
    assert results["worst_case"]["protected"] == {
        "attack": "source_all_new",
        "slc_auc": pytest.approx(0.3),
        "retained_transfer": pytest.approx(0.3 / 0.4),
    }


def test_what_is_wrong_is_found_before_any_fit(checkpoints, attack, monkeypatch):
    monkeypatch.setattr(runner, "_run", None)
    starts = {"protected": checkpoints[1]}
    with pytest.raises(ValueError, match=r"sample_sizes are \[10\]; needed: at least two"):
        run_attacks(starts, attack, ["dense"], [10])
    with pytest.raises(ValueError, match="none with a slash"):
        run_attacks({**starts, "a/b": checkpoints[0]}, attack, ["dense"], [6, 24])
    with pytest.raises(FileNotFoundError, match="no where is neither a folder nor a name"):
        sample_wise_learning_curves([Arm("a", "no where")], attack, [6, 24])
    with pytest.raises(ValueError, match="a name of its own for each"):
        sample_wise_learning_curves([Arm("a", checkpoints[0])] * 2, attack, [6, 24])
    with pytest.raises(ValueError, match="jobs is -1"):
        sample_wise_learning_curves([Arm("a", checkpoints[0])], attack, [6, 24], jobs=-1)
    with pytest.raises(ValueError, match=r"seeds are \[0, -1\]; needed: .*none below 0"):
        run_attacks(starts, attack, ["dense"], [6, 24], [0, -1])


def test_a_plain_attack_on_the_protected_model_may_diverge(checkpoints, attack, monkeypatch):
    unprotected, _ = checkpoints
    alive = runner.Accuracies(0.5, 0.5)

    def run(fits, *rest):
        (fit,) = fits
        fails = fit.arm.checkpoint != unprotected and not fit.arm.random_init and fit.arm.name.endswith("/dense")
        return {fit: runner.Accuracies(float("nan"), float("nan")) if fails else alive}

    monkeypatch.setattr(runner, "_run", run)
    results = suite(checkpoints, attack, ["mask_kept", "dense"])
    assert results["not_run"]["protected"] == {"dense": suite_module.DIVERGED}
    assert results["starts"]["protected"].keys() == {"mask_kept"}


def test_unlabelled_images_are_no_measurement(checkpoints, attack):
    """Their accuracy was 0, before and after."""
    data = datasets.Dataset.from_dict({"image": [Image.new("RGB", (8, 8))] * 12})
    blank = PixelDataset.from_dataset(data, ViTImageProcessorPil(size={"height": 8, "width": 8}), labelled=False)
    for part in ("train", "validation", "test", "source"):
        with pytest.raises(ValueError, match=f"the images of '{part}' have no labels"):
            replace(attack, **{part: blank})
    with pytest.raises(ValueError, match="authorized test split have no labels"):
        measure_source(*checkpoints, blank)


def test_models_of_two_architectures_are_not_compared(checkpoints, attack, tmp_path):
    tiny_resnet().save_pretrained(tmp_path / "resnet")
    with pytest.raises(ValueError, match="one architecture"):
        measure_transfer(checkpoints[0], tmp_path / "resnet", attack, [6, 24])


def test_sparsity_where_the_head_is_not_of_the_images_classes(checkpoints):
    assert measure_sparsity(AutoModelForImageClassification.from_pretrained(checkpoints[1]), pixels(12, 0, 4)).live > 0


def test_numbers_of_numpy(checkpoints, attack):
    arms = [Arm("a", checkpoints[0], attack=ATTACKS["knn"])]
    plain = sample_wise_learning_curves(arms, attack, [6, 24], [0, 1], QUICK, jobs=1)
    assert sample_wise_learning_curves(arms, attack, np.array([6, 24]), np.arange(2), QUICK, jobs=1) == plain


@pytest.mark.parametrize(
    ("names", "reason"),
    [("012", None), ("210", "align_labels_with_mapping"), ("x12", "classes are x, 1, 2, the target's")],
)
def test_the_heads_classes_have_to_be_the_targets(checkpoints, attack, names, reason):
    """Also in their order: a target in another one looked like protection to whoever keeps the head."""
    for folder in checkpoints:
        model = AutoModelForImageClassification.from_pretrained(folder)
        model.config.id2label = dict(enumerate(names))
        model.save_pretrained(folder)
    keep_the_head = {"as_published", "head_kept", "shot"}
    not_run = suite(checkpoints, attack, ["dense", *keep_the_head], seeds=[0])["not_run"]["protected"]
    assert not_run.keys() == (keep_the_head if reason else set())
    assert all(reason in found for found in not_run.values())


def test_authorized_images_of_more_classes_than_the_head_has(checkpoints, attack):
    """On a GPU, such a label breaks the device for all later fits."""
    through_the_source = ["source_all_new", "transntl"]
    data = replace(attack, source=pixels(12, 3, classes=4))
    not_run = suite(checkpoints, data, ["dense", *through_the_source], seeds=[0])["not_run"]["protected"]
    assert not_run == dict.fromkeys(through_the_source, "authorized images have labels up to 3, the head 3 classes")


def test_authorized_images_in_another_order_than_the_heads(checkpoints, attack):
    for folder in checkpoints:
        model = AutoModelForImageClassification.from_pretrained(folder)
        model.config.id2label = dict(enumerate("210"))
        model.save_pretrained(folder)
    data = replace(attack, source=pixels(12, 3))
    not_run = suite(checkpoints, data, ["dense", "source_all_new"], seeds=[0])["not_run"]
    assert "the authorized images' 0, 1, 2: align_labels_with_mapping" in not_run["protected"]["source_all_new"]


def test_a_model_that_was_evaluated_by_trainer_is_of_the_same_architecture(checkpoints, attack):
    """Trainer's loss notes problem_type in the config."""
    model = AutoModelForImageClassification.from_pretrained(checkpoints[1])
    model.config.problem_type = "single_label_classification"
    model.save_pretrained(checkpoints[1])
    assert suite(checkpoints, attack, ["dense"], seeds=[0])["not_run"]["protected"] == {}


def test_a_compressed_model_is_attacked_beside_the_original(checkpoints, attack, tmp_path):
    unprotected, protected = checkpoints
    compress_folder(protected, tmp_path / "small")
    dense = suite(checkpoints, attack, ["mask_kept"])
    assert suite((unprotected, str(tmp_path / "small")), attack, ["mask_kept"])["starts"] == dense["starts"]


def test_images_that_are_not_prepared(attack):
    data = datasets.Dataset.from_dict({"label": [0, 1]})
    with pytest.raises(TypeError, match="test is Dataset; needed: a PixelDataset"):
        AttackData(attack.train, attack.validation, data)
    with pytest.raises(TypeError, match="the authorized test split is Dataset"):
        measure_source("a", "b", data)


def test_every_attack_runs_on_real_data(checkpoints, attack, tmp_path):
    results = suite(checkpoints, attack, ["dense", "lora", "linear_probe", "first_block_reinit"], cache_dir=tmp_path)
    assert set(results["starts"]["protected"]) == {"dense", "lora", "linear_probe", "first_block_reinit"}
    again = suite(checkpoints, attack, ["dense", "lora", "linear_probe", "first_block_reinit"], cache_dir=tmp_path)
    assert again == results


def test_attacks_that_need_source_data_are_not_run_without_it(checkpoints, attack):
    results = suite(checkpoints, attack, ["dense", "transntl"], seeds=[0])
    assert "authorized data" in results["not_run"]["protected"]["transntl"]
    assert "transntl" not in results["starts"]["protected"]


@pytest.mark.parametrize("attacks", [["dance"], []])
def test_bad_attacks(checkpoints, attack, attacks):
    with pytest.raises(ValueError, match="needed"):
        suite(checkpoints, attack, attacks)


def test_starts_must_be_comparable(checkpoints, attack, tmp_path):
    tiny_resnet().save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="one architecture"):
        run_attacks({"protected": checkpoints[1], "unprotected": str(tmp_path / "other")}, attack, ["dense"], [6, 24])
    with pytest.raises(ValueError, match="'protected'"):
        run_attacks({"mine": checkpoints[1]}, attack, ["dense"], [6, 24])


@pytest.mark.parametrize("kind", ["magnitude", "random"])
def test_controls_have_the_zeros_of_the_protected_model(checkpoints, tmp_path, kind):
    unprotected, protected = checkpoints
    prune_without_protection(unprotected, tmp_path / kind, protected, kind)
    models = [AutoModelForImageClassification.from_pretrained(p) for p in (unprotected, protected, tmp_path / kind)]
    for before, like, control in zip(*(prunable_weights(model).values() for model in models), strict=True):
        kept = control != 0
        assert int((~kept).sum()) == int((like == 0).sum())
        assert torch.equal(control[kept], before[kept])
        if kind == "magnitude":
            assert before[kept].abs().min() >= before[~kept].abs().max()


def test_unknown_control(checkpoints, tmp_path):
    with pytest.raises(ValueError, match="'magnitude' or 'random'"):
        prune_without_protection(*checkpoints[:1], tmp_path / "x", checkpoints[1], "clever")


class Broken(FineTuning):
    """Diverges above a rate; what it leaves predicts nothing."""

    def fit(self, model, loot, protocol, value, seed):
        with torch.no_grad():
            if value > 1e-3 or self.longer > 1:
                next(model.parameters()).fill_(torch.nan)
        return super().fit(model, loot, protocol, value, seed)


def test_an_attack_that_diverges_is_no_measurement(checkpoints, attack, monkeypatch, tmp_path):
    """NaN is the largest value to argmax: such a fit looked like an attacker at chance, from the cache as well."""
    monkeypatch.setitem(suite_module.ATTACKS, "at_times", Broken())
    monkeypatch.setitem(suite_module.ATTACKS, "always", Broken(longer=3))
    for _ in range(2):
        results = suite(checkpoints, attack, ["dense", "at_times", "always"], cache_dir=tmp_path / "fits")
        assert results["starts"]["protected"]["at_times"]["tuned"] == [[1e-3, 1e-3]] * 2
        for start in ("protected", "unprotected"):
            assert set(results["starts"][start]) == {"dense", "at_times"}
            assert results["not_run"][start]["always"].startswith("the fit diverged at every value")
        json.dumps(results, allow_nan=False)
    with pytest.raises(FloatingPointError, match="protected/always, unprotected/always: the fit diverged"):
        suite(checkpoints, attack, ["always"])


def test_scratch_that_diverges_stops_the_measurement(checkpoints, attack, monkeypatch):
    monkeypatch.setattr(runner, "_accuracies", lambda *_: runner.Accuracies(float("nan"), float("nan")))
    with pytest.raises(FloatingPointError, match="the fit diverged"):
        suite(checkpoints, attack, ["dense"])
    with pytest.raises(FloatingPointError, match=r"fits of scratch, .* diverged at every rate"):
        measure_transfer(*checkpoints, attack, [6, 12], [0], QUICK, jobs=1)
