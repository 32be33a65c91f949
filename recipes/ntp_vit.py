"""Protect a vision model: pretrain (or take yours), prune against an unauthorized domain, measure, write the result.

The embedded demo, with the settings of ntp_vit.yaml:

    accelerate launch recipes/ntp_vit.py

Your own model and data, from the Hub or from folders:

    accelerate launch recipes/ntp_vit.py --model_name_or_path ORG/MODEL --source_dataset ORG/AUTHORIZED \
        --target_dataset ORG/UNAUTHORIZED --output_dir runs/mine

Every option of NTPConfig and transformers.TrainingArguments is understood too; --config takes a YAML file of them
(the default one holds the numbers of steps of the demo). The result is OUTPUT_DIR/protected. Running the same command
again continues an interrupted run; SIGTERM or Ctrl-C during protection saves a checkpoint first.

An encoder without a head (ViT, DINOv2, I-JEPA, ...) gets one, where transformers has a classifier of its family, and
is fine-tuned on the source first, as in the NTP paper. With --source_loss features it stays as it is, without a head:
recipes/ntp_ssl.py has defaults for that.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_ntp.recipes import common
from hf_ntp.recipes.common import SMALL_SIZE, BaseModel, given_model, small_processor

if TYPE_CHECKING:
    from hf_ntp import NTPConfig


@dataclass
class ViTArguments(common.RecipeArguments):
    """Model, data and evaluation."""

    config: str = str(Path(__file__).with_suffix(".yaml"))


def parse(argv: list[str]) -> tuple[ViTArguments, NTPConfig]:
    """Read YAML defaults and command-line options; unknown keys in either are errors."""
    return common.parse(argv, ViTArguments, __doc__)


def base_model(recipe: ViTArguments, config: NTPConfig, labels: list[str]) -> BaseModel:
    """Load the model to protect, or make a small ViT, and tell whether it knows the source's classes."""
    import torch
    from transformers import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING, AutoConfig, AutoModelForImageClassification

    from hf_ntp.models import class_names, lacks_head, load_model, readable, replace_head
    from hf_ntp.training.pretraining import small_vit

    rate = recipe.pretrain_learning_rate
    if recipe.model_name_or_path is None:
        return BaseModel(small_vit(labels, SMALL_SIZE, recipe.pretrain_seed), small_processor(), rate or 1e-3)
    name, revision = recipe.model_name_or_path, recipe.model_revision
    if config.source_loss == "features":
        return given_model(recipe, load_model(name, config.head_name, config.encoder_name, revision=revision))
    kind = type(AutoConfig.from_pretrained(name, revision=revision))
    if kind not in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
        raise ValueError(
            f"{name} has a {kind.__name__}, for which transformers has no image classifier; needed: a model that can "
            "have a head, to fine-tune it on the source. Protect the encoder as it is: recipes/ntp_ssl.py with the "
            "same options."
        )
    with readable(name):
        model, loading = AutoModelForImageClassification.from_pretrained(
            name, revision=revision, dtype=torch.float32, output_loading_info=True
        )
    found = [model.config.id2label[i] for i in range(model.config.num_labels)]
    generic = class_names(model.config) is None and len(found) == len(labels)
    headless = lacks_head(model, loading["missing_keys"], config.head_name)
    # In another order or spelling they are still its classes: the labels of the data are brought into its order.
    same = sorted(map(str.lower, found)) == sorted(map(str.lower, labels))
    if not headless and (same or generic):
        return given_model(recipe, model)
    print(
        f"{name} does not classify the source ({len(found)} classes: {', '.join(found[:4])}, ...; the source has "
        f"{len(labels)}: {', '.join(labels[:4])}, ...). It gets a new head and is fine-tuned on the source for "
        f"{recipe.pretrain_steps} steps first."
    )
    replace_head(model, labels, head_name=config.head_name)
    return given_model(recipe, model, rate or 5e-5)


def main(argv: list[str]) -> dict[str, Any]:
    """Run the recipe and return the content of ``results.json`` (on the first process; {} on the others)."""
    recipe, config = parse(argv)
    from hf_ntp.training.pretraining import train_classifier

    return common.run(recipe, config, base_model, train_classifier)


if __name__ == "__main__":
    common.run_script(main)
