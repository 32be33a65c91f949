import doctest
from pathlib import Path

import evaluate
import pytest
import yaml

from hf_ntp.functional import slc_auc
from hf_ntp.metrics import SLC_AUC
from hf_ntp.metrics.slc_auc import app

CURVES = {"predictions": [[0.5, 0.7, 0.9], [0.4, 0.6, 0.9]], "references": [[0.3, 0.6, 0.9], [0.3, 0.6, 0.9]]}
SIZES = [10, 100, 1000]
FROM_LISTS = {"transfer": CURVES["predictions"], "scratch": CURVES["references"], "sample_sizes": SIZES}


@pytest.fixture(scope="module")
def metric(tmp_path_factory):
    return evaluate.load(SLC_AUC, cache_dir=str(tmp_path_factory.mktemp("metric")))


def test_docstring_examples(metric):
    text = metric.inputs_description
    example = doctest.DocTestParser().get_doctest(text, {}, "slc_auc", None, 0)
    assert len(example.examples) == 5
    assert doctest.DocTestRunner(verbose=False).run(example).failed == 0


def test_it_agrees_with_the_library(metric):
    found = metric.compute(**CURVES, sample_sizes=SIZES)
    area = slc_auc(CURVES["predictions"], CURVES["references"], SIZES)
    assert found["nats"] == pytest.approx(float(area.nats.mean()))
    assert found["ci_low"] < found["normalized"] < found["ci_high"]
    assert all(type(value) is float for value in found.values())


def test_curves_added_seed_by_seed(metric):
    for prediction, reference in zip(CURVES["predictions"], CURVES["references"], strict=True):
        metric.add(predictions=prediction, references=reference)
    assert metric.compute(sample_sizes=SIZES) == metric.compute(**CURVES, sample_sizes=SIZES)


@pytest.mark.parametrize("sizes", [[100, 10, 1000], [10, 100]])
def test_bad_grids(metric, sizes):
    with pytest.raises(ValueError, match="sample"):
        metric.compute(**CURVES, sample_sizes=sizes)


def test_the_space_reads_typed_curves():
    found = app.score("0.5, 0.7 0.9\n0.4 0.6 0.9", "0.3 0.6 0.9\n0.3 0.6 0.9", "10 100 1000")
    assert found["normalized"] == pytest.approx(float(slc_auc(**FROM_LISTS).normalized.mean()))
    with pytest.raises(ValueError, match="one row of accuracies per seed"):
        app.score("", "0.3", "10")


def test_the_folder_is_a_metric_space():
    folder = Path(SLC_AUC)
    assert {"slc_auc.py", "README.md", "app.py", "requirements.txt"} <= {path.name for path in folder.iterdir()}
    front = yaml.safe_load((folder / "README.md").read_text().split("---")[1])
    assert front["sdk"] == "gradio"
    assert front["app_file"] == "app.py"
    assert "metric" in front["tags"]
