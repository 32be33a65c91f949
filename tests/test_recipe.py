"""The recipe end to end, through its command line, with small numbers of steps."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from hf_ntp.recipes import ntp_attack, ntp_ssl, ntp_vit
from huggingface_hub import HfApi
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
    ViTImageProcessorPil,
)

from hf_ntp import AttackData, load_domain, read_record
from hf_ntp.attacks import probes
from hf_ntp.models import prunable_weights, zero_fraction
from hf_ntp.training.arguments import ProtectionArguments
from hf_ntp.training.pretraining import small_vit

from .conftest import tiny_resnet, tiny_vit
from .hub_server import OWNER

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "recipes" / "ntp_vit.py"
QUICK = (
    "--max_steps 20 --pretrain_steps 10 --save_steps 10 --attack_steps 3 --attack_seeds 0 1 --sample_sizes 10 20 "
    "--attack_learning_rates 1e-3 --report_to none --disable_tqdm true --source_max_samples 200 "
    "--target_max_samples 200 --jobs 1"
).split()

DEMO = ["--source_dataset", "mnist", "--target_dataset", "optdigits"]


@pytest.fixture(scope="module")
def recipe():
    spec = importlib.util.spec_from_file_location("ntp_vit", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["ntp_vit"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A whole run as the README launches it, with few steps."""
    run = tmp_path_factory.mktemp("recipe") / "run"
    launch = [sys.executable, "-m", "accelerate.commands.launch", str(SCRIPT), "--output_dir", str(run), *QUICK]
    done = subprocess.run(launch, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    return run, done.stdout


def test_readme_launches_this_recipe():
    readme = (ROOT / "README.md").read_text()
    assert "accelerate launch recipes/ntp_vit.py" in readme
    assert len(re.findall(r"<!-- (?:run|test) command -->", readme)) == 2


def test_result_folder(finished):
    run, printed = finished
    folder = run / "protected"
    assert {path.name for path in folder.iterdir()} == {
        "README.md", "authorization.json", "config.json", "model.safetensors",
        "preprocessor_config.json", "results.json", "slc.png",
    }  # fmt: skip
    assert "SLC-AUC" in printed
    assert "protected, mask kept" in printed
    results = json.loads((folder / "results.json").read_text())
    assert results["source"]["domain"] == "mnist"
    assert results["target"]["domain"] == "optdigits"
    assert np.shape(results["slc"]["curves"]["protected_dense"]) == (2, 2)
    assert set(results["seconds"]) == {"pretrain", "protect", "evaluate"}
    assert not list(run.rglob("*.unfinished"))


def test_the_model_is_sparse_and_described(finished):
    folder = finished[0] / "protected"
    model = AutoModelForImageClassification.from_pretrained(folder)
    requested = ProtectionArguments().sparsity
    weights = list(prunable_weights(model).values())
    assert zero_fraction(weights) == pytest.approx(requested, abs=0.5 / sum(w.numel() for w in weights))
    record = read_record(folder)
    assert record["sparsity"]["achieved"] == model.config.ntp["sparsity"] == zero_fraction(weights)
    assert set(record["unauthorized_domains"][0]["fingerprint"]) == {"owner", "attacker", "validation", "test"}


def test_plain_transformers_loads_it(finished):
    """In a process without our package: tests/publishing/test_hub.py."""
    folder = finished[0] / "protected"
    assert "auto_map" not in json.loads((folder / "config.json").read_text())
    model, found = AutoModelForImageClassification.from_pretrained(folder, output_loading_info=True)
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    assert model(torch.zeros(1, 3, 16, 16)).logits.shape == (1, 10)
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    assert processor(Image.new("RGB", (28, 28)), return_tensors="pt")["pixel_values"].shape == (1, 3, 16, 16)


def test_the_same_command_again_changes_nothing(finished, recipe, monkeypatch):
    run, _ = finished
    before = {path: path.stat().st_mtime_ns for path in (run / "protected").iterdir()}
    for name in ("hf_ntp.NTPTrainer", "hf_ntp.recipes.domains.measure"):
        monkeypatch.setattr(name, None)
    recipe.main(["--output_dir", str(run), *QUICK])
    assert {path: path.stat().st_mtime_ns for path in (run / "protected").iterdir()} == before


def test_options_of_the_pretraining(recipe, tmp_path, monkeypatch):
    class Begun(Exception):
        pass

    def pretrain(model, data, folder, steps, rate, **options):
        found.update(options, model=model, steps=steps, rate=rate)
        raise Begun

    found = {}
    monkeypatch.setattr("hf_ntp.training.pretraining.train_classifier", pretrain)
    given = "--pretrain_seed 3 --pretrain_learning_rate 0.01 --pretrain_steps 9 --augment_shift 2 --bf16 true"
    with pytest.raises(Begun):
        recipe.main(["--output_dir", str(tmp_path / "run"), *QUICK, *given.split(), "--use_cpu", "true"])
    assert (found["seed"], found["steps"], found["rate"], found["transform"].pixels) == (3, 9, 0.01, 2)
    assert (found["bf16"], found["fp16"], found["use_cpu"]) == (True, False, True)
    names = [str(digit) for digit in range(10)]
    assert torch.equal(found["model"].classifier.weight, small_vit(names, 16, 3).classifier.weight)


def test_another_run_does_not_mix_in(finished, recipe):
    run, _ = finished
    with pytest.raises(ValueError, match=r"holds another run \(rho: .* there, 0.3 here\)"):
        recipe.main(["--output_dir", str(run), *QUICK, "--rho", "0.3"])
    with pytest.raises(ValueError, match=r"is not empty and holds no run\.json"):
        recipe.main(["--output_dir", str(run / "protected"), *QUICK])
    with pytest.raises(ValueError, match=r"results\.json is a file; needed: a folder"):
        recipe.main(["--output_dir", str(run / "protected" / "results.json"), *QUICK])


def test_an_interrupted_run_continues_to_the_same_result(finished, recipe, tmp_path, monkeypatch):
    """Killed after the first checkpoint, then during the curves; the weights end up bit for bit the same."""
    from hf_ntp import NTPTrainer
    from hf_ntp.evaluation import runner

    save = NTPTrainer._save_checkpoint

    def save_and_die(self, *args):
        save(self, *args)
        raise KeyboardInterrupt

    arguments = ["--output_dir", str(tmp_path / "run"), *QUICK]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(NTPTrainer, "_save_checkpoint", save_and_die)
        recipe.main(arguments)
    assert (tmp_path / "run" / "work" / "checkpoint-10").is_dir()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(runner, "_run", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        recipe.main(arguments)
    assert not (tmp_path / "run" / "protected").exists()
    results = recipe.main(arguments)
    whole = json.loads((finished[0] / "protected" / "results.json").read_text())
    assert {k: v for k, v in results.items() if k != "seconds"} == {k: v for k, v in whole.items() if k != "seconds"}
    ours, theirs = (load_file(p / "protected" / "model.safetensors") for p in (tmp_path / "run", finished[0]))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_your_own_model_and_folders_of_images(recipe, tmp_path):
    """A ConvNet with other classes, image folders of mixed sizes and modes: a head is trained, the rest the same."""
    rng = np.random.default_rng(0)
    for domain, modes in (("ours", ["RGB"]), ("theirs", ["RGB", "L", "RGBA"])):
        for label, shade in (("dark", 40), ("bright", 200)):
            folder = tmp_path / domain / label
            folder.mkdir(parents=True)
            for i in range(40):
                size = 8 if domain == "ours" else int(rng.integers(8, 20))
                pixels = np.clip(rng.normal(shade, 20, (size, size, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).convert(modes[i % len(modes)]).save(folder / f"{i}.png")
    tiny_resnet(num_labels=5).save_pretrained(tmp_path / "model")
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "model")
    results = recipe.main(
        [
            "--model_name_or_path", str(tmp_path / "model"), "--source_dataset", str(tmp_path / "ours"),
            "--target_dataset", str(tmp_path / "theirs"), "--output_dir", str(tmp_path / "run"), *QUICK,
            "--owner_fraction", "0.5",
        ]
    )  # fmt: skip
    assert results["source"]["domain"] == "ours"
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "run" / "protected")
    assert type(model).__name__ == "ResNetForImageClassification"
    assert model.config.id2label == {0: "bright", 1: "dark"}
    record = read_record(tmp_path / "run" / "protected")
    assert record["authorized_domains"][0]["classes"] == ["bright", "dark"]
    assert record["base_model"]["fine_tuning_steps"] == 10
    card = (tmp_path / "run" / "protected" / "README.md").read_text()
    assert "Base model: not on the Hub, with a new head and fine-tuned on ours for 10 steps" in card
    assert str(tmp_path) not in (tmp_path / "run" / "protected" / "authorization.json").read_text()


def test_several_domains_a_third_and_no_access(recipe, tmp_path):
    """All kinds of domains in one run, through the command line."""
    load_domain("optdigits", max_samples=200).save_to_disk(tmp_path / "scans")
    results = recipe.main(
        [
            "--source_dataset", "mnist", "optdigits", "--source_weights", '{"mnist": 2, "optdigits": 1}',
            "--target_dataset", "syn", "mnistm", "--third_dataset", str(tmp_path / "scans"), "--target_access", "none",
            "--output_dir", str(tmp_path / "run"), *QUICK, "--attack_seeds", "0", "--max_steps", "4",
            "--save_strategy", "no",
        ]
    )  # fmt: skip
    assert results["target"] == {"domain": "syn", "dataset": "syn", "access": "none"}
    assert results["other_targets"][0]["target"]["domain"] == "mnistm"
    assert results["third"]["target"]["domain"] == "scans"
    record = read_record(tmp_path / "run" / "protected")
    assert [found["domain"] for found in record["source_accuracy"]["domains"]] == ["mnist", "optdigits"]
    assert [found["domain"] for found in record["evidence"]] == ["syn", "mnistm"]
    assert set(record["unauthorized_domains"][0]["fingerprint"]) == {"attacker", "validation", "test"}
    assert record["method"]["settings"]["target_access"] == "none"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (["--source_dataset", "mnist", "mnist"], ValueError, "domains with names of their own"),
        (["--target_dataset", "mnist"], ValueError, "mnist would be the name of an authorized and of an unauthorized"),
        (
            ["--third_dataset", "optdigits"],
            ValueError,
            "optdigits would be the name of an authorized",
        ),
        (["--target_weights", '{"digits": 1}'], ValueError, "target_weights are for 'digits'; needed: .*'optdigits'"),
        (["--prune_exclude", "."], ValueError, "no prunable weight left"),
        (["--prune_pattern", "2:7"], ValueError, "2:7"),
        (["--report_to", "mlflow"], RuntimeError, "mlflow"),
        (["--third_dataset", "nothing/here"], (ConnectionError, FileNotFoundError), "nothing/here"),
        (["--target_weights", "optdigits"], ValueError, "target_weights is 'optdigits'"),
        (["--sample_sizes", "10", "100000"], ValueError, "sample_sizes"),
        (["--sample_sizes", "20", "10"], ValueError, "strictly increasing"),
        (["--sample_sizes", "10"], ValueError, "at least two positive sizes"),
        (["--attack_seeds", "0", "0"], ValueError, "each of them once"),
        (["--sparsity", "1.5"], ValueError, "sparsity is 1.5"),
        (["--rho", "-1"], ValueError, "rho is -1.0"),
        (["--attack_steps", "0"], ValueError, "attack_steps is 0; needed: at least 1"),
        (["--pretrain_steps", "0"], ValueError, "pretrain_steps is 0"),
        (["--pretrain_learning_rate", "0"], ValueError, "pretrain_learning_rate is 0.0; needed: a positive"),
        (["--pretrain_learning_rate", "-1"], ValueError, "pretrain_learning_rate is -1.0"),
        (["--augment_shift", "-1"], ValueError, "augment_shift is -1"),
        (["--jobs", "0"], ValueError, "jobs is 0"),
        (["--license", ""], ValueError, "license is empty"),
        (["--max_steps", "0"], ValueError, "max_steps is 0"),
        (["--per_device_train_batch_size", "0"], ValueError, "per_device_train_batch_size is 0"),
        (["--owner_fraction", "1"], ValueError, "owner_fraction is 1"),
        (["--target_dataset", "nobody/nothing"], (ConnectionError, FileNotFoundError), "nobody/nothing"),
        (["--target_dataset", "./missing"], FileNotFoundError, "missing"),
        (["--target_label_column", "nothing"], ValueError, "nothing"),
    ],
)
def test_bad_input_stops_before_any_training(recipe, tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        recipe.main(["--output_dir", str(tmp_path / "run"), *QUICK, *options])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("script", "options", "message"),
    [
        (ntp_vit, "--source_loss reconstruction", "source_loss is 'reconstruction' and the model is ViTForImage"),
        (ntp_ssl, "--source_loss labels", "source_loss is 'labels' but the model has no classification head"),
        (ntp_ssl, "--lr_scheduler_type warmup_stable_decay", "with lr_scheduler_type .*num_decay_steps"),
        (ntp_vit, "--per_device_train_batch_size 1", "a batch has one image of each domain"),
        (
            ntp_ssl,
            "--source_dataset mnist syn --dataloader_drop_last true --per_device_train_batch_size 241",
            "240 rows are no whole batch of 241",
        ),
        (ntp_vit, "--attackers 1 --target_dataset optdigits mnistm", "attackers is 1 for 2 unauthorized domains"),
    ],
)
def test_what_the_trainer_would_refuse_is_refused_before_the_model_is_pretrained(
    script, options, message, tmp_path, monkeypatch
):
    """The folder is not claimed either: the same command, corrected, may use it."""
    monkeypatch.setattr("hf_ntp.run_folder.claim_run_folder", lambda *args: pytest.fail("claimed"))
    with pytest.raises(ValueError, match=message):
        script.main(["--output_dir", str(tmp_path / "run"), *QUICK, *options.split()])
    assert not (tmp_path / "run").exists()


