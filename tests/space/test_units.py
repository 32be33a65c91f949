"""The functions behind the page, without a browser."""

import base64
import io
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from ..publishing.folders import make_keys
from .conftest import SPACE

pytest.importorskip("gradio", reason="gradio is not installed: pip install -e '.[space]'")

from app import warm_up
from ntp_space import page, score, words
from ntp_space.classifiers import Classifiers
from ntp_space.images import domain_examples, read_drawing, read_image
from ntp_space.settings import Settings
from ntp_space.showcase import open_showcase

from hf_ntp.functional import Interval


def data_url(image):
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def paper():
    return Image.new("RGB", (280, 280), "white")


def test_settings_default_to_the_demo(tmp_path):
    settings = Settings.from_environment({"NTP_CACHE": str(tmp_path), "NTP_MODEL": ""})
    assert settings.demo
    assert settings.model == str(tmp_path / "demo" / "protected")
    assert settings.unprotected == str(tmp_path / "demo" / "unprotected")


def test_settings_for_another_model():
    settings = Settings.from_environment({"NTP_MODEL": "org/x", "NTP_REVISION": "v1", "NTP_PUBLIC_KEY": "k.pem"})
    assert (settings.model, settings.revision, settings.public_key) == ("org/x", "v1", "k.pem")
    assert settings.unprotected is None
    assert not settings.demo


def test_settings_that_do_not_go_together():
    with pytest.raises(ValueError, match="NTP_REVISION is set without NTP_MODEL"):
        Settings.from_environment({"NTP_REVISION": "v1"})


def test_a_drawing_is_centred_like_mnist():
    image = paper()
    ImageDraw.Draw(image).rectangle([10, 10, 29, 109], fill="black")
    values = np.asarray(read_drawing(data_url(image)).convert("L"), dtype=float)
    assert values.shape == (28, 28)
    rows, columns = np.nonzero(values)
    assert np.ptp(rows) + 1 == 20
    assert np.ptp(columns) + 1 == 4
    assert (rows.mean() + 0.5, columns.mean() + 0.5) == (14, 14)
    assert values.max() == 255


@pytest.mark.parametrize("edge", [(0, 0, 279, 2), (0, 0, 0, 0), (0, 0, 279, 279), (277, 0, 279, 279)])
def test_any_drawing_gives_an_image(edge):
    image = paper()
    ImageDraw.Draw(image).rectangle(edge, fill="black")
    assert read_drawing(data_url(image)).size == (28, 28)


def test_nothing_drawn():
    assert read_drawing(None) is None
    assert read_drawing(data_url(paper())) is None


@pytest.mark.parametrize("drawing", ["x", 7, "data:image/png;base64,AAAA", "data:image/png;base64," + "A" * (1 << 21)])
def test_drawings_that_are_none(drawing):
    with pytest.raises(ValueError, match="rawing"):
        read_drawing(drawing)


def test_drawings_of_other_sizes_are_refused():
    with pytest.raises(ValueError, match="280 x 280"):
        read_drawing(data_url(Image.new("RGB", (5, 5))))


def test_large_images_are_refused(tmp_path):
    Image.new("1", (9000, 9000)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="9000 x 9000 pixels"):
        read_image(tmp_path / "a.png")


def test_photographs_are_turned(tmp_path):
    turned = Image.Exif()
    turned[0x0112] = 6  # the camera lay on its side
    Image.new("RGB", (40, 20)).save(tmp_path / "photo.jpg", exif=turned)
    assert read_image(tmp_path / "photo.jpg").size == (20, 40)


