"""What is measured; every function gives JSON-ready figures, and ratios are of things that took turns."""

from __future__ import annotations

import json
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import (
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    Trainer,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)
from transformers.trainer_callback import TrainerCallback

import hf_ntp
from benchmarks.cost import reference
from benchmarks.strength.run import PAPER_ATTACKS, load, source_accuracy
from hf_ntp.data import RandomShift
from hf_ntp.evaluation.summary import summarize
from hf_ntp.functional import trace_ratio, whitened_discriminant
from hf_ntp.models import prunable_weights
from hf_ntp.publishing.from_trainer import write_folder
from hf_ntp.training.arguments import PRESETS
from hf_ntp.training.pretraining import small_resnet, small_vit, train_classifier
from hf_ntp.training.pruning import ADMMPruner

ROOT = Path(__file__).parents[2]
LABELS = [str(digit) for digit in range(10)]
IMAGES = 64
"""Images per step: NTPTrainer takes half of them from the authorized domain, half from the other."""

STEPS, TURNS, GPU_TURNS = 60, 5, 3
BATCHES = (32, 64, 128)
MEMORY_STEPS = 6
RESNET_SCALES = (0.25, 0.5, 1.0)
ADMM_TURNS, FISHER_TURNS = 5, 10
FISHER_IMAGES = 256
CLASSES, WIDTHS = (10, 100, 1000), (128, 512, 2048)
REFERENCE_WIDTH = 512
"""Wider, the whitened reference keeps more matrices for its backward pass than most machines can hold."""
SWEEP_STEPS, GPU_SWEEP_STEPS = 200, 100
PUBLISHED_SPARSITY = 0.95
PRETRAIN_STEPS, PROTECTION_STEPS, ATTACK_STEPS = 1500, 1500, 300


FEED: dict[str, Any] = {"dataloader_num_workers": 6, "dataloader_pin_memory": True}
"""So that a GPU need not wait for images: waiting would hide what else a step costs."""


class RandomImages(Dataset):
    """Images in memory: reading them costs all trainers the same. More rows than a run takes: no epoch ends in it."""

    def __init__(self, image_size: int, rows: int = 8000) -> None:
        self.images = torch.randn(min(2000, 3 * 10**7 // image_size**2), 3, image_size, image_size)
        self.labels = torch.randint(0, len(LABELS), (rows,))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"pixel_values": self.images[index % len(self.images)], "labels": int(self.labels[index])}


@cache
def random_images(image_size: int, which: int) -> RandomImages:
    """Return one of several sets of images, made once."""
    return RandomImages(image_size)


def vit_small() -> ViTForImageClassification:
    """ViT-S on small images: 21 M weights, so that what is held per weight shows, and little else."""
    shape = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536}
    return ViTForImageClassification(ViTConfig(image_size=32, patch_size=8, num_labels=len(LABELS), **shape))


def resnet_50(scale: float = 1.0, num_labels: int = 1000) -> ResNetForImageClassification:
    """ResNet-50 with its widths multiplied by ``scale``: 25.6 M weights at 1."""
    widths = [int(scale * width) for width in (256, 512, 1024, 2048)]
    return ResNetForImageClassification(
        ResNetConfig(embedding_size=int(64 * scale), hidden_sizes=widths, num_labels=num_labels)
    )


SMALL: dict[str, tuple[Callable[[], PreTrainedModel], int]] = {
    "ViT, 0.1 M weights, 16x16": (lambda: small_vit(LABELS), 16),
    "ResNet, 0.08 M weights, 32x32": (lambda: small_resnet(LABELS), 32),
}
VIT_B, RESNET_50 = "ViT-B/16, 224x224", "ResNet-50, 224x224"
LARGE: dict[str, tuple[Callable[[], PreTrainedModel], int]] = {
    VIT_B: (lambda: ViTForImageClassification(ViTConfig(num_labels=len(LABELS))), 224),
    RESNET_50: (lambda: resnet_50(num_labels=len(LABELS)), 224),
}


def options_of(kind: str, model: str) -> dict[str, Any] | None:
    """Options of NTPConfig of a kind of training on a model, or None for plain Trainer."""
    adaptive = "adaptive" if model.startswith("ViT") else "adaptive_convnet"
    return {"plain": None, "published terms": PRESETS["paper"], "default": PRESETS[adaptive]}[kind]


