import json
import math
import multiprocessing
import os
import re
import shutil
import signal
from pathlib import Path

import datasets
import pytest
import torch
from huggingface_hub import HfApi
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn import functional as F
from transformers import (
    ResNetConfig,
    ResNetForImageClassification,
    TrainerCallback,
    ViTForImageClassification,
    ViTModel,
)

from hf_ntp import NTPConfig, NTPTrainer, load_protected, read_record, run_folder, write_folder
from hf_ntp.functional import uniform_cross_entropy, whitened_discriminant
from hf_ntp.models import scale_free_weights, zero_fraction
from hf_ntp.publishing.record import write_record
from hf_ntp.training.attackers import AttackerPool
from hf_ntp.training.guard import SourceGuard

from ..conftest import Rows, learn, tiny_resnet, tiny_vit
from ..hub_server import OWNER

NOTHING = object()  # stands for no target data at all
# What is not in it is the source loss and ADMM alone.
NO_TARGET = {"target_weight": 0.0, "fisher_weight": 0.0, "collapse_weight": 0.0, "attackers": 0}


def trainer(folder, model=None, target=None, callbacks=None, source=None, evaluation=None, **options):
    defaults = {
        "output_dir": str(folder),
        "max_steps": 12,
        "per_device_train_batch_size": 8,
        "admm_interval": 2,
        "logging_steps": 3,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "sparsity": 0.6,
    }
    return NTPTrainer(
        tiny_vit() if model is None else model,
        NTPConfig(**{**defaults, **options}),
        Rows() if source is None else source,
        Rows(size=20, classes=4, seed=1) if target is None else None if target is NOTHING else target,
        evaluation,
        callbacks=callbacks,
    )


