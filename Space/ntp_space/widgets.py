"""Two small elements of the page: paper to draw on, and example images as buttons.

Gradio's own sketchpad and gallery need a graphics card's help, many clicks or much space; these are a few lines each,
work with one finger, and with the keyboard where that makes sense.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape

import gradio as gr
from PIL import Image

from .images import PAPER_SIDE, Example, enlarged

# Ink is drawn on white paper in both colour schemes: what the models get does not depend on the scheme.
_DRAW = """
const paper = element.querySelector("canvas"), pen = paper.getContext("2d");
let last = null;
const wipe = () => { pen.fillStyle = "white"; pen.fillRect(0, 0, paper.width, paper.height); };
const at = (event) => {
  const box = paper.getBoundingClientRect();
  return [(event.clientX - box.left) * paper.width / box.width, (event.clientY - box.top) * paper.height / box.height];
};
const stroke = (event) => {
  const point = at(event);
  pen.lineWidth = 20; pen.lineCap = pen.lineJoin = "round"; pen.strokeStyle = "black";
  pen.beginPath(); pen.moveTo(...(last || point)); pen.lineTo(...point); pen.stroke();
  last = point;
};
const finish = () => {
  if (last === null) return;
  last = null;
  trigger("input", { drawing: paper.toDataURL("image/png") });
};
wipe();
paper.addEventListener("pointerdown", (event) => { paper.setPointerCapture(event.pointerId); stroke(event); });
paper.addEventListener("pointermove", (event) => { if (last !== null) stroke(event); });
paper.addEventListener("pointerup", finish);
paper.addEventListener("pointercancel", finish);
document.addEventListener("ntp-picked", wipe);
element.querySelector("button").addEventListener("click", () => { wipe(); trigger("input", { drawing: null }); });
element.dataset.ready = "";
"""

_PICK = """
element.addEventListener("click", (event) => {
  const button = event.target.closest("button[data-index]");
  if (!button) return;
  // An old drawing beside the answers for an example would mislead.
  document.dispatchEvent(new Event("ntp-picked"));
  trigger("select", { index: Number(button.dataset.index) });
  // On a phone the answers are above the examples, out of sight.
  document.getElementById("message").scrollIntoView({ block: "nearest" });
});
element.dataset.ready = "";
"""


def sketch_paper() -> gr.HTML:
    """Paper that triggers "input" with a PNG data URL as "drawing" after each stroke, and with null when cleared."""
    return gr.HTML(
        f'<div class="ntp-paper"><div class="ntp-label">Draw a digit</div><canvas width="{PAPER_SIDE}" '
        f'height="{PAPER_SIDE}" role="img" aria-label="Paper to draw a digit on, with mouse, pen or finger"></canvas>'
        '<button type="button">Clear</button></div>',
        js_on_load=_DRAW,
        elem_id="sketch",
    )


def example_buttons(title: str, examples: Sequence[Example], elem_id: str) -> gr.HTML:
    """Images as buttons; triggers "select" with the "index" of the one that was chosen."""
    buttons = "".join(
        f'<button type="button" data-index="{index}" aria-label="{escape(title)}: {escape(example.label)}">'
        f'<img alt="" src="{_data_url(example)}"><span>{escape(example.label)}</span></button>'
        for index, example in enumerate(examples)
    )
    return gr.HTML(
        f'<div class="ntp-examples"><div class="ntp-label">{escape(title)}</div><div>{buttons}</div></div>',
        js_on_load=_PICK,
        elem_id=elem_id,
    )


def _data_url(example: Example) -> str:
    buffer = io.BytesIO()
    with Image.open(example.path) as image:
        enlarged(image).save(buffer, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
