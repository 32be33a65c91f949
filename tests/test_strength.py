"""The strength benchmark end to end on one pair, with small numbers of steps."""

import json
import runpy
import shutil
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from benchmarks.common import README
from benchmarks.pixels import run as pixels
from benchmarks.strength import run as module
from benchmarks.strength.report import plot, summary, table
from hf_ntp.attacks import FineTuneProtocol, probes

HERE = Path(module.__file__).parent


@pytest.fixture
def benchmark(monkeypatch, few_images):
    quick = {"pretrain_steps": 4, "protection_steps": 6, "attack_steps": 3}
    shapes = {name: replace(shape, **quick) for name, shape in module.ARCHITECTURES.items()}
    monkeypatch.setattr(module, "ARCHITECTURES", shapes)
    monkeypatch.setattr(module, "PAIRS", (("optdigits", "mnist"),))
    monkeypatch.setattr(module, "FULL_SUITE", ())
    monkeypatch.setattr(module, "DECISIVE", ("mask_kept", "dense", "linear_probe"))
    monkeypatch.setattr(module, "SAMPLE_SIZES", (10, 20))
    monkeypatch.setattr(module, "SEEDS", (0, 1))
    monkeypatch.setattr(module, "PROTECTION_SEEDS", (1,))
    one_rate = partial(FineTuneProtocol, learning_rates=(1e-3,), warmup_steps=1)
    monkeypatch.setattr(module.hf_ntp, "FineTuneProtocol", one_rate)
    monkeypatch.setattr(probes, "_MAX_ITERATIONS", 20)  # on features of a few steps thousands would not be enough
    return module


def test_one_cell_from_pretraining_to_the_table(benchmark, tmp_path, monkeypatch):
    command = ["--work_dir", str(tmp_path / "work"), "--out", str(tmp_path / "out"), "--jobs", "1", "--only", "resnet"]
    results = benchmark.main(command)
    (name,) = results["cells"]
    assert name == "resnet/optdigits-mnist"
    cell = results["cells"][name]
    assert cell["sparsity"]["adaptive"] == pytest.approx(0.8, abs=1e-4)
    assert set(cell["adaptive"]["starts"]) == {"protected", "unprotected"}
    assert set(cell["paper"]["starts"]["protected"]) == {"mask_kept", "dense"}
    assert set(cell["source_accuracy"]) == {"unprotected", "adaptive", "paper", "reference"}
    others = results["other_seeds"][name]
    assert set(others["source_accuracy"]) == {"seed_1"}
    assert set(others["starts"]) == {"protected", "unprotected", "seed_1"}
    for attack, of_the_cell in others["starts"]["protected"].items():
        assert of_the_cell == cell["adaptive"]["starts"]["protected"][attack]
    protected = list((tmp_path / "work").glob("*/models/resnet/optdigits/mnist/adaptive*/model/model.safetensors"))
    assert len(protected) == 2
    assert len({path.read_bytes() for path in protected}) == 2
    saved = json.loads((tmp_path / "out" / "results.json").read_text())
    assert saved["cells"].keys() == results["cells"].keys()
    assert "resnet/optdigits-mnist" in (tmp_path / "out" / "table.md").read_text()
    assert Image.open(tmp_path / "out" / "strength.png").size[0] > 500

    for measure in ("attack", "attack_other_seeds"):
        monkeypatch.setattr(benchmark, measure, None)  # a cell that is there is not run again
    assert benchmark.main(command)["cells"] == saved["cells"]


def test_the_command_is_a_module_that_workers_find(monkeypatch):
    """Functions of a script are copied to worker processes, which a cached one cannot be."""
    commands = []
    monkeypatch.setattr(module, "main", commands.append)
    monkeypatch.setattr(sys, "argv", ["run.py", "--only", "no cell"])
    runpy.run_module(module.__name__, run_name="__main__")
    assert commands == [["--only", "no cell"]]


def test_what_the_pixels_give(benchmark, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(pixels, "GRID", (0.1,))
        patch.setattr(pixels, "SAMPLE_SIZES", (10, 20))
        few, more = pixels.accuracies("vit", "optdigits", seed=0)
    assert 0.3 < few < more
    committed = json.loads((Path(pixels.__file__).parent / "results.json").read_text())
    table_of = pixels.table(committed)
    assert (Path(pixels.__file__).parent / "table.md").read_text() == f"{table_of}\n"
    assert table_of in (HERE / "README.md").read_text()


def test_results_of_other_settings_are_not_kept(benchmark, monkeypatch):
    cell = benchmark.Cell("vit", "mnist", "mnistm")
    before = benchmark.settings_of(cell)
    assert benchmark.settings_of(cell) == before
    monkeypatch.setattr(benchmark, "SEEDS", (0, 1, 2, 3))
    assert benchmark.settings_of(cell) != before


def test_an_interrupted_protection_goes_on(benchmark, tmp_path):
    """SIGTERM leaves a checkpoint, also where none was asked for."""
    cell = benchmark.Cell("resnet", "optdigits", "mnist")
    base, folder = tmp_path / "base" / "model", tmp_path / "protected" / "model"
    benchmark.pretrain(cell.architecture, cell.source, base)
    options = {"attackers": 0, "save_strategy": "steps", "save_steps": 3}
    benchmark.protect(cell, base, folder, "adaptive_convnet", options)
    whole = load_file(folder / "model.safetensors")
    shutil.rmtree(folder)
    shutil.rmtree(tmp_path / "protected" / "trainer" / "checkpoint-6")
    benchmark.protect(cell, base, folder, "adaptive_convnet", options)
    again = load_file(folder / "model.safetensors")
    assert all(torch.equal(tensor, again[name]) for name, tensor in whole.items())


def test_tables_figure_and_readme_are_of_the_committed_results(tmp_path):
    results = json.loads((HERE / "results.json").read_text())
    assert (HERE / "table.md").read_text() == table(results) + "\n"
    assert summary(results) in README.read_text()
    plot(results, tmp_path / "strength.png")
    assert Image.open(tmp_path / "strength.png").size == Image.open(HERE / "strength.png").size