class Stop(TrainerCallback):
    """Stands for a crash: training ends after a checkpoint, and a new process continues."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def test_end_to_end(tmp_path):
    ours = trainer(tmp_path)
    ours.train()
    weights = list(ours.prunable.values())
    assert zero_fraction(weights) == pytest.approx(0.6, abs=0.5 / sum(w.numel() for w in weights))
    assert ours.model.config.ntp["sparsity"] == zero_fraction(weights)
    assert not any(bool(torch.signbit(w[w == 0]).any()) for w in weights), "-0.0 cannot be left out where it is stored"
    others = [p for name, p in ours.model.named_parameters() if name not in ours.prunable]
    assert zero_fraction(others) < 0.05
    logged = [row for row in ours.state.log_history if "loss" in row]
    assert len(logged) == 4
    terms = {"source_loss", "collapse_loss", "fisher_loss", "attacker_loss", "distillation_loss", "sparsity"}
    terms.add("target_strength")
    assert all(terms <= row.keys() for row in logged)
    assert all(math.isfinite(row[term]) for row in logged for term in terms)
    assert {"primal_residual", "dual_residual"} <= logged[-1].keys()
    assert logged[-1]["sparsity"] == pytest.approx(0.6, abs=1e-3)


def test_every_term_reaches_tensorboard(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    trainer(tmp_path, report_to="tensorboard", target_weight=0.1).train()
    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    terms = ("source_loss", "target_loss", "fisher_loss", "collapse_loss", "attacker_loss", "source_excess")
    names = {f"train/{term}" for term in (*terms, "primal_residual", "sparsity")}
    assert names <= set(events.Tags()["scalars"])


def test_the_loss_is_the_sum_of_its_terms(tmp_path):
    """One batch against the same computation written out."""
    ours = trainer(
        tmp_path,
        target_weight=0.3,
        fisher_weight=0.7,
        collapse_weight=0.2,
        source_distillation=0.5,
        source_tolerance=[],
        lr_scheduler_type="constant",
    )
    ours.train()
    batch = next(iter(ours.get_train_dataloader()))
    model = ours.model.eval()
    head = ours.heads["target"]
    loss = ours.compute_loss(model, batch)
    target = batch["targets"]["target"]
    logits = model(batch["pixel_values"]).logits
    outputs = model.vit(target["pixel_values"], output_hidden_states=True)
    pooled = outputs.last_hidden_state[:, 0]
    levels = [state.mean(1) for state in outputs.hidden_states[1:]] + [pooled]
    levels = [(level - level.mean(0)) / level.std(0, correction=0) for level in levels]
    # Counted as if features were 64 wide.
    fisher = 64 / 16 * sum(whitened_discriminant(level, target["labels"], 4, 0.1) for level in levels) / len(levels)
    transfer = uniform_cross_entropy(F.linear(pooled, head.linear.weight, head.linear.bias))
    source_states = model.vit(batch["pixel_values"], output_hidden_states=True).hidden_states[1:]
    spreads = [
        [F.layer_norm(state, (16,)).var(0, unbiased=False).mean() for state in states]
        for states in (outputs.hidden_states[1:], source_states)
    ]
    collapse = sum((t / s + 1e-4).log() for t, s in zip(*spreads, strict=True)) / 2
    original = tiny_vit().eval()(batch["pixel_values"]).logits
    divergence = F.kl_div(logits.log_softmax(-1), original.softmax(-1), reduction="batchmean")
    expected = F.cross_entropy(logits, batch["labels"]) + 0.3 * transfer + 0.7 * fisher + 0.2 * collapse
    expected = expected + 0.5 * divergence
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize(
    ("tolerance", "evaluation", "warning"),
    [
        ([1e-6, 1e-6], None, "on authorized training images .* pass others as eval_dataset"),
        ([1e-6, 1e-6], Rows(), "on authorized evaluation images .* Lower the sparsity"),
        ([0.9, 0.9], Rows(), None),
        ([], None, None),
    ],
)
def test_a_guard_that_switches_protection_off_says_so(tmp_path, caplog, tolerance, evaluation, warning):
    model = tiny_vit()
    learn(model, Rows())
    options = {"max_steps": 80, "learning_rate": 0.02, "target_warmup": 0.1, "rho": 1.0, "sparsity": 0.95}
    options["attackers"] = 1
    ours = trainer(tmp_path, model, evaluation=evaluation, source_tolerance=tolerance, **options)
    ours.train()
    found = [record.getMessage() for record in caplog.records if "Everything aimed at" in record.getMessage()]
    assert bool(found) == bool(warning)
    assert warning is None or re.search(warning, found[0])
    assert (f"source_tolerance={tolerance} allows" in caplog.text) == bool(warning)
    shares = [row["target_strength"] for row in ours.state.log_history if "target_strength" in row][3:]
    # It takes some steps until an image is lost.
    assert max(shares[len(shares) // 2 :]) < 0.1 if warning else min(shares) == 1


def test_an_original_that_does_not_know_the_source_is_named(tmp_path, caplog):
    """Three classes, equally frequent: a third is chance, 40 % and less no knowledge."""
    model = tiny_vit()
    learn(model, Rows())
    trainer(tmp_path, model, max_steps=1, evaluation=Rows()).train()
    assert "does not know the source" not in caplog.text
    with torch.no_grad():
        model.classifier.weight.zero_()
    trainer(tmp_path, model, max_steps=1, evaluation=Rows(size=30)).train()
    found = "classifies 33 % of 30 authorized images correctly, of which the most frequent class has 33 %"
    assert found in caplog.text
    caplog.clear()
    trainer(tmp_path, model, max_steps=1, source_tolerance=[], source_distillation=0.0).train()
    assert "does not know the source" not in caplog.text, "nothing of the original is kept"


def test_a_model_that_lost_more_than_allowed_says_so(tmp_path, caplog):
    model = tiny_vit()
    learn(model, Rows())
    options = {"max_steps": 40, "learning_rate": 0.05, "sparsity": 0.99, "evaluation": Rows(), "attackers": 1}
    trainer(tmp_path, model, source_tolerance=[0.001, 0.001], **options).train()
    assert re.search(r"the model ends 0\.\d+ worse than the original \(source_excess\); source_tolerance", caplog.text)
    caplog.clear()
    trainer(tmp_path, model, source_tolerance=[1.0, 1.0], **options).train()
    assert "worse than the original" not in caplog.text


@pytest.mark.parametrize("option", ["prune_include", "prune_exclude"])
def test_a_pattern_that_means_no_weight_is_refused(tmp_path, option):
    with pytest.raises(ValueError, match=rf"{option} has 'classifer', which .* such as .*classifier\\.weight"):
        trainer(tmp_path, **{option: ["attention", "classifer"]})


def test_strength_is_logged_where_attackers_are_all_there_is(tmp_path):
    ours = trainer(tmp_path, **{**NO_TARGET, "attackers": 2, "target_warmup": 0.5, "source_tolerance": []})
    ours.train()
    shares = [row["target_strength"] for row in ours.state.log_history if "loss" in row]
    assert shares == pytest.approx([2 / 6, 5 / 6, 1, 1])
    alone = trainer(tmp_path / "alone", **NO_TARGET)
    alone.train()
    assert not any("target_strength" in row for row in alone.state.log_history)


def test_only_authorized_evaluation_data_count(tmp_path, caplog):
    """Of several by name, those of the authorized domains; no stream, and nothing where there is no limit."""
    one, other = Rows(size=9), Rows(size=7, seed=2)
    source = {"one": Rows(), "two": Rows(seed=5)}
    evaluation = {"one": one, "unauthorized": other}
    assert (
        trainer(tmp_path, source=source, evaluation=evaluation)._guard.held_out.labels.tolist() == one.labels.tolist()
    )
    assert "judged on 'one' alone: eval_dataset has nothing of 'two'" in caplog.text
    assert trainer(tmp_path, evaluation=one, source_tolerance=[])._guard.held_out is None
    assert "judged on training images" not in caplog.text
    assert trainer(tmp_path, evaluation=evaluation)._guard.held_out is None
    assert "eval_dataset is one of 'one', 'unauthorized'. Better" in caplog.text
    stream = datasets.IterableDataset.from_generator(lambda: iter(one))
    assert trainer(tmp_path, evaluation=stream)._guard.held_out is None
    with pytest.raises(ValueError, match=r"eval_dataset.*3"):
        trainer(tmp_path, evaluation=Rows(classes=5))


def test_a_stream_of_images_is_refused_before_training(tmp_path):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=3)})
    data = datasets.IterableDataset.from_generator(lambda: iter(()), features=features)
    with pytest.raises(ValueError, match="eval_dataset is a stream of images"):
        trainer(tmp_path, evaluation=data)
    with pytest.raises(ValueError, match="test_dataset is a stream of images"):
        trainer(tmp_path).predict(data)


def test_a_checkpoint_of_other_evaluation_data_is_refused(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 6}
    trainer(tmp_path, evaluation=Rows(size=9), **options).train()
    with pytest.raises(ValueError, match=r"data: .*9 rows.*there"):
        trainer(tmp_path, evaluation=Rows(size=8), **options).train(resume_from_checkpoint=True)


def test_target_terms_rise_over_the_warm_up(tmp_path):
    ours = trainer(tmp_path, max_steps=20, target_warmup=0.5, source_tolerance=[])
    ours._guard = SourceGuard(ours.model, ours.args, Rows())
    ours.state.max_steps = 20
    strengths = []
    for ours.state.global_step in (0, 4, 9, 15):
        strengths.append(ours._strength())
    assert strengths == [0.1, 0.5, 1.0, 1.0]
    ours.args.target_warmup = 0.0
    assert ours._strength() == 1.0


def test_published_terms(tmp_path):
    ours = trainer(
        tmp_path,
        target_weight=1.0,
        target_warmup=0.0,
        target_loss="ascent",
        target_bound=0.5,
        fisher="trace_ratio",
        fisher_level="pooled",
        prune_pattern="l1",
        rho=5e-3,
    )
    ours.train()
    row = next(row for row in ours.state.log_history if "loss" in row)
    assert row["non_transferable_loss"] == pytest.approx(-0.5)
    assert zero_fraction(list(ours.prunable.values())) == pytest.approx(0.6, abs=1e-3)


def test_evaluation_is_trainers_own(tmp_path):
    ours = trainer(tmp_path)
    check_evaluation(ours, Rows(size=10, seed=5))


def check_evaluation(ours, data, given=None):
    """Accuracy and cross-entropy are those of the logits; ``given`` holds the same rows in another form."""
    metrics = ours.evaluate(given or data)
    with torch.no_grad():
        logits = ours.model.eval()(data.images).logits
    assert metrics["eval_accuracy"] == pytest.approx(float((logits.argmax(-1) == data.labels).float().mean()))
    assert metrics["eval_loss"] == pytest.approx(float(F.cross_entropy(logits, data.labels)), rel=1e-5)


def test_the_mask_is_fixed_in_the_last_phase(tmp_path):
    seen = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append([(weight == 0).clone() for weight in ours.prunable.values()])

    ours = trainer(tmp_path, callbacks=[Watch()], pruning_end=0.5)
    ours.train()
    assert all(torch.equal(a, b) for later in seen[5:] for a, b in zip(seen[5], later, strict=True))
    assert sum(int(zeros.sum()) for zeros in seen[4]) < sum(int(zeros.sum()) for zeros in seen[5])


def test_the_simulated_attacker_keeps_up_with_the_encoder(tmp_path):
    """With the other terms off, the refitted head reads the target off features that move under it."""
    options = {**NO_TARGET, "target_weight": 1e-9}  # a term without weight is not computed
    ours = trainer(tmp_path, max_steps=80, sparsity=0.0, logging_steps=10, **options)
    ours.train()
    losses = [row["target_loss"] for row in ours.state.log_history if "target_loss" in row]
    assert losses[-1] < 0.8 * losses[0]


def test_the_target_is_made_hard_to_read(tmp_path):
    plain = trainer(tmp_path / "a", max_steps=80, **{**NO_TARGET, "fisher_weight": 1e-9})
    protected = trainer(tmp_path / "b", max_steps=80, **{**NO_TARGET, "target_weight": 1.0, "fisher_weight": 1.0})
    fisher = []
    for ours in (plain, protected):
        ours.train()
        fisher.append([row["fisher_loss"] for row in ours.state.log_history if "fisher_loss" in row][-1])
    assert fisher[1] < 0.5 * fisher[0]


def test_batch_norm_statistics_come_from_the_source_only(tmp_path):
    class Bright(Rows):
        def __getitem__(self, index):
            row = super().__getitem__(index)
            return {**row, "pixel_values": row["pixel_values"] + 100}

    one = trainer(tmp_path / "a", tiny_resnet(), **NO_TARGET)
    other = trainer(tmp_path / "b", tiny_resnet(), target=Bright(size=20), **NO_TARGET)
    for ours in (one, other):
        ours.train()
    for (name, a), (_, b) in zip(one.model.named_buffers(), other.model.named_buffers(), strict=True):
        assert torch.equal(a, b), name


def test_weights_before_batch_norm_keep_their_length(tmp_path):
    model = tiny_resnet()
    before = {name: float(weight.detach().norm()) for name, weight in scale_free_weights(model).items()}
    ours = trainer(tmp_path, model, learning_rate=1e-2)
    ours.train()
    assert {
        name: float(weight.detach().norm()) for name, weight in scale_free_weights(model).items()
    } == pytest.approx(before)


def test_a_convolution_that_is_pruned_altogether(tmp_path):
    """Its length is 0 and no factor gives it back: it stays at 0, and nothing else becomes NaN."""
    model = tiny_resnet()
    name, weight = list(scale_free_weights(model).items())[-1]
    with torch.no_grad():
        weight.mul_(1e-2)  # BatchNorm makes up for it, and a threshold for all layers does not
    ours = trainer(tmp_path, model, prune_pattern="global", attackers=2, learning_rate=1e-4)
    ours.train()
    assert not bool(model.get_parameter(name).any())
    assert all(bool(tensor.isfinite().all()) for tensor in model.state_dict().values())


@pytest.mark.parametrize("rows", [10, 11])
def test_no_attacker_averages_a_single_image(tmp_path, rows):
    """Of the last batch of an epoch, which is smaller: BatchNorm has nothing to average in one image of one pixel."""
    torch.manual_seed(0)
    model = ResNetForImageClassification(
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic", num_labels=3)
    )
    images = {"source": Rows(rows, image_size=8), "target": Rows(20, 4, image_size=8, seed=1)}
    ours = trainer(tmp_path, model, max_steps=4, attackers=2, attacker_batch_size=4, **images)
    ours.train()
    assert sum(ours._pool.lives) + sum(a.age for a in ours._pool.attackers if a is not None) > 0


def test_a_run_too_short_to_prune_by_degrees_says_so(tmp_path, caplog):
    trainer(tmp_path / "short", admm_interval=16).train()
    assert "0 of 12 steps are Z-steps (admm_interval 16, from 0" in caplog.text
    caplog.clear()
    trainer(tmp_path / "long").train()
    assert "Z-steps" not in caplog.text


def test_several_targets_with_label_sets_of_their_own(tmp_path):
    ours = trainer(tmp_path, target={"four": Rows(20, 4, seed=1), "two": Rows(15, 2, seed=2)}, target_weight=0.1)
    ours.train()
    row = [row for row in ours.state.log_history if "loss" in row][-1]
    assert {"target_loss_four", "target_loss_two", "fisher_loss_four"} <= row.keys()
    assert ours.heads["two"].linear.out_features == 2


def test_weight_decay_leaves_prunable_weights_alone(tmp_path):
    ours = trainer(tmp_path, weight_decay=0.5)
    assert not set(ours.get_decay_parameter_names(ours.model)) & set(ours.prunable)
    assert "classifier.weight" in ours.get_decay_parameter_names(ours.model)


def test_training_that_stops_early_still_prunes_exactly(tmp_path):
    class Enough(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 3

    ours = trainer(tmp_path, callbacks=[Enough()])
    ours.train()
    assert zero_fraction(list(ours.prunable.values())) == pytest.approx(0.6, abs=1e-3)


def learned_resnet():
    model = tiny_resnet()
    learn(model, Rows())
    return model


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (lambda: tiny_vit(dropout=0.1), {}),
        (lambda: tiny_vit(dropout=0.1), {"gradient_accumulation_steps": 2, "bf16": True, "dataloader_num_workers": 1}),
        (tiny_resnet, {"prune_pattern": "l1", "fisher_level": "pooled"}),
        (
            learned_resnet,
            {"evaluation": Rows(101, seed=3), "source_tolerance": [1e-6, 1e-6], "sparsity": 0.9, "rho": 1.0},
        ),
    ],
    ids=["vit", "vit-accumulated-bf16-worker", "resnet-l1", "resnet-held-out"],
)
def test_resumed_is_uninterrupted_bit_for_bit(tmp_path, make, options):
    """From steps 4 and 10, inside epochs of 6 steps (3 when accumulated); pruning ends at step 8."""
    whole = trainer(tmp_path / "whole", make(), **options)
    whole.train()
    options = {**options, "save_strategy": "steps", "save_steps": 1}
    for interrupted_at in (5, 11):
        folder = tmp_path / str(interrupted_at)
        with pytest.raises(KeyboardInterrupt):
            trainer(folder, make(), callbacks=[Stop(interrupted_at)], **options).train()
        resumed = trainer(folder, make(), **options)
        resumed.train(resume_from_checkpoint=True)
        for (name, a), (_, b) in zip(
            whole.model.state_dict().items(), resumed.model.state_dict().items(), strict=True
        ):
            assert torch.equal(a, b), name
        for a, b in zip(whole.heads.values(), resumed.heads.values(), strict=True):
            assert torch.equal(a.linear.weight, b.linear.weight)
        last = [[r for r in t.state.log_history if "loss" in r][-1] for t in (whole, resumed)]
        assert last[0]["source_loss"] == last[1]["source_loss"]


def test_a_checkpoint_of_other_settings_is_refused(tmp_path):
    trainer(tmp_path, save_strategy="steps", save_steps=6).train()
    with pytest.raises(ValueError, match=r"rho: 0.02 there, 0.5 here"):
        trainer(tmp_path, save_strategy="steps", save_steps=6, rho=0.5).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match=r"data: .*48 rows.*there"):
        trainer(tmp_path, source=Rows(size=30)).train(resume_from_checkpoint=True)


def test_a_checkpoint_of_a_run_from_other_weights_is_refused(tmp_path):
    """The original model is the teacher: resumed from its own checkpoint, a run would be measured against itself."""
    trainer(tmp_path, save_strategy="steps", save_steps=6).train()
    half_protected = type(tiny_vit()).from_pretrained(tmp_path / "checkpoint-6")
    with pytest.raises(ValueError, match="original_weights"):
        trainer(tmp_path, half_protected, save_strategy="steps", save_steps=6).train(resume_from_checkpoint=True)


def test_a_checkpoint_that_lacks_weights_is_refused(tmp_path):
    """They would be drawn at random, and the run would go on with them."""
    options = {"save_strategy": "steps", "save_steps": 6}
    trainer(tmp_path, **options).train()
    path = tmp_path / "checkpoint-6" / "model.safetensors"
    weights = load_file(path)
    del weights["classifier.bias"]
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(
        ValueError, match=r"lack classifier.bias \(1 of \d+ tensors\); needed: all of ViTForImageClass"
    ):
        trainer(tmp_path, **options).train(str(tmp_path / "checkpoint-6"))


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    trainer(tmp_path, save_strategy="steps", save_steps=6).train()
    other = tiny_vit(num_labels=5)
    before = other.classifier.weight.detach().clone()
    with pytest.raises(ValueError, match="architecture: "):
        trainer(tmp_path, other).train(resume_from_checkpoint=True)
    assert torch.equal(before, other.classifier.weight)


def test_one_process_at_a_time_trains_into_a_folder(tmp_path, monkeypatch):
    """Both would write the checkpoints of the same names, and remove what the other one has half-written."""
    monkeypatch.setattr(run_folder, "_LOCK_WAIT", 0.1)

    class Second(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            with pytest.raises(ValueError, match=r"another process trains into .* needed: a folder of its own"):
                trainer(tmp_path).train()

    trainer(tmp_path, callbacks=[Second()], save_strategy="steps", save_steps=6).train()
    assert not [path for path in tmp_path.iterdir() if "lock" in path.name]
    trainer(tmp_path, save_strategy="steps", save_steps=6).train(resume_from_checkpoint=True)


def test_workers_leave_signals_to_the_run(tmp_path):
    """Launchers send them to the whole group of processes: a worker that ends takes the step with it."""
    loader = trainer(tmp_path, dataloader_num_workers=1).get_train_dataloader()
    batches = iter(loader)
    next(batches)
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid, signal.SIGTERM)
    assert len(list(batches)) == len(loader) - 1
    assert not worker.is_alive()


def test_a_folder_with_another_runs_checkpoints_is_refused(tmp_path):
    trainer(tmp_path, save_strategy="steps", save_steps=6).train()
    with pytest.raises(ValueError, match=r"holds checkpoints of another run \(checkpoint-12\)"):
        trainer(tmp_path).train()


def test_what_a_killed_save_left_does_no_harm(tmp_path):
    (tmp_path / "_unfinished" / "checkpoint-7").mkdir(parents=True)
    (tmp_path / "_unfinished" / "checkpoint-7" / "half").write_text("x")
    trainer(tmp_path, save_strategy="steps", save_steps=6).train()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-12", "checkpoint-6"]


def test_half_precision_checkpoints_are_loaded_in_full(tmp_path):
    tiny_vit().to(torch.bfloat16).save_pretrained(tmp_path / "half")
    ours = trainer(tmp_path / "run", str(tmp_path / "half"))
    assert {p.dtype for p in ours.model.parameters()} == {torch.float32}


def test_a_checkpoint_of_plain_trainer_is_refused(tmp_path):
    trainer(tmp_path, save_strategy="steps", save_steps=6).train()
    (tmp_path / "checkpoint-6" / "ntp_state.json").unlink()
    with pytest.raises(FileNotFoundError, match="not a checkpoint of NTPTrainer"):
        trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))


def test_a_checkpoint_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    ours = trainer(tmp_path, save_strategy="steps", save_steps=4)

    def fail(output_dir):
        raise OSError("no space left on device")

    monkeypatch.setattr(ours, "_save_rng_state", fail)
    with pytest.raises(OSError, match="no space"):
        ours.train()
    assert not list(tmp_path.glob("checkpoint-*"))
    trainer(tmp_path, save_strategy="steps", save_steps=4, save_total_limit=2).train()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-12", "checkpoint-8"]


@pytest.mark.parametrize("spelled", ["", "./"])
def test_the_best_checkpoint_is_found_where_it_lies(tmp_path, monkeypatch, spelled):
    monkeypatch.chdir(tmp_path.parent)
    folder = f"{spelled}{tmp_path.name}" if spelled else tmp_path
    ours = trainer(
        folder,
        evaluation=Rows(size=12, seed=8),
        save_strategy="steps",
        save_steps=4,
        eval_strategy="steps",
        eval_steps=4,
        metric_for_best_model="accuracy",
    )
    ours.train()
    best = ours.state.best_model_checkpoint
    found = {row["step"]: row["eval_accuracy"] for row in ours.state.log_history if "eval_accuracy" in row}
    assert len(found) == 3
    assert Path(best) == Path(folder) / f"checkpoint-{max(found, key=found.get)}"
    assert (tmp_path / "checkpoint-12").exists()
    state = json.loads((tmp_path / "checkpoint-12" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == best


def test_saved_weights_are_the_pruned_ones(tmp_path):
    ours = trainer(tmp_path)
    ours.train()
    ours.save_model(str(tmp_path / "final"))
    again = type(ours.model).from_pretrained(tmp_path / "final")
    for (name, a), (_, b) in zip(ours.model.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    assert again.config.ntp == ours.model.config.ntp


class Broken(Rows):
    """Rows with one thing wrong."""

    def __init__(self, change, **options):
        super().__init__(**options)
        self.change = change
        if "labels" in change:
            del self.labels

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        row = {"pixel_values": self.images[index], "labels": index % 3, **self.change}
        return {key: value for key, value in row.items() if value is not None}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"source": Rows(classes=5)}, "train_dataset: row 3 has label 3"),
        ({"source": Rows(classes=1)}, "train_dataset has 48 rows of class 0 only"),
        ({"source": Rows(size=0)}, "train_dataset has no rows"),
        ({"target": Rows(size=0)}, "target 'target' has no rows"),
        ({"target": Rows(classes=1)}, "of class 0 only"),
        ({"source": Broken({"labels": None})}, r"rows have the keys \['pixel_values'\]"),
        ({"target": Broken({"pixel_values": None, "labels": 1})}, r"rows have the keys \['labels'\]"),
        ({"target": Broken({"labels": 0.5})}, "of class 0.5 only"),
        ({"source": Broken({"pixel_values": torch.full((3, 8, 8), float("nan"))})}, "NaN or infinite pixel_values"),
        ({"prune_pattern": "2:5", "sparsity": 0.6}, "'2:5' does not fit"),
    ],
)
def test_bad_data_shows_before_training(tmp_path, bad, message):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, **bad)


@pytest.mark.parametrize(("label", "message"), [(-1, "has label -1"), (1.5, "has label")])
def test_target_labels_that_are_no_classes(tmp_path, label, message):
    target = Broken({})
    target.labels = [0, 1, label] * 16
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, target=target)


def test_resuming_what_has_ended_takes_no_further_step(tmp_path):
    """Ten steps end inside the second epoch of six."""
    options = {"max_steps": 10, "save_strategy": "steps", "save_steps": 5}
    whole = trainer(tmp_path, **options)
    whole.train()
    again = trainer(tmp_path, **options)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 10
    for (name, a), (_, b) in zip(whole.model.state_dict().items(), again.model.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


def test_losses_that_stop_being_finite_stop_the_run(tmp_path):
    with pytest.raises(FloatingPointError, match=r"source_loss.* stopped being finite at step 2.*No checkpoint"):
        trainer(tmp_path, learning_rate=1e30, max_grad_norm=0).train()


class BrokenAt(TrainerCallback):
    """Does something before a step, once the trainer is known."""

    def __init__(self, step, harm):
        self.step, self.harm = step, harm

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            self.harm(self.trainer)


def spoil_attacker(ours):
    next(attacker for attacker in ours._pool.attackers if attacker).head["bias"].fill_(float("inf"))


def spoil_admm(ours):
    next(iter(ours.pruner.stored.values()))[0, 0] = float("nan")


def spoil_head(ours):
    ours.heads["target"].linear.bias.data.fill_(float("nan"))


@pytest.mark.parametrize(
    ("harm", "term"),
    [(spoil_head, "loss, target_loss"), (spoil_attacker, "the simulated attackers hold values"), (spoil_admm, "")],
)
def test_whatever_breaks_stops_the_run_before_it_is_saved(tmp_path, harm, term):
    """Long before the next log (and at odds with Trainer's filter, which would hide it)."""
    options = {"logging_steps": 100, "save_strategy": "steps", "save_steps": 1, "logging_nan_inf_filter": True}
    options["target_weight"] = 0.1
    broken = BrokenAt(4, harm)
    broken.trainer = ours = trainer(tmp_path, callbacks=[broken], **options)
    with pytest.raises(FloatingPointError, match=rf"{term}.*at step 4; .*checkpoint is .*checkpoint-3; "):
        ours.train()
    assert ours.state.global_step == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"checkpoint-{step}" for step in (1, 2, 3)]


