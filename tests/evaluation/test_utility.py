import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, KFold
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from transformers import ViTModel

from hf_ntp import FineTuneProtocol, measure_protection
from hf_ntp.attacks import ATTACKS
from hf_ntp.attacks.attack import NO_HEAD
from hf_ntp.evaluation.controls import prune_without_protection
from hf_ntp.evaluation.measure import measure_source
from hf_ntp.evaluation.suite import run_attacks
from hf_ntp.evaluation.utility import source_utility
from hf_ntp.models import load_model, noted_prunable_weights, zero_fraction
from hf_ntp.publishing.results import build_results

from ..conftest import tiny_vit
from ..publishing.conftest import SOURCE, TARGET
from .conftest import pixels

QUICK = FineTuneProtocol(steps=3, batch_size=8, learning_rates=(1e-3,), warmup_steps=1)


@pytest.fixture
def encoders(tmp_path):
    """Folders of an encoder without head, before and after half of its weights were set to zero."""
    tiny_vit().vit.save_pretrained(tmp_path / "unprotected")
    model = load_model(str(tmp_path / "unprotected"))
    for weight in noted_prunable_weights(model).values():
        weight.data[:, ::2] = 0
    model.config.ntp = {"sparsity": 0.5, "requested_sparsity": 0.5}
    model.save_pretrained(tmp_path / "protected")
    return str(tmp_path / "unprotected"), str(tmp_path / "protected")


def test_probes_find_what_the_features_show(encoders):
    found = source_utility(load_model(encoders[0]), pixels(60, 0), pixels(30, 1))
    assert found.linear_probe > 0.8
    assert found.knn > 0.8
    assert found == source_utility(load_model(encoders[0]), pixels(60, 0), pixels(30, 1))


def test_the_choice_is_that_of_a_grid_search(encoders, attack):
    """On labels that are partly wrong, where it matters how much a probe is regularised."""
    train, test = pixels(60, 0), pixels(40, 1)
    for data in (train, test):
        wrong = torch.rand(len(data), generator=torch.Generator().manual_seed(0)) < 0.4
        data.labels[wrong] = (data.labels[wrong] + 1) % 3
    found = source_utility(load_model(encoders[0]), train, test)
    encoder = ViTModel.from_pretrained(encoders[0]).eval()

    def features(images):
        with torch.no_grad():
            state = encoder(images).last_hidden_state
        return torch.cat([state[:, 0], state[:, 1:].mean(1)], 1).double().numpy()

    for accuracy, classifier, grid in (
        (found.linear_probe, LogisticRegression(max_iter=1000), {"C": [10.0**power for power in range(-3, 4)]}),
        (found.knn, KNeighborsClassifier(weights="distance"), {"n_neighbors": [1, 3, 5, 10, 20]}),
    ):
        steps = make_pipeline(StandardScaler(), classifier)
        named = {f"{type(classifier).__name__.lower()}__{key}": values for key, values in grid.items()}
        search = GridSearchCV(steps, named, cv=KFold(5, shuffle=True, random_state=0))
        search.fit(features(train.tensors()[0]), train.tensors()[1].numpy())
        expected = search.score(features(test.tensors()[0]), test.tensors()[1].numpy())
        assert 0.4 < expected < 0.95
        assert accuracy == pytest.approx(expected)


def test_measuring_an_encoder_without_head(encoders, attack, tmp_path):
    def measure(**options):
        return measure_protection(*encoders, attack.test, attack, [6, 12], [0], QUICK, jobs=1, **options)

    with pytest.raises(
        ValueError, match="no classification head for the 3 classes of the authorized images, and source_train"
    ):
        measure()
    measured = measure(source_train=pixels(60, 0))
    assert measured.accuracy.measure == "linear_probe"
    assert measured.accuracy.before == measured.utility.before.linear_probe
    assert measured.accuracy.after == measured.utility.after.linear_probe
    assert measured.sparsity.achieved == 0.5
    assert measured.sparsity.live_fraction > 0.5
    assert measured.sparsity.layers.keys() <= ViTModel.from_pretrained(encoders[1]).state_dict().keys()
    assert build_results(SOURCE, TARGET, measured, {})["source"]["measure"] == "linear_probe"


@pytest.mark.parametrize("head", ["more outputs", "other names", "several labels"])
def test_a_head_for_something_else_says_nothing_about_the_source(tmp_path, head):
    """Such a model is kept by its features; its arg-max has nothing to do with the labels."""
    model, test = tiny_vit(20 if head == "more outputs" else 3), pixels(30, 1)
    if head == "other names":
        model.config.id2label = dict(enumerate(["2", "0", "1"]))
    elif head == "several labels":
        model.config.problem_type = "multi_label_classification"
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no classification head for the 3 classes"):
        measure_source(tmp_path, tmp_path, test)
    accuracy, utility = measure_source(tmp_path, tmp_path, test, pixels(60, 0))
    assert accuracy.measure == "linear_probe"
    assert accuracy.after == utility.after.linear_probe > 0.8
    tiny_vit().save_pretrained(tmp_path / "its_own")
    assert measure_source(tmp_path / "its_own", tmp_path / "its_own", test)[0].measure == "classification"


def test_attacks_on_an_encoder_without_head(encoders, attack, tmp_path):
    unprotected, protected = encoders
    prune_without_protection(unprotected, tmp_path / "magnitude", protected)
    assert zero_fraction(
        list(noted_prunable_weights(load_model(str(tmp_path / "magnitude"))).values())
    ) == pytest.approx(0.5)
    assert type(ViTModel.from_pretrained(tmp_path / "magnitude")) is ViTModel
    starts = {"protected": protected, "unprotected": unprotected}
    names = ["dense", "mask_kept", "lora", "linear_probe", "knn", "distillation", "first_block_reinit", "head_kept"]
    results = run_attacks(starts, attack, names, [6, 24], [0], QUICK, jobs=1)
    assert set(results["starts"]["protected"]) == set(names) - {"head_kept"}
    assert results["not_run"]["protected"] == {"head_kept": NO_HEAD}


def test_attacks_that_need_a_head(encoders):
    model = load_model(encoders[1])
    needed = {name for name, attack in ATTACKS.items() if attack.unsuitable(model, 2) == NO_HEAD}
    assert needed == {
        "as_published",
        "head_kept",
        "source_all_kept",
        "source_last_kept",
        "source_last_new",
        "transntl",
        "shot",
    }
