"""Every YAML under configs/ does what its header says, on tiny files in the official formats."""

import csv
import dataclasses
import json
import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb
import yaml
from pytorch_lightning import Trainer
from pytorch_lightning.cli import LightningArgumentParser
from torch import Tensor

from lightning_advknn.attacks import AttackSettings
from lightning_advknn.commands.main import main
from lightning_advknn.commands.options import parse
from lightning_advknn.data import CIFAR10, GTSRB, KMNIST, MNIST, SVHN, Digits, FashionMNIST
from lightning_advknn.experiment import settings
from lightning_advknn.experiment.grid import Grid, cells
from lightning_advknn.experiment.settings import Experiment
from lightning_advknn.models import LeNet5
from lightning_advknn.modules import BackboneModule, SurrogateModule
from lightning_advknn.training_cli import AdvKNNCLI

ROOT = Path(__file__).parents[1]
REAL_DATA = ROOT.parent / "shared" / "data"
CONFIGS = sorted(
    path.relative_to(ROOT) for path in (ROOT / "configs").glob("*/*.yaml") if path.parent.name != "trainer"
)
TRAINERS = {"cpu2": ("cpu", 2), "gpu1": ("gpu", 1), "gpu2": ("gpu", 2), "gpu8": ("gpu", 8)}
SETS = {
    "cifar10": CIFAR10,
    "digits": Digits,
    "fashion_mnist": FashionMNIST,
    "gtsrb": GTSRB,
    "kmnist": KMNIST,
    "mnist": MNIST,
    "svhn": SVHN,
}
TRANSFER = ("digits", "mnist")  # the data sets with a transfer network: the paper's Table 3 is on MNIST alone
COMMANDS = {
    "attack": "evaluate",
    "backbone": "train fit",
    "black_box": "leaderboard",
    "cls_weight": "evaluate",
    "eps": "evaluate",
    "layers": "evaluate",
    "leaderboard": "leaderboard",
    "lenet": "train fit",
    "libraries": "evaluate",
    "minimum_norm": "leaderboard",
    "pixels": "leaderboard",
    "reproduce": "reproduce",
    "surrogate": "train fit",
    "sweep": "sweep",
    "transfer": "evaluate",
    "variants": "leaderboard",
}
EVERYWHERE = {"attack", "backbone", "data", "network", "surrogate"}
FIGURES = {"cls_weight", "layers", "lenet", "transfer"}  # the paper's are on MNIST alone
KINDS = {
    "cifar10": EVERYWHERE,
    "digits": EVERYWHERE
    | FIGURES
    | {"black_box", "eps", "leaderboard", "libraries", "pixels", "reproduce", "sweep"},
    "fashion_mnist": EVERYWHERE | {"eps", "leaderboard"},
    "folder": EVERYWHERE | {"leaderboard"},  # test_own.py runs it
    "gtsrb": EVERYWHERE,
    "kmnist": EVERYWHERE,
    "mnist": EVERYWHERE | FIGURES | {"leaderboard", "minimum_norm", "pixels", "sweep", "variants"},
    "svhn": EVERYWHERE,
}

pytestmark = [
    # Validating a checkpoint logs into a folder of its own.
    pytest.mark.filterwarnings("ignore:The dirpath has changed from"),
    # 200 images in batches of 100 are two steps; Lightning logs each 50th, and says so.
    pytest.mark.filterwarnings("ignore:The number of training batches"),
]


def header(config: Path) -> list[str]:
    """The comment lines on top, without their ``#``."""
    lines = []
    for line in (ROOT / config).read_text().splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").strip())
    return lines


def command(config: Path) -> list[str]:
    """The arguments in the header's command, after ``lightning-advknn``."""
    program, *arguments = shlex.split(header(config)[0])
    assert program == "lightning-advknn"
    return arguments


