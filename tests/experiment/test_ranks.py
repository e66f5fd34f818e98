"""Several processes do what one does, and notice when one of them dies."""

import csv
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch.distributed import TCPStore

import attack
from lightning_advknn.data import Digits
from lightning_advknn.data.sample import fair_order
from lightning_advknn.experiment import fill
from lightning_advknn.ranks import Ranks, _gpu, _LostRankError, join
from lightning_advknn.search import MemoryBank
from lightning_advknn.search.sharded import _merge
from lightning_advknn.storage import load_tensors
from lightning_advknn.training_cli import AdvKNNCLI
from tests.ranks_worker import CLASSES, METRICS, K, points, questions

ROOT = Path(__file__).parents[2]
LAYERS = ["relu1", "relu2", "relu4", "logits"]
SERVERS: list[TCPStore] = []  # as long as there are ranks that say in them that they live
IMAGES, NEIGHBOURS = 101, 10  # no multiple of the ranks, of an attack's batches or of its pieces

pytestmark = [
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:LightningCLI's args parameter"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed from"),
]


def write_configs(folder: Path) -> None:
    """A small experiment for one process, two, two with a sharded bank, and two of which one dies; and a training."""
    network = {"class_path": "lightning_advknn.models.LeNet5", "init_args": {"mean": [0.3], "std": [0.3]}}
    # Batches of 845 and 6 training images: the second rank's shard is smaller than k.
    sizes = {"val_size": 149, "eval_batch_size": 845, "calibration_per_class": 6}
    data = {"class_path": "lightning_advknn.data.Digits", "init_args": sizes}
    picker = {"monitor": "val/acc", "mode": "max", "filename": "best", "save_last": True}
    trainer: dict[str, Any] = {"max_epochs": 1, "limit_train_batches": 8, "log_every_n_steps": 1}
    trainer["callbacks"] = [
        {"class_path": "pytorch_lightning.callbacks.ModelCheckpoint", "init_args": picker}
    ]
    models = {
        "backbone": ("BackboneModule", {"layers": LAYERS}),
        "surrogate": ("SurrogateModule", {"layer": "relu2", "k": NEIGHBOURS, "backbone_checkpoint": "none"}),
    }
    contents: dict[str, Any] = {}
    for name, (module, arguments) in models.items():
        model = {
            "class_path": f"lightning_advknn.modules.{module}",
            "init_args": {"network": network, **arguments},
        }
        contents[name] = {"seed_everything": 0, "model": model, "data": data, "trainer": trainer}
    attacks: dict[str, Any] = {
        "bim": {"function": "bim", "settings": {"eps": 0.2, "step_size": 0.1, "steps": 2}},
        "ask": {
            "function": "ask",
            "settings": {"eps": 0.1, "step_size": 0.1, "steps": 1},
            "targets": ["knn"],
        },
    }
    for name in ("one", "two", "shard", "dies"):
        on_logits = {"bim": attacks["bim"]}
        contents[name] = {
            "backbone": {"config": "backbone.yaml"},
            "surrogates": {
                "dknnb": {
                    "config": "surrogate.yaml",
                    "overrides": {"cls_weight": 1.0, "cl_weight": 0.0},
                },
                "dknnb_cl": {"config": "surrogate.yaml"},
            },
            "victim": {"layer": "relu2", "k": NEIGHBOURS, "shard": name == "shard"},
            "attacks": attacks if name in ("one", "two") else on_logits,
            "images": IMAGES,
            "output": str(folder / name),
            "cache": str(folder / f"cache-{name}"),
        }
    fit = json.loads(json.dumps(contents["surrogate"]))
    fit["model"]["init_args"] |= {"backbone_checkpoint": str(folder / "backbone.ckpt")}
    logger = {
        "class_path": "pytorch_lightning.loggers.CSVLogger",
        "init_args": {"save_dir": str(folder), "name": "log"},
    }
    fit["trainer"] |= {"logger": logger, "enable_progress_bar": False, "enable_model_summary": False}
    contents["fit"] = fit
    for name, content in contents.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str], float]:
    """The folder of one process's and of two processes' results; how their job ended, and how long that took."""
    folder = tmp_path_factory.mktemp("ranks")
    write_configs(folder)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the others: sums over threads are rounded in another order
    try:
        assert attack.main(["evaluate", f"--config={folder / 'one'}.yaml"]) == 0
    finally:
        torch.set_num_threads(threads)
    (checkpoint,) = (folder / "cache-one" / "backbone").glob("*.ckpt")
    shutil.copy(checkpoint, folder / "backbone.ckpt")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    process = subprocess.run(
        [*torchrun, "-m", "tests.ranks_worker", str(folder)],
        env=environment,
        cwd=ROOT,
        timeout=400,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (folder / "done0").is_file(), process.stderr
    assert (folder / "done1").is_file(), process.stderr
    ended = time.time() - max((folder / f"done{rank}").stat().st_mtime for rank in range(2))
    return folder, process, ended


Job = tuple[Path, "subprocess.CompletedProcess[str]", float]


def files(output: Path) -> dict[str, str]:
    return {str(path.relative_to(output)): path.read_text() for path in output.rglob("*.csv")}


def test_two_processes_find_what_one_finds(job: Job) -> None:
    folder, *_ = job
    one, two = files(folder / "one"), files(folder / "two")
    assert len(one) == 9  # rows of three methods, clean and attacked, of an attack on the kNN; two tables
    assert two == one
    summaries = [json.loads((folder / name / "summary.json").read_text()) for name in ("one", "two", "shard")]
    for name in ("metrics", "credibility", "images", "settings"):
        assert summaries[0][name] == summaries[1][name]
    # Stages count as often, whoever did them.
    assert summaries[0]["seconds"].keys() == summaries[1]["seconds"].keys()
    sharded = files(folder / "shard")
    rows = {name for name in one if name.startswith("rows") and "ask" not in name}
    assert rows == {name for name in sharded if name.startswith("rows")}
    assert {name: sharded[name] for name in rows} == {name: one[name] for name in rows}


def test_every_image_counts_once(job: Job) -> None:
    folder, *_ = job
    test = Digits(val_size=149, calibration_per_class=6).split("test")
    expected = test.ids[fair_order(test.labels, 0)[:IMAGES]].sort().values.tolist()
    for name in ("two", "shard"):
        for path in (folder / name / "rows").rglob("*.csv"):
            with path.open() as file:
                assert [int(row["id"]) for row in csv.DictReader(file)] == expected
        summary = json.loads((folder / name / "summary.json").read_text())
        assert {metrics["n"] for metrics in summary["metrics"].values()} == {IMAGES}
        # Nothing is left of the parts that files were made in.
        cache = folder / f"cache-{name}"
        left = [path for path in cache.rglob("*") if path.is_file() and path.parent.parent.parent != cache]
        assert {path.parent.name for path in left} == {"backbone", "bank", "surrogate", "calibration"}


def brute_force(
    queries: torch.Tensor, own_ids: torch.Tensor | None, metric: str
) -> tuple[list[list[int]], list[list[int]]]:
    """Rows and votes by sorting (distance, row) in float64."""
    features, labels, ids = (part.numpy() for part in points())
    nearest, votes = [], []
    for number, query in enumerate(queries.double().numpy()):
        if metric == "euclidean":
            distances = ((features.astype(float) - query) ** 2).sum(1)
        else:
            size = np.linalg.norm(features.astype(float), axis=1) * np.linalg.norm(query)
            products = features.astype(float) @ query
            distances = 1 - np.divide(products, size, out=np.zeros_like(products), where=size > 0)
        others = [
            row for row in range(len(features)) if own_ids is None or ids[row] != own_ids[number].item()
        ]
        # Features are small integers and halves: what ties, ties to 12 decimals.
        order = sorted(others, key=lambda row: (round(distances[row], 12), row))[:K]
        nearest.append(order)
        votes.append(np.bincount(labels[order], minlength=CLASSES).tolist())
    return nearest, votes


@pytest.mark.parametrize("metric", METRICS)
def test_shards_give_the_neighbours_of_the_whole(job: Job, metric: str) -> None:
    folder, *_ = job
    features, labels, ids = points()
    whole = MemoryBank(features, labels, ids, CLASSES, metric)  # type: ignore[arg-type]
    for rank in range(2):
        found = json.loads((folder / f"found{rank}.json").read_text())
        assert len(found) == 2 * len(questions(rank))
        for number, (queries, own_ids) in enumerate(questions(rank)):
            distances, rows, votes = found[f"{metric}/{number}"]
            assert (rows, votes) == brute_force(queries, own_ids, metric)
            assert distances == whole.search(queries, K, own_ids)[0].tolist()
    # There are ties over both shards, so that the rule about them is asked.
    assert len({tuple(row) for row in features[:3].tolist()} & {tuple(row) for row in features[3:].tolist()})


def test_ties_between_shards_go_to_the_lower_row() -> None:
    distances = torch.tensor([[1.0, 2.0, 0.5, 1.0, torch.inf]]).double()
    rows = torch.tensor([[7, 1, 9, 2, 10]])
    near, found = _merge(distances, rows, 3)
    assert (near.tolist(), found.tolist()) == ([[0.5, 1.0, 1.0]], [[9, 2, 7]])


def test_lightning_trains_and_validates_on_each_image_once(job: Job) -> None:
    folder, *_ = job
    (log,) = (folder / "log").iterdir()  # one run, written once
    with (log / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    (logged,) = (
        {name: float(row[name]) for name in row if name.startswith("val/")} for row in rows if row["val/acc"]
    )
    # Each rank has half of an epoch's 27 batches, of which `limit_train_batches` leaves 8.
    assert len([row for row in rows if row["train/loss"]]) == 8
    assert round(logged["val/acc"] * 149, 4) == pytest.approx(round(logged["val/acc"] * 149), abs=1e-3)
    checkpoint = next(log.rglob("best.ckpt"))
    assert torch.load(checkpoint, weights_only=True)["global_step"] == 8
    alone = AdvKNNCLI(
        [
            "validate",
            f"--config={folder / 'fit.yaml'}",
            "--trainer.logger=false",
            f"--trainer.default_root_dir={folder}",
            "--trainer.accelerator=cpu",
            f"--ckpt_path={checkpoint}",
        ]
    )
    validated = {name: value.item() for name, value in alone.trainer.callback_metrics.items()}
    assert validated == pytest.approx(logged, rel=1e-5)


def test_leave_one_out_votes_of_two_processes_are_those_of_one(job: Job) -> None:
    folder, *_ = job
    one, two = (
        {
            path.stem: load_tensors(path)[0]["votes"]
            for path in (folder / name / "votes").rglob("*.safetensors")
        }
        for name in ("cache-one", "cache-two")
    )
    assert one["train"].sum(1).tolist() == [NEIGHBOURS] * 851
    assert one.keys() == two.keys() == {"train", "val"}
    for split, expected in one.items():
        assert torch.equal(two[split], expected)


def test_a_killed_rank_ends_the_job(job: Job) -> None:
    folder, process, ended = job
    assert process.returncode != 0
    assert ended < 60
    assert "attack.py: terminated, as launchers do with all processes when one has died" in process.stderr
    assert "Signal 9 (SIGKILL) received" in process.stderr
    assert not (folder / "dies" / "summary.json").exists()
    # What was finished is there for the same command to go on from.
    assert len(list((folder / "cache-dies" / "surrogate").glob("*.ckpt"))) == 2


@pytest.fixture
def rank() -> Callable[..., Ranks]:
    """Makes ranks of one job within this process: ``rank(number, size, timeout)``."""
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    SERVERS.append(server)

    def make(number: int, size: int, timeout: float) -> Ranks:
        store = TCPStore("127.0.0.1", server.port, is_master=False, wait_for_workers=False)
        return Ranks(number, size, number, store, timeout)

    return make


def test_a_rank_without_a_sign_of_life_is_lost(rank: Callable[..., Ranks]) -> None:
    first = rank(0, 2, 0.5)
    started = time.monotonic()
    with pytest.raises(_LostRankError, match=r"Expected rank 1 at 'the bank', .* no sign of life for 0\.5 s"):
        first.barrier("the bank")
    assert 0.5 < time.monotonic() - started < 5


def test_long_work_is_waited_for(rank: Callable[..., Ranks]) -> None:
    first, second = (rank(number, 2, 1.0) for number in range(2))
    late = threading.Timer(2.0, lambda: second.barrier("attacks"))
    late.start()
    started = time.monotonic()
    first.barrier("attacks")
    assert time.monotonic() - started > 1.5
    late.join()


def test_ranks_that_do_different_things_are_told(rank: Callable[..., Ranks]) -> None:
    first, second = (rank(number, 2, 30.0) for number in range(2))
    other = threading.Thread(target=lambda: second.barrier("attacks"), daemon=True)
    threading.excepthook, before = lambda _: None, threading.excepthook
    try:
        other.start()
        with pytest.raises(
            RuntimeError, match=r"at \['observations', 'attacks'\]. Give all the same command"
        ):
            first.barrier("observations")
        other.join()
    finally:
        threading.excepthook = before


def test_each_rank_learns_what_all_say(rank: Callable[..., Ranks]) -> None:
    ranks = [rank(number, 3, 30.0) for number in range(3)]
    with ThreadPoolExecutor(3) as pool:
        for number in range(2):
            found = list(pool.map(lambda one: one.gather("numbers", [one.rank, number]), ranks))  # noqa: B023
            assert found == [[[0, number], [1, number], [2, number]]] * 3


@pytest.mark.parametrize(
    ("gpus", "backend"),
    [
        ((None, None), "gloo"),  # CPUs
        (("GPU-a", "GPU-b"), "cpu:gloo,cuda:nccl"),
        (("GPU-a", "GPU-a"), "gloo"),  # NCCL would refuse it, and the other rank be blamed
        (("GPU-a", None), "gloo"),
    ],
)
def test_ranks_on_gpus_of_their_own_use_nccl(
    rank: Callable[..., Ranks],
    monkeypatch: pytest.MonkeyPatch,
    gpus: tuple[str | None, ...],
    backend: str,
) -> None:
    devices = [torch.device("cpu") if gpu is None else torch.device("cuda", 0) for gpu in gpus]
    made: list[Any] = []

    def init(*given: Any, **named: Any) -> None:
        made.append((*given, named["rank"], named["device_id"], os.environ.get("TORCH_NCCL_BLOCKING_WAIT")))

    monkeypatch.delenv("TORCH_NCCL_BLOCKING_WAIT", raising=False)
    monkeypatch.setattr("torch.distributed.init_process_group", init)
    ranks = [rank(number, 2, 30.0) for number in range(2)]
    names = {id(device): gpu for device, gpu in zip(devices, gpus, strict=True)}
    monkeypatch.setattr("lightning_advknn.ranks._gpu", lambda device: names[id(device)])
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda one: one.open("a bank", devices[one.rank]), ranks))
    bound = devices if "nccl" in backend else [None, None]
    assert sorted(made, key=lambda each: each[1]) == [(backend, n, bound[n], "1") for n in range(2)]
    assert "TORCH_NCCL_BLOCKING_WAIT" not in os.environ


