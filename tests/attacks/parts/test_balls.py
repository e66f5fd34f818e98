"""Which norm each attack of torchattacks, foolbox and ART is measured in.

Written by hand: torchattacks' from its README's table, foolbox's from its API's names and papers
(`HopSkipJumpAttack` and the like in L2, EAD in L1, ...), ART's from its wiki and the papers. None where they
leave it open; the reason where one cannot be used here.
"""

import inspect
import re
import warnings

import art.attacks.evasion
import numpy as np
import pytest
import torch
import torchattacks
from art.attacks.attack import EvasionAttack

from lightning_advknn.attacks import AttackSettings

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # foolbox 3.3.4 imports a name that scipy moved
    import foolbox

TORCHATTACKS = {
    "linf": "APGD APGDT AutoAttack BIM DIFGSM EOTPGD FAB FFGSM FGSM Jitter MIFGSM NIFGSM PGD PGDRS PIFGSM PIFGSMPP RFGSM SINIFGSM SPSA"
    " Square TIFGSM TPGD UPGD VMIFGSM VNIFGSM",
    "l2": "CW DeepFool PGDL2 PGDRSL2",
    "l1": "EADL1",
    "l0": "JSMA OnePixel Pixle SparseFool",
    "open": "EADEN GN VANILA",  # L1 and L2; Gaussian noise; no change
    "unusable": "LGV MultiAttack",  # a loader of training images; other attacks
}
FOOLBOX = {
    "linf": "AdamPGD FGSM GenAttack LInfFMNAttack LinfAdamBasicIterativeAttack LinfAdamPGD LinfAdamProjectedGradientDescentAttack"
    " LinfAdditiveUniformNoiseAttack LinfBasicIterativeAttack LinfDeepFoolAttack LinfFastGradientAttack"
    " LinfMomentumIterativeFastGradientMethod LinfPGD LinfProjectedGradientDescentAttack LinfRepeatedAdditiveUniformNoiseAttack"
    " LinfinityBrendelBethgeAttack MIFGSM PGD",
    "l2": "BoundaryAttack DDNAttack FGM HopSkipJumpAttack L2AdamBasicIterativeAttack L2AdamPGD L2AdamProjectedGradientDescentAttack"
    " L2AdditiveGaussianNoiseAttack L2AdditiveUniformNoiseAttack L2BasicIterativeAttack L2BrendelBethgeAttack L2CarliniWagnerAttack"
    " L2ClippingAwareAdditiveGaussianNoiseAttack L2ClippingAwareAdditiveUniformNoiseAttack"
    " L2ClippingAwareRepeatedAdditiveGaussianNoiseAttack L2ClippingAwareRepeatedAdditiveUniformNoiseAttack"
    " L2ContrastReductionAttack L2DeepFoolAttack L2FMNAttack L2FastGradientAttack L2MomentumIterativeFastGradientMethod L2PGD"
    " L2ProjectedGradientDescentAttack L2RepeatedAdditiveGaussianNoiseAttack L2RepeatedAdditiveUniformNoiseAttack NewtonFoolAttack"
    " SaltAndPepperNoiseAttack VirtualAdversarialAttack",
    "l1": "EADAttack L1AdamBasicIterativeAttack L1AdamPGD L1AdamProjectedGradientDescentAttack L1BasicIterativeAttack"
    " L1BrendelBethgeAttack L1FMNAttack L1FastGradientAttack L1MomentumIterativeFastGradientMethod L1PGD"
    " L1ProjectedGradientDescentAttack SparseL1DescentAttack",
    "l0": "L0BrendelBethgeAttack L0FMNAttack",
    "open": "PointwiseAttack SpatialAttack",
    # What their `distance` says.
    "told": "BinarizationRefinementAttack BinarySearchContrastReductionAttack DatasetAttack GaussianBlurAttack InversionAttack"
    " LinearSearchBlendedUniformNoiseAttack LinearSearchContrastReductionAttack",
    "unusable": "Attack",
}
ART = {
    "linf": "AutoAttack AutoConjugateGradient AutoProjectedGradientDescent BasicIterativeMethod CarliniLInfMethod FastGradientMethod"
    " MomentumIterativeMethod ProjectedGradientDescent ProjectedGradientDescentNumpy ProjectedGradientDescentPyTorch"
    " ProjectedGradientDescentTensorFlowV2 RescalingAutoConjugateGradient SquareAttack ThresholdAttack UniversalPerturbation",
    "l2": "BoundaryAttack CarliniL2Method DeepFool GeoDA HopSkipJump NewtonFool SignOPTAttack SimBA VirtualAdversarialMethod ZooAttack",
    "l0": "CarliniL0Method PixelAttack SaliencyMapMethod",
    "wasserstein": "Wasserstein",
    "open": "AdversarialPatchPyTorch ElasticNet OverTheAirFlickeringPyTorch ShadowAttack SpatialTransformation",
    # Not of images, classifiers or PyTorch; or they need objects that a configuration cannot write; or they
    # aim at their labels.
    "unusable": "AdversarialPatch AdversarialPatchNumpy AdversarialPatchTensorFlowV2 AdversarialTexturePyTorch BrendelBethgeAttack"
    " CarliniWagnerASR CompositeAdversarialAttackPyTorch DPatch DecisionTreeAttack FeatureAdversariesNumpy FeatureAdversariesPyTorch"
    " FeatureAdversariesTensorFlowV2 FrameSaliencyAttack GRAPHITEBlackbox GRAPHITEWhiteboxPyTorch HighConfidenceLowUncertainty"
    " ImperceptibleASR ImperceptibleASRPyTorch LaserAttack LowProFool MalwareGDTensorFlow OverloadPyTorch RobustDPatch SNAL"
    " TargetedUniversalPerturbation",
}
LIBRARIES = {
    "torchattacks": (torchattacks, torchattacks.attack.Attack, TORCHATTACKS),
    "foolbox.attacks": (foolbox.attacks, foolbox.attacks.base.Attack, FOOLBOX),
    "art.attacks.evasion": (art.attacks.evasion, EvasionAttack, ART),
}
ART_PGD = "art.attacks.evasion.ProjectedGradientDescent"
ALL = [
    (f"{package}.{name}", norm)
    for package, (_, _, norms) in LIBRARIES.items()
    for norm, names in norms.items()
    for name in names.split()
]


