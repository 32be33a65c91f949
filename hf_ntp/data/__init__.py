"""Domains: loading, splitting, checking, and pixels as a model takes them."""

from __future__ import annotations

from .augmentation import RandomShift, RandomView
from .columns import (
    MOST_CLASSES,
    Content,
    check_labels,
    check_target,
    dataset_fingerprint,
    find_columns,
    has_labels,
    shared_images,
)
from .digits import mnist, optdigits
from .domains import EMBEDDED_DOMAINS, load_domain
from .images import PixelDataset, check_pixels, to_rgb
from .neighbourhood import Neighbourhood
from .reference import DomainReference, domain_name
from .rows import PixelValues, contents_of, fetch_rows, fingerprint_of
from .splits import nested_subsets, split_owner_attacker, stratified_pieces
from .synthetic import mnistm, syn

__all__ = [
    "EMBEDDED_DOMAINS",
    "MOST_CLASSES",
    "Content",
    "DomainReference",
    "Neighbourhood",
    "PixelDataset",
    "PixelValues",
    "RandomShift",
    "RandomView",
    "check_labels",
    "check_pixels",
    "check_target",
    "contents_of",
    "dataset_fingerprint",
    "domain_name",
    "fetch_rows",
    "find_columns",
    "fingerprint_of",
    "has_labels",
    "load_domain",
    "mnist",
    "mnistm",
    "nested_subsets",
    "optdigits",
    "shared_images",
    "split_owner_attacker",
    "stratified_pieces",
    "syn",
    "to_rgb",
]
