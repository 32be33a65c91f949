import pytest
import torch

from hf_ntp import NTPConfig
from hf_ntp.functional import feature_distance
from hf_ntp.models import batch_norms, find_head, recorded_features
from hf_ntp.training.guard import FeatureGuard, SourceGuard

from ..conftest import Rows, learn, tiny_resnet, tiny_vit


def config(**options):
    return NTPConfig(output_dir="unused", report_to="none", use_cpu=True, **options)


def guard(held_out=None, **options):
    return SourceGuard(tiny_vit(), config(**options), Rows(), held_out)


def test_the_share_falls_beyond_the_tolerance():
    """Full up to the tolerance, nothing from twice the tolerance on; the tolerance falls geometrically."""
    ours = guard(source_tolerance=[0.4, 0.1])
    found = []
    for progress, excess in ((0, -1.0), (0, 0.4), (0, 0.6), (0, 0.9), (0.5, 0.3), (1, 0.15)):
        ours.excess = torch.tensor(excess)
        found.append(float(ours.share(progress)))
    assert found == pytest.approx([1.0, 1.0, 0.5, 0.0, 0.5, 0.5])


def test_divergence_by_hand():
    ours, data = guard(), Rows(size=6)
    logits = tiny_vit().eval()(data.images).logits.detach()
    assert ours.distillation(data.images, logits) == pytest.approx(0.0, abs=1e-6)
    moved = logits.clone()
    moved[:2] = -moved[:2]
    moved.requires_grad_()
    divergence = ours.distillation(data.images, moved)
    teacher, student = logits.softmax(-1), moved.detach().softmax(-1)
    assert divergence.item() == pytest.approx(
        float((teacher * (teacher.log() - student.log())).sum(-1).mean()), rel=1e-4
    )
    divergence.backward()
    assert moved.grad.abs().sum() > 0
    assert not any(parameter.requires_grad for parameter in ours.original.parameters())


class Seen(Rows):
    """Remembers the rows that were asked for."""

    def __getitem__(self, index):
        self.asked = [*getattr(self, "asked", []), index]
        return super().__getitem__(index)


