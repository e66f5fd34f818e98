"""Result folders as `attack.py evaluate` leaves them, with numbers of our own."""

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from matplotlib.figure import Figure

from lightning_advknn.reports.records import published
from lightning_advknn.reports.records.csv_files import write_csv
from lightning_advknn.reports.records.names import DATA_CLASSES
from lightning_advknn.reports.records.over_seeds import Plan, Planned
from lightning_advknn.reports.records.paper_records import COLUMNS
from lightning_advknn.reports.render.style import save_figure
from lightning_advknn.storage import write_json

ORIGIN = {"origin": {"layers": ["relu1", "relu2", "relu3", "logits"], "learning_rate": 1e-3}}


def surrogate(layer: str = "relu3", cls_weight: float = 0.3, cl_weight: float = 1.0) -> dict[str, Any]:
    """Arguments of a surrogate's module."""
    weights = {"cls_weight": cls_weight, "cl_weight": cl_weight}
    return {"layer": layer, "k": 75, "metric": "cosine", "learning_rate": 3e-5, **weights}


METHODS = {**ORIGIN, "dknnb": surrogate(cls_weight=1.0, cl_weight=0.0), "dknnb_cl": surrogate()}


def attack(function: str, eps: float) -> dict[str, Any]:
    """An attack's settings."""
    more = {} if function == "fgsm" else {"step_size": eps / 25, "steps": 100}
    return {"function": function, "settings": {"eps": eps, **more}, "precision": "winograd"}


ATTACKS = {"fgsm": attack("fgsm", 0.25), "bim": attack("bim", 0.25)}


def settings(
    data: str = "mnist",
    methods: Mapping[str, Mapping[str, Any]] = METHODS,
    attacks: Mapping[str, Mapping[str, Any]] = ATTACKS,
    k: int = 75,
) -> dict[str, Any]:
    """An experiment's settings, as far as a report reads them."""
    network = {"class_path": "lightning_advknn.models.ConvNet", "init_args": {}}
    sizes = {"val_size": 5000, "calibration_per_class": 75, "split_seed": 0}
    return {
        "trainings": {
            name: {
                "trainer": {"max_epochs": 18},
                "model": {"class_path": "module", "init_args": {"network": network, **arguments}},
                "data": {"class_path": "data", "init_args": sizes},
            }
            for name, arguments in methods.items()
        },
        "victim": {"layer": "relu3", "k": k, "metric": "cosine", "convention": "strict"},
        "attacks": dict(attacks),
        "label_source": "knn",
        "data": {"name": DATA_CLASSES[data], "fingerprint": "0"},
        "version": "0.1.0",
    }


def write_results(
    folder: Path,
    settings: Mapping[str, Any],
    accuracy: Callable[[str, str, str, int], float],
    seeds: Sequence[int] = (0,),
    l2: Callable[[str, str], float] = lambda method, attack: 4.5,
    **more: Any,
) -> None:
    """Write Tables 1 and 2 and summaries.

    Args:
        folder: Results folder.
        settings: Of the experiment.
        accuracy: Of victim, method, attack (``clean`` is one) and seed, in %; the DNN's and surrogates' have
            their own name as victim.
        seeds: Of training.
        l2: Of method and attack.
        more: Further content of the summaries.
    """
    data, attacks = settings["data"]["name"], settings["attacks"]
    table1, table2 = [], []
    methods = [name for name in settings["trainings"] if name not in settings.get("transfer", {})]
    for seed in seeds:
        for victim in ("dnn", "knn", "dknn", *methods[1:]):
            line = {"victim": victim, "accuracy": accuracy(victim, "origin", "clean", seed), "n": 9250}
            table1.append(
                line | {"paper": published.clean_accuracy(data, victim, settings["victim"]), "seed": seed}
            )
        for method in methods:
            for name in ("clean", *attacks):
                used = attacks[name]["settings"] if name != "clean" else {}
                distortion = 0.0 if name == "clean" else l2(method, name)
                table2 += [
                    {
                        "victim": victim,
                        "method": method,
                        "attack": name,
                        "eps": used.get("eps", 0),
                        "accuracy": accuracy(victim, method, name, seed),
                        "paper": published.accuracy_under_attack(
                            data, victim, method, name, used, settings["victim"]
                        ),
                        "l2_mean": distortion,
                        "l2_mean_success": None,
                        "credibility_mean": 0.25,
                        "n": 9250,
                        "seed": seed,
                    }
                    for victim in ("knn", "dknn")
                ]
        summary = {
            "command": f"python attack.py evaluate --seed={seed} --results={folder}",
            "settings": settings,
            "versions": {"lightning-advknn": "0.1.0", "torch": "2.15.0"},
            "device": "2 CPU cores (x86_64)",
            "date": "2026-11-23",
            "seconds": {"train origin": 60.0, "build bank": 20.0, "query clean": 30.0},
            "pieces": {
                f"backbone/{data}{seed}.ckpt": ("train origin", 60.0),
                "bank/origin": ("build bank", 20.0),
                f"observations/{data}{seed}{settings['victim']['k']}/000000": ("query clean", 30.0),
            },
            **more,
        }
        write_json(folder / f"seed{seed}.json", summary)
    write_csv(folder / "table1.csv", COLUMNS["table1"], table1)
    write_csv(folder / "table2.csv", COLUMNS["table2"], table2)