def test_without_checkpoints_a_broken_run_goes_on_for_one_step_at_most(tmp_path):
    broken = BrokenAt(4, spoil_head)
    broken.trainer = ours = trainer(tmp_path, callbacks=[broken], logging_steps=100, target_weight=0.1)
    with pytest.raises(FloatingPointError, match="at step 4"):
        ours.train()
    assert ours.state.global_step == 5


def test_transformers_own_answer_to_sigterm_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"enable_jit_checkpoint is True; needed: False\. It saves amid a step"):
        NTPConfig(output_dir=str(tmp_path), enable_jit_checkpoint=True)


class Named(Rows):
    """A dataset whose ``labels`` are those of another number of rows, such as the names of its classes."""

    def __init__(self, labels, **options):
        super().__init__(**options)
        self.truth, self.labels = self.labels, labels

    def __len__(self):
        return len(self.truth)

    def __getitem__(self, index):
        return {"pixel_values": self.images[index], "labels": int(self.truth[index])}


@pytest.mark.parametrize("labels", [[0, 1, 2], list(range(96)), 3, None])
def test_labels_of_other_rows_are_not_those_of_the_dataset(labels, tmp_path):
    """Of a domain with a list of its classes, only so many rows were used."""
    ours = trainer(tmp_path, target=Named(labels))
    assert ours.paired_sampler.target_sizes == [48]
    assert ours.target_labels["target"].tolist() == [i % 3 for i in range(48)]


