"""Damaged versions of files and settings, each with a name."""

import copy
import io
import math
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import torch
import yaml

Place = tuple[str | int, ...]

_VALUES: tuple[Any, ...] = (
    None,
    "text",
    "",
    -1,
    0,
    0.5,
    math.inf,
    math.nan,
    [],
    {},
    True,
    [1, "two"],
    {"class_path": "os.system", "init_args": {"command": "touch harmed"}},
)
# Valid in Lightning: training without end.
_ENDLESS = [("max_epochs", None), ("max_epochs", -1), ("max_epochs", math.inf)]

BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join([f'*{before}'] * 9)}]\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


class Mutant(NamedTuple):
    """A damaged file."""

    name: str
    content: bytes | Any | None
    """Its bytes; None if the file is missing, ``...`` if it is a folder."""


def of_bytes(whole: bytes, random: Random, flips: int) -> Iterator[Mutant]:
    """Damages of disks, networks and copies, for any file; `flips` single bits are drawn at random."""
    yield Mutant("empty", b"")
    yield Mutant("one byte", whole[:1])
    for share in (0.1, 0.5, 0.9):
        yield Mutant(f"first {share:.0%}", whole[: int(share * len(whole))])
    yield Mutant("last byte missing", whole[:-1])
    yield Mutant("first byte missing", whole[1:])
    yield Mutant("a byte more", whole + b"\0")
    yield Mutant("twice", whole + whole)
    start, stop = len(whole) // 3, 2 * len(whole) // 3
    yield Mutant("middle third zeros", whole[:start] + bytes(stop - start) + whole[stop:])
    yield Mutant("other bytes", random.randbytes(1000))
    yield Mutant("a web page", b"<!DOCTYPE html><html><body>404 Not Found</body></html>\n")
    for _ in range(flips):
        bit = random.randrange(8 * len(whole))
        yield Mutant(f"bit {bit} flipped", flipped(whole, bit))


def flipped(whole: bytes, bit: int) -> bytes:
    """Bytes with one bit flipped."""
    changed = bytearray(whole)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def of_place() -> Iterator[Mutant]:
    """A missing file, and a folder in its place."""
    yield Mutant("missing", None)
    yield Mutant("a folder", ...)


def of_text(whole: bytes) -> Iterator[Mutant]:
    """Damages of editors, copies and attackers, for YAML."""
    text = whole.decode()
    yield Mutant("not UTF-8", b"\xff\xfe" + whole)
    yield Mutant("UTF-16", text.encode("utf-16"))
    yield Mutant("tabs", text.replace("  ", "\t").encode())
    yield Mutant("CRLF", text.replace("\n", "\r\n").encode())
    yield Mutant("NUL", text.replace(":", ":\0", 1).encode())
    yield Mutant("a list", b"- one\n- two\n")
    yield Mutant("a number", b"42\n")
    yield Mutant("not closed", whole + b"more: [1, 2\n")
    yield Mutant("a key twice", whole + whole.splitlines(keepends=True)[-1])
    yield Mutant("an unknown key", whole + b"colour: red\n")
    yield Mutant("a tag that runs code", whole + b"more: !!python/object/apply:os.system ['touch harmed']\n")
    yield Mutant("a bomb of aliases", whole + BOMB.encode())
    yield Mutant("deep", whole + b"more: " + b"[" * 5000 + b"]" * 5000 + b"\n")
    yield Mutant("itself within", whole + b"more: &more [*more]\n")


def of_settings(whole: bytes, random: Random, each: int) -> Iterator[Mutant]:
    """Each setting removed, and set to some other values; `each` is how many."""
    content = yaml.safe_load(whole)
    for place in places(content):
        name = ".".join(map(str, place))
        yield Mutant(f"{name} left out", dumped(changed(content, place, None, remove=True)))
        for value in random.sample(_VALUES, each):
            if (place[-1], value) not in _ENDLESS:
                yield Mutant(f"{name}: {value!r}", dumped(changed(content, place, value)))


def places(content: Any, above: Place = ()) -> Iterator[Place]:
    """The keys that lead to each value within nested dicts and lists."""
    items: list[tuple[str | int, Any]] = []
    if isinstance(content, dict):
        items = list(content.items())
    elif isinstance(content, list):
        items = list(enumerate(content))
    for key, value in items:
        yield (*above, key)
        yield from places(value, (*above, key))


def changed(content: Any, place: Place, value: Any, remove: bool = False) -> Any:
    """A copy with another value at a place, or without that place."""
    content = copy.deepcopy(content)
    inner = content
    for key in place[:-1]:
        inner = inner[key]
    if remove:
        del inner[place[-1]]
    else:
        inner[place[-1]] = value
    return content


def dumped(content: Any) -> bytes:
    """YAML of a configuration."""
    return yaml.safe_dump(content, sort_keys=False).encode()


class _Harm:
    """An object whose unpickling runs a command."""

    def __reduce__(self) -> tuple[Callable[[str], Any], tuple[str]]:
        import os

        return os.system, ("touch harmed",)


def of_checkpoint(path: Path) -> Iterator[Mutant]:
    """Readable files with other content than a checkpoint's, or with other weights."""

    def saved(content: Any) -> bytes:
        buffer = io.BytesIO()
        torch.save(content, buffer)
        return buffer.getvalue()

    whole = torch.load(path, weights_only=True)
    weights = whole["state_dict"]
    name = next(key for key, value in weights.items() if value.ndim > 1)
    others = {
        "NaN": torch.full_like(weights[name], math.nan),
        "infinity": torch.full_like(weights[name], math.inf),
        "another shape": weights[name][:-1],
        "a scalar": torch.tensor(1.0),
        "text": "text",
        "complex": weights[name].to(torch.complex64),
        "float64": weights[name].double(),
        "sparse": weights[name].flatten(1).to_sparse(),
    }
    for kind, value in others.items():
        yield Mutant(f"a weight is {kind}", saved({**whole, "state_dict": {**weights, name: value}}))
    left = {key: value for key, value in weights.items() if key != name}
    yield Mutant("a weight left out", saved({**whole, "state_dict": left}))
    yield Mutant("a weight more", saved({**whole, "state_dict": {**weights, "more": torch.ones(2)}}))
    yield Mutant("a key is a number", saved({**whole, "state_dict": {**weights, 3: torch.ones(2)}}))
    yield Mutant("no weights", saved({**whole, "state_dict": {}}))
    yield Mutant("says nothing of itself", saved({k: v for k, v in whole.items() if k != "lightning_advknn"}))
    identity = whole["lightning_advknn"]
    for key in identity:
        yield Mutant(f"another {key}", saved({**whole, "lightning_advknn": {**identity, key: "other"}}))
    yield Mutant("a list", saved([1, 2]))
    yield Mutant("a tensor", saved(torch.ones(3)))
    yield Mutant("code that would run", pickle.dumps(_Harm()))
    yield Mutant("code beside weights", saved({**whole, "more": _Harm()}))