def write_table3(folder: Path, accuracy: Callable[[str, str, str], float], methods: Sequence[str]) -> None:
    """Write Table 3 of seed 0; accuracy in % is of victim, method and attack."""
    attacks = ("clean", "fgsm", "bim")
    lines = [
        {
            "network": "lenet5",
            "victim": victim,
            "method": method,
            "attack": name,
            "eps": 0 if name == "clean" else 0.25,
            "accuracy": accuracy(victim, method, name),
            "paper": 70.04 if (victim, method, name) == ("dknn", "dknnb_cl", "bim") else None,
            "l2_mean": 0 if name == "clean" else 5.1,
            "n": 9250,
            "seed": 0,
        }
        for name in attacks
        for method in methods
        for victim in ("dnn", "knn", "dknn")
    ]
    write_csv(folder / "table3.csv", COLUMNS["table3"], lines)


def plan_of(names: Sequence[str], seeds: Sequence[int] = (0,)) -> Plan:
    """A plan of experiments ``<data>/<part>[/<variation>]``."""
    plan: dict[str, dict[str, list[Planned]]] = {}
    for name in names:
        data, part, *variation = name.split("/")
        command = f"python attack.py evaluate --config=configs/{data}/attack.yaml --output=runs/{name}"
        plan.setdefault(data, {}).setdefault(part, []).extend(
            Planned(seed, f"{command}/seed{seed} --seed={seed}", "".join(variation)) for seed in seeds
        )
    return plan


def write_grid(results: Path) -> Plan:
    """A whole grid with numbers that look like real ones; SVHN and one k are missing."""
    _tables(results / "mnist", settings(), [0, 1, 2])
    fashion = {"fgsm": attack("fgsm", 0.1), "bim": attack("bim", 0.1)}
    _tables(results / "fashion_mnist", settings("fashion_mnist", attacks=fashion), [0, 1])
    _transfer(results / "mnist" / "transfer")
    _layers(results / "mnist" / "layers")
    for k in (5, 25, 75, 150):
        own = settings(k=k)
        write_results(
            results / "mnist" / "neighbours" / f"k={k}", own, _faded(own, 0.2 * math.log(k)), [0, 1]
        )
    weights = {f"cl_{weight}": surrogate(cls_weight=weight) for weight in (0.0, 0.03, 0.1, 0.3, 1.0, 3.0)}
    own = settings(methods={**METHODS, **weights} | {"dknnb_cl": surrogate(cls_weight=10.0)})
    write_results(results / "mnist" / "cls_weight", own, _faded(own))
    sweep = {
        f"{function}_{position}": attack(function, eps)
        for function in ("fgsm", "bim")
        for position, eps in enumerate((0.02, 0.05, 0.1, 0.15, 0.2, 0.25))
    }
    own = settings("fashion_mnist", attacks=sweep)
    write_results(results / "fashion_mnist" / "eps", own, _faded(own, -0.2), [0, 1], _distortion(own))
    ks = [f"mnist/neighbours/k={k}" for k in (5, 25, 75, 150, 300)]
    names = ["mnist/tables", "mnist/transfer", "mnist/layers", *ks, "mnist/cls_weight"]
    plan = plan_of([*names, "fashion_mnist/tables", "fashion_mnist/eps"])
    lost = "Expected SVHN's file data/train_32x32.mat, but it is missing."
    svhn = Planned(0, "python attack.py evaluate --config=configs/svhn/attack.yaml", missing=lost)
    return {**plan, "svhn": {"tables": [svhn]}}


def _distortion(own: Mapping[str, Any]) -> Callable[[str, str], float]:
    """About what eps makes of 784 pixels."""

    def l2(method: str, name: str) -> float:
        used = own["attacks"][name]
        return used["settings"]["eps"] * (20.8 if used["function"] == "fgsm" else 18.3) - 0.01 * len(method)

    return l2