@contextmanager
def at_home(folder: Path) -> Iterator[pytest.MonkeyPatch]:
    """Work in a folder, with W&B switched off."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder)
        monkeypatch.setenv("WANDB_MODE", "disabled")
        monkeypatch.setenv("WANDB_DATA_DIR", str(folder / "wandb-data"))
        yield monkeypatch
        wandb.finish()


def run(folder: Path, arguments: list[str]) -> AdvKNNCLI:
    """Run ``lightning-advknn train`` with these arguments in a folder."""
    with at_home(folder):
        return AdvKNNCLI(arguments)


def smaller(data: str, root: Path | None) -> list[str]:
    """Options that fit the tiny files."""
    calibration = 5 if data == "gtsrb" else 20  # of 8 and 40 test images a class
    sizes = {"batch_size": 100, "eval_batch_size": 100, "calibration_per_class": calibration, "val_size": 100}
    if root is None:
        assert data == "digits"
    else:
        sizes |= {"root": root, "verify_checksums": "false", "download": "false"}
    trainer = (
        "max_epochs=1",
        "limit_train_batches=2",
        "enable_progress_bar=false",
        "enable_model_summary=false",
    )
    return [
        *(f"--data.init_args.{name}={value}" for name, value in sizes.items()),
        *(f"--trainer.{setting}" for setting in trainer),
    ]


def last_values(metrics: Path) -> dict[str, float]:
    """The last value of each column of a CSV log."""
    with metrics.open() as file:
        return {name: float(value) for row in csv.DictReader(file) for name, value in row.items() if value}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the configurations, of which only the sizes of `AttackEvaluation` are changed."""
    folder = tmp_path_factory.mktemp("home")
    shutil.copytree(ROOT / "configs", folder / "configs")
    for config in CONFIGS:
        content = yaml.safe_load((folder / config).read_text())
        for callback in content.get("trainer", {}).get("callbacks", []):
            if callback["class_path"].endswith("AttackEvaluation"):
                arguments = callback["init_args"]
                arguments.update(k=5, num_images=6, num_calibration=8, bank_size=40)
                arguments["attacks"]["bim"]["settings"]["steps"] = 2
                (folder / config).write_text(yaml.safe_dump(content))
    return folder


@pytest.mark.parametrize("data", [pytest.param(data, marks=pytest.mark.xdist_group(data)) for data in SETS])
def test_the_headers_commands_train_and_validate(
    request: pytest.FixtureRequest, home: Path, data: str
) -> None:
    root = None if data == "digits" else request.getfixturevalue(f"{data}_root")
    checkpoints = {}
    modules = {"backbone": BackboneModule, "surrogate": SurrogateModule}
    if data in TRANSFER:
        modules["lenet"] = BackboneModule
    for kind, module in modules.items():
        train, fit, *arguments = command(Path("configs", data, f"{kind}.yaml"))
        assert (train, fit) == ("train", "fit")
        # As a user fills it in.
        arguments = [str(checkpoints["backbone"]) if word == "CHECKPOINT" else word for word in arguments]
        options = [*arguments, *smaller(data, root)]
        if kind == "surrogate":
            options.append("--model.init_args.k=5")
        cli = run(home, ["fit", *options])
        assert isinstance(cli.model, module)
        assert type(cli.datamodule) is SETS[data]
        assert cli.datamodule.val_size == 100
        assert cli.trainer.global_step == 2

        log = home / "runs" / data / kind / "version_0"
        fitted = last_values(log / "metrics.csv")
        checkpoints[kind] = log / "checkpoints" / "best.ckpt"
        torch.load(checkpoints[kind], weights_only=True)
        cli = run(home, ["validate", *options, f"--ckpt_path={checkpoints[kind]}"])
        validated = {name: value.item() for name, value in cli.trainer.callback_metrics.items()}
        attacks = {f"attack/{name}/{who}_acc" for name in ("fgsm", "bim") for who in ("dnn", "knn", "dknn")}
        assert attacks | {"val/loss", "val/acc"} <= validated.keys()
        # The same weights on the same images, as after the epoch that the checkpoint is of.
        logged = {name: fitted[name] for name in validated}
        assert validated == pytest.approx(logged, rel=1e-4, abs=1e-6, nan_ok=True)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_a_header_says_what_a_configuration_is_for(config: Path) -> None:
    lines = header(config)
    assert len(lines[0]) > 30
    if config.stem in COMMANDS:
        assert len(lines) >= 2  # the command, then what to expect
        name = str(config.relative_to("configs").with_suffix(""))
        arguments = command(config)
        words = len(COMMANDS[config.stem].split())
        assert " ".join(arguments[:words]) == COMMANDS[config.stem]
        if config.stem == "sweep":
            assert arguments[words:] == [name, "--trials", "2"]
            return
        option, found, *rest = arguments[words:]
        assert (option, found) == ("--config", name)
        part = config.stem in ("cls_weight", "eps", "layers") and "digits" not in str(config)
        assert rest == (
            ["--model.init_args.backbone_checkpoint", "CHECKPOINT"]
            if config.stem == "surrogate"
            else ["--images", "1000"] * part
        )
    else:
        assert config.stem in ("data", "network")


