"""Configurations by name: ``digits/attack`` is a file of the working folder, or one that ships with this."""

import os
from pathlib import Path
from typing import Any

from jsonargparse.typing import Path_fr, register_type

from lightning_advknn.choices import did_you_mean

_PACKAGE = Path(__file__).parent
_INSTALLED = _PACKAGE / "configs"

SHIPPED = _INSTALLED if _INSTALLED.is_dir() else _PACKAGE.parent / "configs"
"""Folder of the configurations that ship: a wheel has them in the package, a checkout at its top."""


class ConfigFile(Path_fr):  # type: ignore[misc]  # jsonargparse makes it when it is imported
    """A configuration's file as another configuration names it: by `find`, relative to that one's folder."""

    def __init__(self, name: Any, **options: Any) -> None:
        super().__init__(str(find(name)) if isinstance(name, str) else name, **options)


register_type(ConfigFile, type_check=isinstance)


def find(name: str) -> Path:
    """The file of a configuration.

    Args:
        name: A file, with or without ``.yaml``: relative to the working folder, to ``configs`` in it, or to the
            configurations that ship. The first that exists is taken.

    Raises:
        TypeError: If there is none; argument parsers expect this kind.
    """
    path = Path(name).expanduser()
    below = _below_configs(path)
    for place in (path, Path("configs", below), SHIPPED / below):
        for file in (place, Path(f"{place}.yaml")):
            if file.exists() and not file.is_dir():
                return file
    beside = [str(each.with_suffix("")) for each in path.parent.glob("*.yaml")]
    shipped = [each.relative_to(SHIPPED).with_suffix("").as_posix() for each in SHIPPED.rglob("*.yaml")]
    meant = did_you_mean(str(path.with_suffix("")), beside) or did_you_mean(
        str(below.with_suffix("")), shipped
    )
    raise TypeError(
        f"Expected a configuration, but there is no file {name}, and none of that name ships with the package in"
        f" {SHIPPED}.{meant}"
    )


def name_of(path: str) -> str:
    """How a command names a configuration's file: relative to the working folder, or as one that ships.

    Args:
        path: Absolute.
    """
    if Path(path).is_relative_to(SHIPPED) and not SHIPPED.is_relative_to(Path.cwd()):
        return Path(path).relative_to(SHIPPED).with_suffix("").as_posix()
    return os.path.relpath(path)


def _below_configs(path: Path) -> Path:
    return Path(*path.parts[1:]) if path.parts[:1] == ("configs",) else path
