"""The commands: each calls make, measure and show."""

COMMANDS = {
    "evaluate": "Run one experiment: train what is missing, attack, report.",
    "leaderboard": "Run one experiment and rank its attacks against every victim.",
    "reproduce": "Run a grid of experiments, what is missing of it, and report on all.",
    "train": "Train, validate or test a backbone or a surrogate.",
    "sweep": "Run trials of a W&B sweep offline.",
}
"""What each does, by name."""
