"""The page: four tabs over one showcase."""

from __future__ import annotations

import logging
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from . import score, words
from .classifiers import Classifiers
from .images import DIGITS, Example, domain_examples, read_drawing, read_image
from .showcase import Showcase, learning_curves
from .widgets import example_buttons, sketch_paper

logger = logging.getLogger(__name__)

TITLES = {"unprotected": "Before protection", "protected": "Protected"}
WHAT_ONE_SEES = (
    "The protected classifier keeps answering on authorized images. What it says about other images proves nothing: "
    "the protection is about fine-tuning, and the Evidence tab shows what that is worth."
)
QUICK_DEMO = (
    "Quick demo model: trained, protected and attacked in a few minutes to show this page at work. Its numbers "
    "are those of a shortened run and say nothing about the strength of the method."
)
# Several visitors at once, but not more computations than a small machine bears.
_AT_ONCE = 4
_CLASSES_SHOWN = 4

_SIZES = "10 30 100"
_CHECKPOINT = "0.51 0.76 0.88\n0.43 0.72 0.88\n0.44 0.68 0.90"
_SCRATCH = "0.19 0.44 0.81\n0.25 0.50 0.76\n0.23 0.44 0.84"


def build_page(showcase: Showcase, classifiers: Classifiers | None) -> gr.Blocks:
    """Put the page together.

    Args:
        showcase: What to show.
        classifiers: Its models, or None where there is nothing to try.
    """
    with gr.Blocks(title="Protected vision encoder", analytics_enabled=False) as page:
        gr.HTML(_heading(showcase), elem_classes="ntp-words")
        with gr.Tabs():
            with gr.Tab("Try it", id="try"):
                _try_it(showcase, classifiers)
            with gr.Tab("Evidence", id="evidence"):
                gr.HTML(_evidence(showcase), elem_classes="ntp-words", elem_id="evidence")
            with gr.Tab("Verify", id="verify"):
                _verify(showcase)
            with gr.Tab("Score your own", id="score"):
                _score()
    return page.queue(default_concurrency_limit=_AT_ONCE)


def _heading(showcase: Showcase) -> str:
    model = showcase.settings.model
    # Of a folder the last two parts: the rest is nobody's business, and the last alone is often "protected".
    place = "/".join(Path(model).resolve().parts[-2:]) if Path(model).is_dir() else model
    name = "quick demo model" if showcase.settings.demo else place
    lines = [f"<h2>Protected vision encoder: {escape(name)}</h2>"]
    if showcase.record is not None:
        lines.append(f"<p>{escape(words.summary_line(showcase.record))}</p>")
    if showcase.problem is not None:
        lines.append(words.note(f"No model is shown: {showcase.problem}", "bad"))
    elif showcase.settings.demo:
        lines.append(words.note(QUICK_DEMO, "warning"))
    return "".join(lines)


def _try_it(showcase: Showcase, classifiers: Classifiers | None) -> None:
    if classifiers is None:
        why = showcase.problem or "this model is an encoder without a classifier, so it has no predictions to show."
        gr.HTML(words.note(f"Nothing to try: {why}", "warning"))
        return
    gr.HTML(words.note(WHAT_ONE_SEES), elem_classes="ntp-words")
    draws = list(showcase.labels) == DIGITS
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            sketch = sketch_paper() if draws else None
            upload = gr.File(label="Upload an image", file_types=["image"], height=120, elem_id="upload")
        with gr.Column(scale=3, min_width=300):
            start = "Draw, upload or pick an example." if draws else "Upload an image."
            message = gr.HTML(words.note(start), elem_id="message")
            with gr.Row():
                answers = [
                    gr.Label(label=TITLES[name], num_top_classes=_CLASSES_SHOWN, elem_id=name, min_width=140)
                    for name in classifiers.names
                ]
            seen = gr.HTML(elem_id="seen")
    # The same outputs for whatever the image came from; of several strokes in a row the last one counts.
    options: dict[str, Any] = {"outputs": [message, seen, *answers], "show_progress": "hidden"}
    latest = {**options, "api_visibility": "private", "trigger_mode": "always_last"}
    if sketch is not None:
        sketch.input(_on_drawing(classifiers), None, **latest)
    upload.upload(partial(_answer_upload, classifiers), upload, api_name="classify", **options)
    for domain, authorized in _domains(showcase):
        examples = domain_examples(domain["dataset"], showcase.settings.cache)
        # Another domain may have the name of an embedded one; its classes are then its own.
        if examples and {example.label for example in examples} <= set(domain["classes"]):
            word, name = ("Authorized", "authorized") if authorized else ("Not authorized", "unauthorized")
            title = f"{word}: {domain['dataset']}, test images"
            buttons = example_buttons(title, examples, f"examples-{name}")
            buttons.select(_on_example(classifiers, domain["dataset"], authorized, examples), None, **latest)


