"""Tables, pictures and files from per-sample rows, with the paper's numbers beside."""

from lightning_advknn.reports.dashboard import Dashboard
from lightning_advknn.reports.evaluate import evaluate, prepare
from lightning_advknn.reports.leaderboard import leaderboard, prepare_leaderboard
from lightning_advknn.reports.reproduction import plan, report_grid, reproduce, show

__all__ = [
    "Dashboard",
    "evaluate",
    "leaderboard",
    "plan",
    "prepare",
    "prepare_leaderboard",
    "report_grid",
    "reproduce",
    "show",
]
