"""Damaged versions of files and settings."""

from random import Random

from reliability import mutants


def test_mutants_of_bytes_are_each_another_file() -> None:
    whole = bytes(range(90))
    random = Random(0)  # noqa: S311  # not for cryptography
    contents = [mutant.content for mutant in mutants.of_bytes(whole, random, flips=5)]
    assert whole not in contents
    assert mutants.flipped(b"\x00\x00", 9) == b"\x00\x02"
    assert list(mutants.places({"a": [1, {"b": 2}]})) == [("a",), ("a", 0), ("a", 1), ("a", 1, "b")]
    assert mutants.changed({"a": [1, 2]}, ("a", 0), "x") == {"a": ["x", 2]}
