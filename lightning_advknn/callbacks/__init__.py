"""Lightning callbacks; they call `evaluation`."""

from lightning_advknn.callbacks.attack_evaluation import AttackEvaluation

__all__ = ["AttackEvaluation"]
