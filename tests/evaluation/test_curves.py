import copy
import errno
import importlib.util
import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from time import perf_counter

import numpy as np
import pytest
import torch

from hf_ntp import (
    ATTACKS,
    Arm,
    AttackData,
    FineTuneProtocol,
    PixelDataset,
    measure_protection,
    sample_wise_learning_curves,
    standard_arms,
    summarize,
)
from hf_ntp.attacks.fine_tuning import FineTuning, predictor
from hf_ntp.attacks.shot import Shot
from hf_ntp.evaluation import runner
from hf_ntp.evaluation.cache import ResultCache
from hf_ntp.evaluation.fits import Describer, Fit
from hf_ntp.evaluation.measure import scratch_convergence
from hf_ntp.evaluation.runner import LearningCurves, accuracy_of, load_start
from hf_ntp.evaluation.summary import retained, retained_share
from hf_ntp.models import load_model, prunable_weights

from ..architectures import build
from ..conftest import tiny_resnet, tiny_vit
from .conftest import pixels

QUICK = FineTuneProtocol(steps=12, batch_size=8, learning_rates=(1e-3, 1e-2), warmup_steps=2)


def test_curves_of_the_standard_arms(attack, checkpoints, tmp_path):
    arms = standard_arms(*checkpoints)
    curves = sample_wise_learning_curves(arms, attack, [6, 24], [0, 1], QUICK, tmp_path / "fits", jobs=1)
    assert list(curves.accuracies) == ["scratch", "unprotected", "protected_mask", "protected_dense"]
    assert all(np.shape(accuracies) == (2, 2) for accuracies in curves.accuracies.values())
    assert all(np.shape(rates) == (2, 2) for rates in curves.learning_rates.values())
    assert {rate for rates in curves.learning_rates.values() for row in rates for rate in row} <= {1e-3, 1e-2}
    # 4 arms, 2 sizes: 2 rates with the first seed, 1 with the other, or 2 where it disappoints.
    assert 4 * 2 * 3 <= curves.fits <= 4 * 2 * 4
    assert len(list((tmp_path / "fits").iterdir())) == curves.fits


def test_nothing_is_fitted_twice_and_processes_do_not_matter(attack, checkpoints, tmp_path, monkeypatch):
    arms = standard_arms(*checkpoints)[:2]
    first = sample_wise_learning_curves(arms, attack, [6, 12], [0], QUICK, tmp_path / "a", jobs=2)
    assert sample_wise_learning_curves(arms, attack, [6, 12], [0], QUICK, tmp_path / "b", jobs=1) == first

    def forbidden(*args):
        raise AssertionError("fitted again")

    monkeypatch.setattr(FineTuning, "fit", forbidden)
    assert sample_wise_learning_curves(arms, attack, [6, 12], [0], QUICK, tmp_path / "a", jobs=1) == first
    with pytest.raises(RuntimeError, match="fitted again"):
        sample_wise_learning_curves(arms, attack, [6, 24], [0], QUICK, tmp_path / "a", jobs=1)


def test_an_interrupted_sweep_continues(attack, checkpoints, tmp_path, monkeypatch):
    arms = standard_arms(*checkpoints)[:2]
    whole = sample_wise_learning_curves(arms, attack, [6, 12], [0], QUICK, jobs=1)
    real, fitted = FineTuning.fit, []

    def interrupt_the_third(*args):
        if len(fitted) == 2:
            raise KeyboardInterrupt
        fitted.append(args)
        return real(*args)

    monkeypatch.setattr(FineTuning, "fit", interrupt_the_third)
    with pytest.raises(KeyboardInterrupt):
        sample_wise_learning_curves(arms, attack, [6, 12], [0], QUICK, tmp_path, jobs=1)
    fitted.clear()
    monkeypatch.setattr(FineTuning, "fit", lambda *args: (fitted.append(args), real(*args))[1])
    assert sample_wise_learning_curves(arms, attack, [6, 12], [0], QUICK, tmp_path, jobs=1) == whole
    assert len(fitted) == whole.fits - 2


