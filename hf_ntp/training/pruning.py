"""ADMM pruning as a stateful driver around :mod:`hf_ntp.functional`: when is the Trainer's business, what is here."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from ..functional import (
    GlobalSelector,
    LayerSelector,
    add_penalty_gradient_,
    apportion_zeros,
    cubic_sparsity,
    dual_residual,
    hard_anchor,
    hard_dual,
    n_m_mask,
    penalty,
    primal_residual,
    soft_anchor,
    soft_dual,
    soft_threshold,
)
from ..models import prunable_weights
from ..models.sharding import cut_like, shard, sum_over_shards, whole
from .arguments import ProtectionArguments, parse_n_m


class ZStep(NamedTuple):
    """What a Z-step leaves, over all weights (scalar tensors, not synchronised)."""

    primal_residual: Tensor
    """``||W - Z||``."""
    dual_residual: Tensor
    """``rho * ||Z - Z_previous||``."""
    admm_penalty: Tensor
    """``(rho / 2) * ||W - Z + U||^2``."""
    sparsity: Tensor
    """Fraction of zeros in Z."""


MaskRule = Callable[[int, Tensor], Tensor]


def mask_rule(
    tensors: Callable[[], Iterable[Tensor]], sizes: Sequence[int], pattern: str, sparsity: float
) -> MaskRule:
    """Return ``rule(i, tensor)``, the mask of the i-th tensor; call it for one tensor after another, in order.

    Args:
        tensors: Gives the tensors one after another, as often as it is called.
        sizes: Their numbers of entries.
        pattern: "layer" or "l1" (every layer at the same sparsity), "global" (one budget for all), or "N:M".
        sparsity: Fraction of zeros. Below the final one an N:M pattern keeps more than N of every M.
    """
    if pattern == "global":
        select = GlobalSelector(lambda: map(whole, tensors()), sparsity)
        return lambda i, tensor: select(tensor)
    if n_m := parse_n_m(pattern):
        n, m = n_m
        kept = max(n, round(m * (1 - sparsity)))
        return lambda i, tensor: n_m_mask(tensor, kept, m)
    return LayerSelector(apportion_zeros(sizes, sparsity))


def _mask(rule: MaskRule, i: int, tensor: Tensor) -> Tensor:
    """Mask of the i-th tensor, cut as it is: thresholds and ties are those of the whole, of one layer at a time."""
    return cut_like(rule(i, whole(tensor)), tensor)


def check_names(model: nn.Module, **patterns: Sequence[str]) -> None:
    """Check that every pattern for names of parameters means some.

    Args:
        model: The model under protection.
        patterns: Regular expressions, by the option that holds them.

    Raises:
        ValueError: If a pattern matches no name: what it was meant for would be pruned, or not, without a word.
    """
    names = [name for name, _ in model.named_parameters()]
    for option, given in patterns.items():
        for pattern in given:
            if not any(re.search(pattern, name) for name in names):
                close = difflib.get_close_matches(pattern, names, 3, 0.0)
                raise ValueError(
                    f"{option} has {pattern!r}, which is found in no name of the {len(names)} parameters of "
                    f"{type(model).__name__}; needed: regular expressions (re.search) that match some, such as "
                    f"{', '.join(map(re.escape, close))}."
                )


def check_pattern(weights: Mapping[str, Tensor], pattern: str) -> None:
    """Raise ``ValueError`` where an N:M pattern does not fit the rows of a weight; other patterns always fit."""
    if n_m := parse_n_m(pattern):
        misfits = [name for name, weight in weights.items() if weight.dim() < 2 or weight.shape[1:].numel() % n_m[1]]
        if misfits:
            raise ValueError(
                f"prune_pattern {pattern!r} does not fit {len(misfits)} weights, such as {misfits[0]} of shape "
                f"{tuple(weights[misfits[0]].shape)}; needed: rows whose length {n_m[1]} divides. Leave them out with "
                "prune_exclude, or choose another pattern."
            )


def chosen_weights(
    model: PreTrainedModel, options: ProtectionArguments, head_name: str | None
) -> dict[str, nn.Parameter]:
    """Weights that the options say to prune, by name.

    Args:
        model: The model under protection, with a head.
        options: Those that begin with ``prune``.
        head_name: See :func:`~hf_ntp.models.find_head`.

    Raises:
        ValueError: If an option means nothing in this model, or leaves nothing to prune.
    """
    check_names(model, prune_include=options.prune_include, prune_exclude=options.prune_exclude)
    weights = prunable_weights(model, options.prune_include, options.prune_exclude, head_name)
    check_pattern(weights, options.prune_pattern)
    return weights


class ADMMPruner:
    """Prunes ``weights`` gradually by ADMM, then fixes the mask.

    One tensor per weight is kept (see :mod:`hf_ntp.functional.admm`): the anchor Z - U for hard patterns, W + U for
    "l1", and after :meth:`finish` the mask itself, in the same storage. Where the weights are shards (DTensor, FSDP2),
    so is that tensor, and every rank has to make every call.

    Args:
        weights: Prunable parameters by name, on their final device.
        sparsity: Final fraction of zeros, in [0, 1).
        pattern: "layer", "global", "N:M" or "l1" (soft threshold while training, magnitude per layer at the end).
        rho: Penalty parameter, > 0.
        l1_weight: Weight mu of the L1 norm; only with the pattern "l1".
    """

    def __init__(
        self,
        weights: Mapping[str, nn.Parameter],
        sparsity: float,
        pattern: str = "layer",
        rho: float = 5e-3,
        l1_weight: float = 1e-4,
    ) -> None:
        self.weights = dict(weights)
        self.final_sparsity = sparsity
        self.pattern = pattern
        self.rho = rho
        self.threshold = l1_weight / rho
        self.sparsity = 0.0
        self.finished = False
        # A first Z-step with U = 0: X = W; at sparsity 0 a hard projection leaves Z = W, and the anchor is W too.
        self.stored = {name: weight.detach().clone() for name, weight in self.weights.items()}
        self._present: LayerSelector | None = None

    @property
    def _soft(self) -> bool:
        return self.pattern == "l1"

    @torch.no_grad()
    def begin(self) -> None:
        """Take up the weights as they are now, before the first penalty."""
        for name, weight in self.weights.items():
            self.stored[name].copy_(weight)

    @torch.no_grad()
    def add_penalty_gradient(self) -> None:
        """Add rho (W - Z + U) to every gradient that this step has; nothing to do once the mask is fixed."""
        if self.finished:
            return
        gradients: list[Tensor] = []
        weights: list[Tensor] = []
        anchors: list[Tensor] = []
        for name, weight in self.weights.items():
            if weight.grad is not None:
                gradients.append(weight.grad)
                weights.append(weight)
                anchors.append(self.stored[name])
        if self._soft:
            anchors = [soft_anchor(x, self.threshold) for x in anchors]
        add_penalty_gradient_(gradients, weights, anchors, self.rho)

    def _sizes(self) -> list[int]:
        return [weight.numel() for weight in self.weights.values()]

    def _old_rule(self) -> MaskRule:
        """Give the mask of Z by the stored tensors: the rule that made it, where it can be used again."""
        return self._present or mask_rule(self.stored.values, self._sizes(), self.pattern, self.sparsity)

    def _new_rule(self, sparsity: float) -> MaskRule:
        """Give the mask of the next Z by W + U."""
        return mask_rule(self._shifted, self._sizes(), self.pattern, sparsity)

    def _shifted(self) -> Iterator[Tensor]:
        """Give W + U of one layer after another."""
        old = self._old_rule()
        for i, (weight, stored) in enumerate(zip(self.weights.values(), self.stored.values(), strict=True)):
            if self._soft:
                yield weight + soft_dual(stored, self.threshold)
            else:
                yield weight + hard_dual(stored, stored * _mask(old, i, stored))

    @torch.no_grad()
    def update(self, progress: float) -> ZStep:
        """Z-step and U-step at the sparsity that the cubic schedule gives for ``progress`` in [0, 1].

        One layer after another: nothing larger than a few copies of the largest layer is made on the way.

        Raises:
            RuntimeError: If the mask is already fixed.
        """
        self._require_unfinished("update")
        sparsity = cubic_sparsity(progress, self.final_sparsity)
        old, new = self._old_rule(), self._new_rule(sparsity)
        parts: list[Tensor] = []
        for i, (weight, stored) in enumerate(zip(self.weights.values(), self.stored.values(), strict=True)):
            if self._soft:
                previous = soft_threshold(stored, self.threshold)
                stored.copy_(weight + soft_dual(stored, self.threshold))
                sparse, anchor = soft_threshold(stored, self.threshold), soft_anchor(stored, self.threshold)
            else:
                previous = stored * _mask(old, i, stored)
                shifted = hard_dual(stored, previous).add_(weight)
                sparse = shifted * _mask(new, i, shifted)
                anchor = stored.copy_(hard_anchor(shifted, sparse))
            w, z, before, v = map(shard, (weight, sparse, previous, anchor))
            parts += primal_residual(w, z), dual_residual(z, before, self.rho), penalty(w, v, self.rho), (z == 0).sum()
        sums = sum_over_shards(torch.stack(parts).view(-1, 4).sum(0), weight)
        self.sparsity = sparsity
        # Stored and shifted tensors have equal magnitudes.
        self._present = new if isinstance(new, LayerSelector) and not self._soft else None
        return ZStep(sums[0].sqrt(), sums[1].sqrt(), sums[2], sums[3] / sum(self._sizes()))

    @torch.no_grad()
    def finish(self) -> None:
        """Hard prune: W <- projection of W + U at exactly the requested sparsity, and fix the mask.

        Raises:
            RuntimeError: If the mask is already fixed.
        """
        self._require_unfinished("finish")
        new, shifted = self._new_rule(self.final_sparsity), self._shifted()
        for i, (weight, stored) in enumerate(zip(self.weights.values(), self.stored.values(), strict=True)):
            x = next(shifted)
            mask = _mask(new, i, x)
            weight.copy_(x * mask)
            stored.copy_(mask)
        self.sparsity = self.final_sparsity
        self.finished = True

    @torch.no_grad()
    def masks(self) -> dict[str, Tensor]:
        """Present boolean mask of every weight: that of Z, and once pruning has finished the fixed one."""
        rule = self._old_rule()
        found = {}
        for i, (name, stored) in enumerate(self.stored.items()):
            if self.finished:
                found[name] = stored != 0
            elif self._soft and self.sparsity:  # at 0, there was no Z-step yet
                found[name] = soft_threshold(stored, self.threshold) != 0
            else:
                found[name] = _mask(rule, i, stored).bool()
        return found

    @torch.no_grad()
    def enforce_mask(self) -> None:
        """Set pruned weights back to zero, after an optimizer step of the masked phase."""
        torch._foreach_mul_(list(self.weights.values()), list(self.stored.values()))

    def _require_unfinished(self, what: str) -> None:
        if self.finished:
            raise RuntimeError(
                f"{what}() was called after finish(): the mask is fixed. Make a new ADMMPruner to prune further."
            )

    @torch.no_grad()
    def move_to(self, weights: Mapping[str, nn.Parameter]) -> None:
        """Go on with the same weights in other tensors: on another device, cut into shards, or whole again."""
        self.weights = dict(weights)
        for name, weight in self.weights.items():
            self.stored[name] = cut_like(whole(self.stored[name]).to(weight.device), weight).clone()
        self._present = None

    def tensors(self) -> dict[str, Tensor]:
        """State tensors by weight name, for a checkpoint; with :meth:`scalars` they are the whole state.

        What lies in shards comes whole, on the CPU, on every rank.
        """
        return {name: whole(t).cpu() if isinstance(t, DTensor) else t for name, t in self.stored.items()}

    def scalars(self) -> dict[str, float | bool]:
        """JSON part of the state."""
        return {"sparsity": self.sparsity, "finished": self.finished}

    def load(self, tensors: Mapping[str, Tensor], scalars: Mapping[str, float | bool]) -> None:
        """Restore what :meth:`tensors` and :meth:`scalars` gave; tensors may be whole where the weights are shards.

        Raises:
            ValueError: If the tensors belong to other weights.
        """
        if tensors.keys() != self.stored.keys():
            differing = sorted(tensors.keys() ^ self.stored.keys())
            raise ValueError(
                f"the ADMM state in the checkpoint is for other weights (differing: {differing[:5]}); needed: the "
                "model, prune_include and prune_exclude of the run that wrote it."
            )
        for name, stored in self.stored.items():
            stored.copy_(cut_like(tensors[name], stored))
        self._present = None
        self.sparsity, self.finished = float(scalars["sparsity"]), bool(scalars["finished"])
