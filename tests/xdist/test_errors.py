"""Errors cross process borders undamaged."""

from __future__ import annotations

import inspect
import pickle

import pytest

from xdist import errors

ALL = [value for _, value in inspect.getmembers(errors, inspect.isclass)]


@pytest.mark.parametrize("error_class", ALL)
def test_an_error_survives_pickle(error_class: type[errors.XdistError]) -> None:
    error = error_class("what, where, what next")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is error_class
    assert str(copy) == "what, where, what next"


def test_every_error_is_drawn_in_the_tree() -> None:
    assert errors.__doc__ is not None
    assert all(error_class.__name__ in errors.__doc__ for error_class in ALL)