def test_the_cache_knows_other_weights_data_and_protocols(attack, checkpoints, tmp_path):
    describe = Describer(attack, QUICK)
    fit = Fit(Arm("a", checkpoints[0]), 6, 0, 1e-3)
    other_data = AttackData(attack.train, attack.validation, pixels(12, 9))
    keys = {
        describe(fit),
        describe(fit._replace(arm=Arm("a", checkpoints[1]))),
        describe(fit._replace(arm=Arm("a", checkpoints[1], attack=ATTACKS["mask_kept"]))),
        describe(fit._replace(arm=Arm("a", checkpoints[0], random_init=True))),
        describe(fit._replace(size=7)),
        describe(fit._replace(seed=1)),
        describe(fit._replace(value=3e-3)),
        Describer(attack, FineTuneProtocol(steps=13, warmup_steps=2))(fit),
        Describer(other_data, QUICK)(fit),
    }
    assert len(keys) == 9
    same = Describer(attack, FineTuneProtocol(12, 8, (0.5,), warmup_steps=2))
    assert same(fit._replace(arm=Arm("renamed", checkpoints[0]))) == describe(fit)


def test_the_cache_knows_how_many_classes_scratch_learns_from_the_source(attack, tmp_path):
    """With authorized images, random weights are trained with the head that the checkpoint has."""
    describe = Describer(replace(attack, source=attack.validation), QUICK)
    for classes in (3, 5):
        tiny_vit(num_labels=classes).save_pretrained(tmp_path / str(classes))
    for name, differ in (("source_all_kept", True), ("dense", False)):
        arms = [Arm("scratch", str(tmp_path / folder), True, ATTACKS[name]) for folder in "35"]
        assert len({describe(Fit(arm, 6, 0, 1e-3)) for arm in arms}) == 1 + differ


OWN = """
from dataclasses import dataclass
from hf_ntp import Attack

@dataclass(frozen=True)
class Probe(Attack):
    kind: str

    def fit(self, model, loot, protocol, value, seed):
        return lambda pixels: pixels.new_full((len(pixels),), {answer}, dtype=int)
"""


def test_the_cache_knows_the_code_of_ones_own_attack(attack, checkpoints, tmp_path, monkeypatch):
    """One of a name that the library has is another one, and so is one that was edited."""
    attacks = [ATTACKS["knn"]]
    keys = {Describer(attack, QUICK)(Fit(Arm("a", checkpoints[0], attack=ATTACKS["knn"]), 6, 0, 1.0))}
    for answer in (0, 1, 1):
        path = tmp_path / f"mine{answer}.py"
        path.write_text(OWN.format(answer=answer))
        spec = importlib.util.spec_from_file_location("mine", path)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, "mine", module)
        spec.loader.exec_module(module)
        attacks.append(module.Probe("knn"))
        keys.add(Describer(attack, QUICK)(Fit(Arm("a", checkpoints[0], attack=attacks[-1]), 6, 0, 1.0)))
    assert len({type(attack).__name__ for attack in attacks}) == 1
    assert len(keys) == 3


def test_arms_that_cannot_be_attacked_so(attack, tmp_path):
    with pytest.raises(TypeError, match=r"attack is 'dense'; needed: an Attack, such as ATTACKS\['dense'\]"):
        Arm("a", "folder", attack="dense")
    tiny_vit(num_labels=7).save_pretrained(tmp_path)
    arms = [Arm("own head", str(tmp_path), attack=ATTACKS["head_kept"])]
    with pytest.raises(ValueError, match="arm 'own head': the head has 7 classes, the target 3; needed"):
        sample_wise_learning_curves(arms, attack, [6, 24], [0], QUICK, jobs=1)