def test_a_head_without_classes_is_refused_before_it_is_trained(recipe, tmp_path):
    model = tiny_vit(num_labels=10)
    model.config.problem_type = "multi_label_classification"
    model.config.id2label = dict(enumerate("0123456789"))
    model.save_pretrained(tmp_path / "model")
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "model")
    own = ["--model_name_or_path", str(tmp_path / "model"), "--source_dataset", "mnist", "--target_dataset", "syn"]
    with pytest.raises(ValueError, match=r"config\.problem_type is 'multi_label_classification'"):
        recipe.main(["--output_dir", str(tmp_path / "run"), *QUICK, *own])
    assert not (tmp_path / "run").exists()


def test_one_class_domains_stop_before_any_training(recipe, tmp_path):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["only"])})
    rows = {"image": [Image.new("L", (8, 8), i) for i in range(30)], "label": [0] * 30}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "single")
    for side in ("source", "target"):
        with pytest.raises(ValueError, match=f"the {side} has .* of class 0 only"):
            recipe.main(["--output_dir", str(tmp_path / "run"), *QUICK, f"--{side}_dataset", str(tmp_path / "single")])
    assert not (tmp_path / "run").exists()


def test_a_model_of_other_classes_is_not_taken_as_trained(recipe, tmp_path, capsys):
    model = tiny_resnet(num_labels=10)
    model.config.id2label = {i: f"animal{i}" for i in range(10)}
    model.save_pretrained(tmp_path)
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(tmp_path)
    arguments, config = recipe.parse(["--model_name_or_path", str(tmp_path), *DEMO])
    digits = [str(i) for i in range(10)]
    assert recipe.base_model(arguments, config, digits).learning_rate == 5e-5
    assert "does not classify the source (10 classes: animal0" in capsys.readouterr().out
    assert recipe.base_model(arguments, config, [f"animal{i}" for i in range(10)]).learning_rate is None
    assert recipe.base_model(arguments, config, [f"Animal{9 - i}" for i in range(10)]).learning_rate is None


