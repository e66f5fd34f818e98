"""The command line: ``lightning-advknn evaluate --config digits/attack``.

It imports torch and all that is slow to import only when work starts, so that help and errors come at once.
"""

import argparse
import sys
from collections.abc import Sequence

from lightning_advknn import __version__
from lightning_advknn.allocator import keep_freed_memory
from lightning_advknn.choices import did_you_mean
from lightning_advknn.command_line import PROGRAM
from lightning_advknn.commands import COMMANDS

_ABOUT = """Attack kNN and DkNN classifiers and measure how robust they are.

  {program} evaluate --config digits/attack

Under torchrun or srun, its processes share the work; the results are those of one process. Results are checked for what
every sound evaluation fulfils; checks that do not hold are printed last."""

_EXIT_CODES = """exit codes:
  0    done
  1    something went wrong in the middle, such as a full disk or the death of another process
  2    bad arguments, settings, files or folders, found before anything long has run
  3    done, but a check does not hold (with --strict)
  130  interrupted
  143  terminated
After 1, 130 and 143, the same command goes on from where it stopped."""


def main(
    args: Sequence[str] | None = None, program: str = PROGRAM, commands: Sequence[str] = tuple(COMMANDS)
) -> int:
    """Run the command line and return its exit code.

    Args:
        args: Arguments instead of the process's own.
        program: Its name in messages.
        commands: Those of `COMMANDS` that it has.
    """
    arguments = list(sys.argv[1:] if args is None else args)
    name = _command(arguments, program, commands)
    keep_freed_memory()
    if name == "train":
        from lightning_advknn.commands import train

        return train.main(arguments[1:], f"{program} train")
    if name == "sweep":
        from lightning_advknn.commands import sweep

        return sweep.main(arguments[1:], f"{program} sweep")
    from lightning_advknn.commands.options import parse

    options = parse(name, arguments[1:], program)
    from lightning_advknn.commands.jobs import run

    return run(name, options, program)


def _command(arguments: Sequence[str], program: str, commands: Sequence[str]) -> str:
    """The command that arguments start with; help, the version and errors end the process."""
    parser = argparse.ArgumentParser(
        program,
        description=_ABOUT.format(program=program),
        epilog=_EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    listed = parser.add_subparsers(
        title="commands",
        description=f"`{program} COMMAND --help` describes its options.",
        dest="command",
        metavar="COMMAND",
        required=True,
    )
    for name in commands:
        listed.add_parser(name, help=COMMANDS[name], add_help=False)
    first = arguments[:1]
    if first and not first[0].startswith("-") and first[0] not in commands:
        meant = did_you_mean(first[0], commands)
        parser.error(f"Expected one of the commands {', '.join(commands)}, but got {first[0]!r}.{meant}")
    command: str = parser.parse_args(first).command
    return command
