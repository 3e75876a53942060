"""How it stands with the checkpoints of a run: for people who look at it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from datapipe.storage import names_in
from xdist.checkpoint import MANIFEST, Checkpoint, Cut, best_name, directories, step_of
from xdist.errors import CheckpointDamaged, UnknownFormat, UserError
from xdist.retention import PINNED, read_scores


@dataclass(frozen=True)
class Standing:
    """How it stands with a checkpoint."""

    step: int
    cut: Cut | None
    """None of one that is not published, or cannot be read."""
    num_bytes: int
    scores: Mapping[str, Mapping[str, float]]
    is_best: bool
    is_pinned: bool
    damage: str | None
    """What is wrong with it."""

    @property
    def remarks(self) -> list[str]:
        """In words."""
        known = {
            "best": self.is_best,
            "pinned": self.is_pinned,
            "final": self.cut is not None and self.cut.is_final,
            "damaged": self.damage is not None,
            "not published": self.cut is None and self.damage is None,
        }
        return [name for name, is_so in known.items() if is_so]


def standing(run_dir: str, *, verifies: bool = False) -> list[Standing]:
    """All checkpoints of a run, in the order of their steps. verifies: by reading them. Raises
    `UserError` where there is none.
    """
    urls = directories(run_dir)
    if not urls:
        raise UserError(f"{run_dir} has no checkpoints; give a run directory")
    best = best_name(run_dir)
    return [_standing(url, best=best, verifies=verifies) for url in urls]


def _standing(url: str, *, best: str | None, verifies: bool) -> Standing:
    names, found, damage = names_in(url), None, None
    if MANIFEST in names:
        try:
            found = Checkpoint.open(url)
            if verifies:
                found.verify()
        except (CheckpointDamaged, UnknownFormat) as error:
            damage = str(error)
    parts = () if found is None else found.manifest.parts
    return Standing(
        step=step_of(url),
        cut=None if found is None else found.manifest.cut,
        num_bytes=sum(part.num_bytes for part in parts),
        scores=read_scores(url),
        is_best=url.endswith(f"/{best}"),
        is_pinned=PINNED in names,
        damage=damage,
    )