def test_every_data_set_has_every_configuration() -> None:
    assert [str(config) for config in CONFIGS] == [
        f"configs/{data}/{kind}.yaml" for data, kinds in KINDS.items() for kind in sorted(kinds)
    ]


def test_trainers_are_for_any_training() -> None:
    assert {path.stem for path in (ROOT / "configs" / "trainer").glob("*.yaml")} == set(TRAINERS)
    parser = LightningArgumentParser()
    parser.add_lightning_class_args(Trainer, "trainer")
    for name, (accelerator, devices) in TRAINERS.items():
        config = Path("configs", "trainer", f"{name}.yaml")
        words = shlex.split(header(config)[0])
        several = ["torchrun", "--nproc_per_node", str(devices), "-m", "lightning_advknn"]
        start = ["lightning-advknn"] if devices == 1 else several
        assert words[: len(start) + 2] == [*start, "train", "fit"]
        assert words[-2:] == ["--config", f"trainer/{name}"]
        trainer = parser.parse_path(str(ROOT / config)).trainer
        assert (trainer.accelerator, trainer.devices, trainer.num_nodes) == (accelerator, devices, 1)
        if devices > 1:
            arguments = trainer.strategy.init_args
            assert arguments.process_group_backend == ("gloo" if accelerator == "cpu" else "nccl")
            assert arguments.timeout.total_seconds() == 600


def experiment_of(config: Path) -> Experiment:
    """The experiment that the header's command runs."""
    name, *arguments = command(config)
    assert name == "evaluate"
    with at_home(ROOT):
        options = parse(name, arguments, "")
    return Experiment(**{name: getattr(options, name) for name in Experiment.__dataclass_fields__})


@pytest.mark.parametrize("data", SETS)
def test_attack_configurations_are_experiments(data: str) -> None:
    config = Path("configs", data, "attack.yaml")
    written = yaml.safe_load((ROOT / config).read_text())
    experiment = experiment_of(config)

    folder = ROOT / "configs" / data
    assert Path(experiment.backbone.config.absolute) == folder / "backbone.yaml"
    assert set(experiment.surrogates) == {"dknnb", "dknnb_cl"}
    for name, trained in experiment.surrogates.items():
        assert Path(trained.config.absolute) == folder / "surrogate.yaml"
        assert trained.overrides == ({"cls_weight": 1.0, "cl_weight": 0.0} if name == "dknnb" else {})
    assert experiment.victim.k == written["victim"]["k"]
    assert experiment.label_source == "knn"
    assert experiment.output == f"runs/{data}"
    assert set(experiment.attacks) == {"fgsm", "bim"}
    for name, attack in experiment.attacks.items():
        assert isinstance(attack, AttackSettings)
        assert attack.settings == written["attacks"][name]["settings"]
        attack.bind()  # its settings are the attack's own
    assert (experiment.images, experiment.transfer) == (None, {})


