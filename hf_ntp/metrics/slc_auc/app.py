"""Metric Space: paste two learning curves, read their SLC-AUC."""

from pathlib import Path

import evaluate


def parse(text: str) -> list[list[float]]:
    """Read one row of numbers per line, separated by commas or spaces."""
    rows = [[float(word) for word in line.replace(",", " ").split()] for line in text.strip().splitlines()]
    if not rows or not all(rows):
        raise ValueError("found an empty line; needed: one row of accuracies per seed, such as 0.31 0.52 0.80")
    return rows


def score(transfer: str, scratch: str, sizes: str) -> dict[str, float]:
    """Compute SLC-AUC of curves typed as text: one line per seed, one number per sample size."""
    # The script, not its folder: evaluate takes a folder for a script of the folder's name, and Spaces lie in "app".
    metric = evaluate.load(str(Path(__file__).with_name("slc_auc.py")))
    numbers = parse(sizes)[0]
    if not all(number.is_integer() for number in numbers):
        raise ValueError(f"found sample sizes {sizes.strip()!r}; needed: whole numbers, such as 10 100 1000")
    return metric.compute(
        predictions=parse(transfer), references=parse(scratch), sample_sizes=[int(number) for number in numbers]
    )


def main() -> None:
    """Start the page."""
    import gradio

    def answer(transfer: str, scratch: str, sizes: str) -> dict[str, float]:
        try:
            return score(transfer, scratch, sizes)
        except ValueError as error:
            raise gradio.Error(str(error)) from error

    gradio.Interface(
        answer,
        [
            gradio.Textbox("0.5 0.7 0.9\n0.4 0.7 0.9", lines=4, label="Accuracies of the checkpoint, a line per seed"),
            gradio.Textbox("0.3 0.6 0.9\n0.3 0.6 0.9", lines=4, label="Accuracies from scratch, same seeds and sizes"),
            gradio.Textbox("10 100 1000", label="Sample sizes"),
        ],
        gradio.JSON(label="SLC-AUC"),
        title="SLC-AUC: what is a checkpoint worth to somebody who fine-tunes it?",
    ).launch()


if __name__ == "__main__":
    main()
