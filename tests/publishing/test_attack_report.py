import json

import pytest
from PIL import Image

from hf_ntp.publishing.attack_report import attacks_table, plot_attacks


def entry(area, low=None, high=None, edge=0):
    return {"normalized": area, "ci": {"normalized": [low, high]}, "at_edge": edge}


@pytest.fixture
def results():
    return {
        "sample_sizes": [10, 30, 100],
        "seeds": [0, 1, 2],
        "starts": {
            "protected": {"dense": entry(0.05, -0.01, 0.11), "lora": entry(-0.2, -0.3, -0.1, edge=2)},
            "unprotected": {"dense": entry(0.2), "lora": entry(-0.1)},
            "magnitude_pruned": {"dense": entry(0.18)},
        },
        "retained_transfer": {"protected": {"dense": 0.25, "lora": None}, "magnitude_pruned": {"dense": 0.9}},
        "worst_case": {
            "protected": {"attack": "dense", "slc_auc": 0.05, "retained_transfer": 0.25},
            "unprotected": {"attack": "dense", "slc_auc": 0.2, "retained_transfer": 1.0},
            "magnitude_pruned": {"attack": "dense", "slc_auc": 0.18, "retained_transfer": 0.9},
        },
    }


def test_the_table_in_full(results):
    assert attacks_table(results).splitlines() == [
        "| attack | unprotected | protected | 95 % interval | retained | at edge | magnitude_pruned |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| dense | +0.200 | +0.050 | [-0.010, +0.110] | 25 % |  | +0.180 |",
        "| lora | -0.100 | -0.200 | [-0.300, -0.100] |  | 2 of 9 |  |",
        "| **worst case** | +0.200 | +0.050 |  | 25 % |  |  |",  # the control went through one attack only
    ]


def test_the_third_domain_has_the_last_row(results):
    third = {"starts": {"protected": {"dense": entry(-0.04, -0.1, 0.02)}, "unprotected": {"dense": entry(0.1)}}}
    third |= {"name": "syn", "retained_transfer": {"protected": {"dense": -0.4}}}
    rows = attacks_table(results | {"third_domain": {**third, "sample_sizes": [10], "seeds": [0]}}).splitlines()
    assert rows[:-1] == attacks_table(results).splitlines()
    assert rows[-1] == "| third domain syn: dense | +0.100 | -0.040 | [-0.100, +0.020] | -40 % |  |  |"


def test_a_table_without_an_unprotected_model(results):
    del results["starts"]["unprotected"], results["worst_case"]["unprotected"]
    results["retained_transfer"]["protected"] = {"dense": None, "lora": None}
    results["worst_case"]["protected"]["retained_transfer"] = None
    assert "| **worst case** |  | +0.050 |" in attacks_table(results)


def test_the_figure_is_drawn(results, tmp_path):
    plot_attacks(results, tmp_path / "attacks.png", "mnist → optdigits")
    assert min(Image.open(tmp_path / "attacks.png").size) > 200
    json.dumps(results)
