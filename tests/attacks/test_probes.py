import numpy as np
import pytest
import torch

from hf_ntp.attacks.probes import KINDS, Probe, reestimate_statistics
from hf_ntp.models import features_and_logits, find_head

from ..conftest import Rows, tiny_resnet, tiny_vit
from .conftest import QUICK, changed, loot_of, state_of

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def blobs(seed, size=90, dim=6, classes=3):
    """Classes that differ along the direction of least variance, and test data of the same kind."""
    rng = np.random.default_rng(seed)
    labels = np.arange(size) % classes
    features = rng.normal(size=(size, dim)) * np.logspace(1, -1, dim)
    features[:, -1] += 0.2 * labels
    return features, labels


def fitted(kind, value, features, labels):
    return KINDS[kind].build(value, features).fit(features, labels)


def standardised(features, reference):
    deviation = reference.std(0)
    return (features - reference.mean(0)) / np.where(deviation > 0, deviation, 1)


def test_features_are_what_enters_the_head(model):
    images = Rows(10).images
    before = state_of(model)
    model.train()
    features, logits = features_and_logits(model, images, batch_size=4)
    assert model.training
    assert not changed(before, model)
    _, head = find_head(model)
    with torch.no_grad():
        expected = model.eval()(pixel_values=images).logits
        assert torch.allclose(logits, expected, atol=1e-5)
        assert torch.allclose(head(features), expected, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_stays_as_it_is(model, kind):
    before = state_of(model)
    Probe(kind).fit(model, loot_of(), QUICK, 1.0, 0)(Rows(8).images)
    assert not changed(before, model)


def test_neighbours_by_hand(model):
    loot, test = loot_of(24), Rows(30, seed=1).images
    predicted = Probe("knn").fit(model, loot, QUICK, 5, 0)(test)
    train, new = (features_and_logits(model, images)[0].double().numpy() for images in (loot.images, test))
    distances = np.linalg.norm(standardised(new, train)[:, None] - standardised(train, train)[None], axis=-1)
    for row, found in zip(distances, predicted, strict=True):
        nearest = np.argsort(row)[:5]
        votes = [sum(1 / row[i] for i in nearest if loot.labels[i] == label) for label in range(3)]
        assert int(np.argmax(votes)) == found


def test_more_neighbours_than_images():
    assert Probe("knn").fit(tiny_vit(), loot_of(4), QUICK, 20, 0)(Rows(5).images).shape == (5,)


def test_ridge_against_the_normal_equations():
    (features, labels), (new, _) = blobs(0), blobs(1)
    x, z = standardised(features, features), standardised(new, features)
    wanted = 2.0 * np.eye(3)[labels] - 1
    weights = np.linalg.solve(x.T @ x + 10 * np.eye(6), x.T @ (wanted - wanted.mean(0)))
    expected = (z @ weights + wanted.mean(0)).argmax(1)
    assert np.array_equal(fitted("ridge", 10.0, features, labels).predict(new), expected)


def test_whitening_undoes_any_linear_map():
    """Also one of condition number 1000, which a plain linear probe feels."""
    (features, labels), (new, _) = blobs(0), blobs(1)
    rng = np.random.default_rng(2)
    left, right = (np.linalg.qr(rng.normal(size=(6, 6)))[0] for _ in range(2))
    mapping = left @ np.diag(np.logspace(0, -3, 6)) @ right
    probabilities = {}
    for kind in ("whitened", "linear"):
        plain = fitted(kind, 1.0, features, labels).predict_proba(new)
        mapped = fitted(kind, 1.0, features @ mapping, labels).predict_proba(new @ mapping)
        probabilities[kind] = np.abs(plain - mapped).max()
    assert probabilities["whitened"] < 1e-2
    assert probabilities["linear"] > 0.1


def test_whitened_features_are_white():
    features, labels = blobs(0)
    white = fitted("whitened", 1.0, features, labels)[:-1].transform(features)
    assert np.allclose(np.cov(white.T), np.eye(6), atol=1e-6)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("collapse", ["few images", "repeated features", "one point"])
def test_degenerate_features(kind, collapse):
    """Directions that hold nothing but rounding noise do not blow up."""
    features, labels = blobs(0, size=6 if collapse == "few images" else 60, dim=12)
    if collapse == "repeated features":
        features[:, 6:] = features[:, :6] + 1e-8 * np.random.default_rng(0).normal(size=(60, 6))
    if collapse == "one point":
        features[:] = 1.5
    probe = fitted(kind, 1.0, features, labels)
    new = features + 1e-3 * np.random.default_rng(1).normal(size=features.shape)
    assert np.isfinite(probe[:-1].transform(new)).all()
    assert set(probe.predict(new)) <= {0, 1, 2}


def test_rounding_noise_is_not_a_direction():
    features, labels = blobs(0, size=60, dim=12)
    features[:, 6:] = features[:, :6] + 1e-8 * np.random.default_rng(0).normal(size=(60, 6))
    assert fitted("whitened", 1.0, features, labels)[:-1].transform(features).shape == (60, 6)


def test_classes_without_an_image():
    """Labels 0 and 2 of three: the probe predicts labels, not positions."""
    loot = loot_of(12)
    rows = loot.labels != 1
    loot = loot._replace(images=loot.images[rows], labels=loot.labels[rows])
    for kind in KINDS:
        assert set(Probe(kind).fit(tiny_vit(), loot, QUICK, 1.0, 0)(Rows(20).images).tolist()) <= {0, 2}


def test_unknown_kinds():
    with pytest.raises(ValueError, match="needed: one of linear, whitened, ridge, knn"):
        Probe("quadratic")


def test_statistics_are_those_of_the_target():
    model, images = tiny_resnet(), Rows(size=96).images
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    reestimate_statistics(model, images)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if name.endswith(STATISTICS)}
    stem = model.resnet.embedder.embedder
    outputs = stem.convolution(images).detach()
    assert torch.allclose(stem.normalization.running_mean, outputs.mean((0, 2, 3)), atol=1e-5)
    assert stem.normalization.momentum == 0.1


@pytest.mark.parametrize("size", [64, 65, 129])
def test_all_images_count_alike_in_statistics(size):
    """The last image of 65 counted as much as the 64 before it, and where maps are single pixels it was an error."""
    model, images = tiny_resnet(), Rows(size=size).images.clone()
    images[-1] += 3
    reestimate_statistics(model, images)
    stem = model.resnet.embedder.embedder
    expected = stem.convolution(images).detach().mean((0, 2, 3))
    assert torch.allclose(stem.normalization.running_mean, expected, rtol=0.03, atol=1e-3)


def test_without_batch_norm_there_are_no_statistics():
    assert Probe(target_statistics=True).unsuitable(tiny_vit(), 3) == "the encoder has no BatchNorm"
    assert Probe(target_statistics=True).unsuitable(tiny_resnet(), 3) is None