@pytest.mark.parametrize("kind", [torch.int32, torch.uint8])
def test_any_kind_of_integers_can_be_labels(kind, tmp_path):
    class Odd(Rows):
        def __getitem__(self, index):
            row = super().__getitem__(index)
            return row | {"labels": torch.tensor([row["labels"]], dtype=kind)}

    trainer(tmp_path, source=Odd(), target=Odd(), max_steps=2).train()


def test_the_order_of_domains_is_part_of_a_run(tmp_path):
    targets = {"a": Rows(seed=1), "b": Rows(seed=2)}
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    trainer(tmp_path, target=targets, **options).train()
    other = trainer(tmp_path, target=dict(reversed(targets.items())), **options)
    with pytest.raises(ValueError, match="data: "):
        other.train(str(tmp_path / "checkpoint-2"))


def test_a_target_called_source_hides_no_data(tmp_path):
    source = Rows()
    source.fingerprint = "a"
    prints = trainer(tmp_path, source=source, target={"source": Rows(seed=1)}).settings()["data"]
    assert prints["source"] == "a"


def test_the_push_has_the_rate_of_the_encoder(tmp_path):
    model = tiny_vit()
    head = {"params": model.classifier.parameters(), "lr": 1e-2}
    first, *rest = model.vit.parameters()
    groups = [head, {"params": [first], "lr": 1e-7}, {"params": rest, "lr": 1e-3}]
    config = trainer(tmp_path, attackers=1, max_steps=3).args
    optimizer = torch.optim.AdamW(groups)
    ours = NTPTrainer(model, config, Rows(), Rows(seed=1), optimizers=(optimizer, None))
    rates = []
    ours.add_callback(Call(lambda: rates.append(ours._encoder_rate())))
    ours.train()
    assert rates[0] == pytest.approx(1e-3, rel=0.5)


