"""The README's Python runs as written, on small models and few steps."""

import json
import re
import shlex
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import ViTImageProcessorPil

import hf_ntp
from hf_ntp import PixelDataset, cli
from hf_ntp.attacks import ATTACKS
from hf_ntp.data import Content
from hf_ntp.publishing.report import write_report
from hf_ntp.publishing.results import read_results, results_table
from hf_ntp.run_folder import weight_digests

from .conftest import tiny_vit
from .publishing.conftest import make_attacks, make_record, make_results
from .publishing.folders import make_folder

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "Space/README.md",
    *(f"benchmarks/{n}/README.md" for n in ("strength", "access", "ssl", "cost")),
]


def anchors(page):
    """Of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    page = ROOT / name
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()) if "://" not in link]
    for link in links:
        path, _, anchor = link.partition("#")
        there = page.parent / path if path else page
        assert there.exists(), link
        assert not anchor or anchor in anchors(there), link


def test_the_default_run_is_the_committed_one():
    """What it prints, and the attacks on it; also how many there are."""
    printed = results_table(read_results(ROOT / "model_cards" / "mnist_only"))
    assert "\n".join(line.rstrip() for line in printed.splitlines()) in README
    assert f"`--attacks all` for all {len(ATTACKS)}" in " ".join(README.split())
    attacks = json.loads((ROOT / "model_cards" / "mnist_only" / "attacks.json").read_text())
    areas = sorted((found["normalized"] for found in attacks["starts"]["protected"].values()), reverse=True)
    table = README.split("## How strong is it?")[1].split("| **worst case** |")[0]
    assert re.findall(r"^\|[^|]+\|[^|]*\| ([+-]\S+) \| \[", table, re.M) == [f"{area:+.3f}" for area in areas]


@pytest.fixture
def blocks():
    return re.findall(r"```python\n(.*?)```", README, re.S)


def test_python_examples(blocks, few_images, tmp_path, monkeypatch):
    model = tmp_path / "model"
    tiny_vit(num_labels=10).save_pretrained(model)
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(model)
    monkeypatch.chdir(tmp_path)
    tiny_vit(num_labels=10).vit.save_pretrained(tmp_path / "encoder")
    shorter = {
        '"ORG/MODEL"': repr(str(model)),
        ", num_train_epochs=30": "",
        '"ORG/ENCODER"': repr(str(tmp_path / "encoder")),
        "NTPConfig(output_dir": "NTPConfig(max_steps=4, report_to='none', use_cpu=True, output_dir",
        "steps=600, learning_rates=(3e-4, 1e-3, 3e-3)": "steps=3, warmup_steps=1, learning_rates=(1e-3,)",
        "sample_sizes=[10, 30, 100],\n    protocol": "sample_sizes=[10, 30], seeds=[0], jobs=1, protocol",
    }
    code = [block for block in blocks if "load_protected" not in block]
    for written, quick in shorter.items():
        assert any(written in block for block in code), written
        code = [block.replace(written, quick) for block in code]
    space = {}
    for block in code:
        exec(compile(block, "README.md", "exec"), space)
        if "trainer = " in block and ".train()" not in block:
            space["trainer"].train()
    assert space["measured"].sparsity.achieved == pytest.approx(0.6, abs=1e-3)
    assert (tmp_path / "runs" / "python" / "protected" / "model.safetensors").exists()
    record = hf_ntp.verify_folder(tmp_path / "runs" / "python" / "published").record
    assert record["source_accuracy"]["after"] == space["measured"].accuracy.after
    assert [domain["name"] for domain in record["unauthorized_domains"]] == ["optdigits"]
    trainer, measured, folder = space["trainer"], space["measured"], tmp_path / "wrong"
    some = space["owner"].shuffle(seed=1).select(range(5))
    seen = PixelDataset.from_dataset(some, space["processor"]).contents
    for part, images in (("attacker", seen), ("test", seen | measured.images["test"])):
        other = replace(measured, images=measured.images | {part: images})
        with pytest.raises(ValueError, match=rf"has seen images that were measured with as {part} \(5 images\)"):
            hf_ntp.write_folder(trainer, folder, "ORG/NAME", *space["domains"], measured=other)
    other = replace(measured, images=measured.images | {"source": trainer.train_dataset.source.contents})
    with pytest.raises(ValueError, match=r"measured with as source test \(\d+ images\)"):
        hf_ntp.write_folder(trainer, folder, "ORG/NAME", *space["domains"], measured=other)
    (source,), (target,) = space["domains"]
    for domains, message in (
        (([source], [target, replace(target, name="x")]), "targets names 2 domains .* was trained with 1"),
        (([replace(source, name=target.name)], [target]), f"name {target.name} more than once"),
    ):
        with pytest.raises(ValueError, match=message):
            hf_ntp.write_folder(trainer, folder, "ORG/NAME", *domains)
    others = frozenset([Content("0" * 64, "1" * 64, b"")])
    other = replace(measured, images=measured.images | {"test": others, "source": others})
    with pytest.raises(ValueError, match=r"than the references name \(targets: test, source: test\)"):
        hf_ntp.write_folder(trainer, folder, "ORG/NAME", *space["domains"], measured=other)
    with pytest.raises(ValueError, match="source and targets are swapped"):
        hf_ntp.write_folder(trainer, folder, "ORG/NAME", *reversed(space["domains"]))
    assert not folder.exists()
    trainer.model.classifier.bias.data.add_(1)
    with pytest.raises(ValueError, match="the measurement is of another model"):
        hf_ntp.write_folder(trainer, folder, measured=measured)


def test_publish_commands(hub, tmp_path, monkeypatch):
    """From a measured folder to a model on a Hub that others verify, with the commands as they stand."""
    (commands,) = re.findall(r"<!-- publish commands -->\n```bash\n(.*?)```", README, re.S)
    monkeypatch.chdir(tmp_path)
    folder = make_folder(tmp_path / "runs" / "ntp_vit" / "protected")
    write_report(folder, make_record(make_results()), make_results())
    (tmp_path / "runs" / "attacks").mkdir()
    attacks = make_attacks() | {"weights": weight_digests(folder)}
    (tmp_path / "runs" / "attacks" / "results.json").write_text(json.dumps(attacks))
    for line in commands.replace("ORG/NAME", "org/NAME").strip().splitlines():
        program, *words = shlex.split(line)
        if program == "hf-ntp":
            assert cli.main(words) == 0, line
        else:
            subprocess.run([program, *words], check=True, capture_output=True, timeout=60)
    (loading,) = [block for block in re.findall(r"```python\n(.*?)```", README, re.S) if "load_protected" in block]
    space = {}
    exec(compile(loading.replace("ORG/NAME", "org/NAME"), "README.md", "exec"), space)
    assert type(space["model"]).__name__ == "ViTForImageClassification"
    assert hub.model("org/NAME").private


def test_public_names():
    assert all(getattr(hf_ntp, name) is not None for name in hf_ntp.__all__)
    assert set(hf_ntp._HOMES) == set(hf_ntp.__all__)
    with pytest.raises(AttributeError, match="no attribute 'protect'"):
        _ = hf_ntp.protect