def test_every_seed_of_scratch_goes_on_at_its_own_rate(attack, checkpoints, monkeypatch):
    """Three times as long: the first seed's rate is not the best of another one that chose for itself."""
    tried = []

    def run(fits, *rest):
        tried.extend((fit.seed, fit.value, rest[-1].steps) for fit in fits)
        return {fit: runner.Accuracies(0.8, 0.8 if fit.seed == 1 else 0.6) for fit in fits}

    monkeypatch.setattr(runner, "_run", run)
    arm = Arm("scratch", checkpoints[0], random_init=True)
    rates = {"scratch": [[1e-3, 1e-2], [1e-3, 1e-3], [1e-3, 1e-2]]}
    curves = LearningCurves((6, 24), (0, 1, 2), {"scratch": [[0.1, 0.5]] * 3}, rates, 0)
    found = scratch_convergence(arm, curves, QUICK, {"data": attack, "cache_dir": None, "jobs": 1, "seeds": (0, 1, 2)})
    assert sorted(tried) == [(0, 1e-2, 36), (1, 1e-3, 36), (2, 1e-2, 36)]
    assert found.accuracy_3x == pytest.approx((0.6 + 0.8 + 0.6) / 3)


def test_a_damaged_cache_entry_counts_as_missing(tmp_path):
    cache = ResultCache(tmp_path)
    cache.put("key", {"test": 0.5})
    assert cache.get("key") == {"test": 0.5}
    (tmp_path / "key.json").write_text('{"test": 0.')
    assert cache.get("key") is None
    assert ResultCache(None).get("key") is None


@pytest.mark.parametrize("entry", [{"test": 0.5}, {"validation": None, "test": 0.5}, {"validation": 1, "test": "x"}])
def test_a_cache_entry_of_something_else_counts_as_missing(entry):
    assert runner.Accuracies.of(entry) is None
    assert runner.Accuracies.of({"validation": 0.25, "test": 0.5}) == (0.25, 0.5)


def test_a_file_that_was_replaced_on_a_server_counts_as_missing(tmp_path, monkeypatch):
    ResultCache(tmp_path).put("a", {})

    def stale(path):
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(Path, "read_bytes", stale)
    assert ResultCache(tmp_path).get("a") is None


def test_the_learning_rate_is_chosen_on_validation_data(attack, checkpoints, monkeypatch):
    """The rate with the better validation accuracy wins even where test accuracy says otherwise."""
    table = {1e-3: runner.Accuracies(0.9, 0.1), 1e-2: runner.Accuracies(0.2, 0.8)}
    monkeypatch.setattr(runner, "_run", lambda fits, *rest: {fit: table[fit.value] for fit in fits})
    curves = sample_wise_learning_curves(standard_arms(*checkpoints)[:1], attack, [6, 12], [0, 1], QUICK, jobs=1)
    assert curves.accuracies["scratch"] == [[0.1, 0.1], [0.1, 0.1]]
    assert curves.learning_rates["scratch"] == [[1e-3, 1e-3], [1e-3, 1e-3]]


@pytest.mark.parametrize(
    ("validation", "chosen", "tried"),
    [
        # Validation accuracy by rate; 0.5 for all others.
        ({3e-3: 0.9}, 3e-3, []),  # inside: the grid is enough
        ({1e-2: 0.8}, 1e-2, [3e-2]),  # the next one is no better
        ({1e-2: 0.8, 3e-2: 0.9}, 3e-2, [3e-2, 1e-1]),
        ({1e-2: 0.8, 3e-2: 0.9, 1e-1: 0.95, 3e-1: 1.0}, 1e-1, [3e-2, 1e-1]),  # two extensions at most
        ({1e-3: 0.8, 3e-4: 0.9}, 1e-3, []),  # nothing below
        ({}, 1e-3, []),  # all alike: the lowest
    ],
)
def test_a_grid_is_extended_where_the_highest_is_the_best(attack, checkpoints, monkeypatch, validation, chosen, tried):
    grid, fits = (1e-3, 3e-3, 1e-2), []

    def run(batch, *rest):
        fits.extend(fit.value for fit in batch)
        return {fit: runner.Accuracies(validation.get(fit.value, 0.5), 0.5) for fit in batch}

    monkeypatch.setattr(runner, "_run", run)
    arms, protocol = standard_arms(*checkpoints)[:1], FineTuneProtocol(learning_rates=grid)
    curves = sample_wise_learning_curves(arms, attack, [6], [0], protocol, jobs=1)
    assert curves.learning_rates["scratch"] == [[chosen]]
    assert fits == [*grid, *tried]
    fits.clear()
    curves = sample_wise_learning_curves(arms, attack, [6], [0], replace(protocol, extensions=0), jobs=1)
    assert fits == list(grid)


