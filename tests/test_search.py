"""The search for settings end to end, with small numbers of steps; test data stays unseen."""

import json
from dataclasses import replace
from functools import partial

import pytest

from benchmarks.search import run as search
from benchmarks.strength import run as strength
from hf_ntp import FineTuneProtocol


@pytest.fixture
def quick(monkeypatch, few_images):
    shapes = {
        name: replace(shape, pretrain_steps=4, protection_steps=6) for name, shape in strength.ARCHITECTURES.items()
    }
    for module in (search, strength):
        monkeypatch.setattr(module, "ARCHITECTURES", shapes)
    monkeypatch.setattr(search, "ATTACK_STEPS", 3)
    monkeypatch.setattr(search.hf_ntp, "FineTuneProtocol", partial(FineTuneProtocol, warmup_steps=1))
    monkeypatch.setattr(search, "RATES", {"vit": (1e-3,)})
    monkeypatch.setattr(search, "SAMPLE_SIZES", (10, 20))
    monkeypatch.setattr(search, "CANDIDATES", {"defaults": {}, "gentle": {"fisher_weight": 1.0}})


def test_candidates_are_measured_once_each(quick, tmp_path, monkeypatch):
    folders = ["--work_dir", str(tmp_path / "work"), "--out", str(tmp_path / "out")]
    command = [*folders, "--pairs", "mnist-optdigits", "--candidates", "defaults", "gentle"]
    results = search.main(command)
    assert list(results) == [f"vit/mnist-optdigits/{name}/seed 0" for name in ("defaults", "gentle")]
    attacks = {"dense", "mask_kept", "first_block_reinit", "source_all_kept", "source_all_new"}
    for run in results.values():
        assert set(run["areas"]) == attacks
        assert run["sparsity"] == pytest.approx(0.6, abs=1e-4)
    assert "gentle/seed 0" in (tmp_path / "out" / "table.md").read_text()
    del run["areas"]["source_all_new"]  # as in an entry of before it was among the attacks
    assert len({row.count("|") for row in search.table(results).splitlines()}) == 1

    monkeypatch.setattr(search, "measure", None)  # a run that is there is not done again
    assert search.main(command) == json.loads((tmp_path / "out" / "results.json").read_text())

    longer = {name: replace(shape, protection_steps=7) for name, shape in search.ARCHITECTURES.items()}
    monkeypatch.setattr(search, "ARCHITECTURES", longer)  # but one of another length is
    with pytest.raises(TypeError, match="not callable"):
        search.main(command)


def test_attacks_are_tuned_and_scored_on_halves_of_the_validation_part(few_images):
    cell = strength.Cell("vit", "mnist", "optdigits")
    arena, target = search.validation_arena(cell), strength.load("optdigits", 16)
    assert len(arena.validation) + len(arena.test) == len(target.validation)
    assert target.test.fingerprint not in {
        arena.train.fingerprint,
        arena.validation.fingerprint,
        arena.test.fingerprint,
    }
    assert arena.source.fingerprint == strength.load("mnist", 16).validation.fingerprint