KINDS = ("plain", "published terms", "default")


def make_trainer(
    model: PreTrainedModel, size: int, method: dict[str, Any] | None, steps: int, images: int, folder: str, **more: Any
) -> Trainer:
    """Trainer on ``images`` random images per step, ours or plain."""
    options: dict[str, Any] = {
        "output_dir": folder,
        "max_steps": steps,
        "save_strategy": "no",
        "report_to": "none",
        "logging_steps": 50,
        "disable_tqdm": True,
        "learning_rate": 1e-5,
        "dataloader_pin_memory": False,
        "use_cpu": True,
        **more,
    }
    source, target, held_out = (random_images(size, which) for which in range(3))
    if method is None:
        plain = TrainingArguments(per_device_train_batch_size=images, **options)
        return Trainer(model, plain, train_dataset=source)
    # ADMM all the way: after the mask is fixed, steps are cheaper.
    method = {"pruning_end": 1.0, **method}
    config = hf_ntp.NTPConfig(per_device_train_batch_size=images // 2, **options, **method)
    return hf_ntp.NTPTrainer(model, config, source, target, eval_dataset=held_out)


def finish_what_was_sent() -> None:
    """Wait for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class StepTimes(TrainerCallback):
    """Wall time from the end of one step to the end of the next; the first one is left out."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self._last: float | None = None

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note the time."""
        finish_what_was_sent()
        now = perf_counter()
        if self._last is not None:
            self.times.append(now - self._last)
        self._last = now


def seconds_per_step(name: str, kind: str, steps: int, images: int, **more: Any) -> float:
    """Mean seconds of a step, Z-steps included, after a sixth of the steps to get warm (data workers start, too)."""
    build, size = (SMALL | LARGE)[name]
    watch = StepTimes()
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(build(), size, options_of(kind, name), steps, images, folder, **more)
        trainer.add_callback(watch)
        trainer.train()
    return statistics.mean(watch.times[len(watch.times) // 6 :])


def step() -> dict[str, Any]:
    """Steps of the small models."""
    return step_ratios([(name, images, {}) for name in SMALL for images in BATCHES])


def gpu_step(name: str) -> dict[str, Any]:
    """Steps of a large model on a GPU, in bf16."""
    return step_ratios([(name, IMAGES, {"use_cpu": False, "bf16": True, **FEED})], GPU_TURNS)


def step_ratios(cases: list[tuple[str, int, dict[str, Any]]], count: int = TURNS) -> dict[str, Any]:
    """Time of a step of NTPTrainer over one of plain Trainer on as many images, by model and images per step."""
    found: dict[str, Any] = {}
    for name, images, more in cases:
        turns = [{kind: seconds_per_step(name, kind, STEPS, images, **more) for kind in KINDS} for _ in range(count)]
        for kind in KINDS:
            ratios = [turn[kind] / turn["plain"] for turn in turns]
            method = hf_ntp.NTPConfig(output_dir="none", report_to="none", **options_of(kind, name) or {})
            share = 0 if kind == "plain" else method.attackers * method.attacker_batch_size / images
            found.setdefault(name, {}).setdefault(str(images), {})[kind] = {
                "seconds": statistics.median(turn[kind] for turn in turns),
                "ratio": statistics.median(ratios),
                "lowest": min(ratios),
                "highest": max(ratios),
                "allowance": 1 + share,
            }
    return found


def tensor_bytes(tensors: Any) -> int:
    """Bytes of the distinct tensors of a collection."""
    distinct = {tensor.data_ptr(): tensor for tensor in tensors}
    return sum(tensor.numel() * tensor.element_size() for tensor in distinct.values())


def peak_memory() -> int:
    """Peak memory of this process, in bytes: of the GPU where there is one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")  # getrusage begins with what the parent had
    if status.exists():
        return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def memory_of(kind: str) -> dict[str, int]:
    """Train a ViT-S for a few steps, in a process of its own: peak memory and what is held, in bytes."""
    model = vit_small()
    with tempfile.TemporaryDirectory() as folder:
        method = options_of(kind, "ViT")
        method = None if method is None else {**method, "admm_interval": 2}
        trainer = make_trainer(model, 32, method, MEMORY_STEPS, 16, folder, use_cpu=not torch.cuda.is_available())
        trainer.train()
    held = {"peak": peak_memory(), "prunable": tensor_bytes(prunable_weights(model).values())}
    if isinstance(trainer, hf_ntp.NTPTrainer):
        held["admm"] = tensor_bytes(trainer.pruner.stored.values())
        held["heads"] = tensor_bytes(t for head in trainer.heads.values() for t in head.tensors().values())
        teacher = trainer._guard.original
        held["teacher"] = 0 if teacher is None else tensor_bytes(teacher.state_dict().values())
        pool = trainer._pool
        held["attackers"] = 0 if pool is None else tensor_bytes([*pool.push, *pool.tensors().values()])
    return held


def memory() -> dict[str, Any]:
    """Peak memory of training a ViT-S, and what protection holds, in bytes per byte of prunable weights."""
    return {kind: worker("memory_of", kind) for kind in KINDS}


def worker(function: str, *words: str, processes: int = 1) -> Any:
    """Call a function of this file in new processes and return what the first one returns."""
    command = [sys.executable, "-m", "benchmarks.cost.run", "--worker", function, *words]
    if processes > 1:
        launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        command = [*command[:2], *launcher, *command[1:]]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def side_by_side(turns: int, *calls: Callable[[], Any]) -> list[float]:
    """Least seconds of every call; all take turns."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(turns):
        for seconds, call in zip(times, calls, strict=True):
            finish_what_was_sent()
            start = perf_counter()
            call()
            finish_what_was_sent()
            seconds.append(perf_counter() - start)
    return [min(seconds) for seconds in times]


def admm(device: str = "cpu") -> list[dict[str, Any]]:
    """ADMM on the prunable weights of a growing ResNet-50: Z- and U-step, and the penalty of one optimizer step."""
    found = []
    for scale in RESNET_SCALES:
        weights = prunable_weights(nn.Module.to(resnet_50(scale), device))
        ours, plain = ADMMPruner(weights, 0.9, rho=0.05), reference.ReferenceADMM(weights, 0.05)
        selecting = reference.ReferenceADMM(weights, 0.05, selects=True)
        for weight in weights.values():
            weight.grad = torch.zeros_like(weight)
        ours.update(0.2)
        with torch.no_grad():
            for weight in weights.values():
                weight.add_(0.2 * weight.std() * torch.randn_like(weight))
        calls = (lambda: ours.update(0.5), lambda: plain.update(0.7875), lambda: selecting.update(0.7875))  # noqa: B023
        update = side_by_side(ADMM_TURNS, *calls)
        penalty = side_by_side(ADMM_TURNS, ours.add_penalty_gradient, plain.penalty_step)
        size = sum(weight.numel() for weight in weights.values())
        found.append({"weights": size, "update": update, "penalty": penalty})
    return found


def fisher(device: str = "cpu") -> list[dict[str, Any]]:
    """Both Fisher terms, forth and back on a batch, by number of classes and feature width."""
    found = []
    cases = dict.fromkeys([*((k, REFERENCE_WIDTH) for k in CLASSES), *((CLASSES[-1], d) for d in WIDTHS)])
    for ours in (trace_ratio, whitened_discriminant):
        for classes, width in cases:
            generator = torch.Generator().manual_seed(0)
            features = torch.randn(FISHER_IMAGES, width, generator=generator).to(device)
            labels = torch.randint(0, classes, (FISHER_IMAGES,), generator=generator).to(device)

            def there_and_back(term: Callable[..., Tensor]) -> Callable[[], Any]:
                leaf = features.clone().requires_grad_()  # noqa: B023
                return lambda: torch.autograd.grad(term(leaf, labels, classes, 0.1), leaf)  # noqa: B023

            terms = [ours]
            if ours is trace_ratio or width <= REFERENCE_WIDTH:
                terms.append(getattr(reference, ours.__name__))
            seconds = side_by_side(FISHER_TURNS, *map(there_and_back, terms))
            found.append({"term": ours.__name__, "classes": classes, "width": width, "seconds": seconds})
    return found


def digits(names: tuple[str, ...]) -> list[Any]:
    """Embedded domains at the size of the small ViT."""
    return [load(name, 16) for name in names]


def attack_data() -> hf_ntp.AttackData:
    """What the attacker of the demo has."""
    (target,) = digits(("optdigits",))
    return hf_ntp.AttackData(target.attacker, target.validation, target.test)


def sweep_of(folder: str, fits: str, jobs: str, steps: str, together: str = "1") -> dict[str, float]:
    """Seconds of the demo's sweep, shortened, in this process and whoever shares ``fits`` with it.

    Args:
        folder: With the checkpoints; here all words are those of a command line.
        fits: Name of the cache in it.
        jobs: Fits at a time, in processes of their own.
        steps: Of one fit.
        together: Fits trained as one, at most; "auto" leaves that to the runner.
    """
    # Nearly always as many fits: nothing is extended.
    protocol = hf_ntp.FineTuneProtocol(int(steps), learning_rates=(3e-4, 1e-3, 3e-3), extensions=0)
    data = attack_data()
    arms = hf_ntp.standard_arms(f"{folder}/unprotected", f"{folder}/protected")
    cache = Path(folder) / fits
    (cache / f"{os.getpid()}.there").touch()  # the clock starts when all have imported what they need
    while len(list(cache.glob("*.there"))) % int(os.environ.get("WORLD_SIZE", "1")):
        pass
    start = perf_counter()
    most = None if together == "auto" else int(together)
    curves = hf_ntp.sample_wise_learning_curves(arms, data, [10, 30, 100], (0, 1, 2), protocol, cache, int(jobs), most)
    return {"fits": curves.fits, "seconds": perf_counter() - start}


@contextmanager
def checkpoints() -> Iterator[Path]:
    """Folder with an unprotected small ViT and a pruned one, and room for the fits."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = small_vit(LABELS)
        model.save_pretrained(folder / "unprotected")
        with torch.no_grad():
            for weight in prunable_weights(model).values():
                weight.mul_(torch.rand_like(weight) > 0.6)
        model.save_pretrained(folder / "protected")
        for fits in ("one", "jobs", "processes", "together"):
            (folder / fits).mkdir()
        yield folder


def sweep() -> dict[str, Any]:
    """A sweep in one process, one after another; on 2 jobs; on 2 launched processes; and again from the cache."""
    with checkpoints() as folder:
        name, steps = str(folder), str(SWEEP_STEPS)
        return {
            "one process": worker("sweep_of", name, "one", "1", steps),
            "2 jobs": worker("sweep_of", name, "jobs", "2", steps),
            "2 processes": worker("sweep_of", name, "processes", "1", steps, processes=2),
            "from the cache": worker("sweep_of", name, "processes", "1", steps),
        }


def gpu_sweep() -> dict[str, Any]:
    """On a GPU: one after another; with as many fits trained as one as the runner chooses; again from the cache."""
    with checkpoints() as folder:
        name, steps = str(folder), str(GPU_SWEEP_STEPS)
        return {
            "one process": worker("sweep_of", name, "one", "1", steps),
            "trained as one": worker("sweep_of", name, "together", "1", steps, "auto"),
            "from the cache": worker("sweep_of", name, "together", "1", steps, "auto"),
        }


@contextmanager
def timed(into: dict[str, float], name: str) -> Iterator[None]:
    """Add the seconds of the block to a dictionary."""
    start = perf_counter()
    yield
    into[name] = perf_counter() - start


def publish() -> dict[str, Any]:
    """Seconds to save, sign, verify and load a ViT-S, dense and sparse, and its size, in bytes."""
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name:
        folder, private, public = Path(name) / "model", Path(name) / "key.pem", Path(name) / "key.pub.pem"
        for command in (
            ["ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", private],
            ["ec", "-in", private, "-pubout", "-out", public],
        ):
            subprocess.run(["openssl", *command], check=True, capture_output=True)
        method = {**PRESETS["paper"], "sparsity": PUBLISHED_SPARSITY}
        trainer = make_trainer(vit_small(), 32, method, 2, 4, name)
        assert isinstance(trainer, hf_ntp.NTPTrainer)
        trainer.processing_class = ViTImageProcessorPil(size={"height": 32, "width": 32})
        trainer.train()
        with timed(seconds, "save"):
            trainer.model.save_pretrained(folder)
        with timed(seconds, "measure zeros, write record and card"):
            write_folder(trainer, folder)
        with timed(seconds, "sign"):
            hf_ntp.sign_folder(folder, private)
        with timed(seconds, "verify"):
            hf_ntp.verify_folder(folder, public)
        with timed(seconds, "load"):
            ViTForImageClassification.from_pretrained(folder)
        with timed(seconds, "verify and load"):
            hf_ntp.load_protected(folder, public_key=public)
        with timed(seconds, "compress"):
            hf_ntp.compress_folder(folder, Path(name) / "sparse")
        with timed(seconds, "load sparse"):
            ViTForImageClassification.from_pretrained(Path(name) / "sparse")
        sizes = {
            kind: sum(path.stat().st_size for path in (Path(name) / place).glob("*.safetensors"))
            for kind, place in (("dense", "model"), ("sparse", "sparse"))
        }
    return {"sparsity": PUBLISHED_SPARSITY, "seconds": seconds, "bytes": sizes}


def protect() -> dict[str, Any]:
    """Seconds of a protection of the small ViT and what it reaches, default against published settings."""
    source, target = digits(("mnist", "optdigits"))
    found: dict[str, Any] = {"pretrain_steps": PRETRAIN_STEPS, "steps": PROTECTION_STEPS}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = small_vit(source.names)
        train_classifier(model, source.train, name, PRETRAIN_STEPS, transform=RandomShift(1), use_cpu=True)
        model.save_pretrained(folder / "unprotected")
        arms = [hf_ntp.Arm("scratch", f"{name}/unprotected", random_init=True)]
        arms += [hf_ntp.Arm("unprotected", f"{name}/unprotected")]
        for preset in ("adaptive", "published"):
            schedule = {"lr_scheduler_type": "cosine", "warmup_steps": 50, "report_to": "none", "disable_tqdm": True}
            settings = hf_ntp.NTPConfig.from_preset(
                preset, output_dir=f"{name}/trainer", max_steps=PROTECTION_STEPS, save_strategy="no", use_cpu=True,
                logging_steps=500, **schedule,
            )  # fmt: skip
            model = ViTForImageClassification.from_pretrained(folder / "unprotected")
            trainer = hf_ntp.NTPTrainer(
                model, settings, source.train, target.owner, source.validation, source_transform=RandomShift(1)
            )
            seconds: dict[str, float] = {}
            with timed(seconds, "seconds"):
                trainer.train()
            model.save_pretrained(folder / preset)
            accuracy = {k: source_accuracy(f"{name}/{k}", source.test) for k in ("unprotected", preset)}
            found[preset] = {**seconds, "source_before": accuracy["unprotected"], "source_after": accuracy[preset]}
            for attack in PAPER_ATTACKS:
                arms.append(hf_ntp.Arm(f"{preset}/{attack}", f"{name}/{preset}", attack=hf_ntp.ATTACKS[attack]))
        curves = hf_ntp.sample_wise_learning_curves(
            arms,
            attack_data(),
            [10, 30, 100],
            (0, 1),
            hf_ntp.FineTuneProtocol(ATTACK_STEPS, learning_rates=(1e-3, 3e-3)),
        )
    for arm, areas in summarize(curves).items():
        preset, _, attack = arm.partition("/")
        if preset == "unprotected":
            found["unprotected"] = areas["normalized"]
        elif attack:
            found[preset][attack] = areas["normalized"]
    return found


SECTIONS: dict[str, Callable[[], Any]] = {
    "step": step,
    "memory": memory,
    "admm": admm,
    "fisher": fisher,
    "sweep": sweep,
    "publish": publish,
    "protect": protect,
    "gpu_step": lambda: gpu_step(VIT_B),
    "gpu_sweep": gpu_sweep,
    "gpu_admm": lambda: admm("cuda"),
    "gpu_fisher": lambda: fisher("cuda"),
    "gpu_step_convnet": lambda: gpu_step(RESNET_50),
}


def recipe_peak() -> int:
    """Run the default recipe and return the largest memory of any one of its processes, in bytes."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "accelerate.commands.launch", str(ROOT / "recipes" / "ntp_vit.py")]
        subprocess.run([*command, "--output_dir", f"{folder}/run"], check=True, cwd=ROOT)
    return 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
