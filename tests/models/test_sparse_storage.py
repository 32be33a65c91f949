import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForPreTraining,
    ConvNextConfig,
    ConvNextForImageClassification,
    Dinov2Config,
    Dinov2ForImageClassification,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    ViTMAEConfig,
    ViTMAEForPreTraining,
)

import hf_ntp
from hf_ntp import compress_folder, expand_folder
from hf_ntp.models.bitmask import PackedTensor, pack_nonzeros, read_bitmask_file, unpack_nonzeros, write_bitmask_file
from hf_ntp.models.sparse_storage import SPARSE_FILE, BitmaskConfig

from ..conftest import Rows, tiny_resnet, tiny_vit

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn]
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(tensor):
    return tensor.contiguous().flatten().view(BITS[tensor.element_size()])


def same(one, other):
    """Equal bit for bit; torch.equal takes -0.0 for 0.0 and NaN for unequal."""
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(bits(one), bits(other))


def same_states(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)


def pruned(model, share=0.95, seed=5):
    """Zeros in every matrix and kernel, buffers unlike their defaults, and values that only bits tell apart."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.masked_fill_(torch.rand(parameter.shape, generator=generator) < share, 0)
                parameter.view(-1)[:2] = torch.tensor([-0.0, float("nan")])
        for buffer in model.buffers():
            buffer.add_(3)
    model.config.ntp = {"method": "non-transferable-pruning", "sparsity": share}
    return model


def stored(model, tmp_path, **options):
    """Folders of the model as usual and compressed."""
    model.save_pretrained(tmp_path / "dense", **options)
    return tmp_path / "dense", compress_folder(tmp_path / "dense", tmp_path / "sparse")


def vit(hidden=64, layers=2):
    torch.manual_seed(0)
    shape = {"hidden_size": hidden, "intermediate_size": 2 * hidden, "num_hidden_layers": layers}
    return ViTForImageClassification(
        ViTConfig(image_size=8, patch_size=4, num_attention_heads=2, num_labels=3, **shape)
    )


# The codec


def test_packed_bytes_by_hand():
    tensor = torch.tensor([[0.0, 2.0, -0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 5.0]])
    mask, values = pack_nonzeros(tensor)
    assert mask.tolist() == [0b00000110, 0b00000001]
    assert values.tolist() == [2.0, -0.0, 5.0]
    assert torch.signbit(values).tolist() == [False, True, False]


@settings(max_examples=60, deadline=None)
@given(
    st.data(),
    st.sampled_from([*FLOATS, torch.int8, torch.uint8]),
    arrays.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=6),
)
def test_there_and_back(data, dtype, shape):
    width = torch.empty(0, dtype=dtype).element_size()
    # Any bit pattern at all, mostly zero: NaN of every kind, -0.0, infinities, denormals.
    pattern = data.draw(arrays.arrays(np.dtype(f"i{width}"), shape, fill=st.just(0)))
    tensor = torch.from_numpy(pattern.reshape(-1)).view(dtype).reshape(shape)
    packed = pack_nonzeros(tensor)
    assert len(packed.values) == np.count_nonzero(pattern)
    assert same(unpack_nonzeros(packed, shape), tensor)


def test_strides_do_not_matter():
    tensor = torch.arange(12.0).reshape(3, 4).T
    assert same(unpack_nonzeros(pack_nonzeros(tensor), [4, 3]), tensor)


MASK, VALUES = torch.tensor([0b00000110, 0b00000001], dtype=torch.uint8), torch.tensor([2.0, 3.0, 5.0])


@pytest.mark.parametrize(
    ("mask", "values", "shape", "message"),
    [
        (MASK[:1], VALUES, [3, 3], r"mask is torch.uint8 \[1\]; needed: torch.uint8 \[2\]"),
        (MASK.to(torch.int16), VALUES, [9], "mask is torch.int16"),
        (MASK[None], VALUES, [9], r"mask is torch.uint8 \[1, 2\]"),
        (MASK, VALUES[:2], [9], r"values are \[2\]; needed: \[3\]"),
        (MASK, VALUES.reshape(3, 1), [9], r"values are \[3, 1\]"),
        (torch.tensor([6, 3], dtype=torch.uint8), VALUES, [9], "bits set behind its 9 entries"),
        (MASK, VALUES, [-3, -3], "shape is"),
        (MASK, VALUES, [9.0], "shape is"),
        (MASK, VALUES, [True, 9], "shape is"),
        (MASK, VALUES, ["9"], "shape is"),
        (MASK, VALUES, [[9]], "shape is"),
        (MASK, VALUES, [2**40, 2**40], "shape is"),
        (MASK, VALUES, [0, 2**40, 2**40], "shape is"),
        (MASK, VALUES, [2**40], "needed: torch.uint8"),
        (MASK, VALUES, [], "mask is"),
    ],
)
def test_parts_that_do_not_fit(mask, values, shape, message):
    with pytest.raises(ValueError, match=message):
        unpack_nonzeros(PackedTensor(mask, values), shape)


def test_only_floats_that_get_smaller_are_packed(tmp_path):
    tensors = {
        "zeros": torch.zeros(1000),
        "half": torch.zeros(1000, dtype=torch.bfloat16).index_fill_(0, torch.arange(500), 1),
        "dense": torch.ones(1000),
        "counts": torch.zeros(1000, dtype=torch.int64),
        "tiny": torch.zeros(4),
    }
    assert write_bitmask_file(tensors, tmp_path / "file") == 2
    with safe_open(tmp_path / "file", framework="pt") as file:
        assert set(file.keys()) == {*tensors, "zeros.ntp_mask", "half.ntp_mask"}
    assert {name: bits(t).tolist() for name, t in read_bitmask_file(tmp_path / "file").items()} == {
        name: bits(t).tolist() for name, t in tensors.items()
    }
    with pytest.raises(ValueError, match=r"named \['x.ntp_mask'\]"):
        write_bitmask_file({"x.ntp_mask": torch.zeros(2)}, tmp_path / "other")


# Loading


def convnext():
    return ConvNextForImageClassification(ConvNextConfig(num_stages=2, hidden_sizes=[24, 48], depths=[1, 1]))


def dinov2():
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return Dinov2ForImageClassification(Dinov2Config(image_size=8, patch_size=4, **shape))


def vit_mae():
    encoder = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    decoder = {f"decoder_{name}": size for name, size in encoder.items()}
    return ViTMAEForPreTraining(ViTMAEConfig(image_size=8, patch_size=4, **encoder, **decoder))


@pytest.mark.parametrize(
    ("make", "auto"),
    [
        (vit, AutoModelForImageClassification),
        (tiny_resnet, AutoModelForImageClassification),
        (convnext, AutoModelForImageClassification),
        (dinov2, AutoModelForImageClassification),
        (vit_mae, AutoModelForPreTraining),
    ],
)
def test_architectures_load_bit_for_bit(make, auto, tmp_path):
    torch.manual_seed(0)
    model = pruned(make())
    dense, sparse = stored(model, tmp_path)
    loaded, info = auto.from_pretrained(sparse, output_loading_info=True)
    assert type(loaded) is type(model)
    assert not any(info.values()), info
    assert same_states(loaded, model)
    bodies = []
    for folder in (dense, sparse):
        torch.manual_seed(0)  # for a pooler that the checkpoint does not have
        bodies.append(AutoModel.from_pretrained(folder))
    assert same_states(*bodies)
    assert os.path.getsize(sparse / SPARSE_FILE) < os.path.getsize(dense / "model.safetensors")


def test_names_of_older_releases_load(tmp_path):
    """Files of real checkpoints have names that transformers 5 changes while it loads."""
    model = pruned(vit())
    model.save_pretrained(tmp_path / "dense")
    old = {
        "layers": "encoder.layer",
        "q_proj": "attention.query",
        "k_proj": "attention.key",
        "v_proj": "attention.value",
    }
    file = tmp_path / "dense" / "model.safetensors"
    tensors = load_file(file)
    if not any("encoder.layer." in name for name in tensors):
        for new, name in old.items():
            tensors = {key.replace(f".{new}.", f".{name}."): tensor for key, tensor in tensors.items()}
        tensors = {
            key.replace("o_proj", "output.dense")
            .replace("mlp.fc1", "intermediate.dense")
            .replace("mlp.fc2", "output.dense"): tensor
            for key, tensor in tensors.items()
        }
        save_file(tensors, file, metadata={"format": "pt"})
    sparse = compress_folder(tmp_path / "dense", tmp_path / "sparse")
    with safe_open(sparse / SPARSE_FILE, framework="pt") as packed:
        assert "vit.encoder.layer.0.attention.attention.query.weight.ntp_mask" in set(packed.keys())
    loaded, info = AutoModelForImageClassification.from_pretrained(sparse, output_loading_info=True)
    assert not any(info.values()), info
    assert same_states(loaded, model)


def test_size_bar(tmp_path):
    dense, sparse = stored(pruned(vit(hidden=192, layers=2)), tmp_path)
    assert os.path.getsize(sparse / SPARSE_FILE) <= 0.12 * os.path.getsize(dense / "model.safetensors")


def test_zeros_with_a_sign_keep_it(tmp_path):
    model = pruned(vit(), share=0)
    finite(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(torch.rand(parameter.shape) >= 0.95)  # -0.0 for about half of them
    _, sparse = stored(model, tmp_path)
    assert same_states(AutoModelForImageClassification.from_pretrained(sparse), model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, "auto", "bfloat16"])
def test_dtype(dtype, tmp_path):
    dense, sparse = stored(pruned(vit()), tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(sparse, dtype=dtype)
    assert same_states(loaded, AutoModelForImageClassification.from_pretrained(dense, dtype=dtype))
    assert loaded.dtype == (torch.float32 if dtype == "auto" else getattr(torch, str(dtype).split(".")[-1]))


def test_half_precision_files(tmp_path):
    model = pruned(vit()).to(torch.bfloat16)
    _, sparse = stored(model, tmp_path)
    assert same_states(AutoModelForImageClassification.from_pretrained(sparse, dtype="auto"), model)


def test_several_files_become_one(tmp_path):
    model = pruned(vit())
    dense, sparse = stored(model, tmp_path, max_shard_size="100KB")
    assert len(list(dense.glob("*.safetensors"))) > 1
    assert [path.name for path in sparse.glob("*safetensors*")] == [SPARSE_FILE]
    assert same_states(AutoModelForImageClassification.from_pretrained(sparse), model)


def test_another_head_a_device_map_and_a_state_dict(tmp_path):
    model = pruned(vit())
    _, sparse = stored(model, tmp_path)
    other = AutoModelForImageClassification.from_pretrained(
        sparse, num_labels=7, ignore_mismatched_sizes=True, device_map="cpu"
    )
    assert other.classifier.weight.shape == (7, 64)
    assert same_states(other.vit, model.vit)
    config = transformers.AutoConfig.from_pretrained(sparse)
    given_weights = ViTForImageClassification.from_pretrained(None, config=config, state_dict=model.state_dict())
    assert same_states(given_weights, model)


def test_by_id_from_the_cache_and_by_subfolder(tmp_path):
    """Laid out as the Hub client does: `from_pretrained` by id resolves the same names online."""
    model = pruned(vit())
    _, sparse = stored(model, tmp_path)
    repository = tmp_path / "cache" / "models--owner--model"
    shutil.copytree(sparse, repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    loaded = AutoModelForImageClassification.from_pretrained("owner/model", cache_dir=tmp_path / "cache")
    assert same_states(loaded, model)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path, subfolder="sparse")
    assert same_states(loaded, model)


def finite(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.nan_to_num_()
    return model


def test_what_is_loaded_is_an_ordinary_model(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    model = pruned(tiny_vit(), share=0.9)
    _, sparse = stored(finite(model), tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(sparse)
    assert not list((tmp_path / "temporary").iterdir())
    assert not loaded.is_quantized
    assert not any(hasattr(loaded, name) for name in ("hf_quantizer", "quantization_method"))
    assert not any(hasattr(loaded.config, name) for name in ("quantization_config", "transformers_weights"))
    assert loaded.config.ntp == model.config.ntp

    loaded.save_pretrained(tmp_path / "again")
    assert {path.name for path in (tmp_path / "again").iterdir()} == {"config.json", "model.safetensors"}
    assert (tmp_path / "again" / "config.json").read_bytes() == (tmp_path / "dense" / "config.json").read_bytes()
    assert same_states(AutoModelForImageClassification.from_pretrained(tmp_path / "again"), model)

    arguments = TrainingArguments(tmp_path / "run", max_steps=1, report_to="none", use_cpu=True, save_strategy="no")
    before = loaded.classifier.weight.detach().clone()
    Trainer(loaded, arguments, train_dataset=Rows(8)).train()
    assert not torch.equal(loaded.classifier.weight, before)

    adapter = get_peft_model(
        AutoModelForImageClassification.from_pretrained(sparse), LoraConfig(target_modules=["q_proj"])
    )
    assert adapter(torch.zeros(1, 3, 8, 8)).logits.shape == (1, 3)


# Folders


def test_there_and_back_is_the_same_folder(tmp_path):
    (tmp_path / "dense" / "figures").mkdir(parents=True)
    (tmp_path / "dense" / "README.md").write_text("card")
    (tmp_path / "dense" / "figures" / "curve.txt").write_text("curve")
    dense, sparse = stored(pruned(vit()), tmp_path)
    back = expand_folder(sparse, tmp_path / "back")
    files = sorted(str(path.relative_to(dense)) for path in dense.rglob("*"))
    assert files == sorted(str(path.relative_to(back)) for path in back.rglob("*"))
    for name in ("config.json", "README.md", "figures/curve.txt"):
        assert (dense / name).read_bytes() == (back / name).read_bytes()
    one, other = load_file(dense / "model.safetensors"), load_file(back / "model.safetensors")
    assert one.keys() == other.keys()
    assert all(same(one[name], other[name]) for name in one)


def test_folders_that_cannot_be_stored(tmp_path):
    dense, sparse = stored(pruned(vit()), tmp_path)
    with pytest.raises(ValueError, match="taken or inside"):
        compress_folder(dense, sparse)
    with pytest.raises(ValueError, match="taken or inside"):
        compress_folder(dense, dense / "sparse")
    with pytest.raises(ValueError, match="quantized already"):
        compress_folder(sparse, tmp_path / "new")
    with pytest.raises(ValueError, match="is no compressed model"):
        expand_folder(dense, tmp_path / "new")
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json"):
        compress_folder(tmp_path, tmp_path.parent / f"{tmp_path.name}-new")
    (dense / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"\['pytorch_model.bin'\] besides"):
        compress_folder(dense, tmp_path / "new")
    (dense / "pytorch_model.bin").unlink()
    config = json.loads((dense / "config.json").read_text())
    for changed, message in (([], "holds a list"), (config | {"transformers_weights": "x"}, "names 'x' as the")):
        (dense / "config.json").write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=message):
            compress_folder(dense, tmp_path / "new")
    (dense / "config.json").write_text(json.dumps(config | {"quantization_config": "x"}))
    with pytest.raises(ValueError, match="is no compressed model"):
        expand_folder(dense, tmp_path / "new")
    (dense / "config.json").write_text(json.dumps(config))
    (dense / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="holds neither"):
        compress_folder(dense, tmp_path / "new")
    for index, message in (("{}", "has no weight_map"), ("[1]", "holds a list")):
        (dense / "model.safetensors.index.json").write_text(index)
        with pytest.raises(ValueError, match=message):
            compress_folder(dense, tmp_path / "new")
    tiny_vit().save_pretrained(tmp_path / "unpruned")
    with pytest.raises(ValueError, match="smaller without its zeros"):
        compress_folder(tmp_path / "unpruned", tmp_path / "new")
    with pytest.raises(ValueError, match="asked for a model with plain weights"):
        AutoModelForImageClassification.from_pretrained(tmp_path / "unpruned", quantization_config=BitmaskConfig())
    assert not (tmp_path / "new").exists()


def test_the_working_directory_is_not_replaced(tmp_path, monkeypatch):
    dense, _ = stored(pruned(vit()), tmp_path)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for out in (".", tmp_path / "here"):
        with pytest.raises(ValueError, match="holds the working directory"):
            compress_folder(dense, out)


def test_a_format_of_the_future(tmp_path):
    _, sparse = stored(pruned(vit()), tmp_path)
    config = json.loads((sparse / "config.json").read_text())
    config["quantization_config"]["format_version"] = 2
    (sparse / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"version 2; needed: 1\. Upgrade hf_ntp"):
        AutoModelForImageClassification.from_pretrained(sparse)


# Damaged and hostile files


@pytest.fixture(scope="module")
def sparse_folder(tmp_path_factory):
    return stored(pruned(vit()), tmp_path_factory.mktemp("hostile"))[1]


NAME = "classifier.weight"


def packed_name(tensors):
    return next(name.removesuffix(".ntp_mask") for name in tensors if name.endswith(".ntp_mask"))


def cut_mask(tensors, notes, name):
    tensors[f"{name}.ntp_mask"] = tensors[f"{name}.ntp_mask"][:-1].clone()


def flip_a_bit(tensors, notes, name):
    tensors[f"{name}.ntp_mask"][0] ^= 0b10000000


def drop_a_value(tensors, notes, name):
    tensors[name] = tensors[name][:-1].clone()


def integers(tensors, notes, name):
    tensors[name] = tensors[name].view(torch.int32)


def wide_mask(tensors, notes, name):
    tensors[f"{name}.ntp_mask"] = tensors[f"{name}.ntp_mask"].to(torch.int32)


def no_values(tensors, notes, name):
    del tensors[name]


def no_mask(tensors, notes, name):
    del tensors[f"{name}.ntp_mask"]


def unlisted(tensors, notes, name):
    del notes["shapes"][name]


def huge_shape(tensors, notes, name):
    notes["shapes"][name] = [2**31, 2**31]


def shape_in_words(tensors, notes, name):
    notes["shapes"][name] = "64x64"


def no_shapes(tensors, notes, name):
    del notes["shapes"]


def other_version(tensors, notes, name):
    notes["version"] = 2


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut_mask, "the mask is"),
        (flip_a_bit, "one for each bit set"),
        (drop_a_value, "one for each bit set"),
        (integers, "torch.int32; needed: a floating-point type"),
        (wide_mask, "the mask is torch.int32"),
        (no_values, "missing; needed"),
        (no_mask, "ntp_mask missing; needed"),
        (unlisted, "belong to no tensor that the file lists"),
        (huge_shape, "the mask is"),
        (shape_in_words, "no shapes by name"),
        (no_shapes, "no shapes by name"),
        (other_version, "needed: version 1"),
    ],
)
def test_damaged_files(damage, message, sparse_folder, tmp_path):
    folder = shutil.copytree(sparse_folder, tmp_path / "copy")
    file = folder / SPARSE_FILE
    tensors = load_file(file)
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    notes = json.loads(metadata["ntp_bitmask"])
    damage(tensors, notes, packed_name(tensors))
    save_file(tensors, file, metadata={**metadata, "ntp_bitmask": json.dumps(notes)})
    with pytest.raises(ValueError, match=rf"ntp_bitmask\.safetensors is damaged: .*{message}"):
        AutoModelForImageClassification.from_pretrained(folder)


@pytest.mark.parametrize("notes", [None, "{", "[]", "[" * 100_000, "NaN", '{"version": 1, "shapes": []}'])
def test_damaged_notes(notes, tmp_path):
    save_file({"x": torch.zeros(3)}, tmp_path / "file", metadata=None if notes is None else {"ntp_bitmask": notes})
    with pytest.raises(ValueError, match="is damaged: its"):
        read_bitmask_file(tmp_path / "file")


def test_cut_and_missing_files(sparse_folder, tmp_path):
    folder = shutil.copytree(sparse_folder, tmp_path / "copy")
    whole = (folder / SPARSE_FILE).read_bytes()
    for content in (b"", b"\0" * 8, whole[:1000], whole[:-1], b"\xff" * 100):
        (folder / SPARSE_FILE).write_bytes(content)
        with pytest.raises(ValueError, match="is not a whole safetensors file"):
            AutoModelForImageClassification.from_pretrained(folder)
    (folder / SPARSE_FILE).unlink()
    with pytest.raises(FileNotFoundError):
        AutoModelForImageClassification.from_pretrained(folder)


# With and without hf_ntp in the process (in this one, conftest.py imports transformers first)

WITHOUT = """
import sys
from transformers import AutoModel, AutoModelForImageClassification, ViTForImageClassification, pipeline
folder, renamed = sys.argv[1:]
attempts = [
    lambda: AutoModel.from_pretrained(folder),
    lambda: AutoModelForImageClassification.from_pretrained(folder),
    lambda: ViTForImageClassification.from_pretrained(folder),
    lambda: AutoModel.from_pretrained(folder, use_safetensors=True),
    lambda: AutoModel.from_pretrained(folder, ignore_mismatched_sizes=True),
    lambda: pipeline("image-classification", model=folder),
    lambda: AutoModel.from_pretrained(renamed),
    lambda: AutoModelForImageClassification.from_pretrained(renamed),
]
assert "hf_ntp" not in sys.modules
for attempt in attempts:
    try:
        attempt()
        print("loaded something")
    except Exception as error:
        print(type(error).__name__, "no file named" in str(error), "ignore_mismatched_sizes" in str(error))
"""

FIRST = """
import sys
import hf_ntp
assert not {"torch", "transformers", "numpy", "peft"} & sys.modules.keys()
from transformers import AutoModel
model = AutoModel.from_pretrained(sys.argv[1])
print(int((model.state_dict()["layers.0.attention.q_proj.weight"] == 0).sum()))
"""


def python(code, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(Path(hf_ntp.__file__).parents[1]), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def test_without_hf_ntp_nothing_loads(sparse_folder, tmp_path):
    renamed = shutil.copytree(sparse_folder, tmp_path / "copy")
    os.rename(renamed / SPARSE_FILE, renamed / "model.safetensors")
    outcomes = python(WITHOUT, sparse_folder, renamed)
    assert outcomes[:5] == ["OSError True False"] * 5
    assert outcomes[5].startswith(("OSError", "ValueError"))
    assert outcomes[6:] == ["RuntimeError False True"] * 2


def test_hf_ntp_may_be_imported_first(sparse_folder):
    weight = AutoModel.from_pretrained(sparse_folder).state_dict()["layers.0.attention.q_proj.weight"]
    assert python(FIRST, sparse_folder) == [str(int((weight == 0).sum()))]
