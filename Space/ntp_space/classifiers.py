"""The models before and after protection, and what they answer.

Loading them takes longer than everything else of the page together, so it happens while the page is already there.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from PIL import Image
from safetensors import SafetensorError

from .images import enlarged
from .showcase import Showcase

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

_SHOWN_SIDE = 160


@dataclass(frozen=True)
class Classifier:
    """A model with the image processor it was saved with."""

    model: PreTrainedModel
    processor: Any
    """An image processor; what it has besides ``__call__`` depends on its kind."""

    def pixels(self, image: Image.Image) -> torch.Tensor:
        """Image as the model takes it, [1, 3, height, width]."""
        return self.processor(images=image.convert("RGB"), return_tensors="pt")["pixel_values"]

    def predict(self, image: Image.Image) -> dict[str, float]:
        """Probability of every class."""
        import torch

        with torch.inference_mode():
            probabilities = self.model(pixel_values=self.pixels(image)).logits[0].float().softmax(-1).tolist()
        names: Any = self.model.config.id2label
        return {str(names[index]): value for index, value in enumerate(probabilities)}

    def seen(self, image: Image.Image) -> Image.Image:
        """What is left of the image when it reaches the model, enlarged with visible pixels."""
        pixels = self.pixels(image)[0].float()
        if getattr(self.processor, "do_normalize", False):
            mean, deviation = (
                pixels.new_tensor(values).reshape(-1, 1, 1)
                for values in (self.processor.image_mean, self.processor.image_std)
            )
            pixels = pixels * deviation + mean
        array = (pixels.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
        return enlarged(Image.fromarray(array), _SHOWN_SIDE)


class Classifiers:
    """The models of a showcase, loaded once, on first use.

    Args:
        showcase: With a model that classifies.
    """

    def __init__(self, showcase: Showcase) -> None:
        self.names = ["protected"] if showcase.settings.unprotected is None else ["unprotected", "protected"]
        self._showcase = showcase
        self._lock = Lock()
        self._loaded: dict[str, Classifier] | None = None

    def load(self) -> dict[str, Classifier]:
        """Return the models by name.

        Raises:
            ValueError: If one cannot be loaded; says which.
        """
        with self._lock:
            if self._loaded is None:
                self._loaded = {name: self._load(name) for name in self.names}
            return self._loaded

    def _load(self, name: str) -> Classifier:
        settings = self._showcase.settings
        variable, given = (
            ("NTP_MODEL", settings.model) if name == "protected" else ("NTP_UNPROTECTED", settings.unprotected)
        )
        try:
            return self._loaded_from(name)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise ValueError(f"the {name} model, {given}, cannot be loaded: {error} Check {variable}.") from error

    def _loaded_from(self, name: str) -> Classifier:
        import torch

        # Visitors are answered side by side; more threads for each would only get in each other's way.
        torch.set_num_threads(1)
        if name == "protected":
            return self._load_protected()
        from transformers import AutoImageProcessor, AutoModelForImageClassification

        name = str(self._showcase.settings.unprotected)
        model = AutoModelForImageClassification.from_pretrained(name, dtype=torch.float32)
        return Classifier(model.eval(), AutoImageProcessor.from_pretrained(name, backend="pil"))

    def _load_protected(self) -> Classifier:
        from hf_ntp import load_protected

        settings, folder = self._showcase.settings, self._showcase.folder
        # Of a download, the commit that was verified: the branch may have moved since.
        commit = None if folder is None or Path(settings.model).is_dir() else folder.name
        model, processor, _ = load_protected(
            settings.model,
            revision=commit,
            verify=True if settings.public_key else "digests",
            public_key=settings.public_key,
        )
        if processor is None:
            raise ValueError(f"{settings.model} comes without an image processor; needed: preprocessor_config.json.")
        return Classifier(model.float().eval(), processor)
