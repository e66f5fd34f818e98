"""Records and measurements by what they share, in order of first appearance."""

from collections.abc import Callable, Iterable
from typing import TypeVar

Item = TypeVar("Item")
Row = TypeVar("Row")
Column = TypeVar("Column")


def grouped(items: Iterable[Item], key: Callable[[Item], Row]) -> dict[Row, list[Item]]:
    """Items by key.

    >>> grouped(["kNN", "DkNN", "DNN"], len)
    {3: ['kNN', 'DNN'], 4: ['DkNN']}
    """
    found: dict[Row, list[Item]] = {}
    for item in items:
        found.setdefault(key(item), []).append(item)
    return found


def pivoted(
    items: Iterable[Item], row: Callable[[Item], Row], column: Callable[[Item], Column]
) -> dict[Row, dict[Column, list[Item]]]:
    """Items by row and column of a table.

    >>> pivoted(["a1", "b1", "a2", "a1"], row=lambda item: item[0], column=lambda item: item[1])
    {'a': {'1': ['a1', 'a1'], '2': ['a2']}, 'b': {'1': ['b1']}}
    """
    return {key: grouped(own, column) for key, own in grouped(items, row).items()}


def columns_of(rows: dict[Row, dict[Column, list[Item]]]) -> list[Column]:
    """All columns of a pivoted table.

    >>> columns_of({"a": {"1": ["a1"]}, "b": {"2": ["b2"], "1": ["b1"]}})
    ['1', '2']
    """
    return list(dict.fromkeys(column for row in rows.values() for column in row))
