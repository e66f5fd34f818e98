"""Find the images in a folder, and describe unused files and equal images."""

import os
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from lightning_advknn.data.decoding import extensions
from lightning_advknn.data.files import ImageFile

_EXTENSION = "files of kinds that Pillow does not read"
_HIDDEN = "hidden files and folders"
_LINK = "links out of their class folder, to folders or to nothing"
_BESIDE = "files beside the class folders"
_SPECIAL = "pipes, sockets and devices"
OTHER_PART = "folders beside train and test that have their classes"

_SHARED = "test images that are training images too"
_TORN = "images in the folders of several classes"

_OF_SYSTEMS = ("thumbs.db", "desktop.ini", "__macosx", "@eadir", "$recycle.bin", "system volume information")
_NAMED = 3  # examples in a warning

Unused = dict[str, list[Path]]
"""Files and folders that are not used, by reason."""


class Found(NamedTuple):
    """Files in a folder of class folders."""

    images: dict[str, list[Path]]
    """Images by class, in order of names; those of a class in order of paths, folder by folder."""
    unused: Unused


def find_images(folder: Path) -> Found:
    """Find images in ``folder/<class>/``, at any depth."""
    images: dict[str, list[Path]] = {}
    unused: Unused = defaultdict(list)
    for entry in sorted(folder.iterdir()):
        if is_hidden(entry.name):
            unused[_HIDDEN].append(entry)
        elif entry.is_dir():
            found = _files_below(entry, entry.resolve(), unused)
            images[entry.name] = sorted(found, key=lambda path: (str(path.parent), path.name))
        else:
            unused[_BESIDE].append(entry)
    return Found(images, unused)


def class_folders(folder: Path) -> list[str]:
    """Names of the class folders in a folder, sorted."""
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not is_hidden(path.name))


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name belongs to a file manager, editor or server."""
    return name.startswith(".") or name.lower() in _OF_SYSTEMS


def _files_below(folder: Path, home: Path, unused: Unused) -> Iterator[Path]:
    with os.scandir(folder) as entries:
        for entry in entries:
            path = Path(entry.path)
            if is_hidden(entry.name):
                unused[_HIDDEN].append(path)
            elif entry.is_symlink() and not (path.is_file() and path.resolve().is_relative_to(home)):
                unused[_LINK].append(path)
            elif entry.is_dir():
                yield from _files_below(path, home, unused)
            elif not entry.is_file():
                unused[_SPECIAL].append(path)
            elif path.suffix.lower() not in extensions():
                unused[_EXTENSION].append(path)
            else:
                yield path


def check_names(folder: Path, names: Iterable[str]) -> None:
    """Raise a ValueError unless names are UTF-8, and differ in more than their Unicode forms."""
    forms: dict[str, str] = {}
    for name in names:
        try:
            name.encode()
        except UnicodeEncodeError:
            raise ValueError(
                f"Expected names in UTF-8 in {folder}, but got the bytes {os.fsencode(name)!r}. Rename it;"
                " `convmv` renames whole folders."
            ) from None
        other = forms.setdefault(unicodedata.normalize("NFC", name), name)
        if other != name:
            raise ValueError(
                f"Expected distinct names in {folder}, but {other!a} and {name!a} are the same text in two"
                " Unicode forms: macOS writes NFD, others NFC. Rename or merge them."
            )


def unused_words(root: Path, unused: Mapping[str, Sequence[Path]]) -> str:
    """Describe unused files, with their number by kind; "" if there are none."""
    parts = []
    for kind, paths in sorted(unused.items()):
        endings = Counter(path.suffix.lower() or "none" for path in paths).most_common(10)
        of_each = (
            ", ".join(f"{_shown(ending)} {n}" for ending, n in endings) + "; " if kind == _EXTENSION else ""
        )
        parts.append(
            f"{kind}: {len(paths)}"
            f" ({of_each}{_some(path.relative_to(root).as_posix() for path in sorted(paths))})"
        )
    return f"Not used, of {root}: {'; '.join(parts)}." if parts else ""


def class_words(names: Iterable[str]) -> str:
    """Describe classes whose names look equal; "" if there are none."""
    alike = defaultdict(list)
    for name in names:
        alike[name.strip().casefold()].append(name)
    pairs = [str(group) for group in alike.values() if len(group) > 1]
    return (
        f"These classes differ only in case or blanks, and count as different: {_some(pairs)}."
        if pairs
        else ""
    )


def equal_images(training: Mapping[ImageFile, int], test: Mapping[ImageFile, int]) -> dict[str, list[str]]:
    """Names of images that are equal, pixel by pixel, across train and test or across classes, by kind.

    Args:
        training: Labels of the training images.
        test: Labels of the test images.
    """
    first: dict[str, str] = {}
    names, labels = defaultdict(list), defaultdict(set)
    for file, label in (*training.items(), *test.items()):
        names[file.pixels].append(file.name)
        labels[file.pixels].add(label)
    for file in training:
        first.setdefault(file.pixels, file.name)
    found = {
        _SHARED: [f"{file.name} = {first[file.pixels]}" for file in test if file.pixels in first],
        _TORN: [" = ".join(names[pixels][:4]) for pixels, several in labels.items() if len(several) > 1],
    }
    return {kind: equal for kind, equal in found.items() if equal}


def equal_words(equal: Mapping[str, Sequence[str]]) -> str:
    """Describe equal images; "" if there are none."""
    parts = [f"{kind}: {len(names)} ({_some(names)})" for kind, names in equal.items()]
    return f"Equal pixel by pixel, {'; '.join(parts)}. Delete the wrong ones." if parts else ""


def _some(names: Iterable[str]) -> str:
    names = list(names)
    more = [f"{len(names) - _NAMED} more"] if len(names) > _NAMED else []
    return ", ".join([_shown(name) for name in names[:_NAMED]] + more)


def _shown(name: str) -> str:
    return os.fsencode(name).decode("utf-8", "backslashreplace")