def test_other_grids_follow_that_of_the_rates(attack, checkpoints, monkeypatch):
    """Tenfold for SGD; what does not depend on rates is not extended."""
    fits = []

    def run(batch, *rest):
        fits.extend((fit.arm.name, fit.value) for fit in batch)
        return {fit: runner.Accuracies(min(fit.value, 1.0), 0.5) for fit in batch}

    monkeypatch.setattr(runner, "_run", run)
    arms = [Arm("sgd", checkpoints[0], attack=ATTACKS["dense_sgd"]), Arm("knn", checkpoints[0], attack=ATTACKS["knn"])]
    protocol = FineTuneProtocol(learning_rates=(1e-3, 3e-3, 1e-2), extensions=1)
    sample_wise_learning_curves(arms, attack, [6], [0], protocol, jobs=1)
    assert [value for name, value in fits if name == "sgd"] == pytest.approx([0.01, 0.03, 0.1, 0.3])
    assert [value for name, value in fits if name == "knn"] == list(ATTACKS["knn"].grid(protocol))


def test_the_attackers_images_reach_attacks_that_need_no_labels(attack, checkpoints, monkeypatch):
    pools = []

    def fit(self, model, loot, *rest):
        pools.append(loot.pool)
        return predictor(model)

    monkeypatch.setattr(Shot, "fit", fit)
    arm = Arm("shot", checkpoints[0], attack=ATTACKS["shot"])
    sample_wise_learning_curves([arm], attack, [6], [0], QUICK, jobs=1)
    assert pools
    assert all(pool is attack.train for pool in pools)


@pytest.mark.parametrize("make", [tiny_vit, tiny_resnet])
def test_weights_are_counted_however_they_are_stored(attack, tmp_path, make):
    """By them, an accelerator is given so many models at a time."""
    make().half().save_pretrained(tmp_path)
    described = Describer(attack, QUICK)
    assert described.weights(Arm("a", str(tmp_path))) == sum(p.numel() for p in make().parameters())


