"""The benchmark of target access end to end, with small numbers of steps."""

import json
from dataclasses import replace

import pytest

from benchmarks.access import run as access
from benchmarks.strength import run as strength
from hf_ntp import FineTuneProtocol


@pytest.fixture
def quick(monkeypatch, few_images):
    shapes = {n: replace(s, pretrain_steps=4, protection_steps=6) for n, s in strength.ARCHITECTURES.items()}
    monkeypatch.setattr(strength, "ARCHITECTURES", shapes)
    monkeypatch.setattr(access, "SHAPES", shapes)
    monkeypatch.setattr(strength, "SAMPLE_SIZES", (10, 20))
    monkeypatch.setattr(strength, "SEEDS", (0,))
    protocol = FineTuneProtocol(steps=3, learning_rates=(1e-3,), warmup_steps=1)

    def short(*given):
        data, settings = strength.arena(*given)
        return strength.Arena(data, {**settings, "protocol": protocol})

    monkeypatch.setattr(access, "arena", short)
    monkeypatch.setattr(access, "ATTACKS", ("dense",))
    monkeypatch.setattr(access, "ACCESS", {name: access.ACCESS[name] for name in ("labelled", "none")})


def test_one_table(quick, tmp_path, monkeypatch):
    command = ["--work_dir", str(tmp_path / "work"), "--out", str(tmp_path / "out"), "--jobs", "1"]
    command += ["--only", "optdigits"]
    results = access.main(command)
    assert list(results) == ["mnist-optdigits/seed 0"]
    rows = access.rows_of(results["mnist-optdigits/seed 0"])
    assert list(rows) == ["labelled", "none"]
    models = [path.read_bytes() for path in (tmp_path / "work").rglob("*/model/model.safetensors")]
    assert len(set(models)) == len(models) == len(rows) + 1, "different protections of one model"
    assert (tmp_path / "out" / "table.md").read_text().count("| mnist-optdigits | 0 |") == 2

    monkeypatch.setattr(access, "measure", None)  # what is there is not run again
    assert access.main(command) == json.loads((tmp_path / "out" / "results.json").read_text())


def test_shares_by_hand():
    assert access.kept_share(0.3, -0.1, 0.1) == pytest.approx(0.5)
    assert access.kept_share(0.3, 0.0, 0.3) == 0
    assert access.kept_share(-0.1, 0.0, 0.3) is None
