"""`attack.py evaluate` from the command line's arguments to files and exit codes."""

import csv
import importlib
import inspect
import json
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

import attack
from lightning_advknn.attacks import minimum_norm
from lightning_advknn.data import Digits
from lightning_advknn.experiment import attack_stages, judges, shards, training
from lightning_advknn.experiment.run import ExperimentRun
from lightning_advknn.experiment.settings import read_experiment
from lightning_advknn.models import ConvNet, LeNet5
from lightning_advknn.modules import BackboneModule
from lightning_advknn.storage import digest
from tests.wandb_runs import offline_wandb, read_runs

CONFIGS = Path(__file__).parents[2] / "configs"
LAYERS = ("relu1", "relu2", "relu3", "logits")

Write = Callable[..., Path]


def write_config(folder: Path, data: str, k: int, **changes: Any) -> Path:
    """A small copy of a data set's configurations, whose attack.yaml is changed at the top level."""
    folder.mkdir(parents=True)
    for source in (CONFIGS / data).glob("*.yaml"):
        shutil.copy(source, folder)
    for name in ("backbone", "surrogate", "lenet"):
        if not (folder / f"{name}.yaml").is_file():
            continue
        config = yaml.safe_load((folder / f"{name}.yaml").read_text())
        config["trainer"] |= {"max_epochs": 3, "log_every_n_steps": 1}
        del config["trainer"]["logger"]
        if name == "surrogate":
            config["model"]["init_args"]["k"] = k
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))
    config = yaml.safe_load((folder / "attack.yaml").read_text())
    config["victim"]["k"] = k
    config["attacks"] = {
        "fgsm": {"function": "fgsm", "settings": {"eps": 0.2}},
        "bim": {"function": "bim", "settings": {"eps": 0.1, "step_size": 0.05, "steps": 3}},
    }
    config |= {"output": str(folder / "out"), "cache": str(folder / "cache")} | changes
    (folder / "attack.yaml").write_text(yaml.safe_dump(config))
    return folder / "attack.yaml"


def evaluate(config: Path, *options: str) -> int:
    return attack.main(["evaluate", f"--config={config}", *options])


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def times(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


def numbers(output: Path) -> dict[str, str]:
    """Everything but times and pictures."""
    files = {str(p.relative_to(output)): p.read_text() for p in output.rglob("*.csv")}
    summary = json.loads((output / "summary.json").read_text())
    return files | {name: summary[name] for name in ("metrics", "credibility")}


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished small experiment on the embedded digits, with shards of 200 images."""
    folder = tmp_path_factory.mktemp("attack") / "digits"
    config = write_config(folder, "digits", k=10)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "_SHARD", dict.fromkeys(("cpu", "cuda"), 200))
        assert evaluate(config, f"--results={folder / 'results'}") == 0
    return folder


@pytest.fixture
def copy(done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the finished experiment to go on from, in which training again fails the test."""
    monkeypatch.setattr(shards, "_SHARD", dict.fromkeys(("cpu", "cuda"), 200))
    shutil.copytree(done, tmp_path / "copy")
    config = tmp_path / "copy" / "attack.yaml"
    text = config.read_text().replace(str(done), str(tmp_path / "copy"))
    config.write_text(text)
    return config


def no_training(*_: object) -> None:
    raise AssertionError("trained")


def test_tables_are_what_the_rows_say(done: Path) -> None:
    tables = {(r["victim"], r["method"], r["attack"]): r for r in read(done / "out" / "table2.csv")}
    assert len(tables) == 2 * 3 * 3
    for (victim, method, name), cell in tables.items():
        rows = read(done / "out" / "rows" / method / f"{name}.csv")
        wrong = [row[f"{victim}_after"] != row["label"] for row in rows]
        l2 = np.array([float(row["l2"]) for row in rows])
        credibility = np.array([float(row[f"{victim}_credibility_after"]) for row in rows])
        assert float(cell["accuracy"]) == pytest.approx(100 - 100 * np.mean(wrong), abs=1e-3)
        assert float(cell["l2_mean"]) == pytest.approx(l2.mean(), abs=1e-4)
        assert float(cell["credibility_mean"]) == pytest.approx(credibility.mean(), abs=1e-4)
        assert float(cell["l2_mean_success"]) == pytest.approx(l2[wrong].mean(), abs=1e-4)
        assert float(cell["eps"]) == {"clean": 0, "fgsm": 0.2, "bim": 0.1}[name]
        assert (cell["n"], cell["seed"], cell["paper"]) == ("547", "0", "")
    table1 = {row["victim"]: float(row["accuracy"]) for row in read(done / "out" / "table1.csv")}
    for classifier, column, method in (
        ("dnn", "dnn_before", "origin"),
        ("knn", "knn_before", "origin"),
        ("dknn", "dknn_before", "origin"),
        ("dknnb", "surrogate_before", "dknnb"),
        ("dknnb_cl", "surrogate_before", "dknnb_cl"),
    ):
        rows = read(done / "out" / "rows" / method / "bim.csv")
        right = np.mean([row[column] == row["label"] for row in rows])
        assert table1[classifier] == pytest.approx(100 * right, abs=1e-3)


def test_rows_are_of_the_test_images_and_attacks_stay_in_their_ball(done: Path) -> None:
    test = Digits().split("test")
    for path in (done / "out" / "rows").rglob("*.csv"):
        rows = read(path)
        assert [int(row["id"]) for row in rows] == test.ids.tolist()
        assert [int(row["label"]) for row in rows] == test.labels.tolist()
        eps = {"clean": 0, "fgsm": 0.2, "bim": 0.1}[path.stem]
        linf = np.array([float(row["linf"]) for row in rows])
        assert (linf <= eps + 1e-6).all()
        assert eps == 0 or linf.min() > eps / 2


def trained(checkpoint: Path, network: torch.nn.Sequential) -> torch.nn.Sequential:
    """A plain network with a checkpoint's weights."""
    state, prefix = torch.load(checkpoint, weights_only=True)["state_dict"], "network.network."
    network.load_state_dict({k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)})
    return network.eval()


def brute_force_votes(
    network: torch.nn.Sequential, layer: str, images: torch.Tensor, k: int = 10
) -> np.ndarray:
    """Votes ``(n, 10)`` of an independent kNN in float64 on the embedded digits, cosine distance."""
    names = [name for name, _ in network.named_children()]
    up_to_layer = torch.nn.Sequential(*list(network)[: names.index(layer) + 1])

    def features(images: torch.Tensor) -> np.ndarray:
        with torch.no_grad():
            raw = up_to_layer(images).flatten(1).double().numpy()
        return raw / np.linalg.norm(raw, axis=1, keepdims=True)

    train = Digits().split("train")
    nearest = (-features(images) @ features(train.images / 255).T).argsort(1, kind="stable")[:, :k]
    labels = train.labels.numpy()[nearest]
    return np.stack([(labels == c).sum(1) for c in range(10)], axis=1)