def test_extended_grids():
    protocol = FineTuneProtocol(learning_rates=(3e-4, 1e-3, 3e-3, 1e-2))
    assert protocol.extended(0) == protocol
    assert protocol.extended(2).learning_rates == (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
    assert QUICK.extensions == 0  # two rates are somebody's choice


@pytest.mark.parametrize("sizes", [[12, 6], [6, 6], [6, 25], [1, 6], []])
def test_bad_sample_sizes(attack, checkpoints, sizes):
    with pytest.raises(ValueError, match="sample_sizes"):
        sample_wise_learning_curves(standard_arms(*checkpoints), attack, sizes, [0], QUICK)


@pytest.mark.parametrize("seeds", [[], [0, 0, 0]])
def test_bad_seeds(attack, checkpoints, seeds):
    with pytest.raises(ValueError, match="each of them once"):
        sample_wise_learning_curves(standard_arms(*checkpoints), attack, [6, 12], seeds, QUICK)


def test_bad_protocols():
    with pytest.raises(ValueError, match="steps >= 1"):
        FineTuneProtocol(steps=0)
    with pytest.raises(ValueError, match="extensions >= 0"):
        FineTuneProtocol(extensions=-1)
    with pytest.raises(ValueError, match="at least one, each positive and finite"):
        FineTuneProtocol(learning_rates=())
    with pytest.raises(ValueError, match=r"learning_rates is 0\.001; needed: a sequence"):
        FineTuneProtocol(learning_rates=1e-3)


@pytest.mark.parametrize(
    ("of_the_other", "chosen", "fits"),
    [
        # As good as the first seed's .9, within the margin: its own best is not looked for.
        ({1e-1: 0.88}, 1e-1, 1),
        ({1e-1: 0.6, 1e-2: 0.5, 1e-3: 0.8, 1e-4: 0.7}, 1e-3, 4),
        ({1e-1: 0.6, 1e-2: 0.5, 1e-3: 0.3, 1e-4: 0.2}, 1e-1, 4),
        ({1e-1: math.nan, 1e-2: math.nan, 1e-3: 0.3, 1e-4: 0.3}, 1e-4, 4),
        ({1e-1: math.nan, 1e-2: math.nan, 1e-3: math.nan, 1e-4: math.nan}, None, 4),
    ],
)
def test_another_seed_tunes_for_itself_where_it_disappoints(
    attack, checkpoints, monkeypatch, of_the_other, chosen, fits
):
    """The first seed prefers 1e-1; each choice rests on validation accuracy alone."""
    tables = {3: {1e-1: 0.9, 1e-2: math.nan, 1e-3: 0.5, 1e-4: 0.4}, 1: of_the_other}
    done = []

    def run(batch, *rest):
        (fit,) = batch
        done.append((fit.seed, fit.value))
        value = tables[fit.seed][fit.value]
        return {fit: runner.Accuracies(value, value / 2)}

    monkeypatch.setattr(runner, "_run", run)
    protocol = FineTuneProtocol(steps=12, learning_rates=(1e-1, 1e-2, 1e-3, 1e-4), warmup_steps=1, extensions=0)
    found = sample_wise_learning_curves(standard_arms(*checkpoints)[:1], attack, [6], [3, 1], protocol, jobs=1)
    assert found.learning_rates["scratch"][0] == [1e-1]
    assert found.accuracies["scratch"][0] == [0.45]
    assert sum(seed == 1 for seed, _ in done) == fits
    assert len(done) == len(set(done))  # also without a cache
    if chosen is None:
        assert found.diverged == ("scratch",)
    else:
        assert found.learning_rates["scratch"][1] == [chosen]
        assert found.accuracies["scratch"][1] == [tables[1][chosen] / 2]
        assert found.diverged == ()


def test_a_seed_that_tunes_for_itself_extends_the_grid_for_itself(attack, checkpoints, monkeypatch):
    """The first seed stays within 1, 2 and 4 (validation .9 at 2); the other one is better the higher the rate."""

    def run(batch, *rest):
        (fit,) = batch
        value = 0.9 - 0.1 * abs(fit.value - 2) / 8 if fit.seed == 0 else fit.value / 40
        return {fit: runner.Accuracies(value, value)}

    monkeypatch.setattr(runner, "_run", run)
    protocol = FineTuneProtocol(steps=12, learning_rates=(1, 2, 4), warmup_steps=1, extensions=2)
    found = sample_wise_learning_curves(standard_arms(*checkpoints)[:1], attack, [6], [0, 1], protocol, jobs=1)
    assert found.learning_rates["scratch"] == [[2], [16]]


def test_a_seed_that_tunes_for_itself_skips_no_rate(attack, checkpoints, monkeypatch):
    """The first seed has gone on to 16, where the other one is at a loss; its best, 8, lies between."""

    def run(batch, *rest):
        (fit,) = batch
        value = fit.value / 20 if fit.seed == 0 or fit.value <= 8 else 0.01
        return {fit: runner.Accuracies(value, value)}

    monkeypatch.setattr(runner, "_run", run)
    protocol = FineTuneProtocol(steps=12, learning_rates=(1, 2, 4), warmup_steps=1, extensions=2)
    found = sample_wise_learning_curves(standard_arms(*checkpoints)[:1], attack, [6], [0, 1], protocol, jobs=1)
    assert found.learning_rates["scratch"] == [[16], [8]]


def test_classes_without_an_image_count(attack):
    """Or the model's own head would seem to have other classes than the target."""

    class Named(PixelDataset):
        class_names = [str(i) for i in range(7)]

    parts = {name: copy.copy(getattr(attack, name)) for name in ("train", "validation", "test")}
    for part in parts.values():
        part.__class__ = Named
    assert attack.num_labels == 3
    assert replace(attack, **parts).num_labels == 7


def test_scratch_is_fitted_once_for_both_checkpoints(attack, checkpoints):
    """Random weights have no zeros to keep: which are prunable is all the same to them."""
    describe = Describer(attack, QUICK)
    arms = [Arm("scratch", path, random_init=True) for path in checkpoints]
    assert len({describe(Fit(arm, 6, 0, 1e-3)) for arm in arms}) == 1


def test_arms_start_where_they_should(checkpoints):
    loaded = load_start(Arm("a", checkpoints[0]), seed=0)
    scratch = load_start(Arm("s", checkpoints[0], random_init=True), seed=5)
    original = tiny_vit()
    name = next(iter(prunable_weights(loaded)))
    assert torch.equal(loaded.classifier.weight, original.classifier.weight)
    assert torch.equal(loaded.get_parameter(name), original.get_parameter(name))
    assert not torch.equal(scratch.get_parameter(name), original.get_parameter(name))
    other = load_start(Arm("s", checkpoints[0], True), seed=1)
    assert not torch.equal(scratch.get_parameter(name), other.get_parameter(name))


def test_what_a_checkpoint_lacks_is_drawn_with_the_seed(tmp_path):
    model = tiny_vit()
    weights = {name: weight for name, weight in model.state_dict().items() if not name.startswith("classifier")}
    model.save_pretrained(tmp_path, state_dict=weights)
    first, again, other = (load_start(Arm("a", str(tmp_path)), seed).classifier.weight for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_accuracy_is_taken_in_eval_mode(attack):
    model = tiny_vit(dropout=0.9).train()
    assert accuracy_of(predictor(model), attack.test) == accuracy_of(predictor(model), attack.test, batch_size=7)
    assert not model.training


def curves(**accuracies):
    return LearningCurves((10, 100), (0, 1), accuracies, {name: [1e-3, 1e-3] for name in accuracies}, 8)


def test_a_summary_needs_scratch():
    with pytest.raises(ValueError, match="the arms are a; needed: one called 'scratch'"):
        summarize(curves(a=[[0.2, 0.4]]))


def test_summary_by_hand():
    found = summarize(
        curves(
            scratch=[[0.2, 0.4], [0.2, 0.4]],
            unprotected=[[0.4, 0.6], [0.4, 0.6]],
            protected_dense=[[0.2, 0.4], [0.3, 0.5]],
        )
    )
    assert found["unprotected"]["normalized"] == pytest.approx(0.2)
    assert found["unprotected"]["nats"] == pytest.approx(0.2 * math.log(10))
    assert found["protected_dense"]["seeds"] == pytest.approx([0.0, 0.1])
    # Mean .05, standard deviation .0707, t(.975, 1) = 12.706: .05 +- 12.706 * .0707 / sqrt(2).
    assert found["protected_dense"]["ci"]["normalized"] == pytest.approx([0.05 - 0.6353, 0.05 + 0.6353], abs=1e-3)
    assert retained(found, "protected_dense") == pytest.approx(0.25)


def test_nothing_to_retain_is_null():
    flat = [[0.2, 0.4], [0.2, 0.4]]
    found = summarize(curves(scratch=flat, unprotected=flat, protected_mask=flat))
    assert retained(found, "protected_mask") is None
    assert retained_share(0.1, 0.0099) is None
    assert retained_share(0.1, 0.01) == pytest.approx(10)


def test_one_seed_has_no_interval():
    single = LearningCurves((10, 100), (0,), {"scratch": [[0.1, 0.2]], "unprotected": [[0.3, 0.4]]}, {}, 2)
    summary = summarize(single)
    assert summary["unprotected"]["ci"]["normalized"] == [None, None]
    json.dumps(summary, allow_nan=False)


def test_measuring_a_protected_model(attack, checkpoints, tmp_path):
    measured = measure_protection(*checkpoints, attack.test, attack, [6, 12], [0], QUICK, 0.5, tmp_path, jobs=1)
    assert measured.sparsity.achieved == 0.5
    assert 0 < measured.sparsity.live_fraction <= 1
    assert measured.accuracy.images == 12
    assert measured.convergence.sample_size == 12
    assert measured.convergence.steps == 12


def test_what_is_known_of_an_architecture_without_its_values(attack, tmp_path):
    """As on an accelerator, before fits are trained as one; the positions of a masked autoencoder have no values."""
    for name in ("ViTMAE-pretraining", "CLIP"):
        folder = tmp_path / name
        build(name).save_pretrained(folder)
        arm = Arm(name, str(folder))
        describe = Describer(attack, QUICK)
        assert describe.weights(arm) == sum(p.numel() for p in load_model(arm.checkpoint).parameters())
        assert not describe.has_dropout(arm)
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["attention_dropout"] = 0.1
    (folder / "config.json").write_text(json.dumps(config))
    assert Describer(attack, QUICK).has_dropout(arm)


def test_fits_trained_as_one_give_the_same_curves(attack, checkpoints, tmp_path, monkeypatch):
    arms = standard_arms(*checkpoints)
    single = sample_wise_learning_curves(arms, attack, [6, 12, 24], [0, 1], QUICK, jobs=1)
    real, batches = FineTuning.fit_together, []

    def noted(attacks, models, loots, *args):
        batches.append((len(models), {attack.keep_mask for attack in attacks}, {len(loot.labels) for loot in loots}))
        return real(attacks, models, loots, *args)

    monkeypatch.setattr(FineTuning, "fit_together", noted)
    joint = sample_wise_learning_curves(
        arms, attack, [6, 12, 24], [0, 1], QUICK, tmp_path / "fits", jobs=1, together=8
    )
    assert joint.fits == single.fits == len(list((tmp_path / "fits").iterdir()))
    # Tuning: 4 arms x 3 sizes x 2 rates, whatever the size of their batches and whether a mask is kept.
    assert batches[:3] == [(8, {False, True}, {24}), (8, {False, True}, {12}), (8, {False, True}, {6})]
    for name, accuracies in single.accuracies.items():
        # 12 test images: rounding may turn one of them.
        assert np.abs(np.subtract(accuracies, joint.accuracies[name])).max() <= 1 / 12 + 1e-9


def test_what_cannot_be_trained_as_one_is_fitted_one_after_another(attack, checkpoints, monkeypatch, caplog):
    arms = standard_arms(*checkpoints)[1:2]
    expected = sample_wise_learning_curves(arms, attack, [6], [0], QUICK, jobs=1)

    def without_memory(*args):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(FineTuning, "fit_together", without_memory)
    assert sample_wise_learning_curves(arms, attack, [6], [0], QUICK, jobs=1, together=2) == expected
    assert "Cannot train 2 fits as one, and fit one after another: no memory" in caplog.text


def test_dropout_is_never_shared(attack, tmp_path, monkeypatch):
    model = tiny_vit(dropout=0.1)
    model.save_pretrained(tmp_path / "a")
    monkeypatch.setattr(FineTuning, "fit_together", lambda *args: pytest.fail("trained as one"))
    arms = [Arm("a", str(tmp_path / "a"))]
    assert sample_wise_learning_curves(arms, attack, [6], [0], QUICK, jobs=1, together=4).fits == 2


def test_no_fits_at_a_time_is_an_error(attack, checkpoints):
    with pytest.raises(ValueError, match="together is 0; needed: at least 1"):
        sample_wise_learning_curves(standard_arms(*checkpoints), attack, [6], [0], QUICK, together=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_trains_many_small_models_in_the_time_of_few(attack, checkpoints):
    arms = standard_arms(*checkpoints)
    protocol = replace(QUICK, steps=80)
    seconds = {}
    for together in (None, 1):
        begin = perf_counter()
        sample_wise_learning_curves(arms, attack, [8, 12, 24], range(6), protocol, jobs=1, together=together)
        seconds[together] = perf_counter() - begin
    assert seconds[1] > 5 * seconds[None]


def test_parts_of_other_classes_are_refused(attack):
    other = pixels(12, 2, classes=2)
    with pytest.raises(
        ValueError, match=r"parts of the target have different classes \(train: 0, 1, 2; .*test: 0, 1\)"
    ):
        AttackData(attack.train, attack.validation, other)


def test_parts_that_are_one_are_refused(attack):
    with pytest.raises(ValueError, match="test and train are the same images"):
        AttackData(attack.train, attack.validation, attack.train)


def test_several_processes_need_a_folder_they_share(checkpoints, attack, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes were launched and cache_dir is None"):
        sample_wise_learning_curves(standard_arms(*checkpoints), attack, [6, 12], [0], QUICK)