@pytest.mark.parametrize("given", ["--source_dataset", "--target-dataset"])
def test_your_own_model_needs_your_own_domains(recipe, capsys, given):
    """The demo's would be taken without a word, and the model's head thrown away."""
    with pytest.raises(SystemExit):
        recipe.parse(["--model_name_or_path", "org/model", given, "mnist"])
    missing = ({"source_dataset", "target_dataset"} - {given[2:].replace("-", "_")}).pop()
    assert f"--model_name_or_path is given and --{missing} not" in capsys.readouterr().err


def test_a_run_of_what_lies_under_the_same_names_and_is_another_is_refused(recipe, tmp_path):
    """Classes in another order than the data's are brought into the model's; then model or images change in place."""
    rng = np.random.default_rng(0)

    def write(domain, label, shade, count=40):
        (tmp_path / domain / label).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            pixels = np.clip(rng.normal(shade, 20, (8, 8, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / domain / label / f"{i}.png")

    def write_model(seed):
        model = tiny_resnet(num_labels=2, seed=seed)
        model.config.id2label = {0: "Dark", 1: "Bright"}
        model.config.label2id = {"Dark": 0, "Bright": 1}
        model.save_pretrained(tmp_path / "model")

    for domain in ("ours", "theirs"):
        write(domain, "dark", 40)
        write(domain, "bright", 200)
    write_model(0)
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "model")
    options = ["--model_name_or_path", str(tmp_path / "model"), "--source_dataset", str(tmp_path / "ours")]
    options += ["--target_dataset", str(tmp_path / "theirs"), "--output_dir", str(tmp_path / "run"), *QUICK]
    options += ["--owner_fraction", "0.5"]
    results = recipe.main(options)
    record = read_record(tmp_path / "run" / "protected")
    assert record["authorized_domains"][0]["classes"] == ["Dark", "Bright"]
    assert "fine_tuning_steps" not in record["base_model"]
    assert recipe.main(options) == results
    write_model(1)
    with pytest.raises(ValueError, match=r"holds another run \(weights"):
        recipe.main(options)
    write_model(0)
    write("theirs", "dark", 90, count=1)
    with pytest.raises(ValueError, match=r"holds another run \(data"):
        recipe.main(options)


def test_a_model_from_the_hub_is_named_with_its_commit(recipe, hub, tmp_path):
    tiny_resnet(num_labels=10).save_pretrained(tmp_path)
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(tmp_path)
    api, commits = HfApi(token=OWNER), []
    api.create_repo("org/base")
    for text in ("first", "second"):
        (tmp_path / "notes.txt").write_text(text)
        commits.append(api.upload_folder(repo_id="org/base", folder_path=tmp_path).oid)
    digits = [str(i) for i in range(10)]
    for options, commit in (([], commits[1]), (["--model_revision", commits[0]], commits[0])):
        arguments, config = recipe.parse(["--model_name_or_path", "org/base", *DEMO, *options])
        assert recipe.base_model(arguments, config, digits).revision == commit


def test_which_of_two_heads(recipe, tmp_path):
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    model = DeiTForImageClassificationWithTeacher(DeiTConfig(image_size=8, patch_size=4, num_labels=3, **size))
    model.save_pretrained(tmp_path)
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(tmp_path)
    arguments, config = recipe.parse(["--model_name_or_path", str(tmp_path), *DEMO, "--head_name", "cls_classifier"])
    made = recipe.base_model(arguments, config, ["cat", "dog"])
    assert made.learning_rate == 5e-5
    assert (made.model.cls_classifier.out_features, made.model.distillation_classifier.out_features) == (2, 2)


def test_two_processes(tmp_path):
    """One folder of each recipe, whole, whatever the number of processes."""
    run, attacks = tmp_path / "run", tmp_path / "attacks"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launch, "-m", "tests.recipe_script", str(tmp_path)], capture_output=True, text=True, timeout=300, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert read_record(run / "protected")
    state = json.loads((run / "work" / "checkpoint-20" / "ntp_state.json").read_text())
    assert state["settings"]["world_size"] == 2, "two runs side by side are not one run on two processes"
    assert done.stdout.count("SLC-AUC normalized:") == 1
    assert not list(run.rglob("*unfinished*"))
    assert done.stdout.count((attacks / "table.md").read_text()) == 1
    assert len(list((attacks / "fits").iterdir())) == json.loads((attacks / "results.json").read_text())["fits"]


