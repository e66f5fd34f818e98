"""`attack.py leaderboard` from the command line's arguments to files and exit codes."""

import csv
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

import attack
from lightning_advknn.attacks.parts import declare
from lightning_advknn.attacks.parts.voronoi import exact_minimum
from lightning_advknn.classifiers import DkNN
from lightning_advknn.data import Digits
from lightning_advknn.data.sample import fair_order
from lightning_advknn.evaluation import perturb
from lightning_advknn.experiment import attack_stages, judges, shards, training
from lightning_advknn.experiment.settings import VictimSettings
from lightning_advknn.storage import load_tensors, save_tensors
from tests.wandb_runs import offline_wandb, read_runs

CONFIGS = Path(__file__).parents[2] / "configs"
LAYERS = ("relu1", "relu2", "relu3", "logits")
IMAGES = 30


@declare.attack(on="victim")
def invert(victim: DkNN, images: Tensor, labels: Tensor) -> Tensor:
    """An attack that asks its victim twice and goes far."""
    victim.predict(images)
    victim(images[labels == victim.predict(images)])
    return 1 - images


ATTACKS = {
    "fgsm": {"function": "fgsm", "vary": {"eps": [0.1, 0.3]}},
    "bim": {"function": "bim", "settings": {"eps": 0.2, "step_size": 0.1, "steps": 3}, "targets": ["joint"]},
    "invert": {"function": f"{__name__}.invert", "norm": "l2"},
}


def write_config(folder: Path, **changes: Any) -> Path:
    """A small copy of the digits' leaderboard."""
    folder.mkdir(parents=True)
    for source in (CONFIGS / "digits").glob("*.yaml"):
        shutil.copy(source, folder)
    for name in ("backbone", "surrogate"):
        config = yaml.safe_load((folder / f"{name}.yaml").read_text())
        config["trainer"] |= {"max_epochs": 1, "log_every_n_steps": 1}
        del config["trainer"]["logger"]
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))
    config = yaml.safe_load((folder / "leaderboard.yaml").read_text())
    config["surrogates"] = {
        name: {"config": "surrogate.yaml", "overrides": {"layer": name}} for name in ("relu3", "logits")
    }
    config["joint"] = {"joint": ["relu3", "logits"]}
    config |= {"attacks": ATTACKS, "images": IMAGES}
    config |= {"output": str(folder / "out"), "cache": str(folder / "cache")} | changes
    (folder / "leaderboard.yaml").write_text(yaml.safe_dump(config))
    return folder / "leaderboard.yaml"


