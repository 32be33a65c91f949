import json
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from PIL import Image

from hf_ntp import read_record
from hf_ntp.publishing.card import render_card
from hf_ntp.publishing.report import results_table, write_report

from .conftest import BASE, SETTINGS, SOURCE, TARGET

EXAMPLE = Path(__file__).parents[2] / "model_cards" / "example.md"


def test_results_have_the_documented_keys(results):
    assert results["source"]["accuracy_before"] == 0.961
    assert results["source"]["accuracy_after"] == 0.957
    assert results["sparsity"] == 0.7
    assert set(results["slc"]["curves"]) == {"scratch", "unprotected", "protected_mask", "protected_dense"}
    assert set(results["slc_auc"]["protected_mask"]) == {"nats", "decades", "normalized", "ci", "seeds"}
    assert set(results["seconds"]) == {"pretrain", "protect", "evaluate"}
    json.dumps(results, allow_nan=False)


def test_results_by_hand(results):
    assert results["slc_auc"]["unprotected"]["normalized"] == pytest.approx(0.2)
    assert results["slc_auc"]["protected_mask"]["normalized"] == pytest.approx(-0.075)
    assert results["retained_transfer"]["dense"] == pytest.approx(0.25)
    assert results["retained_transfer"]["mask"] == pytest.approx(-0.375)


def test_the_table(results):
    expected = """\
authorized    photos: accuracy 0.961 before, 0.957 after (1250 test images)
sparsity      0.7000 of 98,304 weights
unauthorized  scans: mean test accuracy of 2 seeds after fine-tuning on n labelled images

start                             n=10   n=100   SLC-AUC     95 % interval  retained
scratch                          0.200   0.600
before protection                0.400   0.800    +0.200  [+0.200, +0.200]
protected, mask kept             0.150   0.500    -0.075  [-0.393, +0.243]     -37 %
protected, all weights tuned     0.250   0.650    +0.050  [+0.050, +0.050]      25 %

SLC-AUC normalized: mean accuracy gap to scratch; above 0 the checkpoint helps."""
    assert "\n".join(line.rstrip() for line in results_table(results).splitlines()) == expected


def test_the_card_is_the_committed_example(results, record):
    """Full match; after a wanted change write it anew: `python -m tests.publishing.test_report`."""
    assert str(render_card(results, record, "org/photos-only", "apache-2.0")) == EXAMPLE.read_text()


def test_card_metadata(results, record):
    data = ModelCard(str(render_card(results, record, "org/photos-only", "apache-2.0"))).data
    assert data.license == "apache-2.0"
    assert data.base_model == "org/base"
    assert data.datasets == ["org/photos", "org/scans"]
    assert "non-transferable-pruning" in data.tags
    assert [(r.dataset_name, r.metric_type, r.metric_value) for r in data.eval_results] == [
        ("photos", "accuracy", 0.957),
        ("scans", "slc_auc", 0.2),
        ("scans", "slc_auc", -0.075),
        ("scans", "slc_auc", 0.05),
    ]


def test_the_folder(results, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    write_report(tmp_path, results, SOURCE, TARGET, BASE, {"sparsity": 0.7})
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"README.md", "authorization.json", "model.safetensors", "results.json", "slc.png"}
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert read_record(tmp_path)["unauthorized_domains"][0]["dataset"] == "org/scans"
    with Image.open(tmp_path / "slc.png") as picture:
        assert picture.size[0] > 900


if __name__ == "__main__":
    from hf_ntp.publishing.report import build_record

    from .conftest import WEIGHTS, make_results

    made = make_results()
    written = build_record(made, SOURCE, TARGET, BASE, WEIGHTS, SETTINGS)
    EXAMPLE.write_text(str(render_card(made, written, "org/photos-only", "apache-2.0")))
