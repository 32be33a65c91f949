"""Every architecture that is promised: protect, save, load with its own class, resume bit for bit, attack."""

import copy
import importlib

import pytest
import torch
from transformers import TimmWrapperConfig, TimmWrapperForImageClassification, TimmWrapperModel

from hf_ntp import Arm, NTPConfig, NTPTrainer
from hf_ntp.attacks import ATTACKS, FineTuneProtocol, Loot
from hf_ntp.evaluation.runner import load_start
from hf_ntp.evaluation.suite import check_same_architecture
from hf_ntp.models import noted_prunable_weights, with_head, zero_fraction
from hf_ntp.models.changes import reinit_first_block, reinit_last_block, reinit_stem

from .architectures import CLASSIFIERS, ENCODERS, SIZE, build
from .conftest import Rows

STEPS = 4
QUICK = FineTuneProtocol(steps=2, batch_size=4, learning_rates=(1e-3,), warmup_steps=1)


class Unlabelled(Rows):
    def __getitem__(self, index):
        return {"pixel_values": self.images[index]}


def trainer(model, folder, labelled, **options):
    args = NTPConfig(
        output_dir=str(folder),
        max_steps=STEPS,
        save_steps=STEPS // 2,
        per_device_train_batch_size=6,
        attackers=2,
        attacker_batch_size=3,
        attacker_patience=0,
        admm_interval=1,
        learning_rate=1e-4,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        **options,
    )
    source = (Rows if labelled else Unlabelled)(24, image_size=SIZE)
    return NTPTrainer(model, args, source, Rows(24, image_size=SIZE, seed=1))


def everything(model, images):
    """All tensors that a model returns, in eval mode; a masked autoencoder gets the order of its patches."""
    noise = {"noise": torch.arange(4.0).expand(len(images), -1)} if "MAE" in type(model).__name__ else {}
    with torch.no_grad():
        outputs = model.eval()(pixel_values=images, **noise)
    return {name: value for name, value in outputs.items() if isinstance(value, torch.Tensor)}


def options_of(config):
    """The configuration without what saving adds."""
    # LeViT's configuration adds to down_ops whenever one is made.
    added = ("architectures", "dtype", "transformers_version", "_name_or_path", "down_ops")
    nested = {key: options_of(value) if isinstance(value, dict) else value for key, value in config.items()}
    return {key: value for key, value in nested.items() if key not in added}


@pytest.fixture(scope="module", params=[*CLASSIFIERS, *ENCODERS])
def protected(request, tmp_path_factory):
    """Name, model after protection, folder where it was saved, and folder of the run."""
    run = tmp_path_factory.mktemp(request.param)
    model = build(request.param)
    ours = trainer(model, run / "run", request.param in CLASSIFIERS)
    ours.train()
    ours.save_model(run / "saved")
    return request.param, model, run / "saved", run / "run"


def test_it_loads_with_its_own_class(protected, tmp_path):
    name, model, saved, _ = protected
    loaded = type(model).from_pretrained(saved)
    saved, weights = loaded.state_dict(), model.state_dict()
    assert saved.keys() == weights.keys()
    assert all(torch.equal(saved[key], weights[key]) for key in weights)
    images = Rows(4, image_size=SIZE).images
    expected, found = everything(model, images), everything(loaded, images)
    torch.testing.assert_close(found, expected)  # convolutions may round differently where memory is laid out anew
    published = options_of(loaded.config.to_dict())
    assert published.pop("ntp")
    assert published == options_of(build(name).config.to_dict())
    assert loaded.config.ntp["sparsity"] == pytest.approx(0.6, abs=0.01)
    loaded.save_pretrained(tmp_path / "again")
    build(name).save_pretrained(tmp_path / "before")
    check_same_architecture({folder: str(tmp_path / folder) for folder in ("before", "again")})


def test_it_resumes_bit_for_bit(protected):
    name, model, _, run = protected
    again = build(name)
    trainer(again, run, name in CLASSIFIERS).train(str(run / f"checkpoint-{STEPS // 2}"))
    weights = again.state_dict()
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


def test_parts_are_found(protected):
    _, model, _, _ = protected
    for change in (reinit_stem, reinit_first_block, reinit_last_block):
        changed = copy.deepcopy(model)
        change(with_head(changed), 5)
        before = model.state_dict()
        assert any(not torch.equal(value, before[name]) for name, value in changed.state_dict().items()), change


def test_it_can_be_attacked(protected):
    """One point of a learning curve, from the checkpoint and from scratch."""
    _, _, saved, _ = protected
    data = Rows(6, image_size=SIZE, seed=2)
    loot = Loot(data.images, data.labels, 3)
    for random_init in (False, True):
        model = load_start(Arm("it", str(saved), random_init), seed=0)
        zeros = zero_fraction(list(noted_prunable_weights(model).values()))
        assert zeros == pytest.approx(0 if random_init else 0.6, abs=0.01)
        for name in ("dense", "lora"):
            predicted = ATTACKS[name].fit(copy.deepcopy(model), loot, QUICK, 1e-3, 0)(data.images)
            assert predicted.shape == (6,)
            assert 0 <= predicted.min() <= predicted.max() < 3


@pytest.mark.parametrize(
    ("kind", "head"), [(TimmWrapperForImageClassification, "timm_model.fc"), (TimmWrapperModel, None)]
)
def test_timm(kind, head, tmp_path):
    """Its models keep blocks as attributes, so attackers who re-initialise blocks are off."""
    try:
        importlib.import_module("timm")
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"timm needs torchvision, which does not import beside a CPU build of torch: {error}")

    def make():
        torch.manual_seed(0)
        options = {"channels": (4, 8, 8, 16)}
        return kind(TimmWrapperConfig(architecture="resnet18", num_labels=3, model_args=options))

    def run(model):
        return trainer(model, tmp_path / "run", head is not None, head_name=head, attacker_informed=0.0)

    model, again = make(), make()
    ours = run(model)
    ours.train()
    ours.save_model(tmp_path / "saved")
    run(again).train(str(tmp_path / "run" / f"checkpoint-{STEPS // 2}"))
    for other in (kind.from_pretrained(tmp_path / "saved"), again):
        assert all(torch.equal(value, other.state_dict()[key]) for key, value in model.state_dict().items())
