"""Files that are not what they were: for property tests of what reads them."""

from __future__ import annotations

import copy
import json
from typing import Any

from hypothesis import strategies as st

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([10**40, -(10**40), 1e308])
    | st.floats()
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@st.composite
def changed_json(draw: st.DrawFn, value: Any) -> Any:
    """The value with another one, or none, at one of its places."""
    value = copy.deepcopy(value)
    places = list(_places(value))
    if not places:
        return draw(json_values)
    holder, key = draw(st.sampled_from(places))
    if draw(st.booleans()):
        holder[key] = draw(json_values)
    else:
        del holder[key]
    return value


def _places(value: Any) -> Any:
    """All (holder, key) in it."""
    keys = range(len(value)) if isinstance(value, list) else list(value)
    for key in keys:
        yield value, key
        if isinstance(value[key], dict | list):
            yield from _places(value[key])


@st.composite
def damaged(draw: st.DrawFn, payload: bytes) -> bytes:
    """The bytes with one of them changed, or cut off somewhere; or foreign ones."""
    place = draw(st.integers(0, max(len(payload) - 1, 0)))
    return draw(
        st.sampled_from(
            [
                payload[:place],
                payload[:place] + draw(st.binary(min_size=1, max_size=3)) + payload[place + 1 :],
                draw(st.binary(max_size=64)),
            ]
        )
    )


def foreign_json(payload: bytes) -> st.SearchStrategy[bytes]:
    """A file of JSON that was damaged, or means something else, or is anything."""
    value = json.loads(payload)
    return (
        damaged(payload)
        | changed_json(value).map(_as_bytes)
        | json_values.map(_as_bytes)
        | st.sampled_from([b"[" * 2000, b'{"a":' * 2000, b"\xff\xfe", b"NaN"])
    )


def foreign_lines(payload: bytes) -> st.SearchStrategy[bytes]:
    """The same of a file with a value a line."""
    lines = payload.splitlines()
    others = st.sampled_from(range(len(lines))).flatmap(
        lambda number: foreign_json(lines[number]).map(
            lambda line: b"\n".join([*lines[:number], line, *lines[number + 1 :]]) + b"\n"
        )
    )
    return damaged(payload) | others


def _as_bytes(value: Any) -> bytes:
    return json.dumps(value).encode()
