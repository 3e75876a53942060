"""Optional packages: there, or named with the line that installs them."""

from __future__ import annotations

import json

import pytest

from xdist.errors import UserError
from xdist.extras import require


def test_a_package_that_is_there_is_imported() -> None:
    assert require("json", extra="none", reason="a.json is JSON") is json


def test_a_missing_package_is_named_with_the_line_that_installs_it() -> None:
    match = r"a.h5 is a file of Keras, which needs h5pie; install it with pip install '.\[keras\]'"
    with pytest.raises(UserError, match=match):
        require("h5pie", extra="keras", reason="a.h5 is a file of Keras")
