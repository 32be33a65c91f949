import copy

import pytest

from hf_ntp import DomainReference, FineTuneProtocol, LearningCurves
from hf_ntp.evaluation.measure import Measurement, ScratchConvergence, SourceAccuracy, SparsityReport
from hf_ntp.publishing.report import build_record, build_results

SOURCE = DomainReference("photos", "org/photos", None, "main", {"train": "a" * 64}, ["cat", "dog"])
TARGET = DomainReference(
    "scans", "org/scans", "small", None, {"owner": "b" * 64, "attacker": "c" * 64}, ["x", "y", "z"]
)
BASE = {"name": "org/base", "weights": {"model.safetensors": "d" * 64}}
SETTINGS = {
    "sparsity": 0.7,
    "fisher_weight": 2.0,
    "target_weight": 0.0,
    "collapse_weight": 0.3,
    "attackers": 4,
}
WEIGHTS = {"model.safetensors": "e" * 64}


def make_results():
    curves = LearningCurves(
        sample_sizes=(10, 100),
        seeds=(0, 1),
        accuracies={
            "scratch": [[0.2, 0.6], [0.2, 0.6]],
            "unprotected": [[0.4, 0.8], [0.4, 0.8]],
            "protected_mask": [[0.1, 0.5], [0.2, 0.5]],
            "protected_dense": [[0.25, 0.65], [0.25, 0.65]],
        },
        learning_rates={"scratch": [1e-3, 3e-3]},
        fits=32,
    )
    measured = Measurement(
        SourceAccuracy(0.961, 0.957, 1250),
        SparsityReport(0.7, 0.7, 98304, 0.69, 0.998),
        curves,
        ScratchConvergence(100, 800, 0.6, 0.61),
        FineTuneProtocol(),
    )
    return build_results(SOURCE, TARGET, measured, {"pretrain": 1.0, "protect": 2.0, "evaluate": 3.0})


@pytest.fixture
def results():
    return make_results()


@pytest.fixture
def record(results):
    return copy.deepcopy(build_record(results, SOURCE, TARGET, BASE, WEIGHTS, SETTINGS))
