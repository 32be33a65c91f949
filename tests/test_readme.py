"""The README's Python runs as written, on small models and few steps."""

import re
from pathlib import Path

import pytest
from transformers import ViTImageProcessorPil

import hf_ntp

from .conftest import tiny_vit

README = (Path(__file__).parents[1] / "README.md").read_text()


@pytest.fixture
def blocks():
    return re.findall(r"```python\n(.*?)```", README, re.S)


def test_python_examples(blocks, tmp_path, monkeypatch):
    model = tmp_path / "model"
    tiny_vit(num_labels=10).save_pretrained(model)
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(model)
    monkeypatch.chdir(tmp_path)
    shorter = {
        '"ORG/MODEL"': repr(str(model)),
        "num_train_epochs=30": "max_steps=4, report_to='none', use_cpu=True",
        "steps=600, learning_rates=(3e-4, 1e-3, 3e-3)": "steps=21",
        "sample_sizes=[10, 30, 100],\n    protocol": "sample_sizes=[10, 30], seeds=[0], jobs=1, protocol",
    }
    code = "\n".join(blocks)
    for written, quick in shorter.items():
        assert written in code, written
        code = code.replace(written, quick)
    space = {}
    exec(compile(code, "README.md", "exec"), space)
    assert space["measured"].sparsity.achieved == pytest.approx(0.6, abs=1e-3)
    assert (tmp_path / "runs" / "mine" / "protected" / "model.safetensors").exists()


def test_public_names():
    assert all(getattr(hf_ntp, name) is not None for name in hf_ntp.__all__)
    assert set(hf_ntp._HOMES) == set(hf_ntp.__all__)
    with pytest.raises(AttributeError, match="no attribute 'protect'"):
        _ = hf_ntp.protect