def leaderboard(config: Path, *options: str) -> int:
    return attack.main(["leaderboard", f"--config={config}", *options])


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def times(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


def no_training(*_: object) -> None:
    raise AssertionError("trained")


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished small leaderboard, with shards of 12 images, of 5 where a victim is attacked."""
    folder = tmp_path_factory.mktemp("leaderboard") / "digits"
    config = write_config(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "_SHARD", dict.fromkeys(("cpu", "cuda"), 12))
        patch.setattr(shards, "_PIECE", dict.fromkeys(("cpu", "cuda"), 5))
        assert leaderboard(config, f"--results={folder / 'results'}") == 0
    return folder


@pytest.fixture
def copy(done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The configuration of a copy of the finished leaderboard."""
    monkeypatch.setattr(shards, "_SHARD", dict.fromkeys(("cpu", "cuda"), 12))
    monkeypatch.setattr(shards, "_PIECE", dict.fromkeys(("cpu", "cuda"), 5))
    shutil.copytree(done, tmp_path / "copy")
    config = tmp_path / "copy" / "leaderboard.yaml"
    config.write_text(config.read_text().replace(str(done), str(tmp_path / "copy")))
    return config


def wrong(rows: list[dict[str, str]], victim: str) -> np.ndarray:
    """Which images a victim gets wrong after an attack, from the rows' votes."""
    labels = np.array([int(row["label"]) for row in rows])
    if victim == "dnn":
        return np.array([int(row["dnn_after"]) for row in rows]) != labels
    layers = LAYERS if victim == "dknn" else [victim.removeprefix("knn/")]
    votes = sum(
        np.array([row[f"votes_after_{layer}"].split() for row in rows]).astype(int) for layer in layers
    )
    return votes.argmax(1) != labels


def test_records_are_what_the_rows_say(done: Path) -> None:
    records = read(done / "out" / "leaderboard.csv")
    wanted = "attack,victim,norm,eps,accuracy,l2_mean,min_l2_mean,min_l2_median,credibility_success_mean,n,seconds_per_image,seed"
    assert ",".join(records[0]).startswith(wanted)
    methods = ("origin", "relu3", "logits", "joint")
    on = [*(f"fgsm, {method}" for method in methods), "bim, joint", "invert, knn", "invert, dknn"]
    assert sorted({record["attack"] for record in records}) == sorted([*on, "clean", "worst case"])
    rows = {path: read(path) for path in (done / "out" / "rows").rglob("*.csv")}
    assert len(rows) == 1 + 2 * 4 + 1 + 2
    for victim in ("dnn", *(f"knn/{layer}" for layer in LAYERS), "dknn"):
        found = {(r["attack"], r["norm"], r["eps"]): r for r in records if r["victim"] == victim}
        assert {record["n"] for record in found.values()} == {str(IMAGES)}
        survive: dict[str, np.ndarray] = {}
        for path, lines in rows.items():
            name, _, eps = path.stem.partition("@eps=")
            norm = "l2" if name == "invert" else "linf"
            key = (
                ("clean", "", "0")
                if name == "clean"
                else (f"{name}, {path.parent.name}", norm, {"bim": "0.2", "invert": ""}.get(name, eps))
            )
            fooled = wrong(lines, victim)
            assert float(found[key]["accuracy"]) == pytest.approx(100 * (1 - fooled.mean()), abs=1e-3)
            l2 = np.array([float(row["l2"]) for row in lines])
            assert float(found[key]["l2_mean"]) == pytest.approx(l2.mean(), abs=1e-3)
            for at in ("0.1", "0.2", "0.3"):
                linf = np.array([float(row["linf"]) for row in lines])
                lost = fooled & (linf <= float(at) + 1e-6)
                survive[at] = survive.get(at, np.full(IMAGES, True)) & ~lost
        for at, left in survive.items():
            accuracy = float(found["worst case", "linf", at]["accuracy"])
            assert accuracy == pytest.approx(100 * left.mean(), abs=1e-3)


def test_costs_are_the_attacks_own(done: Path) -> None:
    rows = read(done / "out" / "rows" / "origin" / "clean.csv")
    # `invert` asks about all, all again, and those again that are what it moves away from.
    asked = {
        victim: 2 + np.mean([row[f"{victim}_before"] == row["label"] for row in rows])
        for victim in ("knn", "dknn")
    }
    for record in read(done / "out" / "leaderboard.csv"):
        if record["counted"] == "run" and record["attack"] != "clean":
            expected = asked[record["method"]] if record["attack"].startswith("invert") else 0
            assert float(record["queries"]) == pytest.approx(expected, abs=5e-3)
            assert float(record["seconds_per_image"]) > 0


def test_files_say_how_they_were_made_and_what_was_checked(done: Path) -> None:
    for folder in ("out", "results"):
        content = json.loads((done / folder / "leaderboard.json").read_text())
        assert content["settings"]["victim"]["layer"] == "relu3"
        assert set(content["settings"]["attacks"]) == {"fgsm@eps=0.1", "fgsm@eps=0.3", "bim", "invert"}
        summary = content["runs"]["0"]
        assert {"command", "versions", "device", "date", "seconds"} <= summary.keys()
        assert summary["images"] == IMAGES
        assert set(summary["thresholds"]) == {"dknn", *(f"knn/{layer}" for layer in LAYERS)}
        checks = {check["check"]: check for check in summary["checks"]}
        assert len(checks) == 12
        assert summary["classes"]["names"] == list("0123456789")
        assert sum(summary["classes"]["attacked"]) == IMAGES
        assert checks["adversarials stay within eps"]["holds"] is True
        again = checks["stored adversarials, queried again, get the same votes"]
        assert (again["holds"], again["detail"]) == (True, f"{(1 + 11) * IMAGES} images")
        apart = checks["images get the same votes in other batches"]
        assert (apart["holds"], apart["detail"]) == (True, f"{(1 + 11) * IMAGES} images")
        assert checks["no distance is below its lower bound"]["holds"] is None
        for name in ("leaderboard.png", "leaderboard.pdf", "leaderboard.md"):
            assert (done / folder / name).stat().st_size > 1000
        assert content["settings"]["sample"] == {"of": 547, "seed": 0}
        # Of each of three victims, and of how it was made.
        page = (done / folder / "leaderboard.md").read_text()
        assert page.count(f", {IMAGES} of 547 test images, classes as in the whole, seed 0") == 4


def test_a_second_run_redoes_nothing(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "fit", no_training)
    monkeypatch.setattr(attack_stages, "perturb", no_training)
    kept, before = times(copy.parent / "cache"), (copy.parent / "out" / "leaderboard.csv").read_text()
    assert leaderboard(copy, f"--results={copy.parent / 'results'}") == 0
    assert times(copy.parent / "cache") == kept
    for folder in ("out", "results"):
        assert (copy.parent / folder / "leaderboard.csv").read_text() == before


def test_an_interrupted_attack_on_a_victim_keeps_its_pieces(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (copy.parent / "out" / "leaderboard.csv").read_text()
    # 12, 12 and 6 images: their pieces are of 5, 5, 2, twice, and of 5 and 1, for each of two victims.
    pieces = [
        path
        for path in sorted((copy.parent / "cache" / "adversarial").rglob("*.safetensors"))
        if "queries" in load_file(path)
    ]
    assert len(pieces) == 2 * 8
    lost, sizes = [pieces[1], pieces[9]], []
    for path in lost:
        sizes.append(len(load_file(path)["adversarial"]))
        path.unlink()
    made: list[int] = []

    def counted(attack: Any, target: Any, images: Tensor, *rest: Any) -> Tensor:
        made.append(len(images))
        return perturb(attack, target, images, *rest)

    monkeypatch.setattr(attack_stages, "perturb", counted)
    assert leaderboard(copy) == 0
    assert sorted(made) == sorted(sizes)
    seconds = 10  # the column of what is measured anew

    def without_seconds(text: str) -> list[list[str]]:
        return [line[:seconds] + line[seconds + 1 :] for line in csv.reader(text.splitlines())]

    after = (copy.parent / "out" / "leaderboard.csv").read_text()
    assert without_seconds(after) == without_seconds(before)


def test_a_changed_adversarial_is_found_out(copy: Path) -> None:
    for path in (copy.parent / "cache" / "adversarial").rglob("*-000000-*.safetensors"):
        tensors, metadata = load_tensors(path)
        if "queries" not in tensors:
            save_tensors(path, {"adversarial": tensors["adversarial"].flip(0)}, metadata)
    assert leaderboard(copy) == 0
    content = json.loads((copy.parent / "out" / "leaderboard.json").read_text())
    check = content["runs"]["0"]["checks"][-1]
    assert check["holds"] is False
    assert "fgsm@eps=0.1, origin: " in check["detail"]
    assert "invert" not in check["detail"]


def test_seeds_are_collected(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = copy.parent / "results"
    first = read(results / "leaderboard.csv")
    one = copy.parent / "one"
    assert leaderboard(copy, "--seed=1", f"--output={one}", f"--results={results}") == 0
    both = read(results / "leaderboard.csv")
    assert both == first + read(one / "leaderboard.csv")
    assert [record["seed"] for record in both] == ["0"] * len(first) + ["1"] * len(first)
    assert list(json.loads((results / "leaderboard.json").read_text())["runs"]) == ["0", "1"]
    assert "±" in (results / "leaderboard.md").read_text()
    # Another experiment belongs neither into these tables nor into a folder with others' results.
    capsys.readouterr()
    fewer = ("--images=20", f"--results={results}")
    assert leaderboard(copy, *fewer, f"--output={copy.parent / 'fewer'}") == 2
    assert "leaderboard.json is of another experiment" in capsys.readouterr().err
    assert leaderboard(copy, "--images=20") == 2
    assert "experiment.json is of another experiment" in capsys.readouterr().err.replace("\n", " ")
    assert read(results / "leaderboard.csv") == both


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"transfer": {"net": {"backbone": {"config": "lenet.yaml"}, "layer": "relu2"}}},
            r"Expected no `transfer` in a leaderboard, but got \['net'\]",
        ),
        (
            {"attacks": {"far": {"function": f"{__name__}.invert", "settings": {"norm": 1}}}},
            "Expected `norm` to say what .*invert keeps small",
        ),
        (
            {"attacks": {"fgsm": {"function": "fgsm", "vary": {"eps": [-0.1]}}}},
            "`eps` to be finite and at least 0",
        ),
        ({"attacks": {}}, "at least one attack"),
    ],
)
def test_bad_input_is_refused_before_anything_long(
    changes: dict[str, Any],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(training, "fit", no_training)
    assert leaderboard(write_config(tmp_path / "digits", **changes)) == 2
    error = capsys.readouterr().err.replace("\n", " ")
    assert re.search(message, error), error
    assert not list((tmp_path / "digits").rglob("leaderboard.csv"))


PIXELS = {
    "victim": {"layer": "normalize", "layers": ["normalize"], "k": 1, "metric": "euclidean"},
    "surrogates": {},
    "joint": {},
    "attacks": {"qp": {"function": "qp", "targets": ["knn"]}},
    "images": 12,
}


@pytest.fixture(scope="module")
def pixels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished small leaderboard of the 1-NN on pixels, in pieces of 5 images."""
    folder = tmp_path_factory.mktemp("pixels") / "digits"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "_PIECE", dict.fromkeys(("cpu", "cuda"), 5))
        assert leaderboard(write_config(folder, **PIXELS)) == 0
    return folder


@pytest.fixture
def pixels_copy(pixels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The configuration of a copy of it."""
    monkeypatch.setattr(shards, "_PIECE", dict.fromkeys(("cpu", "cuda"), 5))
    shutil.copytree(pixels, tmp_path / "copy")
    config = tmp_path / "copy" / "leaderboard.yaml"
    config.write_text(config.read_text().replace(str(pixels), str(tmp_path / "copy")))
    return config


def bound_check(folder: Path) -> dict[str, Any]:
    """The check of bounds, of its leaderboard."""
    checks = json.loads((folder / "out" / "leaderboard.json").read_text())["runs"]["0"]["checks"]
    (check,) = (each for each in checks if "lower bound" in each["check"])
    return dict(check)


def test_bounds_of_the_knn_on_pixels(pixels: Path) -> None:
    assert bound_check(pixels)["holds"] is True
    assert bound_check(pixels)["detail"] == "2 victims with bounds"
    records = read(pixels / "out" / "leaderboard.csv")
    found = [record for record in records if record["attack"] == "lower bound"]
    assert {record["victim"] for record in found} == {"knn/normalize", "dknn"}
    # Between the largest bisector distance of the nearest cell, by a loop over images, and what the attack reaches.
    data = Digits()
    train, test = data.split("train"), data.split("test")
    rows, classes = train.images.flatten(1).double().numpy() / 255, train.labels.numpy()
    least = []
    test = test.select(fair_order(test.labels, 0)[:12])
    for query, label in zip(test.images.flatten(1).double().numpy() / 255, test.labels, strict=True):
        squares = ((rows - query) ** 2).sum(1)
        own, wrong = rows[classes == int(label)], rows[classes != int(label)]
        lengths = np.sqrt((wrong**2).sum(1)[:, None] + (own**2).sum(1) - 2 * wrong @ own.T)
        gaps = squares[classes != int(label)][:, None] - squares[classes == int(label)]
        least.append(max((gaps / (2 * lengths)).max(1).min(), 0))
    (attacked,) = (r for r in records if (r["victim"], r["attack"], r["eps"]) == ("dknn", "qp, knn", ""))
    for record in found:
        for column, low in (("min_l2_mean", np.mean(least)), ("min_l2_median", np.median(least))):
            assert 0.5 < low - 1e-4 <= float(record[column]) <= float(attacked[column]) + 1e-4


def test_approximate_neighbours_have_a_note_and_no_bounds(pixels_copy: Path) -> None:
    pytest.importorskip("faiss")
    folder = pixels_copy.parent
    index = '--victim.index={"nlist": 5, "nprobe": 5}'
    assert leaderboard(pixels_copy, "--victim.backend=ivf", index, f"--output={folder / 'ivf'}") == 0
    said = "Approximate neighbours (ivf, nlist 5, nprobe 5): recall@1 on 100 validation images is normalize 1.0000."
    exact, records = (read(folder / name / "leaderboard.csv") for name in ("out", "ivf"))
    timed = {"seconds_per_image": ""}
    assert [{**record, **timed} for record in records] == [
        {**record, **timed, "note": said} for record in exact if record["attack"] != "lower bound"
    ]
    run = json.loads((folder / "ivf" / "leaderboard.json").read_text())["runs"]["0"]
    assert run["approximation"]["origin"]["recall"] == {"normalize": 1.0}
    page = (folder / "ivf" / "leaderboard.md").read_text()
    assert page.count(said[:-1]) == 3  # DkNN, kNN, how it was made; not the backbone
    assert "Approximate" not in (folder / "out" / "leaderboard.md").read_text()


def test_an_adversarial_below_the_bound_is_found_out(pixels_copy: Path) -> None:
    folder = pixels_copy.parent
    (path,) = (folder / "cache" / "adversarial").rglob("*-000005-*.safetensors")
    tensors, metadata = load_tensors(path)
    test = Digits().split("test")
    clean = test.images[fair_order(test.labels, 0)[:12].sort().values[5:10]].float() / 255
    # Half of the way, with the verdicts that are kept of the whole.
    save_tensors(path, tensors | {"adversarial": (clean + tensors["adversarial"]) / 2}, metadata)
    assert leaderboard(pixels_copy) == 0
    check = bound_check(folder)
    assert check["holds"] is False
    assert re.search(r"knn/normalize: \d images, the first of qp, knn at", check["detail"])


def test_interrupted_bounds_keep_their_pieces(pixels_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = pixels_copy.parent
    pieces = sorted((folder / "cache" / "bounds").rglob("*.safetensors"))
    assert [path.stem[-13:] for path in pieces] == ["000000-000005", "000005-000010", "000010-000015"]
    kept = load_file(pieces[1])["bounds"]
    pieces[1].unlink()
    made: list[int] = []

    def counted(*known: Any) -> Any:
        made.append(len(known[2]))
        return exact_minimum(*known)

    monkeypatch.setattr(judges, "exact_minimum", counted)
    before = (folder / "out" / "leaderboard.csv").read_text()
    assert leaderboard(pixels_copy) == 0
    assert made == [5]
    assert (load_file(pieces[1])["bounds"] == kept).all()
    assert (folder / "out" / "leaderboard.csv").read_text() == before


@pytest.mark.parametrize("k", [1, 3])
def test_bounds_by_hand(plane_knn: Callable[..., DkNN], k: int) -> None:
    # Two points, or two copies of each: the class changes at x = .5.
    rows = [(0.2, 0.5, 0), (0.8, 0.5, 1)] * (1 if k == 1 else 2)
    knn = plane_knn(rows, k)
    device = knn.calibration_votes.device
    images = torch.tensor([[0.3, 0.9], [0.3, 0.9], [0.6, 0.2]])[:, None, None].to(device)
    known: Any = SimpleNamespace(dknn=knn, settings=VictimSettings("pixels", k=k, metric="euclidean"))
    scale = torch.ones(2, dtype=torch.float64, device=device)

    def bounds(labels: list[int]) -> list[float]:
        found = judges.Judges.bounds(known, "pixels", scale, images, torch.tensor(labels).to(device))[
            "bounds"
        ]
        assert found.dtype == torch.float64
        return found.tolist()

    # The second is wrong as it is.
    assert bounds([0, 1, 1]) == pytest.approx([0.2, 0, 0.1], abs=1e-6)
    assert bounds([0, 0, 0]) == pytest.approx([0.2, 0.2, 0], abs=1e-6)


def test_a_dashboard_shows_the_curves_of_every_entry(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "fit", no_training)
    with offline_wandb(copy.parent):
        assert leaderboard(copy, "--wandb_mode=offline") == 0
    output = copy.parent / "out"
    (run,) = read_runs(output)
    assert run.of("run")[0]["job_type"] == "leaderboard"
    records = read(output / "leaderboard.csv")
    assert run.table("tables/leaderboard")["attack"] == tuple(record["attack"] for record in records)
    assert run.media("figures/leaderboard").read_bytes() == (output / "leaderboard.png").read_bytes()
    expected: dict[str, dict[float, float]] = {}
    for record in records:
        victim = {"knn/relu3": "knn"}.get(record["victim"], record["victim"])
        axis = {("run", "linf"): "eps", ("nearest", "l2"): "l2"}.get((record["counted"], record["norm"]))
        if axis and record["eps"] and victim in ("dnn", "knn", "dknn"):
            entry = record["attack"].replace(", ", "/").replace(" ", "_")
            line = expected.setdefault(f"{axis}/{entry}/{victim}_acc", {})
            line[float(record["eps"])] = float(record["accuracy"]) / 100
    assert {"eps/fgsm/origin/dknn_acc", "l2/bim/joint/knn_acc", "l2/worst_case/dnn_acc"} < expected.keys()
    for key, line in expected.items():
        axis = f"{key.split('/')[0]}/{key.split('/')[0]}"
        points = {point[axis]: point[key] for point in run.history(key)}
        assert list(points) == sorted(line)
        assert points == pytest.approx(line)
        assert run.axes[key] == axis