def stored_adversarials(cache: Path) -> list[torch.Tensor]:
    """All adversarials in a cache, each in shards of 200."""
    stored = []
    for folder in (cache / "adversarial").iterdir():
        shards = [load_file(path)["adversarial"] for path in sorted(folder.iterdir())]
        assert [len(shard) for shard in shards] == [200, 200, 147]
        stored.append(torch.cat(shards))
    return stored


def of_rows(rows: list[dict[str, str]], stored: list[torch.Tensor]) -> torch.Tensor:
    """The adversarials that rows are of, known by their distortions."""
    l2 = np.array([float(row["l2"]) for row in rows])
    clean = (Digits().split("test").images / 255).double()
    distances = [(images.double() - clean).flatten(1).norm(dim=1).numpy() for images in stored]
    (found,) = (
        images
        for images, found in zip(stored, distances, strict=True)
        if np.allclose(found, l2, rtol=0, atol=1e-9)
    )
    return found


def votes_of(rows: list[dict[str, str]], layer: str) -> np.ndarray:
    return np.array([[int(votes) for votes in row[f"votes_after_{layer}"].split()] for row in rows])


def test_stored_adversarials_queried_by_brute_force_give_the_rows(done: Path) -> None:
    """An independent kNN in float64, on the adversarials as stored and features of the stored weights."""
    network = trained(
        next((done / "cache" / "backbone").glob("*.ckpt")), ConvNet(mean=[0.3051], std=[0.3247])
    )
    stored = stored_adversarials(done / "cache")
    assert len(stored) == 6
    for path in (done / "out" / "rows").rglob("[fb]*m.csv"):
        rows = read(path)
        votes = brute_force_votes(network, "relu3", of_rows(rows, stored))
        assert (votes == votes_of(rows, "relu3")).all()
        assert (votes.argmax(1) == [int(row["knn_after"]) for row in rows]).all()


def test_files_say_how_they_were_made(done: Path) -> None:
    summary = json.loads((done / "out" / "summary.json").read_text())
    assert summary["versions"]["torch"] == torch.__version__.split("+")[0]
    assert summary["settings"]["victim"] == {
        "layer": "relu3",
        "k": 10,
        "metric": "cosine",
        "convention": "strict",
    }
    assert summary["settings"]["label_source"] == "knn"
    assert {"command", "device", "date"} <= summary.keys()
    stages_seen = {stage.split()[0] for stage in summary["seconds"]}
    assert stages_seen == {"train", "build", "query", "attack", "differentiate"}
    for suffix, magic in (("png", b"\x89PNG"), ("pdf", b"%PDF")):
        picture = (done / "out" / f"neighbours.{suffix}").read_bytes()
        assert picture.startswith(magic)
        assert (done / "results" / f"neighbours.{suffix}").read_bytes() == picture
    assert not (done / "out" / "adversarials.png").exists()  # no function has two eps


def test_the_summary_distributes_credibility_as_the_rows_do(done: Path) -> None:
    summary = json.loads((done / "out" / "summary.json").read_text())
    assert summary["images"] == 547
    assert len({check["check"] for check in summary["checks"]}) == 12
    again = next(check for check in summary["checks"] if "queried again" in check["check"])
    assert (again["holds"], again["detail"]) == (True, "700 images")
    classes = summary["classes"]
    assert (classes["names"], sum(classes["test"]), classes["attacked"]) == (
        list("0123456789"),
        547,
        classes["test"],
    )
    assert set(summary["credibility"]) == set(summary["metrics"])
    for name, told in summary["credibility"].items():
        rows = read(done / "out" / "rows" / f"{name}.csv")
        wrong = [row for row in rows if row["dknn_after"] != row["label"]]
        assert told.keys() == {"dknn"}
        assert told["dknn"].keys() == {"all", "success"}
        for kind, chosen in (("all", rows), ("success", wrong)):
            counts = Counter(round(float(row["dknn_credibility_after"]), 6) for row in chosen)
            assert told["dknn"][kind] == [list(pair) for pair in sorted(counts.items())]
    published = json.loads((done / "results" / "seed0.json").read_text())
    assert len(published.pop("tables")) == 2
    assert summary | {"digest": None} == published | {"digest": None}


def test_a_second_run_redoes_nothing(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "fit", no_training)
    summary = copy.parent / "out" / "summary.json"
    before, kept = numbers(copy.parent / "out"), times(copy.parent / "cache")
    seconds = json.loads(summary.read_text())["seconds"]
    assert evaluate(copy) == 0
    assert times(copy.parent / "cache") == kept
    assert numbers(copy.parent / "out") == before
    assert json.loads(summary.read_text())["seconds"] == seconds
    assert {"train origin", "build bank", "query clean"} <= seconds.keys()


JUDGED = {"asked_again", "neighbours", "observations"}  # what follows an attack


def test_a_changed_setting_redoes_only_what_depends_on_it(copy: Path) -> None:
    def redone(name: str, *options: str) -> set[str]:
        kept = times(copy.parent / "cache")
        assert evaluate(copy, *options, f"--output={copy.parent / name}") == 0
        new = set(times(copy.parent / "cache")) - set(kept)
        assert kept.items() <= times(copy.parent / "cache").items()
        return {name.split("/")[0] for name in new}

    assert redone("ge", "--victim.convention=ge") == set()
    assert redone("faiss", "--victim.backend=faiss") == set()
    # Votes are by layer; what is trained, and what its gradient makes for the kNN's label, is not.
    assert redone("own", "--victim.layers=[relu1,relu2,relu3,logits]") == set()
    assert redone("two", "--victim.layers=[normalize,relu3]") == {"bank", "calibration", "gradients"} | JUDGED
    summary = json.loads((copy.parent / "two" / "summary.json").read_text())
    assert summary["settings"]["victim"]["layers"] == ["normalize", "relu3"]
    for method in ("origin", "dknnb"):
        two, four = (read(copy.parent / name / "rows" / method / "bim.csv") for name in ("two", "out"))
        assert {name for name in two[0] if name.startswith("votes_after_")} == {
            "votes_after_normalize",
            "votes_after_relu3",
        }
        same = ("l2", "dnn_after", "knn_after", "votes_after_relu3", "knn_credibility_after")
        assert [[row[name] for name in same] for row in two] == [[row[name] for name in same] for row in four]
    assert redone("true", "--label_source=true") == {"adversarial", "gradients", "predictions"} | JUDGED
    content = yaml.safe_load(copy.read_text())
    content["attacks"]["bim"]["precision"] = "winograd"
    copy.write_text(yaml.safe_dump(content))
    assert redone("winograd") == {"adversarial", "asked_again", "observations", "predictions"}
    rows = {
        attack: read(copy.parent / "winograd/rows/origin" / f"{attack}.csv") for attack in ("bim", "fgsm")
    }
    assert {row["precision"] for row in rows["bim"]} == {"winograd"}
    assert {row["precision"] for row in rows["fgsm"]} == {"float32"}
    # The surrogates imitate the victim's kNN, so another k trains others; the backbone stays.
    stages = {"adversarial", "bank", "calibration", "gradients", "predictions", "surrogate", "votes"}
    assert redone("k5", "--victim.k=5") == stages | JUDGED
    summary = json.loads((copy.parent / "k5" / "summary.json").read_text())
    trainings = summary["settings"]["trainings"]
    assert {trainings[n]["model"]["init_args"]["k"] for n in ("dknnb", "dknnb_cl")} == {5}


