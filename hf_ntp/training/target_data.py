"""What stands for the unauthorized domains in training, depending on what is known of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch.utils.data import Dataset
from transformers import BaseImageProcessor

from ..data import Neighbourhood
from .paired_data import ImageData, as_pixels, check_images

NEIGHBOURHOOD = "neighbourhood"


def target_domains(
    data: ImageData | Mapping[str, ImageData] | None,
    source: Dataset,
    access: str,
    as_labelled: Callable[[Dataset], Dataset],
    image_processor: BaseImageProcessor | None,
    source_classes: bool,
    seed: int,
) -> dict[str, Dataset]:
    """Labelled images by name of the unauthorized domain.

    Args:
        data: What the user passed as ``target_dataset``.
        source: Authorized images.
        access: ``target_access``.
        as_labelled: Gives images pseudo-classes, see :func:`~hf_ntp.training.pseudo_labels.with_clusters`.
        image_processor: Image processor (PIL backend), for datasets of images.
        source_classes: Whether the authorized images have classes, which their neighbourhood then has, too.
        seed: Seed of the run.

    Raises:
        ValueError: If there are data with "none", or none otherwise.
    """
    if (data is None) != (access == "none"):
        found = "None" if data is None else type(data).__name__
        raise ValueError(
            f"target_dataset is {found} and target_access is {access!r}; needed: unauthorized images with 'labelled' "
            "or 'unlabelled', and None with 'none'. A public stand-in set counts as images: pass it with either."
        )
    if data is None:
        base = source if source_classes else as_labelled(source)
        return {NEIGHBOURHOOD: Neighbourhood(base, seed)}
    domains = data if isinstance(data, Mapping) else {"target": data}
    if access == "labelled":
        return {name: as_pixels(part, image_processor, f"target {name!r}") for name, part in domains.items()}
    images = {name: as_pixels(part, image_processor, f"target {name!r}", False) for name, part in domains.items()}
    for name, part in images.items():
        check_images(part, f"target {name!r}")
    return {name: as_labelled(part) for name, part in images.items()}
