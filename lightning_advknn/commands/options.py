"""Options of the commands evaluate, leaderboard and reproduce."""

from collections.abc import Sequence
from typing import Any

from lightning_advknn.choices import WandbMode
from lightning_advknn.command_line import CommandParser
from lightning_advknn.commands import COMMANDS
from lightning_advknn.configurations import SHIPPED
from lightning_advknn.experiment.grid import Grid
from lightning_advknn.experiment.settings import experiment_parser


def parse(name: str, args: Sequence[str], program: str) -> Any:
    """Options of a command, with settings as objects; errors end the process with code 2.

    Args:
        name: Of the command.
        args: After its name.
        program: Name in messages.
    """
    parser = _make_parser(name, program)
    try:
        return parser.instantiate(parser.parse_args(list(args)))
    except (TypeError, RecursionError) as error:  # jsonargparse takes some nestings for others
        parser.error(f"Expected settings nested as in {SHIPPED}, but: {error}")
    except UnicodeError as error:
        parser.error(f"Expected a configuration to be text in UTF-8, but: {error}. Save it in that encoding.")


def _make_parser(name: str, program: str) -> CommandParser:
    """The parser of a command's options."""
    about: dict[str, Any] = {"prog": f"{program} {name}", "description": COMMANDS[name]}
    if name == "reproduce":
        parser = CommandParser(**about)
        parser.add_argument(
            "--config", action="config", help="A grid: a file, or one that ships, such as reproduce."
        )
        parser.add_class_arguments(Grid)
        parser.add_argument(
            "--only",
            nargs="+",
            default=[],
            help="Names of cells, or beginnings or patterns of them, such as mnist/tables '*/seed0'.",
        )
        parser.add_argument("--dry-run", action="store_true", help="Show what there is and what would run.")
    else:
        parser = experiment_parser(**about)
        parser.add_argument(
            "--results",
            type=str | None,
            default=None,
            help="Folder of tables over several seeds, such as results/mnist, to add this seed to.",
        )
    parser.add_argument(
        "--wandb_mode",
        type=WandbMode,
        default="disabled",
        help="What W&B does: by default nothing, as files have it all. WANDB_MODE, if set, overrides"
        " `offline` and `online`.",
    )
    parser.add_argument(
        "--wandb_project",
        default="lightning-advknn",
        help="W&B's project, that of the training configurations.",
    )
    parser.add_argument(
        "--strict", action="store_true", help="Exit with code 3 if a check of the results does not hold."
    )
    parser.add_argument(
        "--quiet",
        action="store_true",
        help="Print only where the results are and checks that do not hold: no progress, no tables.",
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=300.0,
        help="Of several processes: seconds without a sign of life after which another counts as dead.",
    )
    return parser