def test_other_formats_are_not_even_tried(tmp_path):
    (tmp_path / "x.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    with pytest.raises(ValueError, match="is not an image that can be read; needed: PNG"):
        read_image(tmp_path / "x.png")


def test_examples_of_unknown_domains_need_no_download(tmp_path):
    assert domain_examples("org/unknown", tmp_path) == []
    assert domain_examples("../mnist", tmp_path) == []
    assert domain_examples("unknown", tmp_path) == []


def test_embedded_examples_are_kept(tmp_path):
    examples = domain_examples("optdigits", tmp_path)
    assert [example.label for example in examples] == [str(digit) for digit in range(10)]
    assert read_image(examples[0].path).size == (8, 8)


def test_scores_by_hand():
    scores = score.score(score.parse_text("10, 100", "[0.5, 0.7]", "0.3 0.6"))
    assert scores["normalized"].mean == pytest.approx(0.15)
    assert scores["decades"].mean == pytest.approx(0.15)
    assert scores["nats"].mean == pytest.approx(0.15 * np.log(10))


def test_files_and_text_agree(tmp_path):
    text = score.parse_text("10 100", "0.5 0.7\n0.4 0.7", "0.3 0.6\n0.2 0.6")
    (tmp_path / "a.csv").write_text(
        "\ufeffSize; Checkpoint; Scratch; Seed\n100;0.7;0.6;0\n10;0.5;0.3;0\n10;0.4;0.2;1\n100;0.7;0.6;1\n"
    )
    (tmp_path / "a.json").write_text(json.dumps(dict(zip(("sizes", "checkpoint", "scratch"), text, strict=True))))
    assert score.parse_file(tmp_path / "a.csv") == text
    (tmp_path / "mac.csv").write_bytes((tmp_path / "a.csv").read_bytes().replace(b"\n", b"\r"))
    assert score.parse_file(tmp_path / "mac.csv") == text
    assert score.parse_file(tmp_path / "a.json") == text


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (("", "0.5", "0.5"), "no sample sizes"),
        (("10 100", "0.5", "0.5 0.6"), "checkpoint, seed 1: found 1 accuracies for 2"),
        (("10 100", "0.5 0.6\n0.5 0.6", "0.5 0.6"), "found 2 seed"),
        (("10 100", "50 60", "0.5 0.6"), "Divide percentages"),
        (("10 100", "0.5 nan", "0.5 0.6"), "finite"),
        (("10 x", "0.5 0.5", "0.5 0.6"), "found 'x'"),
        (("10.5 100", "0.5 0.5", "0.5 0.6"), "whole numbers"),
        (("10 1e300", "0.5 0.5", "0.5 0.6"), "whole numbers"),
        (("100 10", "0.5 0.5", "0.5 0.6"), "increasing"),
        (("10", "0.5", "0.5"), "at least two"),
        (("10 100\n5", "0.5 0.5", "0.5 0.6"), "one line"),
    ],
)
def test_wrong_text(texts, message):
    with pytest.raises(ValueError, match=message):
        score.score(score.parse_text(*texts))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "columns"),
        ("size,checkpoint,scratch\n", "no lines"),
        ("size,checkpoint,scratch\n10,0.5\n", "line 2, scratch: found 'None'"),
        ("size,checkpoint,scratch\n10,0.5,0.4\n10,0.5,0.4\n", "comes twice"),
        ("size,checkpoint,scratch,seed\n10,0.5,0.4,0\n10,0.5,0.4,1\n20,0.5,0.4,1\n", "seed 0 lacks the sizes 20"),
        ("{", "not valid JSON"),
        ("[1]", "holds list"),
        ("{}", "holds nothing"),
        ('{"sizes": 3, "checkpoint": [], "scratch": []}', "needed: a list"),
        ('{"sizes": [1, 2], "checkpoint": [0.1, true], "scratch": [0.1, 0.2]}', "found 'True'"),
        ('{"sizes": [1, 2], "checkpoint": [[0.1, 0.2], 3], "scratch": [0.1, 0.2]}', "needed: a list"),
        ('{"sizes": [1, 2], "checkpoint": [0.1, NaN], "scratch": [0.1, 0.2]}', "finite"),
        ("[" * 100_000, "not valid JSON"),
        ("size," + "x" * 200_000 + "\n", "not valid CSV"),
        ("x" * (2 << 20), "larger than 1 MB"),
    ],
)
def test_wrong_files(content, message, tmp_path):
    (tmp_path / "a").write_text(content)
    with pytest.raises(ValueError, match=message):
        score.parse_file(tmp_path / "a")


@pytest.mark.parametrize(
    ("area", "words_"),
    [
        (Interval(0.1, 0.05, 0.15), "0.100 more accuracy than training from scratch; the interval"),
        (Interval(-0.1, -0.3, 0.1), "0.100 less accuracy than training from scratch; but the interval"),
        (Interval(0.1, float("nan"), float("nan")), "from one seed"),
        (Interval(0.0, -0.1, 0.1), "as much as training from scratch; but"),
    ],
)
def test_the_verdict_claims_no_more_than_the_interval(area, words_):
    assert words_ in words.verdict(area)


def test_changed_files_are_not_shown(folders, tmp_path):
    copy = tmp_path / "protected"
    shutil.copytree(folders.model, copy)
    (copy / "results.json").write_text("{}")
    showcase = open_showcase(replace(folders, model=str(copy)))
    assert showcase.record is None
    assert "results.json" in showcase.problem
    assert showcase.labels == ()


def keys(folder):
    folder.mkdir()
    return make_keys(folder)


def test_a_model_on_the_hub(folders, hub, tmp_path):
    """The commit that was verified is the one that answers; the visitor's key is checked on the download."""
    from hf_ntp import push_folder, sign_folder
    from hf_ntp.publishing.report import refresh_report

    private, public = keys(tmp_path / "owner")
    copy = tmp_path / "protected"
    shutil.copytree(folders.model, copy)
    refresh_report(copy, repo_id="org/model")
    sign_folder(copy, private)
    push_folder(copy, "org/model")
    showcase = open_showcase(replace(folders, model="org/model", revision="main", public_key=str(public)))
    assert (showcase.problem, showcase.signed) == (None, True)
    assert "ntp-good" in page.check_key(showcase, str(public))
    assert set(Classifiers(showcase).load()) == {"unprotected", "protected"}
    missing = open_showcase(replace(folders, model="org/other"))
    assert "404" in missing.problem


