"""SLC-AUC: area between sample-wise learning curves, as an `evaluate` metric."""

import datasets
import evaluate

from hf_ntp.functional import confidence_interval
from hf_ntp.functional import slc_auc as area_between_curves

_DESCRIPTION = """
SLC-AUC measures what a pretrained checkpoint is worth to somebody who fine-tunes it on a domain: the area between the
sample-wise learning curve of the checkpoint and that of training from scratch, over the logarithm of the number of
labelled samples. Positive: the checkpoint helps. Zero: it is worth as much as random initialisation. Negative: worse.
"""

_CITATION = """
@inproceedings{ntp2024,
  title = {Non-transferable Pruning},
  booktitle = {European Conference on Computer Vision (ECCV)},
  year = {2024},
  note = {arXiv:2410.08015}
}
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions: Accuracies in [0, 1] after fine-tuning the checkpoint: one list per seed, one value per sample size.
    references: Accuracies of training from scratch, same seeds, same sizes, same protocol.
    sample_sizes: Numbers of labelled samples, strictly increasing.
    confidence: Level of the two-sided interval over seeds (Student's t); default 0.95.

Returns:
    nats: Mean area over seeds, integrated over the natural logarithm (the unit of the NTP paper's notebooks).
    decades: The same over the decimal logarithm.
    normalized: Mean accuracy gap, in [-1, 1]; the only unit that compares across ranges of sample sizes.
    ci_low, ci_high: Interval of the normalized area; NaN with a single seed.

Raises:
    ValueError: If the grids differ, sizes are not increasing or accuracies are not in [0, 1].

Examples:
    >>> import evaluate
    >>> from hf_ntp.metrics import SLC_AUC
    >>> metric = evaluate.load(SLC_AUC)
    >>> result = metric.compute(
    ...     predictions=[[0.5, 0.7, 0.9], [0.5, 0.7, 0.9]],
    ...     references=[[0.3, 0.6, 0.9], [0.3, 0.6, 0.9]],
    ...     sample_sizes=[10, 100, 1000],
    ... )
    >>> {name: round(value, 4) for name, value in result.items()}
    {'nats': 0.4605, 'decades': 0.2, 'normalized': 0.1, 'ci_low': 0.1, 'ci_high': 0.1}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class SLCAUC(evaluate.Metric):
    """Area between the learning curves of a checkpoint and of scratch training."""

    def _info(self) -> evaluate.MetricInfo:
        curve = datasets.Sequence(datasets.Value("float64"))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"predictions": curve, "references": curve}),
            reference_urls=["https://arxiv.org/abs/2410.08015"],
        )

    def _compute(
        self,
        predictions: list[list[float]],
        references: list[list[float]],
        sample_sizes: list[int],
        confidence: float = 0.95,
    ) -> dict[str, float]:
        areas = area_between_curves(predictions, references, sample_sizes)
        interval = confidence_interval(areas.normalized, confidence)
        means = {unit: float(values.mean()) for unit, values in areas._asdict().items()}
        return {**means, "ci_low": interval.low, "ci_high": interval.high}