def found(module, base):
    return {
        name: each for name, each in vars(module).items() if isinstance(each, type) and issubclass(each, base)
    }


def needed(path):
    """Settings that an attack must have."""
    package, _, name = path.rpartition(".")
    module, base, _ = LIBRARIES[package]
    kind = found(module, base)[name]
    parameters = inspect.signature(kind).parameters
    eps = package == "foolbox.attacks" and issubclass(kind, foolbox.attacks.base.FixedEpsilonAttack)
    return {
        **({"eps": 0.1} if eps else {}),
        **({"targeted": False} if "targeted" in parameters else {}),
        **({"steps": 2} if name == "VirtualAdversarialAttack" else {}),
    }


@pytest.mark.parametrize("package", LIBRARIES)
def test_the_table_has_every_attack(package):
    module, base, norms = LIBRARIES[package]
    assert set(found(module, base)) <= {name for names in norms.values() for name in names.split()}


@pytest.mark.parametrize(("path", "norm"), ALL, ids=[path for path, _ in ALL])
def test_the_norm_of_each_attack(path, norm):
    settings = AttackSettings(path, needed(path) if norm != "unusable" else {})
    if "BrendelBethge" in path:
        pytest.importorskip("numba")
    if norm in ("l2", "linf"):
        assert settings.measure == norm
        return
    message = {
        "unusable": rf"Expected the settings of {path} to be among|one of .* not there",
        "open": rf"Expected `norm` to say what {path} keeps small",
        "told": "distance says neither l2 nor linf",
    }.get(norm, rf"Expected the norm of {path} to be L2 or Linf, .* but got '{norm}'")
    with pytest.raises(ValueError, match=message):
        _ = settings.measure
    if norm == "open":
        assert AttackSettings(path, settings.settings, norm="L2").measure == "l2"
    elif norm == "told":
        for distance, said in (("l2", "l2"), ("Linf", "linf"), (2, "l2"), (np.inf, "linf")):
            assert AttackSettings(path, {"distance": distance}).measure == said
        with pytest.raises(ValueError, match=r"to be L2 or Linf, .* but got 'l1'"):
            _ = AttackSettings(path, {"distance": "L1"}).measure
    else:  # before anything runs, whatever the user says
        with pytest.raises(ValueError, match=message):
            AttackSettings(path, settings.settings, norm=None if norm == "unusable" else "l2").check()


@pytest.mark.parametrize(
    ("path", "settings", "norm"),
    [
        *(
            (f"torchattacks.{name}", {"norm": given}, norm)
            for name in ("APGD", "APGDT", "AutoAttack", "FAB", "Square")
            for given, norm in (
                ("L2", "l2"),
                ("l2", "l2"),
                (2, "l2"),
                ("LINF", "linf"),
                ("inf", "linf"),
                (np.inf, "linf"),
            )
        ),
        *(
            (f"art.attacks.evasion.{name}", {"norm": given}, norm)
            for name in ("ProjectedGradientDescent", "SquareAttack", "HopSkipJump", "GeoDA")
            for given, norm in (
                (2, "l2"),
                ("2", "l2"),
                ("L2", "l2"),
                (np.inf, "linf"),
                ("inf", "linf"),
                ("linf", "linf"),
            )
        ),
        ("foolbox.attacks.HopSkipJumpAttack", {"constraint": "l2"}, "l2"),
        ("foolbox.attacks.HopSkipJumpAttack", {"constraint": "Linf"}, "linf"),
        ("art.attacks.evasion.ElasticNet", {"decision_rule": "L2"}, "l2"),
        (
            "art.attacks.evasion.Wasserstein",
            {"ball": "inf", "norm": "2"},
            "linf",
        ),  # within it; steps are of the other
        ("art.attacks.evasion.Wasserstein", {"ball": "2", "norm": "inf"}, "l2"),
    ],
)
def test_a_setting_decides_the_norm(path, settings, norm):
    settings = {**needed(path), **settings}
    attack = AttackSettings(path, settings)
    assert attack.measure == norm
    assert attack.describe()["settings"] == settings