def test_signatures(folders, tmp_path):
    from hf_ntp import sign_folder

    (private, public), (_, stranger) = (keys(tmp_path / name) for name in ("owner", "stranger"))
    copy = tmp_path / "protected"
    shutil.copytree(folders.model, copy)
    sign_folder(copy, private)
    unsure = open_showcase(replace(folders, model=str(copy)))
    assert not unsure.signed
    assert "not checked" in page.signature_state(unsure)
    assert "ntp-good" in page.check_key(unsure, str(public))
    refused = page.check_key(unsure, str(stranger))
    assert "ntp-bad" in refused
    assert f"the model: model.sig does not verify with {stranger.name}" in refused
    assert str(tmp_path) not in refused
    sure = open_showcase(replace(folders, model=str(copy), public_key=str(public)))
    assert sure.signed
    assert "ntp-good" in page.signature_state(sure)
    assert list(Classifiers(sure).load()) == ["unprotected", "protected"]
    assert open_showcase(replace(folders, model=str(copy), public_key=str(stranger))).record is None


def test_a_page_without_a_model_still_scores(folders):
    broken = open_showcase(replace(folders, model="/nowhere/x"))
    assert "/nowhere/x" in page.signature_state(broken)
    page.build_page(broken, None)


def test_a_missing_model_is_a_problem_and_no_crash(folders):
    showcase = open_showcase(replace(folders, model="/nowhere/x"))
    assert showcase.problem


def test_the_protected_model_alone(folders):
    classifiers = Classifiers(open_showcase(replace(folders, unprotected=None)))
    assert list(classifiers.load()) == ["protected"]
    answer = classifiers.load()["protected"].predict(Image.new("RGB", (9, 9)))
    assert sum(answer.values()) == pytest.approx(1)


def test_a_record_of_what_python_publishes(folders):
    """Without digests of the original, and without labels on the authorized side."""
    record = open_showcase(folders).record
    (domain,) = record["authorized_domains"]
    html = words.record_words(
        record
        | {"base_model": record["base_model"] | {"weights": None}, "authorized_domains": [domain | {"classes": []}]}
    )
    assert "SHA-256 of the model before protection" not in html
    assert "no labels" in html


def test_curves_on_several_domains_are_named(folders):
    results = open_showcase(folders).results
    assert "<h4>" not in words.curves_tables(results)
    several = results | {
        "other_targets": [results | {"target": {"domain": "scans & co"}}],
        "third": results | {"target": {"domain": "maps"}},
    }
    html = words.curves_tables(several)
    assert html.count("<table") == 3
    assert "scans &amp; co (not authorized)" in html
    assert "maps (neither authorized nor forbidden)" in html


def test_the_model_that_cannot_be_loaded_is_named(folders):
    classifiers = Classifiers(open_showcase(replace(folders, unprotected="nowhere/at")))
    with pytest.raises(
        ValueError, match=r"(?s)the unprotected model, nowhere/at, cannot be loaded: .*NTP_UNPROTECTED"
    ):
        classifiers.load()


def test_damaged_weights_are_a_problem_and_no_crash(folders, tmp_path):
    copy = tmp_path / "unprotected"
    shutil.copytree(folders.unprotected, copy)
    (copy / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    classifiers = Classifiers(open_showcase(replace(folders, unprotected=str(copy))))
    with pytest.raises(ValueError, match=r"(?s)the unprotected model, .* cannot be loaded: .*NTP_UNPROTECTED"):
        classifiers.load()
    warm_up(classifiers)


@pytest.mark.parametrize("classes", [None, ["digit_0", "digit_1"]])
def test_examples_of_a_domain_that_has_the_name_of_an_embedded_one(folders, monkeypatch, classes):
    titles = []
    buttons = page.example_buttons
    monkeypatch.setattr(page, "example_buttons", lambda title, *rest: titles.append(title) or buttons(title, *rest))
    showcase = open_showcase(folders)
    for domain in showcase.record["unauthorized_domains"]:
        domain["classes"] = classes or domain["classes"]
    page.build_page(showcase, Classifiers(showcase))
    assert any("Not authorized" in title for title in titles) == (classes is None)


def test_values_from_a_record_are_text(folders):
    html = words.record_words(open_showcase(folders).record)
    assert "&lt;img src=" in html
    assert "<img" not in html


def test_the_page_starts_from_the_command_line_with_a_readable_error(tmp_path):
    environment = {**os.environ, "NTP_REVISION": "v1"}
    done = subprocess.run([sys.executable, SPACE / "app.py"], env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: NTP_REVISION is set without NTP_MODEL")


def test_the_front_matter_fits_the_requirements():
    import gradio
    import yaml

    front = yaml.safe_load((SPACE / "README.md").read_text().split("---")[1])
    assert front["sdk"] == "gradio"
    assert front["sdk_version"] == gradio.__version__
    assert (SPACE / front["app_file"]).is_file()
    assert (Path(__file__).parents[2] / "constraints.txt").read_text().count(f"gradio=={gradio.__version__}") == 1
