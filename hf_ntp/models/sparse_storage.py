"""Saved models without their zeros: an opt-in storage format that `from_pretrained` loads where hf_ntp is imported.

:func:`compress_folder` makes such a folder. Plain `from_pretrained` calls load it, on the Hub as well, once hf_ntp is
imported in the process: the format is registered with `transformers` as a quantization method. What is loaded is an
ordinary dense model.

**Without hf_ntp the folder must not load.** `transformers` only warns about a quantization method it does not know,
looks for weights under the usual names, and leaves random what it does not find in them. So the weights lie in a file
that it never looks for (:data:`SPARSE_FILE`), and no other weights lie beside it: without hf_ntp `from_pretrained`
raises ``OSError``. ``config.json`` does not name the file (``transformers_weights`` would work without hf_ntp); only
the registered class knows it. Even renamed to a usual name the file does not load: packed tensors do not have the
model's sizes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..run_folder import whole_folder
from .bitmask import read_bitmask_file, write_bitmask_file

SPARSE_FILE = "ntp_bitmask.safetensors"
"""Name of the file with the weights; neither a default name nor a default name with a variant."""
QUANT_METHOD = "ntp-bitmask"
_FORMAT_VERSION = 1
# What a plain from_pretrained might pick up; a copy beside the packed weights would load without hf_ntp.
_OTHER_WEIGHTS = ("pytorch_model*", "model.*.safetensors*", "tf_model*", "flax_model*", "adapter_*")


def compress_folder(folder: str | Path, out: str | Path) -> Path:
    """Write a copy of a saved model that stores its weights without their zeros, bit for bit.

    With 95 % zeros in float32 the weights take about 8 % of their size. All other files are copied as they are; a
    record or signature over the old folder does not fit the new one (``hf-ntp compress`` writes the record anew). The
    weights are held in memory once. -0.0 is a number like any other and costs its full width.

    Args:
        folder: What ``save_pretrained`` wrote; one safetensors file or several.
        out: Folder to make. Its weights are one file, however many there were.

    Returns:
        ``out`` as a path.

    Raises:
        FileNotFoundError: If ``folder`` holds no configuration or no safetensors weights.
        ValueError: If ``out`` is taken or inside ``folder``, ``folder`` is quantized or holds other weights as well,
            or no weight has enough zeros.
    """
    out = free_folder(folder, out)
    with whole_folder(out) as staged:
        compress_into(folder, staged)
    return out


def compress_into(folder: str | Path, out: Path) -> None:
    """Do what :func:`compress_folder` does, to fill an empty folder that has no name yet."""
    folder = Path(folder)
    config = _read_config(folder)
    if method := config.get("quantization_config"):
        raise ValueError(f"{folder} is quantized already ({method}); needed: a model saved with plain weights.")
    if other := config.get("transformers_weights"):
        raise ValueError(
            f"{CONFIG_NAME} of {folder} names {other!r} as the weights; needed: those under the usual names, which "
            "are compressed. Load the model and save it anew."
        )
    if others := sorted({path.name for pattern in _OTHER_WEIGHTS for path in folder.glob(pattern)}):
        raise ValueError(
            f"{folder} holds {others} besides {SAFE_WEIGHTS_NAME}; needed: no other weights, which would load in "
            "place of the compressed ones. Save the model anew, or remove them."
        )
    shards = _shards(folder)
    tensors: dict[str, Tensor] = {}
    for shard in shards:
        tensors |= load_file(shard)
    config["quantization_config"] = BitmaskConfig().to_dict()
    _copy_others(folder, out, {SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, *(shard.name for shard in shards)})
    _write_config(out, config)
    if not write_bitmask_file(tensors, out / SPARSE_FILE):
        raise ValueError(
            f"no weight of {folder} is smaller without its zeros; needed: a pruned model. Keep it as it is."
        )


def expand_folder(folder: str | Path, out: str | Path) -> Path:
    """Undo :func:`compress_folder`: write a copy with ordinary weights, bit for bit, that loads without hf_ntp.

    A record beside the weights does not fit the copy (``hf-ntp expand`` writes it anew).

    Args:
        folder: What :func:`compress_folder` wrote.
        out: Folder to make.

    Returns:
        ``out`` as a path.

    Raises:
        FileNotFoundError: If ``folder`` holds no configuration or no compressed weights.
        ValueError: If ``out`` is taken or inside ``folder``, or the weights are damaged.
    """
    out = free_folder(folder, out)
    with whole_folder(out) as staged:
        expand_into(folder, staged)
    return out


def expand_into(folder: str | Path, out: Path) -> None:
    """Do what :func:`expand_folder` does, to fill an empty folder that has no name yet."""
    folder = Path(folder)
    config = _read_config(folder)
    storage = config.pop("quantization_config", None)
    if not isinstance(storage, dict) or storage.get("quant_method") != QUANT_METHOD:
        raise ValueError(f"{folder} is no compressed model; needed: a folder that compress_folder wrote.")
    tensors = read_bitmask_file(folder / SPARSE_FILE)
    _copy_others(folder, out, {SPARSE_FILE})
    _write_config(out, config)
    _write_dense(tensors, out)


@register_quantization_config(QUANT_METHOD)
class BitmaskConfig(QuantizationConfigMixin):
    """What ``config.json`` of a compressed model says about its weights.

    Args:
        format_version: Of the folder.
        options: Ignored; a later release may write more.

    Raises:
        ValueError: For a version that this release does not know.
    """

    dequantize = True
    """Tells `transformers` to drop every trace of quantization after loading (a class attribute: never saved)."""

    def __init__(self, format_version: int = _FORMAT_VERSION, **options: Any) -> None:
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]  # an enumeration there, but any string works
        self.format_version = format_version
        if format_version != _FORMAT_VERSION:
            raise ValueError(
                f"the weights are stored in {QUANT_METHOD} version {format_version!r}; needed: {_FORMAT_VERSION}. "
                "Upgrade hf_ntp."
            )


@register_quantizer(QUANT_METHOD)
class BitmaskQuantizer(HfQuantizer):
    """Lets `from_pretrained` read a compressed folder.

    Before the weights are loaded they are written to a temporary dense file, and `transformers` is given that one: so
    key renaming, dtypes, device maps and missing heads work as for any other checkpoint. The file is gone when
    `from_pretrained` returns. It takes the dense size in the temporary folder (``TMPDIR``).
    """

    requires_calibration = False

    def __init__(self, quantization_config: BitmaskConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._dense: TemporaryDirectory[str] | None = None

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Raise ``ValueError`` if someone asks to compress while loading."""
        if not self.pre_quantized:
            raise ValueError(
                f"{QUANT_METHOD} was asked for a model with plain weights; needed: a folder that compress_folder "
                "wrote. Load the model without quantization_config."
            )

    def update_attn_implementation(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """Say where the weights are: the one hook that sees the configuration before the files are looked for."""
        config.transformers_weights = SPARSE_FILE
        return config

    update_tp_plan = update_attn_implementation
    """The same hook in older releases of `transformers` (5.10)."""

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        # Not .get(): a release that does not name the files must fail here, not load packed weights as they are.
        files: list[str] | None = kwargs["checkpoint_files"]
        if files:  # none if the caller passes a state_dict
            (path,) = files
            self._dense = TemporaryDirectory(prefix="hf_ntp-", ignore_cleanup_errors=True)
            with torch.device("cpu"):  # the model around us is being built on the meta device
                dense = _write_dense(read_bitmask_file(Path(path)), Path(self._dense.name))
            files[:] = [str(dense)]  # in place: this is the list that the weights are loaded from
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        if self._dense is not None:
            self._dense.cleanup()
        del model.config.transformers_weights
        if "disk" in (getattr(model, "hf_device_map", None) or {}).values():
            raise ValueError(
                "device_map leaves weights on disk; needed: all of them in memory, for compressed weights have no "
                "file to be read from later. Write an ordinary folder with hf_ntp.expand_folder and load that."
            )
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Whether the loaded model can be saved: it is dense."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether the loaded model can be trained: it is dense."""
        return True


def free_folder(folder: Path | str, out: Path | str) -> Path:
    """Return ``out`` as a path.

    Raises:
        ValueError: If it is taken, or inside ``folder``.
    """
    folder, out = Path(folder), Path(out).absolute()
    if Path.cwd().is_relative_to(out):
        raise ValueError(f"out is {out}, which holds the working directory; needed: a new folder, or one inside it.")
    if out.resolve().is_relative_to(folder.resolve()) or (out.exists() and (out.is_file() or any(out.iterdir()))):
        raise ValueError(f"out is {out}, taken or inside {folder}; needed: a new or empty folder elsewhere.")
    return out


def _read_config(folder: Path) -> dict[str, Any]:
    if not (folder / CONFIG_NAME).is_file():
        raise FileNotFoundError(f"{folder} holds no {CONFIG_NAME}; needed: a folder that save_pretrained wrote.")
    return _read_object(folder / CONFIG_NAME)


def _read_object(path: Path) -> dict[str, Any]:
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}; needed: the file as save_pretrained wrote it.")
    return content