@pytest.mark.parametrize(
    "config", [config for config in CONFIGS if COMMANDS.get(config.stem) == "leaderboard"], ids=str
)
def test_leaderboards_run_every_attack_on_something_that_is_there(config: Path) -> None:
    name, *arguments = command(config)
    with at_home(ROOT):
        experiment = settings.experiment_of(parse(name, arguments, ""))
    main = experiment_of(config.with_name("attack.yaml"))
    # A rival's credibility is published in `ge`, and a rival leaves the true label, not the kNN's.
    pixels = {"layer": "normalize", "layers": ["normalize"], "k": 1, "metric": "euclidean"}
    changes = {"convention": "ge", **(pixels if config.stem == "pixels" else {})}
    assert experiment.victim == dataclasses.replace(main.victim, **changes)
    assert experiment.label_source == "true"
    assert experiment.output == f"runs/{config.parent.name}-{config.stem}"
    there = {"origin", *experiment.surrogates, *experiment.joint}
    for attack in experiment.attacks.values():
        attack.bind()
        # Pixels are in [0, 1]: what is farther than 1 is not in Linf.
        assert attack.measure == "l2" or attack.settings.get("eps", 0) <= 1
        targets = {"knn", "dknn"} if attack.on_victim else {"knn", "dknn", *there}
        assert attack.targets is None or set(attack.targets) <= targets
    # Of every gradient-sign attack there are several, for a curve; these are of attacks without eps.
    families = [
        name.partition("@")[0]
        for name, attack in experiment.attacks.items()
        if attack.function in ("fgsm", "bim")
    ]
    assert bool(families) == (config.stem not in ("black_box", "minimum_norm", "variants"))
    assert all(families.count(name) > 1 for name in families)


def test_attacks_of_other_libraries_run_by_configuration_alone(tmp_path: Path) -> None:
    # The header's command, but for an epoch of training, no surrogate, three images and few steps.
    folder = tmp_path / "configs" / "digits"
    shutil.copytree(ROOT / "configs" / "digits", folder)
    backbone = yaml.safe_load((folder / "backbone.yaml").read_text())
    backbone["trainer"] |= {"max_epochs": 1, "log_every_n_steps": 1}
    del backbone["trainer"]["logger"], backbone["trainer"]["callbacks"][1]
    (folder / "backbone.yaml").write_text(yaml.safe_dump(backbone))
    written = yaml.safe_load((folder / "libraries.yaml").read_text()) | {"surrogates": {}}
    written["attacks"]["carlini_wagner"]["settings"]["initial_const"] = 10.0  # one search finds something
    fewer = {"steps": 10, "max_iter": 3, "num_random_init": 2, "binary_search_steps": 1}
    written["attacks"]["deepfool"]["settings"]["candidates"] = 3
    for attack in written["attacks"].values():
        attack["settings"] |= {name: fewer[name] for name in attack["settings"] if name in fewer}
    (folder / "libraries.yaml").write_text(yaml.safe_dump(written))

    arguments = command(Path("configs", "digits", "libraries.yaml"))
    with at_home(tmp_path):
        assert main([*arguments, "--images", "3"]) == 0
    output = tmp_path / written["output"]
    described = json.loads((output / "summary.json").read_text())["settings"]["attacks"]
    libraries = {attack["function"].split(".")[0] for attack in described.values()}
    assert libraries == {"fgsm", "bim", "art", "torchattacks", "foolbox"}
    for name, attack in written["attacks"].items():
        assert described[name]["settings"] == attack["settings"]
        with (output / "rows" / "origin" / f"{name}.csv").open() as file:
            linf = [float(row["linf"]) for row in csv.DictReader(file)]
        assert len(linf) == 3
        assert 0 < max(linf) <= attack["settings"].get("eps", 1) + 1e-6


@pytest.mark.parametrize("data", TRANSFER)
def test_transfer_configurations_reuse_the_main_experiment(data: str) -> None:
    main, transfer = (experiment_of(Path("configs", data, f"{kind}.yaml")) for kind in ("attack", "transfer"))
    same = ("victim", "attacks", "label_source", "seed", "cache", "images")
    assert all(getattr(main, name) == getattr(transfer, name) for name in same)
    for ours, theirs in (
        (transfer.backbone, main.backbone),
        (transfer.surrogates["dknnb_cl"], main.surrogates["dknnb_cl"]),
    ):
        assert (ours.config.absolute, ours.overrides) == (theirs.config.absolute, theirs.overrides)
    assert set(transfer.surrogates) == {"dknnb_cl"}
    assert transfer.output == f"runs/{data}-transfer"
    network = transfer.transfer["lenet5"]
    assert Path(network.backbone.config.absolute) == ROOT / "configs" / data / "lenet.yaml"
    lenet = yaml.safe_load(Path(network.backbone.config.absolute).read_text())
    layers = lenet["model"]["init_args"]["layers"]
    assert layers == [name for name, _ in LeNet5().named_children() if name.startswith(("relu", "logits"))]
    assert network.layer == "relu2"  # after the last convolution
    # Normalised as the backbone, whose numbers a test compares with the images.
    ours = lenet["model"]["init_args"]["network"]["init_args"]
    theirs = yaml.safe_load((ROOT / "configs" / data / "network.yaml").read_text())["init_args"]
    assert all(ours[name] == theirs[name] for name in ("mean", "std", "num_classes"))