class Call(TrainerCallback):
    def __init__(self, action):
        self.action = action

    def on_step_begin(self, args, state, control, **kwargs):
        self.action()


def test_looking_at_the_model_changes_nothing(tmp_path):
    """Evaluation draws, too, from what dropout draws from."""
    models = [tiny_vit(dropout=0.2) for _ in range(2)]
    for model, often in zip(models, ("no", "steps"), strict=True):
        options = {"eval_strategy": often, "eval_steps": 1, "evaluation": Rows(seed=5), "source_tolerance": []}
        trainer(tmp_path / often, model=model, max_steps=6, **options).train()
    one, other = (model.state_dict() for model in models)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_second_training_begins_with_a_clean_guard(tmp_path):
    ours = trainer(tmp_path / "a", max_steps=2)
    ours._guard.excess = torch.tensor(0.9)
    ours.train()
    assert float(ours._guard.excess) < 0.1


def test_what_was_held_back_is_told_without_a_log(tmp_path, caplog):
    ours = trainer(tmp_path, logging_strategy="no", source_tolerance=[1e-6, 1e-6])
    ours.look_at_source = lambda step: None
    ours._guard._note = lambda *_: None
    ours.add_callback(Call(lambda: setattr(ours._guard, "excess", torch.tensor(1.0))))
    ours.train()
    assert "Everything aimed at the target had" in caplog.text


