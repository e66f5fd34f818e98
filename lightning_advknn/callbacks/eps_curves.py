"""Attacks at other eps, and at several eps for a curve of success against eps."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from lightning_advknn.attacks import AttackSettings


def at_eps(attack: AttackSettings, eps: float) -> AttackSettings:
    """An attack with another eps, if it has one."""
    return replace(attack, settings={**attack.settings, "eps": eps}) if "eps" in attack.settings else attack


def eps_curves(
    attacks: Mapping[str, AttackSettings], values: Sequence[float]
) -> dict[str, dict[float, AttackSettings]]:
    """Each attack that has an eps, by eps: the values and the eps of all attacks, ascending, without 0.

    Args:
        attacks: By name.
        values: Eps of the curve; if there are none, there is no curve.

    Raises:
        ValueError: If no attack has an eps, or an attack refuses one of them.
    """
    with_eps = {name: attack for name, attack in attacks.items() if "eps" in attack.settings}
    if not values:
        return {}
    if not with_eps:
        raise ValueError(
            f"Expected no `eps_curve` without an attack that has an eps, but got {list(values)}. Add such an"
            " attack."
        )
    all_eps = sorted({*values, *(attack.settings["eps"] for attack in with_eps.values())} - {0})
    curves = {name: {eps: at_eps(attack, eps) for eps in all_eps} for name, attack in with_eps.items()}
    for curve in curves.values():
        for attack in curve.values():
            attack.check()
    return curves
