"""Tables, pictures and files from per-sample rows, with the paper's numbers beside."""

from lightning_advknn.reports.evaluate import evaluate, prepare

__all__ = ["evaluate", "prepare"]
