"""Protect a self-supervised encoder: no head, and no labels of the authorized domain but to measure what is left.

The embedded demo pretrains a small encoder by masked autoencoding or contrastive learning, with the settings of
ntp_ssl.yaml:

    accelerate launch recipes/ntp_ssl.py --pretraining mae
    accelerate launch recipes/ntp_ssl.py --pretraining simclr

Your own encoder (DINOv2, DINOv3, ViTMAE, I-JEPA, ...) as it is, from the Hub or a folder:

    accelerate launch recipes/ntp_ssl.py --model_name_or_path facebook/dinov2-small --source_dataset ORG/AUTHORIZED \
        --target_dataset ORG/UNAUTHORIZED --output_dir runs/mine

What the encoder is to its owner is kept by staying close to the original's features on authorized images, and measured
before and after by a linear probe and nearest neighbours there; a masked autoencoder may keep its own loss instead
(--source_loss reconstruction). All else is as in recipes/ntp_vit.py, which can also fine-tune such an encoder on
labelled authorized images first and protect the classifier, as in the NTP paper.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_ntp.recipes import common
from hf_ntp.recipes.common import SMALL_SIZE, BaseModel, given_model, small_processor

if TYPE_CHECKING:
    from hf_ntp import NTPConfig


@dataclass
class SSLArguments(common.RecipeArguments):
    """Model, data and evaluation."""

    config: str = str(Path(__file__).with_suffix(".yaml"))
    pretraining: str = field(
        default="mae",
        metadata={"help": "How the small encoder learns the source's images.", "choices": ["mae", "simclr"]},
    )


def parse(argv: list[str]) -> tuple[SSLArguments, NTPConfig]:
    """Read YAML defaults and command-line options; unknown keys in either are errors."""
    return common.parse(argv, SSLArguments, __doc__)


def base_model(recipe: SSLArguments, config: NTPConfig, labels: list[str]) -> BaseModel:
    """Load the encoder to protect as it is, or make a small one that has to learn the source's images."""
    from hf_ntp.models import load_model
    from hf_ntp.training.self_supervised import small_encoder

    if recipe.model_name_or_path is None:
        encoder = small_encoder(recipe.pretraining, SMALL_SIZE, recipe.pretrain_seed)
        return BaseModel(encoder, small_processor(), recipe.pretrain_learning_rate or 1e-3)
    name, revision = recipe.model_name_or_path, recipe.model_revision
    return given_model(recipe, load_model(name, config.head_name, config.encoder_name, revision=revision))


def main(argv: list[str]) -> dict[str, Any]:
    """Run the recipe and return the content of ``results.json`` (on the first process; {} on the others)."""
    recipe, config = parse(argv)
    from hf_ntp.training.self_supervised import pretrain

    return common.run(recipe, config, base_model, partial(pretrain, recipe.pretraining))


if __name__ == "__main__":
    common.run_script(main)
