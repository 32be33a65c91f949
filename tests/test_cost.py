"""The cost benchmark end to end on tiny sizes, and that table and README are of its results."""

import json
from pathlib import Path

import pytest
from PIL import Image

from benchmarks.common import README
from benchmarks.cost import measurements, run
from benchmarks.cost.report import plot, table

HERE = Path(run.__file__).parent


def test_some_sections(monkeypatch, tmp_path, capsys):
    tiny = {
        "SMALL": {"ViT, tiny": (lambda: measurements.small_vit(measurements.LABELS), 16)},
        "STEPS": 2, "TURNS": 1, "BATCHES": (64,), "ADMM_TURNS": 1, "FISHER_TURNS": 1, "RESNET_SCALES": (1 / 16, 1 / 8),
        "CLASSES": (3, 10), "WIDTHS": (8, 16), "REFERENCE_WIDTH": 8, "FISHER_IMAGES": 20,
    }  # fmt: skip
    for name, value in tiny.items():
        monkeypatch.setattr(measurements, name, value)
    before = README.read_text()
    run.main(["--only", "admm", "fisher", "step", "--out", str(tmp_path)])
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results) == ["step", "admm", "fisher"]
    kinds = results["step"]["ViT, tiny"]["64"]
    assert kinds["plain"]["ratio"] == 1
    assert kinds["default"]["allowance"] == 1 + 4 * 16 / 64
    assert results["admm"][0]["weights"] < results["admm"][1]["weights"]
    assert {len(entry["seconds"]) for entry in results["fisher"]} == {1, 2}
    assert (tmp_path / "table.md").read_text() in capsys.readouterr().out
    assert README.read_text() == before


@pytest.mark.parametrize("selects", [False, True])
def test_an_update_of_the_reference_is_ours(selects):
    """Times can be compared because results are equal, up to a zero per layer (Fisher terms: in their own tests)."""
    weights = measurements.prunable_weights(measurements.resnet_50(1 / 16, 4))
    ours = measurements.ADMMPruner(weights, 0.9, rho=0.05)
    plain = measurements.reference.ReferenceADMM(weights, 0.05, selects)
    for progress in (0.3, 0.7):
        found = ours.update(progress)
        primal, dual = plain.update(ours.sparsity)
        assert float(found.primal_residual) == pytest.approx(float(primal), rel=1e-2)
        assert float(found.dual_residual) == pytest.approx(float(dual), rel=1e-2)
        with measurements.torch.no_grad():
            for weight in weights.values():
                weight.mul_(0.9).add_(0.01)


def test_table_figure_and_readme_are_of_the_committed_results(tmp_path):
    results = json.loads((HERE / "results.json").read_text())
    assert (HERE / "table.md").read_text() == table(results) + "\n"
    assert table(results, with_bar=True) in README.read_text()
    plot(results, tmp_path / "cost.png")
    assert Image.open(tmp_path / "cost.png").size == Image.open(HERE / "cost.png").size