@pytest.mark.parametrize(
    ("path", "settings"),
    [
        ("torchattacks.FAB", {"norm": "L1"}),
        ("torchattacks.APGD", {"norm": "l1"}),
        ("art.attacks.evasion.ProjectedGradientDescent", {"norm": 1}),
        ("art.attacks.evasion.SquareAttack", {"norm": "L1"}),
        ("art.attacks.evasion.ElasticNet", {"decision_rule": "L1"}),
        ("foolbox.attacks.EADAttack", {"decision_rule": "L1", "eps": 5.0}),
        ("foolbox.attacks.L1FastGradientAttack", {"eps": 5.0}),
    ],
)
def test_l1_is_refused_at_the_start(path, settings):
    with pytest.raises(ValueError, match=rf"{path}.*(L2 or Linf|'L1')"):
        AttackSettings(path, {**needed(path), **settings}).check()


@pytest.mark.parametrize(
    ("path", "settings", "order", "margin"),
    [
        ("torchattacks.APGD", {"norm": "l2", "eps": 0.7, "steps": 5}, 2, 0.1),
        ("torchattacks.APGD", {"norm": "inf", "eps": 0.05, "steps": 5}, np.inf, 0.1),
        ("torchattacks.Square", {"norm": 2, "eps": 0.7, "n_queries": 20}, 2, 0.1),
        (ART_PGD, {"norm": "L2", "eps": 0.7, "eps_step": 0.3, "max_iter": 5}, 2, 1.0),
        (ART_PGD, {"norm": "linf", "eps": 0.05, "eps_step": 0.03, "max_iter": 5}, np.inf, 1.0),
        ("foolbox.attacks.DDNAttack", {"eps": 0.7, "steps": 40}, 2, 6.0),
        ("foolbox.attacks.LinfDeepFoolAttack", {"eps": 0.05}, np.inf, 3.0),
        ("foolbox.attacks.InversionAttack", {"eps": 0.7, "distance": "L2"}, 2, 0.1),
    ],
)
def test_eps_is_of_the_norm_that_is_said(path, settings, order, margin):
    """Measured on what uses its eps up: ascent, and smallest perturbations that are longer than eps and cut."""
    images = 0.4 + 0.2 * torch.rand(4, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    weight = torch.randn(36, generator=torch.Generator().manual_seed(1))

    def logits_fn(each):
        first = (each - 0.5).flatten(1) @ weight
        return torch.stack([margin + first - (images[: len(each)] - 0.5).flatten(1) @ weight, 0 * first], 1)

    attack = AttackSettings(path, settings)
    moved = attack.bind((1, 6, 6), 2)(logits_fn, images, torch.zeros(4, dtype=torch.int64)) - images
    sizes = torch.linalg.vector_norm(moved.flatten(1), order, dim=1)
    torch.testing.assert_close(sizes.max().item(), settings["eps"], rtol=0.02, atol=0)
    assert attack.measure == {2: "l2", np.inf: "linf"}[order]


def test_a_users_word_is_taken_where_the_library_is_silent_and_must_agree_where_it_is_not():
    assert AttackSettings("torchattacks.GN", norm="LINF").measure == "linf"
    assert AttackSettings("foolbox.attacks.DDNAttack", norm="L2").measure == "l2"
    message = "Expected `norm` of foolbox.attacks.DDNAttack to be 'l2', as it says itself, but got 'linf'. Leave `norm` out."
    with pytest.raises(ValueError, match=re.escape(message)):
        AttackSettings("foolbox.attacks.DDNAttack", norm="linf").check()
    with pytest.raises(ValueError, match=r"to be L2 or Linf, .* but got 'l1'"):
        AttackSettings("torchattacks.GN", norm="L1").check()


def test_a_class_of_ones_own_is_not_taken_for_what_it_extends():
    # It may project to another ball.
    with pytest.raises(ValueError, match=r"say what .*Own keeps small"):
        _ = AttackSettings(f"{__name__}.Own").measure
    assert AttackSettings(f"{__name__}.Own", norm="l2").measure == "l2"
    assert AttackSettings(f"{__name__}.OwnWithANorm").measure == "l2"
    assert AttackSettings(f"{__name__}.OwnPixels").measure == "linf"


class Own(torchattacks.PGD):
    """Something else."""


class OwnWithANorm(torchattacks.PGD):
    norm = "L2"


class OwnPixels(art.attacks.evasion.ProjectedGradientDescent):
    """It has the `norm` that it extends."""