def checkpointed():
    """A model with BatchNorm that was told itself to compute activations twice."""
    model = tiny_resnet()
    model.resnet.gradient_checkpointing = True
    return model


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"per_device_train_batch_size": 1, "fisher_weight": 1.0}, "a batch has one image of each domain"),
        ({"target": {"a": Rows(), "b": Rows(seed=1)}, "attackers": 1}, "attackers is 1 for 2 unauthorized domains"),
        ({"target": Rows(image_size=4)}, "pixel_values have the shapes"),
        ({"target": {"source": Rows(image_size=4)}}, "pixel_values have the shapes"),
        ({"source": Rows(image_size=16), "target": Rows(image_size=16)}, "does not take pixel_values"),
        ({"model": checkpointed()}, "gradient_checkpointing is on and ResNet.* has BatchNorm"),
    ],
)
def test_what_would_fail_amid_training(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, **options)


def test_few_rows_give_attackers_as_many_images_as_asked_for(tmp_path):
    ours = trainer(tmp_path, source=Rows(size=6), attackers=2, attacker_batch_size=12, max_steps=2)
    seen = []
    step = AttackerPool.step

    def noted(pool, images, *rest):
        seen.append(sum(len(labels) for parts in images.values() for _, labels in parts))
        return step(pool, images, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AttackerPool, "step", noted)
        ours.train()
    assert min(seen) >= 2 * 12


def test_the_training_set_can_be_evaluated(tmp_path):
    ours = trainer(tmp_path, max_steps=2)
    check_evaluation(ours, Rows(), ours.train_dataset)


def test_accuracy_where_hidden_states_come_along(tmp_path):
    model = tiny_vit()
    model.config.output_hidden_states = True
    check_evaluation(trainer(tmp_path, model=model), Rows(seed=5))


def test_push_to_hub(hub, tmp_path):
    """Private, one commit, and a card that says that nothing was measured."""
    ours = trainer(tmp_path, hub_model_id="org/model")
    with pytest.raises(ValueError, match="not protected yet"):
        ours.push_to_hub()
    ours.train()
    with pytest.raises(TypeError, match="push_to_hub got dataset, tags; needed: no others than source, targets"):
        ours.push_to_hub(tags=["x"], dataset="mnist")
    ours.create_model_card()
    assert not (tmp_path / "README.md").exists()
    ours.push_to_hub(license="apache-2.0", terms="Photos only.")
    repo = hub.model("org/model")
    assert repo.private
    assert [commit.message for commit in repo.commits] == ["initial commit", "End of training"]
    assert b"**Not measured.**" in repo.files["README.md"]
    loaded = load_protected("org/model", verify="digests")
    assert all(torch.equal(loaded.model.state_dict()[name], w) for name, w in ours.model.state_dict().items())
    assert (loaded.record["terms"]["text"], loaded.record["evidence"]) == ("Photos only.", [])
    assert loaded.record["sparsity"]["achieved"] == pytest.approx(0.6, abs=1e-3)
    assert loaded.record["unauthorized_domains"][0]["classes"] == ["0", "1", "2", "3"]


