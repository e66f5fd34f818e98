"""What all command lines share: configurations and suggestions by name, how a process was called."""

import json
import re
import shlex
import sys
from argparse import Action
from collections.abc import Iterable, Iterator, Mapping
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import ActionConfigFile, ArgumentParser  # type: ignore[attr-defined]  # LightningCLI uses it too

from lightning_advknn.choices import did_you_mean
from lightning_advknn.configurations import find

PROGRAM = "lightning-advknn"


class CommandParser(ArgumentParser):
    """A parser that finds configurations by name (`configurations.find`) and suggests known names."""

    def add_argument(self, *args: Any, **options: Any) -> Action:
        """Add an argument; ``action="config"`` is one for configurations."""
        if options.get("action") in ("config", ActionConfigFile):
            options["action"] = _NamedConfig
        action: Action = super().add_argument(*args, **options)
        return action

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Exit with code 2 and a message, or raise an ArgumentError, as the parser was made to."""
        suggestion = "" if "Did you mean" in message else _suggestion(self, message)
        super().error(f"{message}.{suggestion}" if suggestion else message, ex)


class _NamedConfig(ActionConfigFile):
    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        written_out = values == "-" or "{" in values or "\n" in values  # standard input, or YAML itself
        name = values if written_out else str(find(values))
        super().__call__(parser, cfg, name, option_string)  # type: ignore[no-untyped-call]


def program() -> list[str]:
    """Words that start this program again: ``python attack.py`` or ``lightning-advknn``, without folders."""
    script = Path(sys.argv[0]).name
    return ["python", script] if script in ("attack.py", "train.py") else [PROGRAM]


def command() -> str:
    """How this process was called, for files that say how they were made."""
    return shlex.join([*program(), *sys.argv[1:]])


def _suggestion(parser: ArgumentParser, message: str) -> str:
    """The end of a parser's message about an unknown name."""
    known: Iterable[str] = _names(parser)
    if found := re.search(r"class_path '([\w.]+)':\s+Option '([\w.]+)'", message):
        module, _, name = found[1].rpartition(".")
        known, unknown = signature(getattr(import_module(module), name)).parameters, found[2]
    elif found := re.search(r"Group '([\w.]+)' does not accept option '([\w.]+)'", message):
        unknown = f"{found[1]}.{found[2]}"
    elif (found := re.search(r"ption '([\w.]+)'", message)) or (
        found := re.search(r"unrecognized arguments: (--[^\s=]+)", message)
    ):
        unknown = found[1]
    elif found := re.search(r"invalid choice: '([^']+)'", message):
        known, unknown = _subcommands(parser), found[1]
    else:
        return ""
    return did_you_mean(unknown, known)


def _names(parser: ArgumentParser) -> Iterator[str]:
    """Names of a parser's options, as configurations and command lines write them, and of its subcommands'."""
    for action in parser._actions:
        yield from (action.dest, *action.option_strings)
    for subcommand in _subcommands(parser).values():
        yield from _names(subcommand)


def _subcommands(parser: ArgumentParser) -> Mapping[str, ArgumentParser]:
    return next((each.choices for each in parser._actions if isinstance(each.choices, Mapping)), {})


def option_text(value: Any) -> str:
    """A value as it is written in an option: text as it is, else as JSON."""
    return value if isinstance(value, str) else json.dumps(value)
