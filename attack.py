"""Attack kNN and DkNN and measure it: python attack.py evaluate --config configs/digits/attack.yaml.

`lightning-advknn` is the same with more commands.
"""

import sys
from collections.abc import Sequence

from lightning_advknn.commands import main as command_line


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    return command_line.main(args, "attack.py", ("evaluate", "leaderboard", "reproduce"))


if __name__ == "__main__":
    sys.exit(main())