def test_unknown_options_are_errors(recipe, tmp_path, capsys):
    with pytest.raises(SystemExit):
        recipe.main(["--output_dir", str(tmp_path / "run"), "--sparcity", "0.5"])
    assert "unrecognized arguments: --sparcity 0.5" in capsys.readouterr().err
    config = tmp_path / "bad.yaml"
    config.write_text("sparcity: 0.5\n")
    with pytest.raises(SystemExit):
        recipe.main(["--config", str(config)])
    assert "unknown keys: sparcity" in capsys.readouterr().err


def test_the_command_line_overrides_the_file(recipe, tmp_path):
    config = tmp_path / "some.yaml"
    config.write_text(f"output_dir: {tmp_path}\nsparsity: 0.6\nrho: 1.0e-2\nsample_sizes: [5, 7]\nreport_to: none\n")
    arguments, ntp = recipe.parse(["--config", str(config), "--rho", "0.5"])
    assert (ntp.sparsity, ntp.rho, arguments.sample_sizes) == (0.6, 0.5, [5, 7])


def test_lists_in_the_file_are_read_as_on_the_command_line(recipe, tmp_path, capsys):
    """YAML takes 1e-3 for text, and a single value for no list."""
    config = tmp_path / "some.yaml"
    lists = "attack_learning_rates: [1e-3, 3e-3]\nattacker_learning_rates: [1e-4, 1e-3]\nattack_seeds: 3\n"
    config.write_text(f"output_dir: {tmp_path}\nreport_to: none\nsource_tolerance: []\n{lists}")
    arguments, ntp = recipe.parse(["--config", str(config)])
    assert (arguments.attack_learning_rates, arguments.attack_seeds) == ([1e-3, 3e-3], [3])
    assert (ntp.attacker_learning_rates, ntp.source_tolerance) == ([1e-4, 1e-3], [])
    config.write_text(f"output_dir: {tmp_path}\nreport_to: none\neval_strategy: no\nmax_steps: 1.0e+3\n")
    _, ntp = recipe.parse(["--config", str(config)])
    assert (ntp.eval_strategy, ntp.max_steps) == ("no", 1000)
    for bad, message in {
        "sample_sizes: [few]": "sample_sizes: \\['few'\\]",
        "a: [": "cannot be read",
        "- a": "holds a list; needed",
        "pretrain_steps: 0.5": "pretrain_steps: 0.5; needed: an integer",
        "preset: papr": "preset: papr; needed: one of adaptive, adaptive_convnet",
    }.items():
        config.write_text(bad)
        with pytest.raises(SystemExit):
            recipe.parse(["--config", str(config)])
        assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize("epochs", [["--num_train_epochs", "3"], ["--num_train_epochs=3"], ["--num-train-epochs=3"]])