def _domains(showcase: Showcase) -> list[tuple[dict[str, Any], bool]]:
    record = showcase.record or {"authorized_domains": [], "unauthorized_domains": []}
    parts = ((record["authorized_domains"], True), (record["unauthorized_domains"], False))
    return [(domain, authorized) for domains, authorized in parts for domain in domains]


def _answer(classifiers: Classifiers, image: Image.Image | None, text: str, kind: str = "info") -> list[Any]:
    """Message, picture and the answer of every model; without an image the old answers go."""
    if image is not None:
        try:
            models = classifiers.load()
        except ValueError as error:
            image, text, kind = None, str(error), "bad"
    if image is None:
        return [words.note(text, kind), "", *(None for _ in classifiers.names)]
    seen = words.picture(models["protected"].seen(image), "", "ntp-seen")
    answers = [models[name].predict(image) for name in classifiers.names]
    return [words.note(text, kind), f"<p>What the models get to see</p>{seen}", *answers]


def _on_drawing(classifiers: Classifiers) -> Any:
    """Handler of the paper; Gradio reads the annotation of the event."""

    def answer(event: gr.EventData) -> list[Any]:
        try:
            image = read_drawing(event.drawing)
        except ValueError as error:
            return _answer(classifiers, None, str(error), "bad")
        if image is None:
            return _answer(classifiers, None, "Draw, upload or pick an example.")
        return _answer(classifiers, image, "Your drawing, cut out and centred as MNIST digits are.")

    return answer


def _answer_upload(classifiers: Classifiers, path: str | None) -> list[Any]:
    if path is None:
        return _answer(classifiers, None, "No image was uploaded.", "warning")
    try:
        image = read_image(path)
    except ValueError as error:
        return _answer(classifiers, None, str(error), "bad")
    return _answer(classifiers, image, "Your image, scaled to the size of the model and otherwise as it is.")


def _on_example(classifiers: Classifiers, domain: str, authorized: bool, examples: list[Example]) -> Any:
    """Handler of the examples of one domain."""

    def answer(event: gr.EventData) -> list[Any]:
        example = examples[event.index]
        allowed = "authorized" if authorized else "not authorized"
        text = f"A test image of {domain} ({allowed}), labelled {example.label}."
        return _answer(classifiers, read_image(example.path), text, "good" if authorized else "warning")

    return answer


def _evidence(showcase: Showcase) -> str:
    if showcase.record is None:
        return words.note(f"No evidence: {showcase.problem}", "warning")
    parts = []
    if showcase.results is not None:
        try:
            curves = words.picture(learning_curves(showcase.results), "Learning curves; the table has their numbers")
            parts += ["<h3>Learning curves</h3>", curves, words.curves_tables(showcase.results)]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            logger.warning("results.json cannot be drawn: %r", error)
            parts.append(words.note("results.json holds no learning curves that this page can draw.", "warning"))
    else:
        parts.append(words.note("The model comes without results.json, so there are no curves to draw."))
    parts += [words.evidence(showcase.record), "<h3>Zeros per layer</h3>", words.sparsity(showcase.record)]
    return "".join(parts)


