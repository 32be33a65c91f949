"""Edited files, odd options and extremes: they work, or an error of the declared kind says why not."""

import copy
import errno
import json
import os
from dataclasses import asdict, fields

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import ViTConfig, ViTForImageClassification

from hf_ntp.evaluation.cache import ResultCache
from hf_ntp.publishing.errors import RecordError
from hf_ntp.publishing.record import validate_record
from hf_ntp.publishing.results import read_results
from hf_ntp.publishing.strict_json import strict_json
from hf_ntp.run_folder import RUN_FILE, Stopwatch, claim_run_folder
from hf_ntp.training.arguments import ProtectionArguments
from hf_ntp.training.checkpoint import SCALARS_FILE, TENSORS_FILE
from hf_ntp.training.objective import TargetBatch, fisher_term

from .conftest import Rows, tiny_resnet, tiny_vit
from .publishing.conftest import make_results
from .publishing.folders import minimal_record
from .training.test_trainer import trainer

FAST = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
scalars = st.none() | st.booleans() | st.integers(-3, 10**20) | st.floats() | st.text(max_size=4)
anything = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner), max_leaves=4
)


def places(value, path=()):
    """Paths to everything in nested lists and dicts."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path] * bool(path) + [place for key, child in children for place in places(child, (*path, key))]


def edited(value, data):
    """A copy with one entry replaced by anything, or gone."""
    value = copy.deepcopy(value)
    *way, last = data.draw(st.sampled_from(places(value)))
    parent = value
    for key in way:
        parent = parent[key]
    if data.draw(st.booleans()):
        parent[last] = data.draw(anything)
    else:
        del parent[last]
    return value


def refused(kind, function, *arguments, **options):
    """Message of the error that a call raises, which has to be of this kind; empty where it raises none."""
    try:
        function(*arguments, **options)
    except kind as error:
        return str(error)
    return ""


@FAST
@given(st.data())
def test_options_of_any_type(data):
    option = data.draw(st.sampled_from([field.name for field in fields(ProtectionArguments)]))
    value = data.draw(anything)
    if refusal := refused(ValueError, ProtectionArguments, **{option: value}):
        assert "needed: " in refusal
        return
    made = ProtectionArguments(**{option: value})
    assert ProtectionArguments(**json.loads(json.dumps(asdict(made)))) == made


@FAST
@given(st.binary(max_size=40) | anything.map(lambda value: json.dumps(value).encode()))
def test_json_from_strangers(content):
    try:
        value = strict_json(content)
    except ValueError:
        return
    assert json.loads(json.dumps(value, allow_nan=False)) == value


@FAST
@given(st.data())
def test_edited_records(data):
    record = edited({**minimal_record(), "files": {"model.safetensors": "a" * 64}}, data)
    refusal = refused(RecordError, validate_record, record)
    assert not refusal or "needed: " in refusal.lower()


@FAST
@given(st.data())
def test_edited_results(tmp_path, data):
    (tmp_path / "results.json").write_text(json.dumps(edited(make_results(), data)))
    refusal = refused(ValueError, read_results, tmp_path)
    assert not refusal or "cannot be read" in refusal


@FAST
@given(st.binary(max_size=30) | anything.map(lambda value: json.dumps(value).encode()))
def test_edited_small_files(tmp_path, content):
    """A fit that cannot be read is fitted again; times are lost; another run's folder is never taken over."""
    for name in ("key.json", RUN_FILE, "seconds.json"):
        (tmp_path / name).write_bytes(content)
    assert isinstance(ResultCache(tmp_path).get("key"), (dict, type(None)))
    assert all(isinstance(seconds, float) for seconds in Stopwatch(tmp_path / "seconds.json").seconds.values())
    with pytest.raises(ValueError, match=r"cannot be read|holds another run"):
        claim_run_folder(tmp_path, {"rho": 1})


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    ours = trainer(folder, max_steps=2, save_strategy="steps", save_steps=2, target_weight=0.1)
    ours.train()
    return ours, folder / "checkpoint-2"


def test_of_two_runs_that_claim_a_folder_at_once_one_gets_it(tmp_path, monkeypatch):
    link = os.link

    def slower(staged, record):
        record.write_text('{"rho": 2}')
        link(staged, record)

    monkeypatch.setattr(os, "link", slower)
    with pytest.raises(ValueError, match=r"holds another run \(rho: 2 there, 1 here"):
        claim_run_folder(tmp_path / "run", {"rho": 1})
    assert [path.name for path in (tmp_path / "run").iterdir()] == [RUN_FILE]

    def without_links(staged, record):
        raise OSError(errno.EOPNOTSUPP, "no links here")

    monkeypatch.setattr(os, "link", without_links)
    claim_run_folder(tmp_path / "other", {"rho": 1})
    claim_run_folder(tmp_path / "other", {"rho": 1})


