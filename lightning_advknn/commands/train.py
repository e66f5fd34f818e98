"""``train``: LightningCLI on backbones and surrogates."""

import sys
from collections.abc import Sequence

from lightning_fabric.utilities.exceptions import MisconfigurationException

from lightning_advknn.commands import COMMANDS
from lightning_advknn.training_cli import AdvKNNCLI


def main(args: Sequence[str] | None = None, program: str = "train.py") -> int:
    """Run LightningCLI and return its exit code: 0 done, 2 if an argument, or a file that it names, is wrong.

    Args:
        args: Arguments instead of the process's own.
        program: Its name in messages.
    """
    try:
        AdvKNNCLI(
            None if args is None else list(args),
            parser_kwargs={"prog": program, "description": COMMANDS["train"]},
        )
    except (ValueError, OSError, ImportError, MisconfigurationException, RecursionError) as error:
        sys.stderr.write(f"{program}: error: {error}\n")
        return 2
    return 0