def test_the_card_names_the_owner(hub, tmp_path):
    ours = trainer(tmp_path, hub_model_id="mine")
    ours.train()
    ours.push_to_hub()
    assert 'load_protected("org/mine"' in hub.model("org/mine").files["README.md"].decode()


def test_nothing_of_another_model_stays_in_a_folder(tmp_path):
    ours = trainer(tmp_path / "run", max_steps=2)
    ours.train()
    folder = tmp_path / "published"
    write_folder(ours, folder)
    for name in ("results.json", "attacks.json", "slc.png", "model-00001-of-00002.safetensors"):
        (folder / name).write_text("of another model")
    write_record(folder, read_record(folder))
    (folder / "model.sig").write_text("of another model")
    write_folder(ours, folder)
    names = {path.name for path in folder.iterdir()}
    assert names == {"README.md", "authorization.json", "config.json", "model.safetensors"}
    (folder / "my_lora.safetensors").write_text("mine")
    with pytest.raises(ValueError, match=r"would be lost: my_lora\.safetensors"):
        write_folder(ours, folder)
    (folder / "my_lora.safetensors").unlink()
    (folder / "notes.txt").write_text("mine")
    before = (folder / "README.md").stat().st_mtime_ns
    with pytest.raises(ValueError, match=r"would be lost: notes\.txt; needed: a folder of its own"):
        write_folder(ours, folder)
    assert (folder / "README.md").stat().st_mtime_ns == before


def test_a_model_is_saved_as_a_whole(tmp_path, monkeypatch):
    """A kill amid saving over an older model leaves none that loads, rather than a mixture."""
    ours = trainer(tmp_path / "run", max_steps=2)
    folder = tmp_path / "saved"
    tiny_vit(seed=3).save_pretrained(folder, max_shard_size="4KB")
    (folder / "notes.txt").write_text("mine")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(ours.model, "save_pretrained", full)
        with pytest.raises(OSError, match="What was there before is unchanged"):
            ours.save_model(str(folder))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before

    replace, moved = os.replace, []

    def killed(*paths):
        if moved:
            raise KeyboardInterrupt
        moved.append(paths)
        replace(*paths)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            ours.save_model(str(folder))
    with pytest.raises(OSError, match="no file named"):
        ViTForImageClassification.from_pretrained(folder)
    ours.save_model(str(folder))
    loaded = ViTForImageClassification.from_pretrained(folder).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in ours.model.state_dict().items())
    names = {path.name for path in folder.iterdir()}
    assert names == {"config.json", "model.safetensors", "training_args.bin", "notes.txt"}


def test_places_for_no_folder(tmp_path, monkeypatch):
    ours = trainer(tmp_path / "run", max_steps=2)
    ours.train()
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is a file"):
        write_folder(ours, tmp_path / "notes.txt")
    assert (tmp_path / "notes.txt").read_text() == "mine"
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(ValueError, match="holds the working directory"):
        write_folder(ours, ".")
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write_folder(ours, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "authorization.json").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here", "link", "notes.txt", "real", "run"]


def test_who_pushes_without_a_target_has_to_do_it_by_hand(hub, tmp_path):
    with pytest.raises(ValueError, match="Needed: False"):
        trainer(tmp_path, target=NOTHING, target_access="none", push_to_hub=True, hub_strategy="end")


def test_who_has_seen_no_target_has_to_name_it(tmp_path):
    ours = trainer(tmp_path / "run", target=NOTHING, target_access="none", max_steps=2)
    ours.train()
    with pytest.raises(ValueError, match=r"needed: the names of what is not authorized"):
        write_folder(ours, tmp_path / "published")


def test_push_an_encoder_without_a_head(hub, tmp_path):
    ours = trainer(tmp_path, model=ViTModel(tiny_vit().config), hub_model_id="org/encoder")
    ours.train()
    ours.push_to_hub()
    loaded = load_protected("org/encoder", verify="digests")
    assert type(loaded.model).__name__ == loaded.record["architecture"] == "ViTModel"
    assert 'AutoModel.from_pretrained("org/encoder")' in hub.model("org/encoder").files["README.md"].decode()


def test_a_process_that_does_not_save_leaves_what_another_one_saved(tmp_path, monkeypatch):
    ours = trainer(tmp_path / "run")
    ours.save_model(str(tmp_path / "saved"))
    before = (tmp_path / "saved" / "model.safetensors").read_bytes()
    monkeypatch.setattr(NTPConfig, "should_save", False)
    ours.save_model(str(tmp_path / "saved"))
    assert (tmp_path / "saved" / "model.safetensors").read_bytes() == before


def test_the_record_names_what_was_loaded_by_id(hub, tmp_path):
    tiny_vit().save_pretrained(tmp_path / "base")
    HfApi(token=OWNER).create_repo("org/base")
    HfApi(token=OWNER).upload_folder(repo_id="org/base", folder_path=tmp_path / "base")
    for name, known in (("org/base", "org/base"), (str(tmp_path / "base"), None)):
        ours = trainer(tmp_path / "run", model=name, hub_model_id="org/protected")
        ours.train()
        shutil.move(tmp_path / "base", tmp_path / "moved")  # a path that is gone is no name on the Hub either
        ours.push_to_hub()
        shutil.move(tmp_path / "moved", tmp_path / "base")
        record = load_protected("org/protected", verify="digests").record
        assert record["base_model"] == {"name": known, "revision": None, "weights": None}


def test_push_at_the_end_of_training(hub, tmp_path):
    ours = trainer(tmp_path, hub_model_id="org/model", push_to_hub=True, hub_strategy="end")
    assert hub.model("org/model").private, "Trainer makes the repository before it trains"
    ours.train()
    ours.save_model()
    assert "authorization.json" in hub.model("org/model").files
    assert [name for name in hub.model("org/model").files if "checkpoint" in name] == []


