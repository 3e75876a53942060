"""Label maps: what they may hold, and every other form refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from datapipe.errors import PackingError
from datapipe.label_map import LabelMap


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"cat": ["a", "b"]}, ("a", "b")),
        ({"cat": [10, "9"]}, ("10", "9")),
        ({"labels_of_class": {"cat": [1]}}, ("1",)),
        ({"labels_of_class": {"cat": [1, "2"]}, "names": {"1": "x", "2": "y"}}, ("1 x", "2 y")),
    ],
)
def test_labels_of_a_map_are_text_or_numbers(
    tmp_path: Path, value: dict[str, Any], expected: tuple[str, ...]
) -> None:
    (tmp_path / "map.json").write_text(json.dumps(value))
    assert LabelMap.read(tmp_path / "map.json").labels_of_class == {"cat": expected}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"cat": [null]}', "None is neither text nor an integer"),
        ('{"cat": [true]}', "True is neither text nor an integer"),
        ('{"cat": [1.5]}', "1.5 is neither text nor an integer"),
        ('{"cat": [["a"]]}', "['a'] is neither text nor an integer"),
        ('{"cat": "abc"}', "the labels of a class are not a list"),
        ('{"labels_of_class": {"cat": [1]}, "names": {"1": ["x"]}}', "['x'] is neither text"),
        ('{"labels_of_class": {"cat": [1]}, "names": {"2": "x"}}', "KeyError"),
        ('{"labels_of_class": [1]}', "AttributeError"),
        ("[1, 2]", "AttributeError"),
        ("3", "TypeError"),
        ("{", "JSONDecodeError"),
        ("[" * 100_000, "nested too deep"),
    ],
)
def test_any_other_label_map_is_refused(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "map.json").write_text(text)
    with pytest.raises(PackingError, match="not a label map") as raised:
        LabelMap.read(tmp_path / "map.json")
    assert reason in str(raised.value)