def _write_config(folder: Path, config: dict[str, Any]) -> None:
    # As transformers writes it, so that there and back again is the same file.
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (folder / CONFIG_NAME).write_text(text, encoding="utf-8")


def _shards(folder: Path) -> list[Path]:
    """Files with the weights, as `transformers` looks for them."""
    if (folder / SAFE_WEIGHTS_NAME).is_file():
        return [folder / SAFE_WEIGHTS_NAME]
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if not index.is_file():
        raise FileNotFoundError(
            f"{folder} holds neither {SAFE_WEIGHTS_NAME} nor {SAFE_WEIGHTS_INDEX_NAME}; needed: a model saved with "
            "save_pretrained. Load older formats once and save them anew."
        )
    places = _read_object(index).get("weight_map")
    if not isinstance(places, dict):
        raise ValueError(f"{index} has no weight_map; needed: the file as save_pretrained wrote it.")
    return [folder / Path(name).name for name in sorted(set(map(str, places.values())))]


def _copy_others(folder: Path, out: Path, leave: Collection[str]) -> None:
    def left(parent: str, names: list[str]) -> set[str]:
        return {name for name in names if name in leave} if Path(parent) == folder else set()

    shutil.copytree(folder, out, ignore=left, dirs_exist_ok=True)


def _write_dense(tensors: dict[str, Tensor], folder: Path) -> Path:
    path = folder / SAFE_WEIGHTS_NAME
    save_file(tensors, path, metadata={"format": "pt"})
    return path
