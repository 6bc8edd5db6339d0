"""Parameters that the fast tests try, among those that `make test-all` tries."""

from collections.abc import Iterable

import pytest


def often(values: Iterable, *fast) -> list:
    """All values, those besides `fast` as slow tests; a tuple holds one of each argument."""
    values = list(values)
    assert all(value in values for value in fast)
    marks = [() if value in fast else pytest.mark.slow for value in values]
    every = (value if isinstance(value, tuple) else (value,) for value in values)
    return [pytest.param(*one, marks=mark) for one, mark in zip(every, marks, strict=True)]
