"""Records and measurements by what they share, in order of first appearance."""

from collections.abc import Callable, Iterable
from typing import TypeVar

_Item = TypeVar("_Item")
_Row = TypeVar("_Row")
_Column = TypeVar("_Column")


def grouped(items: Iterable[_Item], key: Callable[[_Item], _Row]) -> dict[_Row, list[_Item]]:
    """Items by key.

    >>> grouped(["kNN", "DkNN", "DNN"], len)
    {3: ['kNN', 'DNN'], 4: ['DkNN']}
    """
    found: dict[_Row, list[_Item]] = {}
    for item in items:
        found.setdefault(key(item), []).append(item)
    return found


def pivoted(
    items: Iterable[_Item], row: Callable[[_Item], _Row], column: Callable[[_Item], _Column]
) -> dict[_Row, dict[_Column, list[_Item]]]:
    """Items by row and column of a table.

    >>> pivoted(["a1", "b1", "a2", "a1"], row=lambda item: item[0], column=lambda item: item[1])
    {'a': {'1': ['a1', 'a1'], '2': ['a2']}, 'b': {'1': ['b1']}}
    """
    return {key: grouped(own, column) for key, own in grouped(items, row).items()}


def columns_of(rows: dict[_Row, dict[_Column, list[_Item]]]) -> list[_Column]:
    """All columns of a pivoted table.

    >>> columns_of({"a": {"1": ["a1"]}, "b": {"2": ["b2"], "1": ["b1"]}})
    ['1', '2']
    """
    return list(dict.fromkeys(column for row in rows.values() for column in row))