def test_epochs_on_the_command_line_replace_the_files_steps(recipe, tmp_path, epochs):
    _, ntp = recipe.parse(["--output_dir", str(tmp_path), *epochs, "--report_to", "none"])
    assert (ntp.num_train_epochs, ntp.max_steps) == (3.0, -1)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--push_to_hub true --hub_strategy end", "hf-ntp push OUTPUT_DIR/protected"),
        ("--adapter merge", "Give a PeftModel to NTPTrainer"),
        ("--max_step 3", "unrecognized arguments: --max_step 3"),
        ("--image_processor org/other", "--image_processor is given without --model_name_or_path"),
    ],
)
def test_what_is_not_for_recipes(recipe, tmp_path, capsys, options, said):
    with pytest.raises(SystemExit):
        recipe.parse(["--output_dir", str(tmp_path), *options.split()])
    assert said in capsys.readouterr().err


def test_another_image_processor(recipe, tmp_path):
    """As for DINOv3, whose own is for torchvision alone."""
    tiny_vit().save_pretrained(tmp_path / "model")
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "other")
    own = ["--model_name_or_path", str(tmp_path / "model"), *DEMO]
    with pytest.raises(OSError, match="image processor"):
        recipe.base_model(*recipe.parse(own), ["cat", "dog"])
    arguments, config = recipe.parse([*own, "--image_processor", str(tmp_path / "other")])
    assert recipe.base_model(arguments, config, ["cat", "dog"]).processor.size == {"height": 8, "width": 8}


