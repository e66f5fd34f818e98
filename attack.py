"""Attack kNN and DkNN and measure it: python attack.py evaluate --config configs/digits/attack.yaml.

Exit codes: 0 done; 2 bad arguments, settings, files or folders, found before anything long has run; 130 interrupted
(the same command goes on from there); 1 anything else, with its traceback.
"""

import logging
import sys

from jsonargparse import ArgumentParser

from lightning_advknn.experiment import Experiment
from lightning_advknn.reports import evaluate, prepare


def make_parser() -> ArgumentParser:
    """The command line."""
    parser = ArgumentParser(description=__doc__)
    commands = parser.add_subcommands()
    command = ArgumentParser(description="Run one experiment: train what is missing, attack, report.")
    command.add_argument(
        "--config", action="config", help="An experiment, such as configs/mnist/attack.yaml."
    )
    command.add_class_arguments(Experiment)
    command.add_argument(
        "--results",
        type=str | None,
        default=None,
        help="Folder of tables over several seeds, such as results/mnist, to add this seed to.",
    )
    commands.add_subcommand("evaluate", command)
    return parser


def main(args: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    parser = make_parser()
    config = parser.parse_args(args)
    options = parser.instantiate(config).evaluate
    for name in ("pytorch_lightning", "lightning.pytorch", "lightning.fabric", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    fields = {name: getattr(options, name) for name in Experiment.__dataclass_fields__}
    try:
        run = prepare(Experiment(**fields), options.results)
    except (ValueError, OSError, ImportError) as error:
        sys.stderr.write(f"attack.py: error: {error}\n")
        return 2
    try:
        evaluate(run, options.results)
    except KeyboardInterrupt:
        sys.stderr.write("attack.py: interrupted; the same command goes on from here\n")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
