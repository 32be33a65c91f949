"""A tiny untrained protected model with results and record, and the page running on it."""

import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

SPACE = Path(__file__).parents[2] / "Space"
CHROMIUM = "/usr/bin/chromium"
# The page's modules live beside its app.py, as on a Space.
sys.path.insert(0, str(SPACE))


def write_model(folder, seed):
    import torch
    from transformers import ViTImageProcessorPil

    from hf_ntp.training.pretraining import small_vit

    model = small_vit([str(digit) for digit in range(10)], 16, seed)
    with torch.no_grad():
        for weight in matrices(model).values():
            weight[: len(weight) // 2] = 0
    model.save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    return model


def matrices(model):
    return {name: weight for name, weight in model.named_parameters() if "layer" in name and weight.ndim == 2}


def write_protected(folder):
    from hf_ntp import DomainReference, FineTuneProtocol
    from hf_ntp.evaluation.measure import Measurement, ScratchConvergence, SourceAccuracy, SparsityReport
    from hf_ntp.publishing.report import build_record, write_report
    from hf_ntp.publishing.results import build_results

    from ..publishing.conftest import make_curves

    model = write_model(folder, 1)
    layers = {
        name: {"weights": weight.numel(), "zeros": int((weight == 0).sum())}
        for name, weight in matrices(model).items()
    }
    digits = [str(digit) for digit in range(10)]
    source, target = (
        DomainReference(name, name, None, None, {"test": mark * 64}, digits)
        for name, mark in (("mnist", "a"), ("optdigits", "b"))
    )
    sparsity = SparsityReport(0.5, 0.5, 98304, 0.5, 1.0, layers)
    convergence = ScratchConvergence(100, 800, 0.6, 0.61)
    accuracy = SourceAccuracy(0.961, 0.957, 1250)
    measured = Measurement(accuracy, sparsity, make_curves(), convergence, FineTuneProtocol())
    results = build_results(source, target, measured, {"pretrain": 1.0, "protect": 2.0, "evaluate": 3.0})
    base = {"name": None, "revision": None, "weights": {"model.safetensors": "d" * 64}}
    # What a stranger may write into a record must arrive on the page as text.
    terms = 'For digits <b>only</b>. <img src="https://example.invalid/x.png" onerror="alert(1)">'
    record = build_record(
        results, [source], [target], type(model).__name__, base, {"sparsity": 0.5}, sparsity, "apache-2.0", terms
    )
    write_report(folder, record, results)


def write_examples(cache):
    from PIL import Image, ImageDraw

    for domain, side in (("mnist", 28), ("optdigits", 8)):
        folder = cache / "examples" / domain
        folder.mkdir(parents=True)
        for digit in range(10):
            image = Image.new("L", (side, side))
            ImageDraw.Draw(image).line([(side // 4, 2), (digit * side // 10, side - 2)], fill=255)
            image.save(folder / f"{digit}.png")


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Settings that show the tiny model."""
    pytest.importorskip("gradio", reason="gradio is not installed: pip install -e '.[space]'")
    from ntp_space.settings import Settings

    root = tmp_path_factory.mktemp("space")
    write_protected(root / "protected")
    write_model(root / "unprotected", 0)
    write_examples(root / "cache")
    return Settings(str(root / "protected"), str(root / "unprotected"), None, None, root / "cache", False)


@pytest.fixture(scope="session")
def url(folders):
    """The page, with everything loaded: a test's patience is for what the test does."""
    from app import serve

    page, load = serve(folders, server_port=None, quiet=True)
    load()
    yield page.local_url
    page.close()


@pytest.fixture(scope="session")
def browser():
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed: pip install '.[test]'"
    )
    if not Path(CHROMIUM).exists():
        pytest.skip(f"no {CHROMIUM}: apt-get install --no-install-recommends chromium fonts-dejavu-core")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=CHROMIUM,
            args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking"],
        )
        yield browser
        browser.close()
