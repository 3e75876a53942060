"""Assembly of batches: which rows repeat which."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from datapipe.assembly import sources


@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=6), min_size=1, max_size=5))
def test_every_row_shows_a_good_one_of_its_segment_if_there_is_one(
    segments: list[list[bool]],
) -> None:
    is_good = np.array([row for segment in segments for row in segment])
    found = sources(is_good, [len(segment) for segment in segments]).tolist()
    start = 0
    for segment in segments:
        rows = range(start, start + len(segment))
        start += len(segment)
        for row in rows:
            if is_good[row]:
                assert found[row] == row
            elif any(segment):
                assert found[row] in rows
            elif is_good.any():
                assert is_good[found[row]]
            else:
                assert found[row] == -1
