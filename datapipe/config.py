"""DataConfig: where the samples are and how they become batches."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite

from datapipe.checks import check, check_types

LIMITS = {
    "image_size": (8, 4096),
    "block_size": (1, 16_384),
    "blocks_per_pool": (1, 1024),
    "decode_threads": (1, 256),
    "read_threads": (1, 100),
    "read_ahead_mb": (0.001, 1_000_000),
    "read_retries": (0, 1000),
    "read_timeout_s": (0.01, 300),
    "cache_gb": (0.001, 1_000_000),
    "prefetch_batches": (1, 1024),
}
"""The smallest and the largest value of a field."""


@dataclass(frozen=True)
class DataConfig:
    """The data part of a run's configuration, checked when built (`ValueError`)."""

    train: str
    """Directory or URL of the training shards, or of a single .tar (jobs/pack_shards.py, or any
    WebDataset)."""
    mix: tuple[str, ...] = ()
    """Further training sets, mixed into the first one; their labels are the same."""
    mix_weights: tuple[float, ...] = ()
    """How much of what is trained on comes from `train` and from each of `mix`, as numbers in
    proportion; empty: as much as they hold."""
    evaluation: str | None = None
    """Directory or URL of the held-out shards; None trains without scores."""
    image_size: int = 299
    """Side of the square network input, in pixels (paper, figure 5: 299)."""
    crop_area: tuple[float, float] = (0.08, 1.0)
    """Training crop: smallest and largest share of the image's area."""
    crop_aspect: tuple[float, float] = (3 / 4, 4 / 3)
    """Training crop: smallest and largest width over height."""
    flip: bool = True
    """Mirror half of the training images."""
    evaluation_crop: float = 0.875
    """Evaluation crop: side of the centre square over the image's shorter side."""
    block_size: int = 64
    """Samples in one block: what one ranged read fetches."""
    blocks_per_pool: int = 8
    """Blocks, from all over the data set, whose samples are shuffled together."""
    read_threads: int = 8
    """Threads of a worker that read blocks ahead of the images that are decoded."""
    read_ahead_mb: float = 1024.0
    """Memory of a worker for blocks that are read ahead or whose samples are not all used yet, in
    MB (1e6 bytes). Where the blocks of a pool exceed it, samples are read one by one."""
    read_retries: int = 10
    """How often a read of remote storage is made again that failed for a passing reason (5xx, 429,
    no answer, broken connection), after growing waits: 10 outlast about a minute."""
    read_timeout_s: float = 60.0
    """After which an attempt to read is given up, in seconds."""
    cache_dir: str | None = None
    """Local directory in which blocks of remote shards are kept, for later epochs and runs and for
    all workers of the machine; None keeps none."""
    cache_gb: float = 100.0
    """Largest size of that directory, in GB (1e9 bytes); what was not used for longest goes."""
    decode_threads: int = 2
    """Threads of a worker that decode images."""
    prefetch_batches: int = 4
    """Batches decoded ahead of the training step."""
    max_bad_samples: int | float = 100
    """Samples that may be corrupt (they are skipped and listed) before the run stops: a number, or,
    below 1, a share of the data set."""

    @property
    def sources(self) -> tuple[str, ...]:
        """All training sets."""
        return (self.train, *self.mix)

    def bad_samples_allowed(self, num_samples: int) -> int:
        """`max_bad_samples` as a number, for a data set of `num_samples`."""
        share = self.max_bad_samples
        return int(share * num_samples) if 0 < share < 1 else int(share)

    def __post_init__(self) -> None:
        check_types(self, "data.")
        check(bool(self.train), "data.train", self.train, "a directory or URL of shards")
        check(
            self.evaluation != "",
            "data.evaluation",
            self.evaluation,
            "a directory or URL of shards, or None",
        )
        check(
            self.cache_dir is None or (bool(self.cache_dir) and "://" not in self.cache_dir),
            "data.cache_dir",
            self.cache_dir,
            "a directory of this machine, or None",
        )
        check(all(self.mix), "data.mix", self.mix, "directories or URLs of shards")
        check(
            not self.mix_weights
            or (
                len(self.mix_weights) == len(self.sources)
                and all(weight > 0 for weight in self.mix_weights)
                and isfinite(sum(self.mix_weights))
            ),
            "data.mix_weights",
            self.mix_weights,
            f"a number above 0 for data.train and each of data.mix ({len(self.sources)}), or none",
        )
        low, high = self.crop_area
        check(
            0 < low <= high <= 1, "data.crop_area", self.crop_area, "0 < smallest <= largest <= 1"
        )
        low, high = self.crop_aspect
        check(
            0 < low <= high < float("inf"),
            "data.crop_aspect",
            self.crop_aspect,
            "0 < smallest <= largest",
        )
        check(
            0 < self.evaluation_crop <= 1,
            "data.evaluation_crop",
            self.evaluation_crop,
            "above 0, at most 1",
        )
        for name, (least, most) in LIMITS.items():
            value = getattr(self, name)
            check(least <= value <= most, f"data.{name}", value, f"{least} to {most}")
        check(
            self.max_bad_samples >= 0
            and (self.max_bad_samples < 1 or self.max_bad_samples % 1 == 0),
            "data.max_bad_samples",
            self.max_bad_samples,
            "a whole number from 0, or a share below 1",
        )
