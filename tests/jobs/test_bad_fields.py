"""Every field of a configuration, given what it cannot be: a message that names it, and code 2."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import json
import math
import typing
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from imagenet_sync import PRESETS as SYNC_PRESETS
from jft_async import PRESETS as ASYNC_PRESETS

from xdist import command_line
from xdist.config import TrainConfig
from xdist.plain_config import from_json

BASES = (SYNC_PRESETS["cifar"], ASYNC_PRESETS["demo"])
HUGE = 10**40
WRONG: tuple[Any, ...] = (
    None, True, -1, 0, 0.5, HUGE, -HUGE, math.nan, math.inf, -math.inf, "", "abc", "1", [], [None],
    ["abc"], [math.nan, 1], {}, {"abc": 1},
)  # fmt: skip
ON_THE_COMMAND_LINE = ("", "abc", "-1", "nan", "inf", "1e999", str(HUGE), "None", "\x00", "é")


def fields_of(part: Any, prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The paths of all fields, of parts too."""
    for name, kind in typing.get_type_hints(part).items():
        yield (*prefix, name)
        if dataclasses.is_dataclass(kind):
            yield from fields_of(kind, (*prefix, name))


FIELDS = tuple(fields_of(TrainConfig))
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


def value_at(base: TrainConfig, path: tuple[str, ...]) -> Any:
    return functools.reduce(getattr, path, base)


def changed(base: TrainConfig, path: tuple[str, ...], value: Any) -> dict[str, Any]:
    """The plain values of a configuration with another one at a place."""
    plain = asdict(base)
    part = plain
    for name in path[:-1]:
        part = part[name]
    part[path[-1]] = value
    return json.loads(json.dumps(plain))  # type: ignore[no-any-return]


def check(base: TrainConfig, path: tuple[str, ...], value: Any) -> None:
    """It is a configuration, which survives JSON, or the message names the field."""
    plain, refusal = changed(base, path, value), ""
    try:
        config = from_json(TrainConfig, plain)
    except ValueError as error:
        refusal = str(error)
    if refusal:
        assert ".".join(path) in refusal
    else:
        assert from_json(TrainConfig, json.loads(json.dumps(config.to_json()))) == config


@pytest.mark.parametrize("path", FIELDS, ids=".".join)
def test_a_wrong_value_in_a_file_is_named_with_its_field(path: tuple[str, ...]) -> None:
    for base in BASES:
        for value in WRONG:
            check(base, path, value)


@settings(derandomize=True, deadline=None, max_examples=200)
@given(path=st.sampled_from(FIELDS), value=values, base=st.sampled_from(BASES))
def test_any_value_in_a_file_is_taken_or_named(
    path: tuple[str, ...], value: Any, base: TrainConfig
) -> None:
    check(base, path, value)


PARTS = {path[:-1] for path in FIELDS}


OPTIONS = [
    path
    for path in FIELDS
    if path not in PARTS and type(value_at(BASES[0], path)) is not bool  # Which takes no value.
]


@settings(derandomize=True, deadline=None, max_examples=40)
@given(path=st.sampled_from(OPTIONS), value=st.sampled_from(ON_THE_COMMAND_LINE) | st.text())
def test_any_value_of_an_option_is_taken_or_named(path: tuple[str, ...], value: str) -> None:
    option = "--" + ".".join(path).replace("_", "-")
    arguments = [f"{option}={value}", "--print-config"]
    said, told = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(told), contextlib.redirect_stderr(said):
        try:
            code = command_line.main(
                "job", SYNC_PRESETS, default="cifar", description="", arguments=arguments
            )
        except SystemExit as error:
            code = int(error.code or 0)
    assert code in (0, 2)
    assert "Traceback" not in said.getvalue()
    if code == 2:
        assert ".".join(path) in said.getvalue() or option in said.getvalue()
    else:
        from_json(TrainConfig, json.loads(told.getvalue()))