def test_processes_that_do_not_know_of_each_other(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    config = NTPConfig(output_dir=str(tmp_path), report_to="none")
    monkeypatch.setattr(type(config), "world_size", 1)
    with pytest.raises(ValueError, match=r"2 processes were started and Accelerate knows of 1.*use_cpu=True"):
        NTPTrainer(tiny_vit(), config, Rows(), Rows(seed=1))


@pytest.mark.parametrize("pattern", ["layer", "l1"])
def test_nothing_pulls_at_the_weights_before_pruning_begins(tmp_path, pattern):
    """A step whose gradient is zero leaves them as they are; then the penalty begins at what they are by then."""
    pulls, model = [], tiny_vit()

    class Watch(TrainerCallback):
        def on_optimizer_step(self, args, state, control, **kwargs):
            pulls.append(float(model.vit.layers[0].mlp.fc1.weight.grad.norm()))

    options = {"prune_pattern": pattern, "pruning_begin": 0.5, "pruning_end": 1.0, "l1_weight": 1e-3}
    trainer(tmp_path, model, callbacks=[Watch()], max_grad_norm=1e-30, **NO_TARGET, **options).train()
    assert max(pulls[:6]) < 1e-20
    # At sparsity 0, what is pulled to is the weights themselves; the soft threshold shrinks them from the first step.
    assert (pulls[6] > 1e-6) == (pattern == "l1")
    assert max(pulls[8:]) > 1e-6


def test_attackers_may_keep_a_head_with_a_class_that_has_no_image(tmp_path):
    names = datasets.ClassLabel(names=["a", "b", "c"])
    features = datasets.Features({"pixel_values": datasets.Array3D((3, 8, 8), "float32"), "label": names})
    rows = {"pixel_values": Rows(20, 2, seed=1).images.numpy(), "label": [i % 2 for i in range(20)]}
    ours = trainer(tmp_path, target=datasets.Dataset.from_dict(rows, features), attacker_keeps_head=1.0, max_steps=4)
    ours.train()
    assert ours.target_classes == {"target": 3}
    assert [attacker.plan.keeps_head for attacker in ours._pool.attackers if attacker] == [True] * 4


def test_batches_without_two_images_of_a_class(tmp_path, caplog):
    trainer(tmp_path, target=Rows(40, 40, seed=1))
    assert "8 images of the target 'target' in 40 classes, on average 0.7 pairs of one class" in caplog.text
    caplog.clear()
    trainer(tmp_path, target=Rows(40, 40, seed=1), fisher_weight=0)
    trainer(tmp_path, target=Rows(40, 10, seed=1))
    assert "pairs of one class" not in caplog.text


def test_what_the_record_says_of_attackers_and_classes(tmp_path):
    """Attackers of no weight are none; classes without an image are classes, and clusters are not."""
    names = datasets.ClassLabel(names=["a", "b", "c", "d", "e"])
    features = datasets.Features({"pixel_values": datasets.Array3D((3, 8, 8), "float32"), "label": names})
    rows = {"pixel_values": Rows(20, 4, seed=1).images.numpy(), "label": [i % 4 for i in range(20)]}
    for access, classes in (("labelled", ["a", "b", "c", "d", "e"]), ("unlabelled", [])):
        options = {"attacker_weight": 0.0, "target_access": access, "pseudo_classes": 4}
        ours = trainer(tmp_path / access, target=datasets.Dataset.from_dict(rows, features), **options)
        ours.train()
        write_folder(ours, tmp_path / access / "published")
        (domain,) = read_record(tmp_path / access / "published")["unauthorized_domains"]
        assert domain["classes"] == classes
        card = (tmp_path / access / "published" / "README.md").read_text()
        assert "collapse of tokens" in card
        assert "simulated attackers" not in card


def test_an_optimizer_that_swaps_weights_for_evaluation_is_refused(tmp_path):
    class Averaging(torch.optim.SGD):
        def eval(self):
            pass

    model = tiny_vit()
    ours = trainer(tmp_path, model)
    ours.optimizer = Averaging(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="the optimizer is Averaging, which puts other weights"):
        ours.train()


def test_batches_that_stay_apart_have_an_accuracy(tmp_path):
    options = {"eval_do_concat_batches": False, "per_device_eval_batch_size": 7}
    apart, together = (trainer(tmp_path, evaluation=Rows(24, seed=9), **o) for o in (options, {}))
    assert apart.evaluate()["eval_accuracy"] == pytest.approx(together.evaluate()["eval_accuracy"])
    with pytest.raises(ValueError, match="batch_eval_metrics is on and compute_metrics is the default"):
        trainer(tmp_path, batch_eval_metrics=True)


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        ({"a": Rows()}, {"a": Rows(20, 4, seed=1)}, "'a' is the name of an authorized and of an unauthorized domain"),
        ({1: Rows()}, {"b": Rows(20, 4, seed=1)}, r"domains are called \[1\]; needed: text"),
        ({"": Rows()}, {"b": Rows(20, 4, seed=1)}, r"domains are called \[''\]; needed: text"),
    ],
)
def test_names_of_domains(tmp_path, source, target, message):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, source=source, target=target)


def test_a_search_over_trials_is_refused(tmp_path):
    with pytest.raises(ValueError, match="a new model and trainer per trial"):
        trainer(tmp_path).hyperparameter_search(n_trials=2)


def test_saving_amid_a_run_that_is_pushed_at_its_end(tmp_path, hub):
    class Save(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 4:
                ours.save_model(str(tmp_path / "amid"))

    options = {"push_to_hub": True, "hub_strategy": "end", "hub_model_id": "org/model"}
    ours = trainer(tmp_path / "run", callbacks=[Save()], **options)
    ours.train()
    assert (tmp_path / "amid" / "model.safetensors").is_file()
    assert ours.state.global_step == 12


def test_a_run_that_was_stopped_says_so(tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 4

    for name, callbacks, said in (("stopped", [Stop()], (4, 12)), ("whole", [], (None, None))):
        ours = trainer(tmp_path / name, callbacks=callbacks)
        ours.train()
        write_folder(ours, tmp_path / name / "published")
        settings = read_record(tmp_path / name / "published")["method"]["settings"]
        assert (settings.get("stopped_at_step"), settings.get("planned_steps")) == said
        card = (tmp_path / name / "published" / "README.md").read_text()
        assert ("Training was stopped at step 4 of 12." in card) == bool(callbacks)
