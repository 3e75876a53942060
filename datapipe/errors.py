"""What can go wrong with data, as exceptions that a user reads and that survive a process border.

    DataError
      UnsupportedUrl      no file system for this URL
      MissingIndex        a directory with neither an index nor shards
      BadIndex            an index file that is not what this version writes
      MissingShard        shards that the index names and storage does not hold
      UnreadableUrl       storage answered a read with an error
      UnreadableShard     a file that is named as a shard and is no tar
      BadLabels           a labels.json that cannot be read
      LabelOutOfRange     a label id the model has no output for
      CorruptSample       one sample that cannot be decoded
      TooManyBadSamples   more of them than `max_bad_samples`
      PackingError        images that cannot be packed as asked
      NoImages            a place that has none
    DecodeError           bytes that are no image that can be used; not of a place, so no DataError

Every class keeps its facts as positional arguments, so that pickle can rebuild it.
"""

from __future__ import annotations

NUM_LISTED = 5
ALLOWED_URLS = (
    "allowed: paths of this machine, https://, and s3:// and gs:// where the project was installed "
    "with them (pip install '.[s3]' or '.[gcs]')"
)


class DecodeError(ValueError):
    """These bytes are not an image that can be used; the text says why."""


class DataError(Exception):
    """Any of the errors above: its text says what is wrong, where, and what to do next."""


class UnsupportedUrl(DataError):
    """The URL's protocol is unknown or its file system is not installed."""

    def __init__(self, url: str, reason: str) -> None:
        super().__init__(url, reason)

    def __str__(self) -> str:
        url, reason = self.args
        return f"{url}: {reason}; {ALLOWED_URLS}"


class MissingIndex(DataError):
    """There is nothing to train on at this place."""

    def __init__(self, url: str, reason: str) -> None:
        super().__init__(url, reason)

    def __str__(self) -> str:
        url, reason = self.args
        return f"{url}: {reason}; pack images into it with jobs/pack_shards.py"


class BadIndex(DataError):
    """A manifest or a table of samples that does not have the form this version reads."""

    def __init__(self, url: str, reason: str) -> None:
        super().__init__(url, reason)

    def __str__(self) -> str:
        url, reason = self.args
        return f"{url}: {reason}; make the index anew with python -m datapipe index"


class MissingShard(DataError):
    """Shards (URLs) that the index names and that are not there."""

    def __init__(self, urls: tuple[str, ...]) -> None:
        super().__init__(urls)
        self.urls = urls

    def __str__(self) -> str:
        count = "1 shard is" if len(self.urls) == 1 else f"{len(self.urls)} shards are"
        return (
            f"{count} in the index but not in storage: {_listed(self.urls)}; "
            "restore them, or make the index anew with python -m datapipe index"
        )


class UnreadableUrl(DataError):
    """Storage answered a read with an error: forbidden, out of reach, broken."""

    def __init__(self, url: str, reason: str) -> None:
        super().__init__(url, reason)

    def __str__(self) -> str:
        url, reason = self.args
        return (
            f"{url}: cannot be read: {reason}; see that the address is right and that this machine "
            "may read it, then give the same command again"
        )


class UnreadableShard(DataError):
    """What storage delivers for this shard is not a tar."""

    def __init__(self, url: str, reason: str) -> None:
        super().__init__(url, reason)

    def __str__(self) -> str:
        url, reason = self.args
        return f"{url}: not a tar: {reason}; replace it, or take it out of the set"


class BadLabels(DataError):
    """A labels.json that is not a list of {"id", "name", "weight"} with ids 0, 1, 2, ..."""

    def __init__(self, url: str, reason: str) -> None:
        super().__init__(url, reason)

    def __str__(self) -> str:
        url, reason = self.args
        return f"{url}: {reason}; take the file that jobs/pack_shards.py wrote beside the shards"


class LabelOutOfRange(DataError):
    """A sample carries a label id that the model has no output for."""

    def __init__(self, shard: str, key: str, label: int, num_classes: int) -> None:
        super().__init__(shard, key, label, num_classes)

    def __str__(self) -> str:
        shard, key, label, num_classes = self.args
        return (
            f"{shard}: sample {key} has label {label}, allowed are 0 to {num_classes - 1} "
            f"({num_classes} classes); set model.num_classes to at least {label + 1}, "
            "or pack this set with the --labels of the training set"
        )


class CorruptSample(DataError):
    """One sample that cannot be used."""

    def __init__(self, shard: str, key: str, offset: int, reason: str) -> None:
        super().__init__(shard, key, offset, reason)
        self.shard = shard
        self.key = key
        self.offset = offset
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.shard}: sample {self.key} at byte {self.offset}: {self.reason}"


class TooManyBadSamples(DataError):
    """The budget `max_bad_samples` is spent, or there is no sample left that could be used instead.

    samples: every corrupt one that was met.
    """

    def __init__(self, samples: tuple[CorruptSample, ...], max_bad_samples: int) -> None:
        super().__init__(samples, max_bad_samples)
        self.samples = samples

    def __str__(self) -> str:
        number, allowed = len(self.samples), self.args[1]
        listed = _listed([str(sample) for sample in self.samples])
        if number <= allowed:
            return f"all {number} samples of the set are corrupt: {listed}; repair the shards"
        return (
            f"{number} corrupt samples, data.max_bad_samples allows {allowed}: {listed}; "
            "repair the shards or raise data.max_bad_samples"
        )


class NoImages(DataError):
    """There are no images at this place."""

    def __init__(self, url: str, reason: str) -> None:
        super().__init__(url, reason)

    def __str__(self) -> str:
        url, reason = self.args
        return f"{url}: {reason}"


class PackingError(DataError):
    """Images, tables or label maps that cannot be packed; the text says which and why."""


def _listed(texts: tuple[str, ...] | list[str]) -> str:
    more = f" and {len(texts) - NUM_LISTED} more" if len(texts) > NUM_LISTED else ""
    return ", ".join(texts[:NUM_LISTED]) + more