def test_help_is_quick():
    """Once in three times, at least: other processes may be at work on the machine."""
    for _ in range(3):
        start = time.perf_counter()
        done = subprocess.run([sys.executable, str(SCRIPT), "--help"], capture_output=True, text=True, timeout=60)
        if (seconds := time.perf_counter() - start) < 3:
            break
    assert done.returncode == 0
    assert "--target_dataset" in done.stdout
    assert "--sparsity" in done.stdout
    assert seconds < 3


def test_the_budget_of_attacks_has_one_name_in_all_recipes():
    budget = "--attack_steps 7 --attack_batch_size 8 --attack_seeds 3 4 --attack_learning_rates 1e-4"
    budget += " --attack_extensions 0"
    attacking = ntp_attack.parse([*"--checkpoint a --target_dataset b --output_dir c".split(), *budget.split()])
    protecting, _ = ntp_vit.parse(["--output_dir", "c", *budget.split()])
    for name in ("steps", "batch_size", "seeds", "learning_rates", "extensions"):
        assert getattr(attacking, name) == getattr(protecting, f"attack_{name}"), name


def attack_options(run, out, *options):
    quick = (
        "--target_dataset optdigits --target_max_samples 200 --steps 3 --seeds 0 --sample_sizes 10 20 "
        "--learning_rates 1e-3 --jobs 1"
    )
    return ["--checkpoint", str(run / "protected"), "--output_dir", str(out), *quick.split(), *options]


