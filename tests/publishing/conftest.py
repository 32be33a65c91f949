import copy

import pytest

from hf_ntp import DomainReference, FineTuneProtocol, LearningCurves
from hf_ntp.evaluation.measure import Measurement, ScratchConvergence, SourceAccuracy, SparsityReport
from hf_ntp.publishing.report import build_record
from hf_ntp.publishing.results import build_results

SOURCE = DomainReference("photos", "org/photos", None, "main", {"train": "a" * 64}, ["cat", "dog"])
TARGET = DomainReference(
    "scans", "org/scans", "small", None, {"owner": "b" * 64, "attacker": "c" * 64}, ["x", "y", "z"]
)
BASE = {"name": "org/base", "revision": "f" * 40, "weights": {"model.safetensors": "d" * 64}}
SETTINGS = {
    "sparsity": 0.7,
    "fisher_weight": 2.0,
    "target_weight": 0.0,
    "collapse_weight": 0.3,
    "attackers": 4,
}
SPARSITY = SparsityReport(0.7, 0.7, 98304, 0.69, 0.998, {"encoder.weight": {"weights": 98304, "zeros": 68813}})


def make_curves():
    return LearningCurves(
        sample_sizes=(10, 100),
        seeds=(0, 1),
        accuracies={
            "scratch": [[0.2, 0.6], [0.2, 0.6]],
            "unprotected": [[0.4, 0.8], [0.4, 0.8]],
            "protected_mask": [[0.1, 0.5], [0.2, 0.5]],
            "protected_dense": [[0.25, 0.65], [0.25, 0.65]],
        },
        learning_rates={"scratch": [[1e-3, 3e-3]] * 2},
        fits=32,
    )


def make_results(**others):
    measured = Measurement(
        SourceAccuracy(0.961, 0.957, 1250),
        SPARSITY,
        make_curves(),
        ScratchConvergence(100, 800, 0.6, 0.61),
        FineTuneProtocol(),
    )
    return build_results(SOURCE, TARGET, measured, {"pretrain": 1.0, "protect": 2.0, "evaluate": 3.0}, **others)


@pytest.fixture
def results():
    return make_results()


def make_record(results):
    return {
        **build_record(
            results, [SOURCE], [TARGET], "ViTForImageClassification", BASE, SETTINGS, SPARSITY, "apache-2.0"
        ),
        # Filled in when it is written; fixed versions, so that the example does not change with the environment.
        "files": {"model.safetensors": "e" * 64},
        "environment": {"torch": "2.13.0"},
    }


@pytest.fixture
def record(results):
    return copy.deepcopy(make_record(results))


def area(value, spread=0.1):
    bounds = [value - spread, value + spread]
    interval = {"level": 0.95, "nats": bounds, "decades": bounds, "normalized": bounds}
    return {"nats": value, "decades": value, "normalized": value, "ci": interval, "seeds": [value, value]}


def make_attacks():
    """Two attacks, one of which does not apply to the unprotected model."""
    entries = {"dense": area(0.05), "lora": area(-0.2)}
    tuned = {name: {"accuracies": [[0.3, 0.6]] * 2, "tuned": [[1e-3, 1e-3]] * 2, "at_edge": 0} for name in entries}
    return {
        "checkpoint": "runs/protected",
        "target": "org/scans",
        "fingerprint": {"attacker": "c" * 64},
        "sample_sizes": [10, 100],
        "seeds": [0, 1],
        "protocol": {"steps": 600, "batch_size": 32, "learning_rates": [1e-3, 3e-3]},
        "starts": {
            "protected": {name: tuned[name] | entry for name, entry in entries.items()},
            "unprotected": {"dense": tuned["dense"] | area(0.2)},
        },
        "retained_transfer": {"protected": {"dense": 0.25, "lora": None}},
        "worst_case": {
            "protected": {"attack": "dense", "slc_auc": 0.05, "retained_transfer": 0.25},
            "unprotected": {"attack": "dense", "slc_auc": 0.2, "retained_transfer": 1.0},
        },
    }


@pytest.fixture
def attacks():
    return make_attacks()
