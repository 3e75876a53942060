"""Whether another process of this node still lives."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Self


@dataclass(frozen=True)
class Process:
    """A process that is told from a later one of the same id: by when it started."""

    process_id: int
    start_ticks: int
    """Clock ticks from the boot of the node."""

    @classmethod
    def find(cls, process_id: int) -> Self | None:
        """The process that has this id; None if there is none, or only what a parent has not yet
        waited for (a zombie).
        """
        try:
            stat = Path(f"/proc/{process_id}/stat").read_text(errors="replace")
        except OSError:
            return None
        fields = stat.rpartition(")")[2].split()  # Its name, in parentheses, may hold anything.
        state, start_ticks = fields[0], fields[19]
        return None if state in "ZX" else cls(process_id, int(start_ticks))

    @property
    def is_alive(self) -> bool:
        """One that is stopped (SIGSTOP) is alive."""
        return Process.find(self.process_id) == self