@pytest.fixture
def two_strengths(monkeypatch):
    """Of ridge probes: two fits in place of seven."""
    monkeypatch.setitem(probes.KINDS, "ridge", probes.KINDS["ridge"]._replace(grid=(1.0, 10.0)))


def test_attacking_the_result(finished, two_strengths, tmp_path, capsys, monkeypatch):
    """With ridge in place of the linear probe, which takes thousands of iterations on features of a few steps."""
    run, _ = finished
    monkeypatch.setattr("hf_ntp.AttackData", lambda *parts: (given.append(parts), AttackData(*parts))[1])
    given = []
    options = ["--unprotected", str(run / "unprotected"), "--source_dataset", "mnist", "--controls"]
    options += ["--num_source_images", "40"]
    options += ["--attacks", "mask_kept", "dense", "ridge_probe", "source_all_new"]
    ntp_attack.main(attack_options(run, tmp_path / "out", *options))
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert set(results["starts"]) == {"protected", "unprotected", "magnitude_pruned", "random_pruned"}
    assert [len(parts[3]) for parts in given] == [40]
    assert set(results["starts"]["protected"]) == {"mask_kept", "dense", "ridge_probe", "source_all_new"}
    assert results["not_run"]["unprotected"] == {"mask_kept": "the checkpoint has no zeros"}
    printed = capsys.readouterr().out
    assert printed.count((tmp_path / "out" / "table.md").read_text()) == 1
    assert "| **worst case** |" in printed
    assert len(list((tmp_path / "out" / "fits").iterdir())) == results["fits"]
    (unauthorized,) = read_record(run / "protected")["unauthorized_domains"]
    assert results["fingerprint"].items() <= unauthorized["fingerprint"].items(), "the protection's own division"
    assert set(unauthorized["fingerprint"]) - set(results["fingerprint"]) == {"owner"}
    assert Image.open(tmp_path / "out" / "attacks.png").size[0] > 500
    ntp_attack.main(attack_options(run, tmp_path / "out", *options))
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == results


