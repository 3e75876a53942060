"""What an evaluation counts is the intersection of model, evaluation set and class weights."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from datapipe.errors import BadLabels
from datapipe.labels import Label, write_labels
from xdist.errors import UserError
from xdist.label_space import (
    ClassWeights,
    LabelSpace,
    label_space,
    read_class_weights,
    weights_of_frequencies,
)

properties = settings(derandomize=True, deadline=None, max_examples=60)
PETS = tuple(Label(i, name, 0.5) for i, name in enumerate(["cat", "dog", "emu", "7"]))


def named(*names: str) -> tuple[Label, ...]:
    return tuple(Label(i, name, 0.1) for i, name in enumerate(names))


def space_of(
    evaluation: Sequence[Label],
    *,
    model: Sequence[Label] = PETS,
    num_classes: int = 4,
    num_labels: int = 0,
    listed: Sequence[int] | None = None,
) -> LabelSpace:
    is_listed = np.isin(np.arange(num_classes), range(num_classes) if listed is None else listed)
    return label_space(
        ClassWeights(np.ones(num_classes), is_listed),
        num_labels=num_labels,
        model_labels=model,
        evaluation_labels=evaluation,
    )


def contents(space: LabelSpace) -> tuple[list[int], list[int]]:
    return space.outputs.tolist(), space.columns.tolist()


def test_the_same_labels_are_all_scored() -> None:
    assert contents(space_of(PETS)) == ([0, 1, 2, 3], [0, 1, 2, 3])


def test_labels_are_matched_by_name_and_others_left_out(caplog: pytest.LogCaptureFixture) -> None:
    assert contents(space_of(named("emu", "yak", "cat"))) == ([0, 2], [1, -1, 0])
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert "1 of 3 labels of the evaluation set" in record.getMessage()
    assert "'yak'" in record.getMessage()


def test_without_names_on_one_side_an_id_is_a_label() -> None:
    assert contents(space_of((), num_labels=6)) == ([0, 1, 2, 3], [0, 1, 2, 3, -1, -1])
    assert contents(space_of(named("a", "b"), model=())) == ([0, 1], [0, 1])


def test_outputs_that_the_evaluation_set_does_not_know_are_not_scored() -> None:
    model = named(*(f"label {i}" for i in range(17)))
    evaluation = named(*(f"label {i}" for i in range(16, 0, -3)))
    assert contents(space_of(evaluation, model=model, num_classes=17)) == (
        [1, 4, 7, 10, 13, 16],
        [5, 4, 3, 2, 1, 0],
    )


def test_what_has_no_weight_listed_is_not_scored() -> None:
    assert contents(space_of(PETS, listed=[1, 3])) == ([1, 3], [-1, 0, -1, 1])


def test_label_ids_beyond_the_labels_named_are_outside() -> None:
    assert space_of(named("cat"), num_labels=3).columns.tolist() == [0, -1, -1]


def test_an_empty_intersection_is_an_error() -> None:
    with pytest.raises(UserError, match="nothing to score: none of the 4 outputs"):
        space_of(named("yak"))


@properties
@given(st.data())
def test_restricting_equals_a_naive_loop(data: st.DataObject) -> None:
    num_classes, num_labels = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 7))
    scored = sorted(data.draw(st.sets(st.integers(0, num_classes - 1), min_size=1)))
    inside = st.integers(-1, len(scored) - 1)
    columns = data.draw(st.lists(inside, min_size=num_labels, max_size=num_labels))
    labels = data.draw(st.lists(st.lists(st.integers(0, num_labels - 1)), min_size=1, max_size=5))
    logits = torch.arange(len(labels) * num_classes, dtype=torch.float32).view(len(labels), -1)
    offsets = torch.tensor([0, *map(len, labels)]).cumsum(0)
    ids = torch.tensor([label for of_image in labels for label in of_image], dtype=torch.int64)
    space = LabelSpace(np.array(scored), np.array(columns))
    restricted, kept, kept_offsets, is_inside = space.restrict(logits, ids, offsets)
    assert restricted.tolist() == [[row[c] for c in scored] for row in logits.tolist()]
    found = [kept[a:b].tolist() for a, b in itertools.pairwise(kept_offsets)]
    assert found == [[columns[i] for i in of_image if columns[i] >= 0] for of_image in labels]
    assert is_inside.tolist() == [columns[i] >= 0 for i in ids.tolist()]


def test_frequencies_weigh_the_labels_and_outputs_beyond_them_nothing() -> None:
    weights = weights_of_frequencies([0.5, 0.25], num_classes=3)
    assert weights.weights.tolist() == [0.5, 0.25, 0.0]
    assert weights.is_listed.all()


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def weights_in(url: str, labels: Sequence[Label] = PETS) -> list[float | None]:
    """The weight of every output, None where it is not scored."""
    read = read_class_weights(url, labels, num_classes=4)
    pairs = zip(read.weights.tolist(), read.is_listed.tolist(), strict=True)
    return [weight if is_listed else None for weight, is_listed in pairs]


def test_class_weights_from_csv_by_name_or_id(tmp_path: Path) -> None:
    url = write(tmp_path / "w.csv", "weight,label\n0.5,dog\n2,0\n0,7\n")
    assert weights_in(url) == [2.0, 0.5, None, 0.0]  # 7 is a name.
    assert weights_in(write(tmp_path / "ids.csv", "label,weight\n1,3\n"), ()) == [
        None, 3.0, None, None,
    ]  # fmt: skip


def test_class_weights_from_json(tmp_path: Path) -> None:
    assert weights_in(write(tmp_path / "w.json", '{"emu": 1, "1": 0.5}')) == [None, 0.5, 1.0, None]


def test_class_weights_from_a_labels_json(tmp_path: Path) -> None:
    url = str(tmp_path / "labels.json")
    write_labels(url, [Label(0, "emu", 0.25), Label(1, "cat", 0.75)])
    assert weights_in(url) == [0.75, None, 0.25, None]


def test_weights_of_labels_that_the_model_lacks_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = "".join(f"animal {i},1\n" for i in range(8))
    assert weights_in(write(tmp_path / "w.csv", f"label,weight\ncat,1\n4,1\n{rows}")) == [
        1.0, None, None, None,
    ]  # fmt: skip
    [record] = caplog.records
    assert "9 labels of" in record.getMessage()
    assert "'4', 'animal 0', 'animal 1', 'animal 2', 'animal 3' and 4 more" in record.getMessage()


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("w.csv", "name,weight\ncat,1\n", "its first line is 'name,weight'"),
        ("w.csv", "", "its first line is ''"),
        ("w.csv", "label,weight\ncat,heavy\n", "the weight of 'cat' is 'heavy'"),
        ("w.csv", "label,weight\ncat\n", "the weight of 'cat' is None"),
        ("w.csv", "label,weight\ncat,-1\n", "allowed: at least 0"),
        ("w.csv", "label,weight\ncat,inf\n", "allowed: at least 0"),
        ("w.csv", "label,weight\ncat,1\n0,2\n", "label '0' is listed twice"),
        ("w.csv", "label,weight\nyak,1\n", "none of the 4 labels of the model has a weight"),
        ("w.csv", "label,weight\ncat,0\n", "none of the 4 labels of the model has a weight"),
        ("w.json", "{", "class weights cannot be read"),
        ("w.json", '{"cat": [1]}', "the weight of 'cat' is [1]"),
    ],
)
def test_a_file_that_holds_no_weights_says_why(
    tmp_path: Path, name: str, text: str, message: str
) -> None:
    with pytest.raises(UserError) as caught:
        weights_in(write(tmp_path / name, text))
    assert message in str(caught.value)
    assert name in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.csv: class weights cannot be read"):
        weights_in(str(tmp_path / "none.csv"))


@pytest.mark.parametrize("value", [["cat"], 3, None])
def test_json_of_another_form_is_named(tmp_path: Path, value: object) -> None:
    url = write(tmp_path / "w.json", json.dumps(value))
    with pytest.raises(BadLabels, match="not a list of"):
        weights_in(url)
