"""``lightning-advknn`` and ``python -m lightning_advknn``: the command line."""

import sys
from pathlib import Path

from lightning_advknn.commands import main as command_line


def main() -> int:
    """Run the command line and return its exit code."""
    # Attacks and networks of one's own are named by import path, from the working folder too.
    sys.path.append(str(Path.cwd()))
    return command_line.main()


if __name__ == "__main__":
    sys.exit(main())