def test_runs_with_other_attacks_share_fits(finished, two_strengths, tmp_path):
    run, shared = finished[0], tmp_path / "shared"
    load_domain("syn", max_samples=200).save_to_disk(tmp_path / "syn")
    more = [
        "--unprotected",
        str(run / "unprotected"),
        "--reference",
        str(run / "unprotected"),
        "--third_dataset",
        str(tmp_path / "syn"),
    ]
    for name, options in {"a": ["ridge_probe"], "b": ["ridge_probe", "knn", *more]}.items():
        ntp_attack.main(attack_options(run, tmp_path / name, "--cache_dir", str(shared), "--attacks", *options))
    few, many = (json.loads((tmp_path / name / "results.json").read_text()) for name in "ab")
    assert set(many["starts"]) == {"protected", "unprotected", "reference"}
    assert many["starts"]["protected"]["ridge_probe"] == few["starts"]["protected"]["ridge_probe"]
    third = many["third_domain"]
    assert third["name"] == "syn"
    assert {start: list(found) for start, found in third["starts"].items()} == {
        key: ["dense"] for key in many["starts"]
    }
    assert (tmp_path / "b" / "table.md").read_text().splitlines()[-1].startswith("| third domain syn: dense | ")
    assert len(list(shared.iterdir())) < few["fits"] + many["fits"] + third["fits"]
    assert not (tmp_path / "b" / "fits").exists()


def test_an_attack_on_other_weights_under_the_same_name_is_refused(finished, two_strengths, tmp_path):
    """Its controls would have another sparsity."""
    shutil.copytree(finished[0] / "protected", tmp_path / "protected")
    (tmp_path / "protected" / "preprocessor_config.json").unlink()
    options = attack_options(tmp_path, tmp_path / "out", "--attacks", "ridge_probe")
    with pytest.raises(OSError, match="Give the one that the checkpoint was trained with: --image_processor"):
        ntp_attack.main(options)
    options += ["--image_processor", str(finished[0] / "protected")]
    ntp_attack.main(options)
    shutil.copy(finished[0] / "unprotected" / "model.safetensors", tmp_path / "protected")
    with pytest.raises(ValueError, match=r"holds another run \(weights_of_starts"):
        ntp_attack.main(options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--controls"], "--controls needs --unprotected"),
        (["--attacks", "dance"], "needed: names among"),
        (["--sample_sizes", "10", "100000"], "sample_sizes"),
        (["--third_dataset", "optdigits"], "third_dataset is optdigits, as target_dataset is"),
        (["--attacks", "source_all_kept", "transntl"], "Give --source_dataset, or other attacks"),
        (["--seeds", "0", "0"], "each of them once"),
        (["--seeds", "-1"], "seeds are [-1]"),
        (["--owner_fraction", "-1"], "owner_fraction is -1"),
        (["--num_source_images", "0"], "num_source_images is 0; needed: at least 1"),
    ],
)
def test_bad_options_of_the_attack_recipe(finished, tmp_path, capsys, options, said):
    with pytest.raises((SystemExit, ValueError)) as stopped:
        ntp_attack.main(attack_options(finished[0], tmp_path / "out", *options))
    assert said in str(stopped.value) + capsys.readouterr().err
    assert not (tmp_path / "out").exists(), "the corrected command may use it"


@pytest.mark.parametrize("script", ["ntp_attack", "ntp_vit", "ntp_ssl"])
def test_a_mistake_on_the_command_line_is_answered_with_a_sentence(script, tmp_path):
    mistake = ["--learning_rates", "0"] if script == "ntp_attack" else ["--pretrain_learning_rate", "0"]
    given = ["--checkpoint", "x", "--target_dataset", "mnist"] if script == "ntp_attack" else []
    command = [sys.executable, SCRIPT.with_name(f"{script}.py"), "--output_dir", tmp_path / "run", *given, *mistake]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1].startswith(f"{script}.py: ")
    assert "Traceback" not in ended.stderr
