"""Strategies for tests: wrappers in which something happens, and the plain way of a gradient."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from datapipe.batch import Batch
from xdist.computation import BatchSums
from xdist.flat import FlatModel


class Wrapped:
    """A strategy that is another one."""

    def __init__(self, strategy: Any) -> None:
        self.strategy = strategy

    def __getattr__(self, name: str) -> Any:
        if name == "strategy":  # Not there yet: it is being unpickled.
            raise AttributeError(name)
        return getattr(self.strategy, name)


class ActsBefore(Wrapped):
    """A strategy that does something once in a run, before its update number `own_step`."""

    def __init__(
        self, strategy: Any, own_step: int, marker: Path, act: Callable[[], object]
    ) -> None:
        """marker: a file that tells that it was done."""
        super().__init__(strategy)
        self._own_step = own_step
        self._marker = marker
        self._act = act

    def update(self, batch: Batch, sums: BatchSums) -> None:
        is_due = self.strategy.progress.own_step + 1 == self._own_step
        if is_due and not self._marker.exists():
            self._marker.touch()
            self._act()
        self.strategy.update(batch, sums)


def collect_gradients(flat: FlatModel) -> None:
    """Bring the gradients of a plain backward into the flat vector, and forget them."""
    parameters = dict(flat.model.named_parameters())
    for entry in flat.layout.parameters:
        gradient = parameters[entry.name].grad
        assert gradient is not None
        entry.view(flat.gradients).copy_(gradient)
        parameters[entry.name].grad = None
