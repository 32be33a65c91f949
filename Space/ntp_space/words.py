"""Evidence and record as HTML.

Everything in a record may come from a stranger's repository: each value is escaped, and none becomes a link or an
image, so that opening the page asks nobody else's server for anything.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from statistics import fmean
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure
from PIL import Image

from hf_ntp.publishing.card import ARM_LABELS, MEASURES, attack_label
from hf_ntp.publishing.evidence import measured_targets
from hf_ntp.publishing.wording import interval, percent

from .score import UNITS

if TYPE_CHECKING:
    from hf_ntp.functional import Interval

ARMS = {"scratch": "training from scratch", **ARM_LABELS}
# What stands where there is no interval, or no share.
ONE_SEED = "one seed"
NOTHING_RETAINED = "no transfer to retain"


def note(text: str, kind: str = "info") -> str:
    """A boxed line; kind is info, good, warning or bad."""
    # Live regions are read out when their content changes.
    return f'<div class="ntp-note ntp-{kind}" role="status">{escape(text)}</div>'


def table(head: Sequence[str], rows: Iterable[Sequence[str]], numbers_from: int = 1) -> str:
    """An HTML table that scrolls by itself on narrow screens.

    Args:
        head: Column names.
        rows: Cells; the first of each row is its name.
        numbers_from: First column to align right.
    """

    def cell(tag: str, index: int, text: str, extra: str = "") -> str:
        align = ' class="ntp-number"' if index >= numbers_from else ""
        return f"<{tag}{extra}{align}>{escape(text)}</{tag}>"

    top = "".join(cell("th", index, text, ' scope="col"') for index, text in enumerate(head))
    body = "".join(
        "<tr>"
        + "".join(
            cell("td" if index else "th", index, text, "" if index else ' scope="row"')
            for index, text in enumerate(row)
        )
        + "</tr>"
        for row in rows
    )
    # Focusable, or the keyboard could not scroll it.
    return (
        f'<div class="ntp-scroll" tabindex="0" role="region" aria-label="{escape(head[0])}"><table class="ntp-table">'
        f"<thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def picture(image: Figure | Image.Image | bytes, alt: str, css: str = "ntp-picture") -> str:
    """A figure, an image, or the bytes of a PNG, inside the page."""
    buffer = io.BytesIO()
    if isinstance(image, Figure):
        image.savefig(buffer, format="png")
    elif isinstance(image, Image.Image):
        image.save(buffer, format="PNG")
    else:
        buffer.write(image)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img class="{css}" alt="{escape(alt)}" src="data:image/png;base64,{data}">'


def curves_tables(results: Mapping[str, Any]) -> str:
    """A table for every domain that a ``results.json`` has learning curves on."""
    found = [("not authorized", part) for part in measured_targets(results)]
    found += [("neither authorized nor forbidden", results["third"])] if "third" in results else []
    parts = []
    for status, part in found:
        if len(found) > 1:
            parts.append(f"<h4>{escape(part['target']['domain'])} ({status})</h4>")
        parts.append(_curves_table(part))
    return "".join(parts)


def _curves_table(results: Mapping[str, Any]) -> str:
    """SLC-AUC and mean accuracies of every start on one domain."""
    slc, areas = results["slc"], results["slc_auc"]
    head = ["start", *(f"n = {size:,}" for size in slc["sample_sizes"]), *UNITS, "95 % interval (normalized)"]
    rows = []
    for arm, accuracies in slc["curves"].items():
        means = [f"{fmean(column):.3f}" for column in zip(*accuracies, strict=True)]
        area = areas.get(arm)
        scores = [f"{area[unit]:+.3f}" for unit in UNITS] if area else [""] * len(UNITS)
        bounds = interval(area["ci"]["normalized"], ONE_SEED) if area else ""
        rows.append([ARMS.get(arm, arm), *means, *scores, bounds])
    return table(head, rows)


def attacks_table(measurement: Mapping[str, Any]) -> str:
    """What every attack of one measurement of a record got, the strongest first."""
    attacks = measurement["attacks"]
    rows = []
    for name in sorted(attacks, key=lambda name: -attacks[name]["protected"]["normalized"]):
        entry = attacks[name]
        before, after = entry["unprotected"], entry["protected"]
        rows.append(
            [
                attack_label(name),
                f"{before['normalized']:+.3f}" if before else "not measured",
                f"{after['normalized']:+.3f}",
                interval(after["ci"]["normalized"], ONE_SEED),
                percent(entry["retained_transfer"], NOTHING_RETAINED),
            ]
        )
    worst = measurement["worst_case"]
    label = f"worst case: {attack_label(worst['attack'])}"
    rows.append([label, "", f"{worst['slc_auc']:+.3f}", "", percent(worst["retained_transfer"], NOTHING_RETAINED)])
    return table(["attack", "unprotected", "protected", "95 % interval", "retained"], rows)


def evidence(record: Mapping[str, Any]) -> str:
    """The attacks of a record, with the protocol in words."""
    if not record["evidence"]:
        return note("The record holds no evidence: nobody measured what attackers get out of this model.", "warning")
    return "".join(_measurement(measurement) for measurement in record["evidence"])


def _measurement(measurement: Mapping[str, Any]) -> str:
    sizes = ", ".join(f"{size:,}" for size in measurement["sample_sizes"])
    seeds = len(measurement["seeds"])
    text = (
        f"Each attack starts from the weights of this very model and gets {sizes} labelled images of "
        f"{measurement['domain']}; {seeds} {'seed' if seeds == 1 else 'seeds'} each. SLC-AUC, normalized: the mean "
        "accuracy gap to training from scratch. Above 0 the checkpoint helps the attacker, at or below 0 it is "
        "worthless as a starting point. “Retained” is the share of what the unprotected model was worth."
    )
    scratch = measurement["scratch_convergence"]
    control = (
        f"Control: training from scratch reaches {scratch['accuracy']:.3f} with {scratch['sample_size']:,} images, "
        f"and {scratch['accuracy_3x']:.3f} when trained three times as long ({3 * scratch['steps']:,} steps)."
        if scratch
        else "Whether training from scratch had converged was not checked."
    )
    return (
        f"<h3>Attacks on {escape(measurement['domain'])}</h3><p>{escape(text)}</p>{attacks_table(measurement)}"
        f"<p>{escape(control)}</p>"
    )


def sparsity(record: Mapping[str, Any]) -> str:
    """Share of zeros, whole and per layer, as bars."""
    counted = record["sparsity"]
    bars = "".join(
        _bar(name, layer["zeros"], layer["weights"])
        for name, layer in counted["layers"].items()
        if layer["zeros"] <= layer["weights"]
    )
    return (
        f"<p>{counted['achieved']:.1%} of {counted['prunable_weights']:,} prunable weights are zero (requested: "
        f"{counted['requested']:.1%}); of the weights that get any gradient, {counted['live']:.1%}.</p>"
        f'<div class="ntp-bars" role="list" aria-label="zeros per layer">{bars}</div>'
    )


def _bar(name: str, zeros: int, weights: int) -> str:
    share = zeros / weights
    return (
        f'<div class="ntp-bar" role="listitem"><span class="ntp-name">{escape(name)}</span>'
        f'<span class="ntp-track"><span style="width: {100 * share:.1f}%"></span></span>'
        f'<span class="ntp-share">{share:.1%} of {weights:,}</span></div>'
    )


def record_words(record: Mapping[str, Any]) -> str:
    """The authorization record, as sentences and lists."""
    base, terms, library = record["base_model"], record["terms"], record["library"]
    origin = base["name"] or "a model that is not on the Hub"
    accuracy = record["source_accuracy"]
    kept = (
        f"On {_names(record['authorized_domains'])}, test split of {accuracy['images']:,} images: "
        f"{MEASURES[accuracy['measure']]} {accuracy['before']:.3f} before protection, {accuracy['after']:.3f} after."
        if accuracy
        else "Nobody measured how well the model still works on its authorized domain."
    )
    made = ", ".join(f"{name} {number}" for name, number in record["environment"].items())
    settings = [[key, str(value)] for key, value in record["method"]["settings"].items()]
    return "".join(
        [
            "<h3>Authorized</h3>", *(_domain(domain) for domain in record["authorized_domains"]),
            f"<p>{escape(kept)}</p>",
            "<h3>Not authorized</h3>", *(_domain(domain) for domain in record["unauthorized_domains"]),
            f"<h3>Terms</h3><p><b>Licence: {escape(terms['license'])}.</b> {escape(terms['text'])}</p>",
            "<h3>What is not claimed</h3><ul>", *(f"<li>{escape(text)}</li>" for text in record["not_tested"]),
            "</ul>",
            f"<h3>Where it comes from</h3><p>Made from {escape(origin)}",
            f", revision {escape(base['revision'])}" if base["revision"] else "",
            f", with hf_ntp {escape(library['version'])}{escape(f' ({made})' if made else '')}.</p>",
            _details("Settings of the protection", table(["setting", "value"], settings, numbers_from=2)),
            _details("SHA-256 of every file", _digests(record["files"])),
            _details("SHA-256 of the model before protection", _digests(base["weights"])) if base["weights"] else "",
        ]
    )  # fmt: skip


def summary_line(record: Mapping[str, Any]) -> str:
    """Name the domains in one line."""
    return (
        f"Authorized for {_names(record['authorized_domains'])}. "
        f"Not authorized for {_names(record['unauthorized_domains'])}."
    )


def scores_table(scores: Mapping[str, Interval]) -> str:
    """SLC-AUC in all units, as :func:`~ntp_space.score.score` returns it."""
    rows = [[unit, f"{area.mean:+.4f}", interval((area.low, area.high), ONE_SEED, 4)] for unit, area in scores.items()]
    meanings = "; ".join(f"{unit}: {meaning}" for unit, meaning in UNITS.items())
    return f"{table(['unit', 'SLC-AUC', '95 % interval'], rows)}<p>{escape(meanings)}.</p>"


def verdict(area: Interval) -> str:
    """Say what an SLC-AUC means, no more than its interval allows."""
    value = f"{abs(area.mean):.3f}"
    if area.low > 0 or area.high < 0:
        sure = "the interval over seeds does not reach 0"
    elif area.low <= 0 <= area.high:
        sure = "but the interval over seeds includes 0: more seeds are needed to tell"
    else:
        sure = "from one seed, so the spread is unknown"
    if area.mean == 0:
        return f"Averaged over the sizes, the checkpoint reaches as much as training from scratch; {sure}."
    more = "more" if area.mean > 0 else "less"
    return (
        f"Averaged over the sizes, the checkpoint reaches {value} {more} accuracy than training from scratch; {sure}."
    )


def _names(domains: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join(domain["name"] for domain in domains)


def _domain(domain: Mapping[str, Any]) -> str:
    extra = [f"configuration {domain['config']}" if domain["config"] else "", domain["revision"] or "no revision"]
    classes = domain["classes"]
    shown = ", ".join(classes[:12]) + (f" and {len(classes) - 12} more" if len(classes) > 12 else "")
    named = f"{len(classes)} classes: {shown}" if classes else "no labels"
    text = f"data set {domain['dataset']} ({'; '.join(filter(None, extra))}), {named}."
    fingerprints = _details("SHA-256 of the images and labels", _digests(domain["fingerprint"]))
    return f"<p><b>{escape(domain['name'])}</b>, {escape(text)}</p>{fingerprints}"


def _digests(digests: Mapping[str, str]) -> str:
    items = "".join(
        f'<li>{escape(name)}: <code class="ntp-digest">{escape(digest)}</code></li>'
        for name, digest in digests.items()
    )
    return f"<ul>{items}</ul>"


def _details(title: str, content: str) -> str:
    return f"<details><summary>{escape(title)}</summary>{content}</details>"
