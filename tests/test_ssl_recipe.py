"""Encoders without a head through the recipes, with small numbers of steps."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hf_ntp.recipes import ntp_ssl, ntp_vit
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    AutoModelForImageClassification,
    CLIPConfig,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    ViTImageProcessorPil,
    ViTMAEForPreTraining,
    ViTModel,
)

from hf_ntp import NTPTrainer, read_record
from hf_ntp.attacks import probes
from hf_ntp.models import load_model, noted_prunable_weights, zero_fraction
from hf_ntp.training.self_supervised import small_encoder

from .conftest import tiny_vit

ROOT = Path(__file__).parents[1]
QUICK = (
    "--max_steps 12 --pretrain_steps 6 --save_steps 6 --attack_steps 3 --attack_seeds 0 --sample_sizes 10 20 "
    "--attack_learning_rates 1e-3 --report_to none --disable_tqdm true --source_max_samples 200 "
    "--target_max_samples 200 --jobs 1"
).split()


@pytest.fixture(scope="module", autouse=True)
def _quick_probes():
    """On features of a few steps thousands of iterations would not be enough."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probes, "_MAX_ITERATIONS", 20)
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    run = tmp_path_factory.mktemp("mae") / "run"
    return run, ntp_ssl.main(["--output_dir", str(run), *QUICK])


def test_readme_launches_this_recipe():
    assert "accelerate launch recipes/ntp_ssl.py --pretraining mae" in (ROOT / "README.md").read_text()


def test_a_preset_goes_before_the_recipes_own_file(tmp_path):
    """And a file that was asked for before the preset."""
    paper, other = "--preset paper", tmp_path / "other.yaml"
    other.write_text("sparsity: 0.3\n")
    for options, sparsity, attackers in (("", 0.5, 4), (paper, 0.9, 0), (f"{paper} --config {other}", 0.3, 0)):
        _, config = ntp_ssl.parse(["--output_dir", str(tmp_path), "--report_to", "none", *options.split()])
        assert (config.sparsity, config.attackers, config.source_loss) == (
            sparsity, attackers, "auto" if "config" in options else "features"
        )  # fmt: skip


DEMO = ["--source_dataset", "mnist", "--target_dataset", "optdigits"]


def given(folder, model):
    """Save a model with an image processor, as anybody would have it."""
    model.save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(folder)
    return ["--model_name_or_path", str(folder), *DEMO]


def test_a_masked_autoencoder_stays_one(finished):
    run, results = finished
    model, loading = ViTMAEForPreTraining.from_pretrained(run / "protected", output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    assert zero_fraction(list(noted_prunable_weights(load_model(str(run / "protected"))).values())) == pytest.approx(
        0.5, abs=1e-3
    )
    before, after = (load_file(run / name / "model.safetensors") for name in ("unprotected", "protected"))
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"vit"}, "the decoder has no part in the features"
    record = read_record(run / "protected")
    assert record["architecture"] == "ViTMAEForPreTraining"
    assert record["source_accuracy"]["measure"] == results["source"]["measure"] == "linear_probe"
    assert {"knn_before", "knn_after"} <= results["source"].keys()
    assert model(torch.zeros(1, 3, 16, 16)).loss.isfinite()


def test_all_of_a_masked_autoencoder_is_pretrained(tmp_path, monkeypatch):
    """The checks before it froze the decoder, which has no part in the features."""
    trained = []

    def stop(method, encoder, *args, **options):
        trained.extend(name for name, weight in encoder.named_parameters() if weight.requires_grad)
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_ntp.training.self_supervised.pretrain", stop)
    with pytest.raises(KeyboardInterrupt):
        ntp_ssl.main(["--output_dir", str(tmp_path / "run"), *QUICK])
    assert trained == [name for name, weight in small_encoder("mae").named_parameters() if weight.requires_grad]


def test_no_classifier_for_a_masked_autoencoder(finished, tmp_path):
    options = ["--model_name_or_path", str(finished[0] / "unprotected"), *DEMO, "--output_dir", str(tmp_path / "run")]
    with pytest.raises(ValueError, match=r"has a ViTMAEConfig, for which transformers has no image .*ntp_ssl.py"):
        ntp_vit.main([*options, *QUICK])
    assert not (tmp_path / "run").exists()