APPROXIMATE = ("--victim.backend=ivf", '--victim.index={"nlist": 10, "nprobe": 10}')


def test_approximate_neighbours_are_named_with_every_number(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("faiss")
    monkeypatch.setattr(training, "fit", no_training)
    content = yaml.safe_load(copy.read_text())
    for surrogate in content["surrogates"].values():  # go on imitating the exact kNN
        surrogate.setdefault("overrides", {})["backend"] = "auto"
    copy.write_text(yaml.safe_dump(content))
    folder, layers = copy.parent, ("relu3", "logits")  # wide layers take long
    two = f"--victim.layers=[{','.join(layers)}]", "--images=100"
    assert evaluate(copy, *two, f"--output={folder / 'exact'}", f"--results={folder / 'exact-results'}") == 0
    kept = times(folder / "cache")
    places = f"--output={folder / 'ivf'}", f"--results={folder / 'ivf-results'}"
    assert evaluate(copy, *two, *APPROXIMATE, *places) == 0
    # What exact neighbours gave is neither used nor changed.
    assert kept.items() <= times(folder / "cache").items()
    new = {name.split("/")[0] for name in set(times(folder / "cache")) - set(kept)}
    assert new == {"adversarial", "bank", "calibration", "gradients", "predictions", "recall"} | JUDGED
    # All lists are looked into, so numbers are those of exact neighbours, with a note on each.
    note = "Approximate neighbours (ivf, nlist 10, nprobe 10): recall@10 on 100 validation images is " + (
        ", ".join(f"{layer} 1.0000" for layer in layers) + "."
    )
    pairs = [(f"exact/{table}.csv", f"ivf/{table}.csv") for table in ("table1", "table2")]
    pairs += [
        (before.replace("exact", "exact-results"), after.replace("ivf", "ivf-results"))
        for before, after in pairs
    ]
    pairs += [("exact/rows/dknnb/bim.csv", "ivf/rows/dknnb/bim.csv")]
    for before, after in pairs:
        assert [{**row, "note": note} for row in read(folder / before)] == read(folder / after)
    index = {"backend": "ivf", "nlist": 10, "nprobe": 10}
    measured = {**index, "k": 10, "images": 100, "recall": dict.fromkeys(layers, 1.0)}
    for before, after in (("exact/summary", "ivf/summary"), ("exact-results/seed0", "ivf-results/seed0")):
        summary = json.loads((folder / f"{after}.json").read_text())
        assert summary["approximation"] == {"origin": measured}
        assert summary["settings"]["victim"]["index"] == index
        exact = json.loads((folder / f"{before}.json").read_text())
        assert not {"approximation", "index"} & {*exact, *exact["settings"]["victim"]}


def test_only_approximate_neighbours_are_in_keys(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("faiss")

    def run(*options: str) -> ExperimentRun:
        return ExperimentRun(read_experiment([f"--config={copy}", *options]))

    def keys(*options: str) -> tuple[str, ...]:
        made = run(*options)
        return made.attacked.key, made.stages.attacked.key("origin", "bim")

    exact = keys()
    assert (
        keys("--victim.backend=float32") == keys("--victim.backend=faiss", "--victim.memory_gib=1") == exact
    )
    found = [
        keys("--victim.backend=ivf"),
        keys("--victim.backend=hnsw"),
        keys("--victim.backend=ivf", "--victim.index.nprobe=3"),
    ]
    for column in zip(exact, *found, strict=True):
        assert len(set(column)) == 4

    # Surrogates imitate the victim's kNN.
    def arguments(*options: str) -> dict[str, Any]:
        settings = training.training_settings(run(*options).networks.trainings["dknnb"])
        return dict(settings["model"]["init_args"])

    assert not {"backend", "index"} & set(arguments("--victim.backend=float32"))
    approximate = {"backend": "ivf", "index": {"nprobe": 3}}
    assert arguments("--victim.backend=ivf", "--victim.index.nprobe=3") == {**arguments(), **approximate}

    assert evaluate(copy, "--victim.backend=ivf", "--victim.index.nprobe=30") == 2
    # The 850 images have 29 lists.
    assert "`victim.index`: Expected `index.nprobe` to be in [1, 29]" in capsys.readouterr().err


def test_what_steers_an_attack_on_a_victim_is_in_its_key(copy: Path) -> None:
    config = yaml.safe_load(copy.read_text())
    config["attacks"]["least"] = {"function": "minimum_norm", "through": "dknnb", "targets": ["dknn"]}
    copy.write_text(yaml.safe_dump(config))

    def made(backend: str) -> ExperimentRun:
        return ExperimentRun(read_experiment([f"--config={copy}", f"--victim.backend={backend}"]))

    runs = [made(backend) for backend in ("auto", "int8", "float32")]
    assert len({run.stages.attacked.key("dknn", "least") for run in runs}) == 3
    assert len({run.stages.attacked.key("origin", "bim") for run in runs}) == 1
    assert [run.describe()["victim"].get("backend") for run in runs] == [None, "int8", "float32"]


def test_a_default_that_another_version_changes_is_in_the_key(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = yaml.safe_load(copy.read_text())
    config["attacks"]["least"] = {"function": "minimum_norm", "through": "dknnb", "targets": ["dknn"]}
    copy.write_text(yaml.safe_dump(config))

    def keys() -> list[str]:
        attacked = ExperimentRun(read_experiment([f"--config={copy}"])).stages.attacked
        return [attacked.key("dknn", "least"), attacked.key("origin", "bim")]

    least, bim = keys()
    assert keys() == [least, bim]
    monkeypatch.setitem(inspect.unwrap(minimum_norm).__kwdefaults__, "steps", 21)
    changed, same = keys()
    assert changed != least
    assert same == bim


def test_how_a_machine_computes_is_in_keys(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = yaml.safe_load(copy.read_text())
    config["attacks"]["least"] = {"function": "minimum_norm", "through": "dknnb", "targets": ["dknn"]}
    copy.write_text(yaml.safe_dump(config))

    def keys() -> dict[str, str]:
        run = ExperimentRun(read_experiment([f"--config={copy}"]))
        return {
            "training": run.networks.key("origin") + run.networks.checkpoint("dknnb").name,
            "experiment": digest(run.describe()),
            "votes": run.attacked.key,
            "bim": run.stages.attacked.key("origin", "bim"),
            "least": run.stages.attacked.key("dknn", "least"),
        }

    def changed() -> set[str]:
        return {name for name, key in keys().items() if key != before[name]}

    before, numbers = keys(), {"votes", "bim", "least"}
    assert changed() == set()
    quick = torch.cpu._is_vnni_supported()
    with monkeypatch.context() as pretended:
        pretended.setattr("torch.cpu._is_vnni_supported", lambda: not quick)
        pretended.setattr("lightning_advknn.search.scans.quantize._int8_is_exact", lambda device: True)
        assert changed() == {"least"}  # neighbours, and so votes, are exact whatever scans
    with monkeypatch.context() as pretended:
        pretended.setattr("torch.backends.cpu.get_cpu_capability", lambda: "another")
        assert changed() == numbers
    with monkeypatch.context() as pretended:
        pretended.setenv("ONEDNN_MAX_CPU_ISA", "SSE41")
        assert changed() == numbers
    precision = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")  # which it is, unless set otherwise
        assert changed() == set()
        torch.set_float32_matmul_precision("medium")
        assert changed() == set()  # victims and attacks compute in float32 whatever is set
    finally:
        torch.set_float32_matmul_precision(precision)


def test_an_edited_attack_of_ones_own_is_run_again(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "fit", no_training)
    monkeypatch.syspath_prepend(tmp_path)
    source = tmp_path / "attack_that_is_edited.py"
    config = yaml.safe_load(copy.read_text())
    config |= {
        "images": 10,
        "output": str(copy.parent / "edited"),
        "attacks": {"own": {"function": "attack_that_is_edited.shift", "targets": ["origin"]}},
    }
    copy.write_text(yaml.safe_dump(config))
    for change, distance in (("0.25 - images.round() / 2", 0.25), ("0.5 - images.round()", 0.5)):
        source.write_text(f"def shift(logits_fn, images, labels):\n    return images + {change}\n")
        sys.modules.pop("attack_that_is_edited", None)
        importlib.invalidate_caches()
        assert evaluate(copy) == 0
        with (copy.parent / "edited" / "rows" / "origin" / "own.csv").open(newline="") as file:
            assert [float(row["linf"]) for row in csv.DictReader(file)] == pytest.approx([distance] * 10)


def test_a_best_score_of_zero_is_a_score(done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = write_config(tmp_path / "digits", "digits", k=10)
    run = ExperimentRun(read_experiment([f"--config={config}"]))
    cli, trained = run.networks.trainings["origin"], run.networks.trained("origin")
    monkeypatch.setattr(type(cli.trainer), "fit", lambda *args, **kwargs: None)
    (best,) = (done / "cache" / "backbone").glob("*.ckpt")
    picker = training._picker(cli, trained)
    picker.best_model_score, picker.best_model_path = torch.tensor(0.0), str(best)
    checkpoint = tmp_path / "made" / "0.ckpt"
    checkpoint.with_suffix(".unfinished").mkdir(parents=True)
    training.fit(cli, trained, checkpoint, 0)
    facts = json.loads(checkpoint.with_suffix(".json").read_text())
    assert facts["validation"] == {picker.monitor: 0.0}


@pytest.mark.parametrize("error", [SystemExit(143), SystemExit(1)])
def test_a_training_that_is_terminated_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: SystemExit
) -> None:
    config = write_config(tmp_path / "digits", "digits", k=10)

    def stop(self: Any) -> None:
        raise error

    monkeypatch.setattr(BackboneModule, "on_train_epoch_start", stop, raising=False)
    if error.code == 143:
        with pytest.raises(SystemExit, match="143"):
            evaluate(config)
        assert "attack.py: terminated; the same command goes on from here" in capsys.readouterr().err
    else:  # what Lightning makes of Ctrl-C
        assert evaluate(config) == 130


def test_fewer_images_are_a_fair_sample_with_files_of_its_own(
    copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(training, "fit", no_training)
    full, kept = copy.parent / "out", times(copy.parent / "cache")
    assert evaluate(copy, "--images=300", f"--output={copy.parent / 'few'}") == 0
    assert "300 of 547 test images, classes as in the whole, seed 0" in capsys.readouterr().out
    now = times(copy.parent / "cache")
    assert kept.items() <= now.items()
    new = sorted(set(now) - set(kept))
    assert Counter(name.split("/")[0] for name in new) == {
        "adversarial": 3 * 2 * 2,  # methods, attacks, shards
        "asked_again": 3 * 2 + 1,  # attacked and clean images
        "gradients": 3,
        "neighbours": 1,
        "observations": (3 * 2 + 1) * 2,
        "predictions": 2 * 3 * 2,  # surrogates, two attacks and clean images, shards
    }
    assert {re.sub("sample-[0-9a-f]{16}-", "sample ", Path(name).stem) for name in new} == {
        "sample 000000-000200",
        "sample 000200-000400",
        "sample 000000-000300",
    }
    assert len({name.split("sample-")[1][:16] for name in new}) == 1
    for path in (full / "rows").rglob("*.csv"):
        whole = {row["id"]: row for row in read(path)}
        rows = read(copy.parent / "few" / path.relative_to(full))
        assert rows == [whole[row["id"]] for row in rows]
        ids = [int(row["id"]) for row in rows]
        assert ids == sorted(set(ids))
        per_class = Counter(row["label"] for row in rows)
        for label, count in Counter(row["label"] for row in whole.values()).items():
            assert abs(per_class[label] - 300 * count / 547) < 1
    summary = json.loads((copy.parent / "few" / "summary.json").read_text())
    assert (summary["images"], summary["settings"]["images"]) == (300, 300)
    assert summary["settings"]["sample"] == {"of": 547, "seed": 0}
    assert {metrics["n"] for metrics in summary["metrics"].values()} == {300}
    for table in ("table1", "table2"):
        assert {row["n"] for row in read(copy.parent / "few" / f"{table}.csv")} == {"300"}


def test_as_many_images_as_there_are_is_all(
    copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(training, "fit", no_training)
    before, kept = numbers(copy.parent / "out"), times(copy.parent / "cache")
    assert evaluate(copy, "--images=547") == 0
    assert times(copy.parent / "cache") == kept
    assert numbers(copy.parent / "out") == before
    assert evaluate(copy, "--images=546") == 2
    assert "is of another experiment" in capsys.readouterr().err.replace("\n", " ")


@pytest.fixture(scope="module")
def transferred(done: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the same experiment, of one surrogate, with transfer to a LeNet5."""
    folder = tmp_path_factory.mktemp("transfer") / "digits"
    shutil.copytree(done, folder)
    content = yaml.safe_load((folder / "attack.yaml").read_text())
    configured = yaml.safe_load((folder / "transfer.yaml").read_text())
    content |= {name: configured[name] for name in ("surrogates", "transfer")}
    content |= {"output": str(folder / "transfer"), "cache": str(folder / "cache")}
    (folder / "transfer.yaml").write_text(yaml.safe_dump(content))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "_SHARD", dict.fromkeys(("cpu", "cuda"), 200))
        assert evaluate(folder / "transfer.yaml", f"--results={folder / 'transfer_results'}") == 0
    return folder


def test_table3_is_what_the_transfer_networks_rows_say(transferred: Path) -> None:
    output = transferred / "transfer"
    table = read(output / "table3.csv")
    assert read(transferred / "transfer_results" / "table3.csv") == table
    assert ",".join(table[0]) == "network,victim,method,attack,eps,accuracy,paper,l2_mean,n,seed"
    judged = [("origin", "clean")] + [(m, a) for m in ("origin", "dknnb_cl") for a in ("bim", "fgsm")]
    assert [(r["method"], r["attack"], r["victim"]) for r in table] == [
        (*pair, victim) for pair in judged for victim in ("dnn", "knn", "dknn")
    ]
    for cell in table:
        rows = read(output / "rows" / "lenet5" / cell["method"] / f"{cell['attack']}.csv")
        right = [row[f"{cell['victim']}_after"] == row["label"] for row in rows]
        assert float(cell["accuracy"]) == pytest.approx(100 * np.mean(right), abs=1e-3)
        assert float(cell["l2_mean"]) == pytest.approx(np.mean([float(row["l2"]) for row in rows]), abs=1e-4)
        eps = {"clean": "0", "fgsm": "0.2", "bim": "0.1"}[cell["attack"]]
        assert (cell["network"], cell["eps"], cell["n"], cell["seed"]) == ("lenet5", eps, "547", "0")
        assert cell["paper"] == ""
        assert {row["network"] for row in rows} == {"lenet5"}
    assert not (transferred / "out" / "table3.csv").exists()  # the experiment without transfer


def test_a_transfer_network_judges_the_stored_adversarials(transferred: Path) -> None:
    """Its DNN, kNN, DkNN and credibility by brute force, from its weights and the adversarials as stored."""
    layers = ("relu1", "relu2", "relu3", "relu4", "logits")
    checkpoints = {
        torch.load(path, weights_only=True)["lightning_advknn"]["network"].rpartition(".")[2]: path
        for path in (transferred / "cache" / "backbone").glob("*.ckpt")
    }
    network = trained(checkpoints["LeNet5"], LeNet5(mean=[0.3051], std=[0.3247]))
    calibration = Digits().split("calibration")
    conforming = sum(
        brute_force_votes(network, layer, calibration.images / 255)[range(250), calibration.labels]
        for layer in layers
    )
    stored = stored_adversarials(transferred / "cache")
    for path in (
        "lenet5/origin/clean.csv",
        "lenet5/origin/fgsm.csv",
        "lenet5/dknnb_cl/bim.csv",
    ):
        rows = read(transferred / "transfer" / "rows" / path)
        images = Digits().split("test").images / 255
        if "clean" not in path:
            images = of_rows(rows, stored)
        votes = {layer: brute_force_votes(network, layer, images) for layer in layers}
        assert all((votes[layer] == votes_of(rows, layer)).all() for layer in layers)
        with torch.no_grad():
            told = {"dnn": network(images).argmax(1).numpy(), "knn": votes["relu2"].argmax(1)}
        total = sum(votes.values())
        told["dknn"] = total.argmax(1)
        for victim, classes in told.items():
            assert (classes == [int(row[f"{victim}_after"]) for row in rows]).all()
        credibility = (conforming[None] < total.max(1)[:, None]).mean(1)
        assert credibility == pytest.approx([float(row["dknn_credibility_after"]) for row in rows])


def test_transfer_redoes_nothing_of_the_attacked_network(done: Path, transferred: Path) -> None:
    kept, now = times(done / "cache"), times(transferred / "cache")
    assert kept.items() <= now.items()
    new = [name.split("/")[0] for name in set(now) - set(kept)]
    # LeNet5's checkpoint and its settings, the time of its bank, its calibration, and three shards
    # of five sets of images.
    assert sorted(new) == (["backbone"] * 2 + ["bank", "calibration"] + ["observations"] * 3 * 5)
    summary = json.loads((transferred / "transfer" / "summary.json").read_text())
    assert summary["settings"]["transfer"] == {"lenet5": {"layer": "relu2"}}
    assert {"train lenet5", "build bank of lenet5", "query dknnb_cl/bim of lenet5"} <= summary[
        "seconds"
    ].keys()
    for method in ("origin", "dknnb_cl"):
        name = f"rows/{method}/bim.csv"
        assert (transferred / "transfer" / name).read_text() == (done / "out" / name).read_text()


def test_several_eps_of_an_attack_are_pictured(copy: Path) -> None:
    content = yaml.safe_load(copy.read_text())
    content["attacks"]["fgsm_small"] = {"function": "fgsm", "settings": {"eps": 0.1}}
    content["surrogates"] = {}
    copy.write_text(yaml.safe_dump(content))
    results = copy.parent / "eps_results"
    assert evaluate(copy, f"--output={copy.parent / 'eps'}", f"--results={results}") == 0
    for name in ("neighbours", "adversarials"):
        for suffix in ("png", "pdf"):
            picture = (copy.parent / "eps" / f"{name}.{suffix}").read_bytes()
            assert (results / f"{name}.{suffix}").read_bytes() == picture


class Slanted(ConvNet):
    """A network whose function depends on an argument that its weights do not show."""

    def __init__(
        self, slope: float = 1.0, mean: Sequence[float] = (0.3051,), std: Sequence[float] = (0.3247,)
    ):
        super().__init__(mean=mean, std=std)
        self.slope = slope

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return super().forward(self.slope * images)


def test_the_same_weights_in_another_function_are_another_experiment(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "slanted", sys.modules[__name__])
    checkpoint = torch.load(next((copy.parent / "cache" / "backbone").glob("*.ckpt")), weights_only=True)
    checkpoint["lightning_advknn"]["network"] = f"{__name__}.Slanted"
    torch.save(checkpoint, copy.parent / "own.ckpt")
    network = copy.parent / "network.yaml"
    accuracies = []
    for slope in (1.0, 0.3):
        content = {"class_path": "slanted.Slanted", "init_args": {"slope": slope}}
        network.write_text(yaml.safe_dump(content))
        output = copy.parent / f"slope{slope}"
        assert evaluate(copy, f"--backbone.checkpoint={copy.parent / 'own.ckpt'}", f"--output={output}") == 0
        accuracies.append(json.loads((output / "summary.json").read_text())["metrics"]["origin/clean"])
    fresh = copy.parent / "fresh"
    options = (f"--output={copy.parent / 'again'}", f"--cache={fresh}")
    assert evaluate(copy, f"--backbone.checkpoint={copy.parent / 'own.ckpt'}", *options) == 0
    again = json.loads((copy.parent / "again" / "summary.json").read_text())["metrics"]["origin/clean"]
    assert accuracies[1] == again != accuracies[0]


def test_an_interrupted_run_goes_on_and_equals_an_uninterrupted_one(
    copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = numbers(copy.parent / "out")
    for folder in ("out", "cache/adversarial", "cache/observations"):
        shutil.rmtree(copy.parent / folder)
    perturb, calls = attack_stages.perturb, []

    def interrupt(*args: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return perturb(*args)

    monkeypatch.setattr(attack_stages, "perturb", interrupt)
    assert evaluate(copy) == 130
    assert "the same command goes on from here" in capsys.readouterr().err
    assert not (copy.parent / "out" / "table2.csv").exists()
    kept = times(copy.parent / "cache")
    assert sum(name.startswith("adversarial") for name in kept) == 4
    assert evaluate(copy) == 0
    assert kept.items() <= times(copy.parent / "cache").items()
    assert numbers(copy.parent / "out") == expected


def test_a_damaged_cached_file_is_made_again(copy: Path) -> None:
    expected = numbers(copy.parent / "out")
    for kind in ("adversarial", "observations"):
        for position, path in enumerate((copy.parent / "cache" / kind).rglob("000200-*.safetensors")):
            content = path.read_bytes()
            flipped = content[:-1] + bytes([content[-1] ^ 1])  # the last number of a tensor
            path.write_bytes(flipped if position % 2 else content[:100])
    with (
        pytest.warns(UserWarning, match="it is damaged: .* It is made again"),
        pytest.warns(UserWarning, match="it has changed since. It is made again"),
    ):
        assert evaluate(copy) == 0
    assert numbers(copy.parent / "out") == expected


def test_results_collect_seeds(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = copy.parent / "results"
    assert evaluate(copy, "--seed=1", f"--output={copy.parent / 'one'}", f"--results={results}") == 0
    table = read(results / "table2.csv")
    assert [row["seed"] for row in table] == ["0"] * 18 + ["1"] * 18
    assert table[:18] == read(copy.parent / "out" / "table2.csv")
    assert table[18:] == read(copy.parent / "one" / "table2.csv")
    assert table[:18] != [{**row, "seed": "0"} for row in table[18:]]
    assert (
        json.loads((results / "seed1.json").read_text())["settings"]["trainings"]["origin"]["seed_everything"]
        == 1
    )
    # The same seed again replaces its lines; other settings do not belong in the same tables.
    assert evaluate(copy, f"--results={results}") == 0
    assert read(results / "table2.csv") == table
    capsys.readouterr()
    assert evaluate(copy, "--victim.k=5", f"--output={copy.parent / 'k5'}", f"--results={results}") == 2
    assert "another experiment" in capsys.readouterr().err


@pytest.mark.parametrize("damaged", [False, True])
def test_training_that_was_interrupted_goes_on_bitwise(
    done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damaged: bool
) -> None:
    config = write_config(tmp_path / "digits", "digits", k=10)
    monkeypatch.setattr(shards, "_SHARD", dict.fromkeys(("cpu", "cuda"), 200))
    epochs = []

    def interrupt(self: Any) -> None:
        epochs.append(self.current_epoch)
        if len(epochs) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training.AttackEvaluation, "setup", no_training)  # nor does it measure
        patch.setattr(BackboneModule, "on_train_epoch_start", interrupt, raising=False)
        assert evaluate(config) == 130
        assert not list((tmp_path / "digits" / "cache" / "backbone").glob("*.ckpt"))
        if damaged:
            (last,) = (tmp_path / "digits" / "cache" / "backbone").glob("*.unfinished/last.ckpt")
            content = bytearray(last.read_bytes())
            content[len(content) // 2] ^= 1
            last.write_bytes(content)
            with pytest.warns(UserWarning, match=r"last\.ckpt to be as it was written.*Training starts over"):
                assert evaluate(config) == 0
        else:
            assert evaluate(config) == 0
    assert epochs == ([0, 1, 0, 1, 2] if damaged else [0, 1, 1, 2])
    (ours,), (theirs,) = (
        list((folder / "cache" / "backbone").glob("*.ckpt")) for folder in (tmp_path / "digits", done)
    )
    assert ours.name == theirs.name
    ours_state, theirs_state = (torch.load(p, weights_only=True)["state_dict"] for p in (ours, theirs))
    assert all(torch.equal(ours_state[name], theirs_state[name]) for name in theirs_state)


def test_attempts_leave_no_checkpoints_that_the_last_epoch_does_not_know(done: Path, tmp_path: Path) -> None:
    (checkpoint,) = (done / "cache" / "backbone").glob("*.ckpt")
    content = checkpoint.read_bytes()
    last = tmp_path / "last.ckpt"
    for name in ("best", "best-v1", "last"):
        (tmp_path / f"{name}.ckpt").write_bytes(content)
    assert training._last_epoch(tmp_path) == last
    assert {path.name for path in tmp_path.iterdir()} == {"best.ckpt", "last.ckpt"}
    last.write_bytes(content[:1000])
    with pytest.warns(UserWarning, match="Training starts over"):
        assert training._last_epoch(tmp_path) is None
    assert not list(tmp_path.iterdir())


def _spoil(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: t * float("nan") if t.is_floating_point() else t for name, t in state.items()}


class _Code:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("ran"),))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--victim.k=851"], r"`victim.k` to be in \[1, 850\].*but got 851"),
        (["--victim.k=0"], "but got 0"),
        (["--images=0"], r"`images` to be in \[1, 547\] \(the test images\), but got 0"),
        (["--images=548"], r"`images` to be in \[1, 547\].*but got 548"),
        (["--images=many"], "images"),
        (["--victim.layer=relu9"], "one of .*relu1.*relu2.*relu3.*logits.*but got 'relu9'"),
        (
            ["--victim.layers=[relu3,relu9]"],
            r"`victim.layers`: Expected distinct `layers`.*relu9.*layers are \['normalize',",
        ),
        (["--victim.layers=[relu3,relu3]"], "`victim.layers`: Expected distinct `layers`"),
        (["--victim.layers=[]"], "`victim.layers`: Expected distinct `layers`"),
        (
            ["--victim.layers=[relu1,logits]"],
            r"`victim.layer` to be one of \['relu1', 'logits'\], but got 'relu3'",
        ),
        (["--attacks.fgsm.settings={'eps': -0.1}"], "`eps` to be finite and at least 0, but got -0.1"),
        (["--attacks.fgsm.settings={'eps': .nan}"], "`eps` to be finite and at least 0, but got nan"),
        (["--attacks.fgsm.settings={}"], r"settings of fgsm to be \['eps'\]"),
        (["--attacks.fgsm.settings={'eps': 0.1, 'step': 1}"], "unexpected keyword argument 'step'"),
        (
            ["--attacks.fgsm.function=pgd"],
            r"one of \[.*'bim', .*'fgsm', .*\] or an import path, but got 'pgd'",
        ),
        (["--backbone.checkpoint=missing.ckpt"], "missing.ckpt, but there is none"),
        (["--backbone.config={configs}/surrogate.yaml"], "to train a BackboneModule"),
        (
            ["--surrogates={'origin': {'config': '{configs}/surrogate.yaml'}}"],
            "which mean something else, but got 'origin'",
        ),
        (["--surrogates={'knn': {'config': '{configs}/surrogate.yaml'}}"], "but got 'knn'"),
        (
            ["--transfer={'dknnb': {'backbone': {'config': '{configs}/lenet.yaml'}, 'layer': 'relu2'}}"],
            "name of each transfer network .*but got 'dknnb'",
        ),
        (
            ["--transfer={'a/b': {'backbone': {'config': '{configs}/lenet.yaml'}, 'layer': 'relu2'}}"],
            "but got 'a/b'",
        ),
        (
            ["--transfer={'net': {'backbone': {'config': '{configs}/lenet.yaml'}, 'layer': 'relu9'}}"],
            "`transfer.net.layer` to be one of .*relu4.*, but got 'relu9'",
        ),
        (
            ["--transfer={'net': {'backbone': {'config': '{configs}/surrogate.yaml'}, 'layer': 'relu2'}}"],
            "to train a BackboneModule",
        ),
        (
            [
                "--transfer={'net': {'backbone': {'config': '{configs}/lenet.yaml', 'checkpoint': 'no.ckpt'},"
                " 'layer': 'relu2'}}"
            ],
            "no.ckpt, but there is none",
        ),
        (
            ["--transfer={'net': {'backbone': {'config': '{configs}/other.yaml'}, 'layer': 'relu2'}}"],
            "Expected net to be configured with the backbone's data and splits",
        ),
        (["--attacks={}"], "at least one attack"),
        (["--attacks={'clean': {'function': 'fgsm', 'settings': {'eps': 0.1}}}"], "but got 'clean'"),
        (["--attacks={'../x': {'function': 'fgsm', 'settings': {'eps': 0.1}}}"], "but got '../x'"),
        (
            ["--attacks.bim.settings={'eps': 0.1, 'step_size': 0.1, 'steps': 2.5}"],
            "`steps` of bim to be int, but got 2.5",
        ),
        (["--surrogates.dknnb.checkpoint={configs}/attack.yaml"], "(no|a whole) checkpoint"),
        (["--results={configs}/attack.yaml/results"], "to write in"),
        (["--device=meta"], "`device` to be one that torch can use here"),
        (
            ["--surrogates={'a': {'config': '{configs}/surrogate.yaml', 'overrides': {'layer': 'conv9'}}}"],
            "Its layers are .*conv1",
        ),
        (
            ["--surrogates={'a': {'config': '{configs}/surrogate.yaml', 'overrides': {'k': 9999}}}"],
            r"a's k to be in \[1, 849\]",
        ),
        (
            ["--surrogates={'a': {'config': '{configs}/surrogate.yaml', 'overrides': {'kk': 9}}}"],
            "surrogate.yaml to be a train.py configuration, but: .*kk",
        ),
        (["--output={configs}/attack.yaml/out"], "to write in .*Choose another output folder"),
        (["--cache={configs}/attack.yaml/cache"], "to write in"),
        (["--victim.backend=numpy"], "backend"),
        (["--device=abacus"], "`device` to be one that torch can use here"),
        (["--label_source=wrong"], "label_source"),
    ],
)
def test_bad_input_is_refused_before_anything_long(
    options: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = write_config(tmp_path / "digits", "digits", k=10)
    other = yaml.safe_load((config.parent / "lenet.yaml").read_text())
    other["data"] = {"class_path": "lightning_advknn.data.Digits", "init_args": {"split_seed": 1}}
    (config.parent / "other.yaml").write_text(yaml.safe_dump(other))
    monkeypatch.setattr(training, "fit", no_training)
    monkeypatch.setattr(judges, "build_banks", no_training)
    try:
        code = evaluate(config, *(o.replace("{configs}", str(config.parent)) for o in options))
    except SystemExit as exit_:  # jsonargparse
        code = exit_.code
    error = capsys.readouterr().err
    assert code == 2
    assert re.search(message, error.replace("\n", " ")), error


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["lightning_advknn"].update(network="other.Net"), "network is 'other.Net', not"),
        (lambda c: c["lightning_advknn"].update(data="MNIST"), "data is 'MNIST', not 'Digits'"),
        (lambda c: c["lightning_advknn"].update(num_classes=7), "num_classes is 7, not 10"),
        (lambda c: c["lightning_advknn"].update(kind="surrogate"), "kind is 'surrogate', not 'backbone'"),
        (lambda c: c.pop("lightning_advknn"), "hold the weights of lightning_advknn.models.convnet.ConvNet"),
        (lambda c: c.update(code=_Code()), "would run code"),
        (lambda c: c.pop("state_dict"), "`state_dict`"),
        (lambda c: c.update(state_dict=_spoil(c["state_dict"])), "holds NaN or infinity"),
        (lambda c: c["state_dict"].popitem(), "Missing key"),
    ],
)
def test_wrong_checkpoints_are_refused(
    change: Callable[[dict[str, Any]], object],
    message: str,
    copy: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(copy.parent)
    for module, name in ((training, "fit"), (judges, "build_banks"), (attack_stages, "perturb")):
        monkeypatch.setattr(module, name, no_training)
    checkpoint = torch.load(next((copy.parent / "cache" / "backbone").glob("*.ckpt")), weights_only=True)
    change(checkpoint)
    torch.save(checkpoint, copy.parent / "wrong.ckpt")
    assert evaluate(copy, "--backbone.checkpoint=wrong.ckpt", "--output=elsewhere") == 2
    assert message in capsys.readouterr().err
    assert not Path("ran").exists()


def test_a_given_checkpoint_is_used(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "fit", no_training)
    kept = next((copy.parent / "cache" / "backbone").glob("*.ckpt")).rename(copy.parent / "own.ckpt")
    assert evaluate(copy, f"--backbone.checkpoint={kept}", f"--output={copy.parent / 'own'}") == 0
    assert numbers(copy.parent / "own") == numbers(copy.parent / "out")


def test_an_output_folder_of_another_experiment_is_left_alone(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = times(copy.parent / "out")
    assert evaluate(copy, "--victim.k=5") == 2
    assert (
        "to hold this experiment's results, but its experiment.json is of another" in capsys.readouterr().err
    )
    assert times(copy.parent / "out") == kept


@pytest.mark.parametrize("data", ["svhn", "mnist", "fashion_mnist"])
def test_files_on_disk_go_through(data: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    root = request.getfixturevalue(f"{data}_root")
    config = write_config(tmp_path / data, data, k=5)
    content = yaml.safe_load((config.parent / "data.yaml").read_text())
    content["init_args"] |= {
        "verify_checksums": False,
        "download": False,
        "val_size": 50,
        "calibration_per_class": 10,
    }
    (config.parent / "data.yaml").write_text(yaml.safe_dump(content))
    assert evaluate(config, f"--root={root}") == 0
    table = read(config.parent / "out" / "table2.csv")
    assert {row["n"] for row in table} == {"300"}
    clean = [float(row["accuracy"]) for row in table if row["attack"] == "clean"]
    assert min(clean) > 50  # of ten classes: the fixture's images can be told apart
    assert not any(row["paper"] for row in table)  # with k = 5 there is nothing to compare with
    missing = attack.main(
        ["evaluate", f"--config={config}", "--root=nowhere", f"--output={tmp_path / 'other'}"]
    )
    assert missing == 2


def test_victims_themselves_are_attacked(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "fit", no_training)
    config = yaml.safe_load(copy.read_text())
    settings = {"surrogate_steps": 5, "steps": 3, "neighbours": 20, "classes": 1}
    config |= {
        "joint": {"all": ["dknnb_cl"]},
        "images": 30,
        "label_source": "true",
        "output": str(copy.parent / "victims"),
        "attacks": {
            "bim": {
                "function": "bim",
                "settings": {"step_size": 0.05, "steps": 3},
                "vary": {"eps": [0.1, 0.2]},
                "targets": ["all"],
            },
            "least": {"function": "minimum_norm", "through": "all", "settings": settings},
            "credible": {
                "function": "credible",
                "through": "all",
                "targets": ["dknn"],
                "settings": settings | {"eps": 3.0},
            },
        },
    }
    copy.write_text(yaml.safe_dump(config))
    assert evaluate(copy) == 0
    rows = copy.parent / "victims" / "rows"
    found = {str(path.relative_to(rows)) for path in rows.rglob("*.csv")}
    clean = {f"{method}/clean.csv" for method in ("origin", "dknnb", "dknnb_cl", "all")}
    assert found == clean | {
        "all/bim@eps=0.1.csv", "all/bim@eps=0.2.csv", "knn/least.csv", "dknn/least.csv", "dknn/credible.csv"
    }  # fmt: skip
    # The nearest errors are errors of the victim that was attacked, nearer than the most credible ones within a ball.
    means = {}
    for victim, name in (("knn", "least"), ("dknn", "least"), ("dknn", "credible")):
        table = read(rows / victim / f"{name}.csv")
        assert name == "credible" or all(row[f"{victim}_after"] != row["label"] for row in table)
        for column in ("l2", "dknn_credibility_after"):
            means[victim, name, column] = np.mean([float(row[column]) for row in table])
    assert means["dknn", "least", "l2"] < means["dknn", "credible", "l2"] <= 3.0
    low, high = (means["dknn", name, "dknn_credibility_after"] for name in ("least", "credible"))
    assert low < high
    before = times(copy.parent / "cache")
    assert evaluate(copy) == 0
    assert times(copy.parent / "cache") == before


@pytest.mark.parametrize(
    ("attack_changes", "joint", "message"),
    [
        ({"targets": ["knn"]}, {}, "knn.*which have no gradient"),
        ({"function": "minimum_norm", "through": "all"}, {}, "but got 'all'"),
        (
            {"function": "minimum_norm"},
            {},
            r"`through`, .* among \['origin', 'dknnb', 'dknnb_cl'\], but it is missing",
        ),
        ({"function": "minimum_norm", "through": "dknnb", "precision": "bfloat16"}, {}, "'bfloat16'"),
        ({}, {"all": ["relu9"]}, "to list surrogates"),
        ({}, {"all": ["dknnb", "dknnb_cl"]}, r"distinct layers, but got layers \['relu3', 'relu3'\]"),
        ({}, {"knn": ["dknnb"]}, "name of each joint surrogate"),
        ({}, {"dknnb": ["dknnb"]}, "name of each joint surrogate"),
    ],
)
def test_targets_that_do_not_exist(
    copy: Path,
    attack_changes: dict[str, Any],
    joint: dict[str, list[str]],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = yaml.safe_load(copy.read_text())
    one: dict[str, Any] = {"function": "fgsm", "settings": {"eps": 0.2}} | attack_changes
    if one["function"] == "minimum_norm":
        one["settings"] = {}
    config |= {"attacks": {"one": one}, "joint": joint, "output": str(copy.parent / "wrong")}
    copy.write_text(yaml.safe_dump(config))
    assert evaluate(copy) == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_dashboard_shows_what_the_files_say(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "fit", no_training)
    output = copy.parent / "out"
    before = numbers(output)
    with offline_wandb(copy.parent):
        assert evaluate(copy, "--wandb_mode=offline", "--wandb_project=robustness") == 0
    assert numbers(output) == before
    (run,) = read_runs(output)
    start = run.of("run")[0]
    assert (start["project"], start["job_type"], start["run_group"]) == ("robustness", "evaluate", "Digits")
    summary = json.loads((output / "summary.json").read_text())
    assert run.config["settings"] == summary["settings"]
    assert run.config["versions"] == summary["versions"]
    for name in ("table1", "table2"):
        shown, rows = run.table(f"tables/{name}"), read(output / f"{name}.csv")
        for column, cells in shown.items():
            texts = [row[column] for row in rows]
            if all(isinstance(cell, float | int) for cell in cells):
                assert cells == tuple(map(float, texts))
            else:
                assert [cell or "" for cell in cells] == texts
    assert run.media("figures/neighbours").read_bytes() == (output / "neighbours.png").read_bytes()

    cells = {(r["method"], r["attack"], r["victim"]): r for r in read(output / "table2.csv")}
    for (method, name, victim), cell in cells.items():
        accuracy = float(cell["accuracy"]) / 100
        (item,) = run.history(f"accuracy/{method}/{name}/{victim}")
        assert item[f"accuracy/{method}/{name}/{victim}"] == pytest.approx(accuracy)
        for function in (
            ("fgsm", "bim") if name == "clean" else (name,)
        ):  # attacks' names are their functions'
            for axis, column in (("eps", "eps"), ("l2", "l2_mean")):
                key = f"{axis}/{method}/{function}/{victim}_acc"
                points = {point[f"{axis}/{axis}"]: point[key] for point in run.history(key)}
                assert list(points) == sorted(points)
                assert points[float(cell[column])] == pytest.approx(accuracy)
                assert len(points) == 2
                assert run.axes[key] == f"{axis}/{axis}"


def test_without_being_asked_nothing_is_recorded(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")  # it says how, not whether
    monkeypatch.setattr(training, "fit", no_training)
    assert evaluate(copy) == 0
    assert not (copy.parent / "out" / "wandb").exists()


@pytest.mark.parametrize("missing", ["login", "wandb"])
def test_a_dashboard_that_cannot_be_is_found_out_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], missing: str
) -> None:
    config = write_config(tmp_path / "digits", "digits", k=10)
    monkeypatch.setattr(training, "fit", no_training)
    with offline_wandb(tmp_path) as environment:
        environment.delenv("WANDB_MODE")
        environment.setenv("NETRC", str(tmp_path / "netrc"))  # nobody's keys
        if missing == "wandb":
            environment.setitem(sys.modules, "wandb", None)
        assert evaluate(config, "--wandb_mode=online") == 2
    error = capsys.readouterr().err
    expected = {
        "login": "attack.py: error: Expected W&B to start a run (online), but it failed: No API key configured.",
        "wandb": "attack.py: error: Expected wandb to be installed",
    }
    assert expected[missing] in error
    assert "`--wandb_mode " in error


@pytest.mark.parametrize("command", ["evaluate", "leaderboard", "reproduce"])
def test_a_configuration_in_another_encoding_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    config = tmp_path / "other.yaml"
    config.write_text("seed: 0\n", encoding="utf-16")
    with pytest.raises(SystemExit) as leaving:
        attack.main([command, f"--config={config}"])
    assert leaving.value.code == 2
    assert "Expected a configuration to be text in UTF-8" in capsys.readouterr().err
