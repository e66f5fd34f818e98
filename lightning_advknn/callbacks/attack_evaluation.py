"""Stub until written below."""

from pytorch_lightning import Callback


class AttackEvaluation(Callback):
    pass