def _faded(own: Mapping[str, Any], shift: float = 0.0) -> Callable[[str, str, str, int], float]:
    """Accuracy that falls in a sigmoid of L2, faster through better surrogates and against the kNN."""
    distortion = _distortion(own)
    strength = {"origin": 0.0, "dknnb": 0.7, "dknnb_cl": 0.85}

    def accuracy(victim: str, method: str, name: str, seed: int) -> float:
        clean = {"dnn": 99.17, "knn": 99.0, "dknn": 98.95}.get(victim, 98.8) + 0.05 * seed
        if name == "clean":
            return round(clean, 4)
        arguments = own["trainings"][method]["model"]["init_args"]
        kind = "origin" if "layer" not in arguments else "dknnb_cl" if arguments["cl_weight"] else "dknnb"
        distance = abs(["relu1", "relu2", "relu3", "logits"].index(arguments.get("layer", "relu3")) - 2)
        weight = abs(math.log10(arguments.get("cls_weight", 0.3) + 0.01) + 0.5) if kind == "dknnb_cl" else 0.0
        gain = max(strength[kind] - 0.3 * distance - 0.15 * weight, 0.0)
        iterated = own["attacks"][name]["function"] == "bim"
        middle = (2.0 if iterated else 4.6) + (0.4 if victim == "dknn" else 0.0) + shift - gain - 0.05 * seed
        return round(clean / (1 + math.exp(2.2 * (distortion(method, name) - middle))), 4)

    return accuracy


def _tables(folder: Path, own: Mapping[str, Any], seeds: Sequence[int]) -> None:
    write_results(folder, own, _faded(own), seeds, _distortion(own))
    _picture(folder / "neighbours")


def _transfer(folder: Path) -> None:
    own = settings(methods={**METHODS, "lenet5": ORIGIN["origin"]})
    own["transfer"] = {"lenet5": {"layer": "relu2"}}
    write_results(folder, own, _faded(own))
    better = {"origin": 20.0, "dknnb": 28.0, "dknnb_cl": 31.0}
    more = {"dnn": 0.0, "knn": 6.0, "dknn": 12.0, "clean": 0.0, "fgsm": 1.0, "bim": 2.0}

    def accuracy(victim: str, method: str, name: str) -> float:
        return 98.9 if name == "clean" else 90.0 - better[method] + more[victim] - 10 * more[name]

    write_table3(folder, accuracy, tuple(METHODS))


def _layers(folder: Path) -> None:
    methods = dict(ORIGIN)
    layers = ORIGIN["origin"]["layers"]
    methods |= {f"{layer}_cls": surrogate(layer, 1.0, 0.0) for layer in layers}
    methods |= {f"{layer}_cl": surrogate(layer) for layer in layers}
    own = settings(
        methods=methods,
        attacks={f"bim_{eps}": attack("bim", eps / 100) for eps in (5, 10, 15, 20, 25, 30, 40, 50)},
    )
    credibility = {
        "origin/clean": {"dknn": {"all": _distribution(9250, 0.7), "success": _distribution(90, 4)}}
    }
    for position, name in enumerate(own["attacks"]):
        some = {
            "all": _distribution(9250, 1.0 + position),
            "success": _distribution(1000 + 1600 * position, 2.0 + position),
        }
        credibility[f"relu3_cl/{name}"] = {"dknn": some}
    write_results(folder, own, _faded(own), [0, 1], _distortion(own), credibility=credibility, images=9250)
    _picture(folder / "adversarials")


def _distribution(n: int, power: float) -> list[list[float]]:
    """About n values j / 750 whose mass moves to 0 as `power` grows."""
    shares = [((j + 1) / 751) ** (1 / power) - (j / 751) ** (1 / power) for j in range(751)]
    counted = [[j / 750, round(n * share)] for j, share in enumerate(shares)]
    return [pair for pair in counted if pair[1]]


def _picture(path: Path) -> None:
    figure = Figure(figsize=(3, 2))
    figure.subplots().imshow([[0, 1], [1, 0]], cmap="gray")
    save_figure(figure, path)


@pytest.fixture(scope="session")
def folders() -> ModuleType:
    """The functions of this file, which tests cannot import."""
    return sys.modules[__name__]


@pytest.fixture(scope="session")
def grid(tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, Path]:
    """A plan and the results of most of it."""
    results = tmp_path_factory.mktemp("results")
    return write_grid(results), results