def test_gpus_that_nccl_cannot_connect_are_no_lost_rank(
    rank: Callable[..., Ranks], monkeypatch: pytest.MonkeyPatch
) -> None:
    def init(*_: Any, **__: Any) -> None:
        raise torch.distributed.DistBackendError("ncclSystemError: no shared memory")

    monkeypatch.setattr("torch.distributed.init_process_group", init)
    with pytest.raises(
        ValueError, match="Expected NCCL to connect the GPUs of 1 ranks, but: ncclSystemError"
    ):
        rank(0, 1, 30.0).open("a bank", torch.device("cpu"))


def test_a_gpu_is_told_from_others_wherever_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    found = SimpleNamespace(uuid="1b3c")
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: found)
    assert [_gpu(torch.device(name)) for name in ("cuda:0", "cpu")] == ["1b3c", None]


@pytest.mark.parametrize("second", ["one", "two"])
def test_ranks_that_do_not_share_the_cache_are_told(
    rank: Callable[..., Ranks], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, second: str
) -> None:
    monkeypatch.setattr(fill, "_SEEN", 0.3)

    def check(number: int, folder: str) -> str:
        stages: Any = SimpleNamespace(networks=None)
        try:
            fill._Filler(stages, rank(number, 2, 30.0), tmp_path / folder)._check_shared()
        except ValueError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(2) as pool:
        said = list(pool.map(check, range(2), ["one", second]))
    assert list((tmp_path / "one").iterdir()) == []
    for each in said:
        assert ("share the files in `cache`" in each) == ("of ranks [1]" in each) == (second == "two")


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"SLURM_NTASKS": "2", "SLURM_JOB_NAME": "run"}, "Expected SLURM to start .* `--ntasks-per-node`"),
        (
            {"SLURM_NTASKS": "2", "SLURM_JOB_NAME": "bash", "SLURM_STEP_NUM_TASKS": "2"},
            "SLURM job called 'bash', .* srun has started 2",
        ),
    ],
)
def test_what_slurm_starts_apart_is_refused(
    variables: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith(("SLURM", "TORCHELASTIC"))]:
        monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        join()