@pytest.mark.parametrize("config", ["configs/reproduce.yaml", "configs/digits/reproduce.yaml"])
def test_grids_share_what_their_parts_have_in_common(config: str) -> None:
    name, *arguments = command(Path(config))
    assert (name, arguments[0]) == ("reproduce", "--config")
    with at_home(ROOT):
        options = parse(name, arguments, "")
        found = cells(Grid(**{name: getattr(options, name) for name in Grid.__dataclass_fields__}))
    main = {cell.data: cell.experiment for cell in found if cell.part == "tables"}
    for cell in found:
        ours, theirs = cell.experiment, main[cell.data]
        assert Path(ours.backbone.config.absolute) == Path(theirs.backbone.config.absolute)
        assert (ours.victim.layer, ours.label_source) == (theirs.victim.layer, theirs.label_source)
        trainings = [(Path(t.config.absolute), t.overrides) for t in ours.surrogates.values()]
        for name in ("dknnb", "dknnb_cl"):
            shared = theirs.surrogates[name]
            assert cell.part == "transfer" or (Path(shared.config.absolute), shared.overrides) in trainings
        for attack in ours.attacks.values():
            attack.bind()
            assert attack.precision == theirs.attacks["bim"].precision
    ks = {cell.experiment.victim.k for cell in found if cell.part == "neighbours"}
    assert ks == ({5, 25, 75} if "digits" in config else {5, 25, 75, 150, 300})
    weights = next(cell.experiment.surrogates for cell in found if cell.part == "cls_weight")
    swept = [t.overrides.get("cls_weight", 0.3) for t in weights.values() if "cl_weight" not in t.overrides]
    assert swept == [0.0, 0.1, 0.3, 1.0, 3.0]


@pytest.mark.parametrize("data", SETS)
def test_a_surrogate_imitates_the_victim_that_its_attack_is_on(data: str) -> None:
    attack, backbone, surrogate = (
        yaml.safe_load((ROOT / "configs" / data / f"{kind}.yaml").read_text())
        for kind in ("attack", "backbone", "surrogate")
    )
    arguments = surrogate["model"]["init_args"]
    assert (arguments["layer"], arguments["k"]) == (attack["victim"]["layer"], attack["victim"]["k"])
    assert arguments["layer"] in backbone["model"]["init_args"]["layers"]
    assert arguments["network"] == backbone["model"]["init_args"]["network"]


@pytest.mark.parametrize(
    "data",
    [
        "digits",
        "fashion_mnist",
        "mnist",
        "svhn",
    ],
)
def test_mean_and_standard_deviation_are_the_training_images(data: str) -> None:
    arguments: dict[str, Any] = yaml.safe_load((ROOT / "configs" / data / "network.yaml").read_text())[
        "init_args"
    ]
    mean, std = statistics(training_images(data))
    assert tuple(arguments["image_shape"]) == SETS[data].image_shape
    assert arguments["mean"] == pytest.approx(mean, abs=1e-3)
    assert arguments["std"] == pytest.approx(std, abs=1e-3)


def training_images(data: str) -> Tensor:
    if data == "digits":
        return Digits().split("train").images
    try:
        return SETS[data](root=str(REAL_DATA), download=False).load(train=True)[0]
    except FileNotFoundError:
        pytest.skip(f"no real {data} in {REAL_DATA}")


def statistics(images: Tensor) -> tuple[list[float], list[float]]:
    """Exact mean and standard deviation of each channel, in [0, 1], by counting the 256 values."""
    values = torch.arange(256, dtype=torch.float64) / 255
    means, deviations = [], []
    for channel in images.unbind(1):
        share = channel.flatten().bincount(minlength=256).double() / channel.numel()
        mean = (share * values).sum()
        means.append(mean.item())
        deviations.append((share * (values - mean).square()).sum().sqrt().item())
    return means, deviations