def _verify(showcase: Showcase) -> None:
    if showcase.folder is None:
        gr.HTML(words.note(f"Nothing to verify: {showcase.problem}", "warning"))
        return
    state = gr.HTML(signature_state(showcase), elem_id="state")
    key = gr.File(
        label="Public key of the owner (optional): checks the signature", height=130, elem_id="key"
    )  # fmt: skip
    key.upload(partial(check_key, showcase), key, state, api_name="verify", show_progress="minimal")
    key.clear(partial(signature_state, showcase), None, state, api_visibility="private", show_progress="hidden")
    if showcase.record is not None:
        gr.HTML(words.record_words(showcase.record), elem_classes="ntp-words", elem_id="record")


def signature_state(showcase: Showcase) -> str:
    """Say whether the files are those of the record, and whether the owner signed them."""
    if showcase.problem is not None:
        return words.note(showcase.problem, "bad")
    files = "All files are those the record speaks of"
    if showcase.signed:
        return words.note(f"{files}, and the signature is valid for the owner's public key.", "good")
    return words.note(
        f"{files}. The signature was not checked: without the owner's public key, anybody could have written both. "
        "Get the key from the owner, not from the repository of the model.",
        "warning",
    )


def check_key(showcase: Showcase, path: str | None) -> str:
    """Check the signature with a visitor's key and say how it went."""
    from hf_ntp import verify_folder

    if path is None or showcase.folder is None:
        return signature_state(showcase)
    try:
        verify_folder(showcase.folder, path, links_into=showcase.links_into)
    except (OSError, ValueError) as error:
        # Where the server keeps them is nobody's business, and tells nobody which file is meant.
        text = str(error).replace(path, Path(path).name).replace(str(showcase.folder), "the model")
        return words.note(text, "bad")
    return words.note("All files are those the record speaks of, and the signature is valid for this key.", "good")


def _score() -> None:
    gr.HTML(
        "<p>What is a checkpoint worth to somebody who fine-tunes it? SLC-AUC is the area between its learning curve "
        "and that of training from scratch, over the logarithm of the number of labelled samples. One line per seed, "
        "one accuracy per size; the numbers that stand here are an example.</p>",
        elem_classes="ntp-words",
    )
    with gr.Row():
        with gr.Column(min_width=300):
            sizes = gr.Textbox(_SIZES, label="Sample sizes", max_lines=1, elem_id="sizes")
            checkpoint = gr.Textbox(_CHECKPOINT, label="Accuracies of the checkpoint", lines=3, elem_id="checkpoint")
            scratch = gr.Textbox(_SCRATCH, label="Accuracies from scratch", lines=3, elem_id="scratch")
            button = gr.Button("Score", variant="primary", elem_id="score")
            upload = gr.File(label="or upload CSV or JSON", height=130, elem_id="curves")
            gr.HTML(f"<p>Files: {escape(score.FORMATS)}.</p>", elem_classes="ntp-words")
        with gr.Column(min_width=300):
            answer = gr.HTML(words.note("Press “Score”."), elem_classes="ntp-words", elem_id="scored")
    options: dict[str, Any] = {"outputs": answer, "show_progress": "minimal"}
    button.click(_score_text, [sizes, checkpoint, scratch], api_name="score", **options)
    upload.upload(_score_file, upload, api_name="score_file", **options)


def _score_text(sizes: str, checkpoint: str, scratch: str) -> str:
    return _scored(lambda: score.parse_text(sizes, checkpoint, scratch))


def _score_file(path: str | None) -> str:
    if path is None:
        return words.note(f"No file was uploaded; needed: {score.FORMATS}.", "warning")
    return _scored(lambda: score.parse_file(path))


def _scored(read: Any) -> str:
    try:
        curves = read()
        areas = score.score(curves)
    except ValueError as error:
        return words.note(str(error), "bad")
    alt = "Learning curves of the checkpoint and of training from scratch"
    return "".join(
        [
            words.note(words.verdict(areas["normalized"]), "info"),
            words.scores_table(areas),
            words.picture(score.draw(curves), alt),
        ]
    )