def test_units_are_dealt_once(rank: Callable[..., Ranks]) -> None:
    units = list(range(7))
    shares = [rank(number, 3, 30.0).deal(units) for number in range(3)]
    assert shares == [[0, 3, 6], [1, 4], [2, 5]]


def test_one_process_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TORCHELASTIC_RUN_ID", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    alone = join()
    assert (alone.rank, alone.size, alone.deal([1, 2])) == (0, 1, [1, 2])
    alone.barrier("nothing")
    assert alone.agree("nothing", lambda: [3]) == [3]
    with pytest.raises(ValueError, match="Expected `timeout` to be above 0 seconds, but got 0"):
        join(0)


def test_attacks_on_victims_refuse_a_sharded_bank(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    folder, *_ = job
    assert attack.main(["evaluate", f"--config={folder / 'one.yaml'}", "--victim.shard=true"]) == 2
    assert "Expected attacks on logits with `victim.shard`, but ask is on a victim" in capsys.readouterr().err


def test_approximate_neighbours_refuse_a_sharded_bank(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    folder, *_ = job
    settings = ["--victim.shard=true", "--victim.backend=ivf"]
    assert attack.main(["evaluate", f"--config={folder / 'one.yaml'}", *settings]) == 2
    assert "Expected an exact `victim.backend` with `victim.shard`, but got 'ivf'" in capsys.readouterr().err
