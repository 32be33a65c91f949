"""The benchmark of self-supervised encoders end to end, with small numbers of steps."""

import json

import pytest

from benchmarks.ssl import run as ssl
from hf_ntp import FineTuneProtocol
from hf_ntp.attacks import probes


@pytest.fixture
def quick(monkeypatch, few_images):
    protection, pretraining = ssl.recipe_settings()
    settings = {**protection, "max_steps": 6}, {**pretraining, "pretrain_steps": 4}
    monkeypatch.setattr(ssl, "recipe_settings", lambda: settings)
    monkeypatch.setattr(ssl, "METHODS", ("mae",))
    monkeypatch.setattr(ssl, "PAIRS", (("optdigits", "mnist"),))
    monkeypatch.setattr(ssl, "SEEDS", (1,))
    monkeypatch.setattr(ssl, "SAMPLE_SIZES", (10, 20))
    monkeypatch.setattr(ssl, "PROTOCOL", FineTuneProtocol(steps=3, learning_rates=(1e-3,), warmup_steps=1))
    monkeypatch.setattr(probes, "_MAX_ITERATIONS", 20)  # on features of a few steps thousands would not be enough


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_from_pretraining_to_the_table(quick, tmp_path, monkeypatch):
    command = ["--work_dir", str(tmp_path / "work"), "--out", str(tmp_path / "out"), "--jobs", "1", "--validation"]
    results = ssl.main(command)
    ((name, run),) = results["runs"].items()
    assert name == "mae/optdigits-mnist/1"
    assert set(run["source"]["after"]) == {"linear_probe", "knn"}
    assert run["attacks"]["seeds"] == [1]
    assert run["sparsity"] == pytest.approx(0.5, abs=1e-3)
    assert "| mae/optdigits-mnist | 1 |" in (tmp_path / "out" / "table.md").read_text()

    monkeypatch.setattr(ssl, "measure", None)  # a run that is there is not done again
    assert ssl.main(command) == json.loads((tmp_path / "out" / "results.json").read_text())


def test_results_of_other_settings_are_not_kept(monkeypatch):
    before = ssl.settings_of(validation=False)
    assert before == ssl.settings_of(validation=False) != ssl.settings_of(validation=True)
    protection, pretraining = ssl.recipe_settings()
    monkeypatch.setattr(ssl, "recipe_settings", lambda: ({**protection, "sparsity": 0.7}, pretraining))
    assert ssl.settings_of(validation=False) != before


def test_bars_are_judged_on_means_over_seeds():
    def run(after, dense):
        probes = {"before": {"linear_probe": 0.9, "knn": 0.8}, "after": {"linear_probe": after, "knn": 0.8}}
        return {"source": probes, "areas": {"unprotected": 0.2, "mask_kept": -0.1, "dense": dense}}

    found = ssl.summary([run(0.9, 0.05), run(0.885, 0.13)])
    assert found["retained"] == pytest.approx(0.45)
    assert found["bars"] == {"probe_drop": True, "mask_kept": True, "retained": True}
    found = ssl.summary([run(0.88, 0.15), run(0.88, 0.07)])
    assert found["bars"] == {"probe_drop": False, "mask_kept": True, "retained": False}