@pytest.mark.slow  # recipes share what is interrupted; test_recipe.py does the same to the other one
def test_an_interrupted_run_ends_the_same(finished, tmp_path, monkeypatch):
    save = NTPTrainer._save_checkpoint

    def save_and_die(self, *args):
        save(self, *args)
        raise KeyboardInterrupt

    arguments = ["--output_dir", str(tmp_path), *QUICK]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(NTPTrainer, "_save_checkpoint", save_and_die)
        ntp_ssl.main(arguments)
    assert (tmp_path / "work" / "checkpoint-6").is_dir()
    ntp_ssl.main(arguments)
    ours, theirs = (load_file(run / "protected" / "model.safetensors") for run in (tmp_path, finished[0]))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.slow  # what is its own is in tests/training/test_ddp.py, the rest in test_recipe.py
def test_contrastive_on_two_processes(tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    options = ["--output_dir", str(tmp_path / "run"), *QUICK, "--pretraining", "simclr", "--use_cpu", "true"]
    done = subprocess.run(
        [*launch, "recipes/ntp_ssl.py", *options], capture_output=True, text=True, timeout=300, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr[-3000:]
    state = json.loads((tmp_path / "run" / "work" / "checkpoint-12" / "ntp_state.json").read_text())
    assert state["settings"]["world_size"] == 2
    assert done.stdout.count("linear probe") == 1
    assert type(AutoModel.from_pretrained(tmp_path / "run" / "protected")) is ViTModel


def test_your_own_encoder_stays_as_it_is(tmp_path):
    torch.manual_seed(0)
    sizes = {"image_size": 8, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    own = given(tmp_path / "model", Dinov2Model(Dinov2Config(**sizes)))
    results = ntp_ssl.main([*own, "--output_dir", str(tmp_path / "run"), *QUICK])
    assert results["source"]["measure"] == "linear_probe"
    before = load_file(tmp_path / "model" / "model.safetensors")
    unprotected = load_file(tmp_path / "run" / "unprotected" / "model.safetensors")
    assert all(torch.equal(before[name], unprotected[name]) for name in before), "nothing is pretrained"
    assert type(AutoModel.from_pretrained(tmp_path / "run" / "protected")) is Dinov2Model


def test_an_encoder_that_has_to_be_named(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    config = CLIPConfig(
        text_config={**sizes, "vocab_size": 20, "bos_token_id": 0, "eos_token_id": 1},
        vision_config={**sizes, "image_size": 8, "patch_size": 4},
        projection_dim=8,
    )
    own = given(tmp_path / "model", CLIPModel(config))
    ntp_ssl.main([*own, "--encoder_name", "vision_model", "--output_dir", str(tmp_path / "run"), *QUICK])
    assert type(AutoModel.from_pretrained(tmp_path / "run" / "protected")) is CLIPModel


def test_the_papers_setting_puts_a_head_on_an_encoder_and_trains_it_first(tmp_path, capsys):
    own = given(tmp_path / "model", ViTModel(tiny_vit().config, add_pooling_layer=False))
    results = ntp_vit.main([*own, "--output_dir", str(tmp_path / "run"), *QUICK])
    assert results["source"]["measure"] == "classification"
    assert "is fine-tuned on the source" in capsys.readouterr().out
    before, base = (
        load_file(folder / "model.safetensors") for folder in (tmp_path / "model", tmp_path / "run" / "unprotected")
    )
    assert any(not torch.equal(base[f"vit.{name}"], tensor) for name, tensor in before.items())
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "run" / "protected")
    assert model.classifier.out_features == 10


def test_no_head_is_put_on_an_encoder_whose_features_are_to_be_kept(tmp_path):
    own = given(tmp_path / "model", ViTModel(tiny_vit().config, add_pooling_layer=False))
    recipe, config = ntp_vit.parse([*own, "--source_loss", "features", "--output_dir", str(tmp_path), *QUICK])
    start = ntp_vit.base_model(recipe, config, ["zero", "one"])
    assert start.learning_rate is None
    assert type(start.model.encoder) is ViTModel
