"""Errors say what is wrong, where and what next, and survive a process border."""

from __future__ import annotations

import pickle

import pytest

from datapipe.errors import (
    BadIndex,
    BadLabels,
    CorruptSample,
    DataError,
    LabelOutOfRange,
    MissingIndex,
    MissingShard,
    NoImages,
    PackingError,
    TooManyBadSamples,
    UnreadableShard,
    UnreadableUrl,
    UnsupportedUrl,
)

CORRUPT = CorruptSample("a.tar", "000001", 512, "image file is truncated")
ERRORS = [
    (
        UnsupportedUrl("s9://x", "Protocol not known: s9"),
        "s9://x: Protocol not known: s9; allowed: paths",
    ),
    (MissingIndex("d", "there is no such index"), "d: there is no such index; pack images into it"),
    (BadIndex("d/index.json", "version is 9"), "d/index.json: version is 9; make the index anew"),
    (MissingShard(("d/a.tar",)), "1 shard is in the index but not in storage: d/a.tar; restore"),
    (MissingShard(tuple("abcdefg")), "7 shards are in the .*: a, b, c, d, e and 2 more; restore"),
    (UnreadableUrl("d/a.tar", "timed out"), "d/a.tar: cannot be read: timed out; see that"),
    (UnreadableShard("d/a.tar", "empty file"), "d/a.tar: not a tar: empty file; replace it"),
    (BadLabels("d/labels.json", "is not there"), "d/labels.json: is not there; take the file that"),
    (
        LabelOutOfRange("a.tar", "000007", 12, 10),
        "a.tar: sample 000007 has label 12, allowed are 0 to 9 .*num_classes to at least 13",
    ),
    (CORRUPT, "a.tar: sample 000001 at byte 512: image file is truncated"),
    (TooManyBadSamples((CORRUPT, CORRUPT), 1), "2 corrupt samples, .*allows 1: a.*000001.* raise"),
    (TooManyBadSamples((CORRUPT,), 100), "all 1 samples of the set are corrupt: .*repair the sha"),
    (PackingError("x: holds no images"), "x: holds no images"),
    (NoImages("photos", "holds no images"), "photos: holds no images"),
]


@pytest.mark.parametrize(("error", "text"), ERRORS, ids=lambda value: type(value).__name__)
def test_message_and_pickle(error: DataError, text: str) -> None:
    with pytest.raises(type(error), match=text):
        raise pickle.loads(pickle.dumps(error))
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_every_error_is_tested_here() -> None:
    assert {type(error) for error, _ in ERRORS} == set(DataError.__subclasses__())