@FAST
@given(data=st.data())
def test_edited_checkpoints(checkpoint, data):
    """Everything that is read is read anew: the trainer is none the worse for having read another one before."""
    ours, folder = checkpoint
    path = folder / SCALARS_FILE
    whole = path.read_bytes()
    state = json.loads(whole)
    own = {key: value for key, value in state.items() if key != "settings"}
    path.write_text(json.dumps({**edited(own, data), "settings": state["settings"]}))
    try:
        refusal = refused(ValueError, ours._load_optimizer_and_scheduler, str(folder))
    finally:
        path.write_bytes(whole)
    assert not refusal or "cannot be read" in refusal


@pytest.mark.parametrize("name", [SCALARS_FILE, TENSORS_FILE])
def test_half_a_checkpoint(checkpoint, tmp_path, name):
    ours, folder = checkpoint
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[: len(whole) // 2])
    try:
        with pytest.raises(ValueError, match=r"cannot be read.*Resume from an earlier one"):
            ours._load_optimizer_and_scheduler(str(folder))
    finally:
        (folder / name).write_bytes(whole)


class Half(Rows):
    """Images in half precision."""

    def __getitem__(self, index):
        row = super().__getitem__(index)
        return {**row, "pixel_values": row["pixel_values"].half()}


EXTREMES = {
    "batches of one": {"per_device_train_batch_size": 1, "fisher_weight": 0.0, "collapse_weight": 0.0},
    "1,000 target classes": {"target": Rows(1000, 1000, seed=1)},
    "1,000 source classes": {"model": lambda: tiny_vit(num_labels=1000), "source": Rows(1000, 1000)},
    "one image per class": {"target": Rows(8, 8, seed=1), "source": Rows(3, 3)},
    "no zeros": {"sparsity": 0.0},
    "nearly all zeros": {"sparsity": 0.999},
    "nearly all zeros, globally": {"sparsity": 0.999, "prune_pattern": "global"},
    "nearly all zeros, published": {"sparsity": 0.999, "prune_pattern": "l1"},
    "images in float16": {"source": Half(), "target": Half(20, 4, seed=1)},
}


@pytest.mark.parametrize("extreme", EXTREMES)
def test_extremes_are_trained_through(tmp_path, extreme):
    options = dict(EXTREMES[extreme])
    model = options.pop("model", tiny_vit)()
    ours = trainer(tmp_path, model, max_steps=3, logging_steps=3, **options)
    ours.train()
    assert ours.model.config.ntp["sparsity"] == pytest.approx(options.get("sparsity", 0.6), abs=1e-3)


def one_block():
    return ViTForImageClassification(
        ViTConfig(image_size=8, patch_size=4, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                  intermediate_size=8, num_labels=3)
    )  # fmt: skip


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (one_block, {}, "needed: an encoder made of blocks"),
        (tiny_resnet, {"per_device_train_batch_size": 1, "fisher_weight": 0.0, "collapse_weight": 0.0}, "one image"),
        (tiny_vit, {"dataloader_drop_last": True, "per_device_train_batch_size": 49}, "48 rows are no whole batch"),
        (tiny_resnet, {"source": Rows(49)}, "49 rows in batches of 8 make a batch of one image; needed: at least two"),
        (lambda: tiny_vit().half(), {}, "weights are torch.float16; needed: float32"),
        (tiny_vit, {"target": Rows(20, 1)}, "class 0 only"),
    ],
)
def test_what_cannot_work_is_said_before_training(tmp_path, model, options, message):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, model(), **options)


def test_a_last_batch_of_one_image_may_be_left_out(tmp_path):
    ours = trainer(tmp_path, tiny_resnet(), source=Rows(49), dataloader_drop_last=True, max_steps=7)
    ours.train()
    assert torch.isfinite(ours.model.classifier[1].weight).all()


@pytest.mark.parametrize("fisher", ["whitened", "trace_ratio"])
@pytest.mark.parametrize("spread", [1e3, 1.0, 1e-5, 1e-7, 1e-20, 1e-25, 0.0])
@pytest.mark.parametrize("shape", [(32, 16), (8, 64)])
def test_features_that_hardly_differ_have_a_finite_gradient(fisher, spread, shape):
    features = (spread * torch.randn(shape, generator=torch.Generator().manual_seed(0))).requires_grad_()
    labels = torch.arange(len(features)) % 4
    options = ProtectionArguments(fisher=fisher, fisher_level="pooled")
    term = fisher_term(TargetBatch(features, (), labels), labels, 4, options)
    term.backward()
    assert bool(term.isfinite())
    assert bool(features.grad.isfinite().all())


@pytest.mark.parametrize("fisher", ["whitened", "trace_ratio"])
def test_the_fisher_term_means_the_same_at_any_width(fisher):
    """Of features without a class in them, and of such that are nothing else."""
    labels = torch.arange(32) % 10
    options = ProtectionArguments(fisher=fisher, fisher_level="pooled")
    generator = torch.Generator().manual_seed(0)

    def mean(width, signal):
        draws = [torch.randn(32, width, generator=generator) for _ in range(20)]
        classes = torch.randn(10, width, generator=generator)[labels] * signal
        terms = [fisher_term(TargetBatch(draw + classes, (), labels), labels, 10, options) for draw in draws]
        return float(torch.stack(terms).mean())

    for signal in (0.0, 10.0):
        assert mean(64, signal) == pytest.approx(mean(768, signal), rel=0.5)
