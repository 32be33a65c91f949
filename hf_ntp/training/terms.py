"""The loss terms of a run: their means for the log, and the alarm when one stops being finite."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ..models.sharding import shard


class Reading(NamedTuple):
    """What the host learns of a step."""

    step: int
    broken: list[str]
    """Terms that are not finite, on any rank."""
    ending: bool
    """Whether a signal has come to any process."""


class _Sent(NamedTuple):
    """What a step left, on its way to the host."""

    step: int
    terms: list[str]
    """Names of the first values; one may come several times."""
    watched: list[str]
    values: Tensor
    arrived: torch.Event | None


class Terms:
    """Loss terms by name, alike on all ranks: one message per step between ranks, and one to the host.

    The host reads what a step left when the next one ends, or when :meth:`read` is called: it never waits for the
    device in between.

    Args:
        reduce: Averages a tensor over ranks.
    """

    def __init__(self, reduce: Callable[[Tensor], Tensor]) -> None:
        self._reduce = reduce
        self._step: list[tuple[str, Tensor]] = []
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}
        self._sent: _Sent | None = None

    def add(self, terms: Mapping[str, Tensor]) -> None:
        """Note scalars of the step that is being taken; a name may come several times."""
        self._step += [(name, value.detach().float()) for name, value in terms.items()]

    def close_step(self, step: int, watched: Mapping[str, Tensor], ending: bool) -> Reading | None:
        """End step number ``step`` and read what the one before it left.

        Args:
            step: Its number.
            watched: Other scalars that have to be finite.
            ending: Whether a signal has come to this process.
        """
        before = self.read()
        names, terms = map(list, zip(*self._step, strict=True))
        device = terms[0].device
        others = [value.to(device, torch.float32, non_blocking=True) for value in watched.values()]
        values = self._reduce(torch.stack([*terms, *others, torch.full((), float(ending), device=device)]))
        self._step = []
        arrived = None
        if values.device.type != "cpu":
            arrived = torch.Event(values.device)
            values = values.to("cpu", non_blocking=True)
            arrived.record()
        self._sent = _Sent(step, names, list(watched), values, arrived)
        return before

    def read(self) -> Reading | None:
        """Read what the last step left; None where that has been read."""
        if self._sent is None:
            return None
        (step, terms, watched, values, arrived), self._sent = self._sent, None
        if arrived is not None:
            arrived.synchronize()
        *found, ending = values.tolist()
        for name, value in zip(terms, found, strict=False):
            self._sums[name] = self._sums.get(name, 0.0) + value
            self._counts[name] = self._counts.get(name, 0) + 1
        named = zip([*terms, *watched], found, strict=True)
        broken = dict.fromkeys(name for name, value in named if not math.isfinite(value))
        return Reading(step, list(broken), ending > 0)

    def means(self) -> dict[str, float]:
        """Mean of every term over the steps read since the last call; the sums begin anew."""
        found = {name: total / self._counts[name] for name, total in self._sums.items()}
        self._sums, self._counts = {}, {}
        return found

    def state(self) -> dict[str, tuple[float, int]]:
        """Sums and counts since the last log, so that the log of a resumed run is that of an uninterrupted one."""
        return {name: (total, self._counts[name]) for name, total in self._sums.items()}

    def load(self, state: Mapping[str, tuple[float, int]]) -> None:
        """Restore what :meth:`state` gave."""
        self._sums = {name: total for name, (total, _) in state.items()}
        self._counts = {name: count for name, (_, count) in state.items()}


def not_finite(
    groups: Mapping[str, Iterable[Tensor]], reduce: Callable[[Tensor], Tensor] = lambda flag: flag
) -> list[str]:
    """Names of the groups that hold a NaN or an infinite value; integer tensors count as finite.

    Args:
        groups: Tensors by name of the group; of shards, this rank's part counts.
        reduce: Averages a tensor over ranks that hold different parts.
    """
    floats = {name: [shard(t) for t in tensors if t.is_floating_point()] for name, tensors in groups.items()}
    flags = {
        name: torch.stack([t.detach().isfinite().all() for t in tensors]).all().float()
        for name, tensors in floats.items()
        if tensors
    }
    return [name for name, finite in flags.items() if float(reduce(finite)) < 1]
