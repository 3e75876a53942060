"""The speeds of pipelines that take turns."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

from tests.benchmarks.peers.timing import Speed


class Rounds:
    """The speeds of all contenders, round by round; those that cannot run, and why."""

    def __init__(self) -> None:
        self.missing: dict[str, str] = {}
        self._speeds: dict[str, list[Speed]] = {}

    def add(self, name: str, speed: Speed) -> None:
        self._speeds.setdefault(name, []).append(speed)

    def drop(self, name: str, reason: str) -> None:
        """This one cannot go on; what it did until now does not count."""
        self.missing[name] = reason
        self._speeds.pop(name, None)

    def per_core(self, name: str) -> float | None:
        """Images a CPU second, the median over the rounds."""
        return self._median([speed.images_per_cpu_s for speed in self._speeds.get(name, [])])

    def wall(self, name: str) -> float | None:
        """Images a second of wall clock, the median over the rounds."""
        return self._median([speed.images_per_wall_s for speed in self._speeds.get(name, [])])

    def ratio_per_core(self, name: str, to: str) -> float | None:
        """The median of the rounds' ratios."""
        return self._median(
            [
                mine.images_per_cpu_s / other.images_per_cpu_s
                for mine, other in self._pairs(name, to)
            ]
        )

    def ratio_wall(self, name: str, to: str) -> float | None:
        return self._median(
            [
                mine.images_per_wall_s / other.images_per_wall_s
                for mine, other in self._pairs(name, to)
            ]
        )

    def _pairs(self, name: str, to: str) -> Iterator[tuple[Speed, Speed]]:
        return zip(self._speeds.get(name, []), self._speeds.get(to, []), strict=False)

    def _median(self, values: list[float]) -> float | None:
        return round(statistics.median(values), 3) if values else None