def test_held_out_images_by_hand():
    """Every eighth step, as many images as eight steps train on, in turn; those of the training do not count."""
    data, training = Seen(size=40), Seen(size=40)
    original, worse = tiny_vit(), tiny_vit().eval()
    learn(original, data)
    data.labels = original.eval()(data.images).logits.argmax(-1)
    ours = SourceGuard(original, config(per_device_train_batch_size=3), training, data)
    ours.look(worse, 7)
    assert float(ours.excess) == 0
    assert not hasattr(data, "asked")
    lost = (worse(data.images).logits.argmax(-1) != data.labels).float()
    expected, asked = 0.0, []
    for step in (8, 16, 24, 32, 40):
        data.asked = []
        ours.look(worse, step)
        expected += max(24 / 1280, 1 / (1 + step // 8)) * (float(lost[data.asked].mean()) - expected)
        assert float(ours.excess) == pytest.approx(expected, rel=1e-5)
        asked += data.asked
    assert 0 < float(lost.mean()) < 1
    assert sorted(asked) == sorted(3 * list(range(40)))
    assert not hasattr(training, "asked")


def test_training_images_where_no_others_are_held_out():
    """A model that draws what it drops differs from itself in training; it is judged as it is used."""
    data, model = Seen(size=40), tiny_vit(dropout=0.5).train()
    learn(model, data)
    ours = SourceGuard(model, config(), data)
    for step in (1, 2, 8, 16, 24):
        ours.look(model, step)
    assert len(data.asked) == 4 * 32
    assert sorted(set(data.asked)) == list(range(40))
    assert float(ours.excess) == 0
    unlimited = SourceGuard(model, config(source_tolerance=[]), Seen(size=40))
    unlimited.look(model, 8)
    assert not hasattr(unlimited._judged, "asked")


def test_all_of_few_images_are_looked_at():
    """The original's own accuracy is no excess, and better than the original is below zero."""
    data, model = Rows(size=20), tiny_vit()
    ours = guard(data)
    ours.look(model, 8)
    assert float(ours.excess) == 0
    right = (model.eval()(data.images).logits.argmax(-1) == data.labels).float().mean()
    learn(model, data)
    ours.look(model, 16)
    gained = (model.eval()(data.images).logits.argmax(-1) == data.labels).float().mean() - right
    assert gained > 0.3
    assert float(ours.excess) == pytest.approx(-float(gained) / 3, rel=1e-4), "looks at 1, 8 and 16 count alike"
    ours.look(model, 8 * 99)
    assert float(ours.excess) == pytest.approx(-(1 / 3 + 2 / 3 * 20 / 1280) * float(gained), rel=1e-4)


def test_a_look_leaves_the_model_as_it_was():
    model = tiny_resnet().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ours = SourceGuard(model, config(), Rows(), Rows())
    ours.look(model, 8)
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_nothing_is_copied_when_nothing_needs_it():
    ours = guard(source_distillation=0.0, source_tolerance=[])
    assert ours.original is None
    assert ours.share(0.5) == 1.0


def features(model, images):
    with recorded_features(find_head(model)[1]) as recorded:
        model(images)
    return recorded[0]


def test_matching_features_by_hand():
    data = Rows(size=6)
    ours = FeatureGuard(tiny_vit(), config(), data)
    inputs = {"pixel_values": data.images}
    original = features(tiny_vit().eval(), data.images).detach()
    assert ours.terms(None, inputs, None, original, 0)[0] == pytest.approx(0.0, abs=1e-6)
    moved = (original + torch.randn(6, 16, generator=torch.Generator().manual_seed(0))).requires_grad_()
    cosine, error = feature_distance(moved, original)
    loss, _ = ours.terms(None, inputs, None, moved, 0)
    assert loss.item() == pytest.approx((cosine + error).item(), rel=1e-5)
    loss.backward()
    assert moved.grad.abs().sum() > 0
    assert not any(parameter.requires_grad for parameter in ours.original.parameters())


def test_batch_norm_is_the_same_on_both_sides():
    """While training, with the batch; in evaluation, with running statistics, which stay as they are."""
    model, data = tiny_resnet().train(), Rows(size=12)
    ours = FeatureGuard(model, config(), data)
    before = {name: buffer.clone() for name, buffer in ours.original.named_buffers()}
    loss, _ = ours.terms(model, {"pixel_values": data.images}, None, features(model, data.images), 0)
    assert loss.item() == pytest.approx(0.0, abs=1e-5)
    assert all(torch.equal(buffer, before[name]) for name, buffer in ours.original.named_buffers())
    distance = ours.distance(data.images, features(tiny_resnet().eval(), data.images))
    assert distance.cosine.item() == pytest.approx(0, abs=1e-5)


def test_features_are_judged_as_they_are_used():
    """Dropout is no excess; what the running statistics have lost is one, though those of a batch know nothing."""
    dropping = tiny_vit(dropout=0.5).train()
    ours = FeatureGuard(dropping, config(), Rows())
    ours.look(dropping, 8)
    assert float(ours.excess) == pytest.approx(0.0, abs=1e-6)
    assert dropping.training
    model, data = tiny_resnet().train(), Seen(size=20)
    ours = FeatureGuard(model, config(per_device_train_batch_size=8), data)
    reference = tiny_resnet().eval()
    for norm in batch_norms(model):
        norm.running_mean += 0.5
    expected = 0.0
    for step in (4, 8, 16):
        data.asked = []
        ours.look(model, step)
        if step == 4:
            assert data.asked == []
            continue
        assert len(data.asked) == 8
        images = data.images[data.asked]
        error = feature_distance(features(model.eval(), images), features(reference, images)).relative_error
        expected += max(0.3, 1 / (1 + step // 8)) * (error.item() - expected)
        assert float(ours.excess) == pytest.approx(expected, rel=1e-4)
        model.train()
    assert expected > 0.05


@pytest.mark.parametrize("kind", [SourceGuard, FeatureGuard])
def test_the_original_computes_in_the_precision_of_the_run(kind):
    found = []
    ours = kind(tiny_vit(), config(), Rows(), autocast=lambda: torch.autocast("cpu", torch.bfloat16))
    ours.original.vit.layers[0].mlp.fc1.register_forward_hook(lambda *args: found.append(args[2].dtype))
    images = Rows(size=6).images
    if kind is SourceGuard:
        ours.distillation(images, torch.zeros(6, 3))
    else:
        ours.distance(images, torch.zeros(6, 16))
    ours.look(tiny_vit(), 8)
    assert len(found) >= 2
    assert set(found) == {torch.bfloat16}


def test_the_limit_of_features_is_their_own():
    ours = FeatureGuard(tiny_vit(), config(feature_tolerance=[0.4, 0.1]), Rows())
    ours.excess = torch.tensor(0.6)
    assert ours.share(0) == pytest.approx(0.5)
    free = FeatureGuard(tiny_vit(), config(feature_tolerance=[]), Rows())
    assert free.share(0) == 1.0
