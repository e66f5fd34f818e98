"""Two ranks share the images and give the metrics of one process."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from pytorch_lightning import seed_everything

from lightning_advknn.data import Digits
from tests.callbacks.small import (
    attack_metrics,
    chosen,
    make_callback,
    make_surrogate,
    make_trainer,
)

WORKER = """
import sys
from pytorch_lightning import Trainer, seed_everything
from pytorch_lightning.loggers import CSVLogger, WandbLogger
from lightning_advknn.data import Digits
from lightning_advknn.modules import SurrogateModule
from tests.callbacks.small import make_callback, make_surrogate

trainer = Trainer(
    accelerator="cpu", devices=2, strategy="ddp", use_distributed_sampler=False, enable_checkpointing=False,
    logger=[CSVLogger("csv", name=""), WandbLogger(save_dir=".")], callbacks=[make_callback()],
    enable_progress_bar=False, enable_model_summary=False,
)
seed_everything(0)
trainer.validate(make_surrogate(sys.argv[1]), datamodule=Digits(), verbose=False)
"""


def test_ranks_share_the_images(checkpoint: Path, tmp_path: Path) -> None:
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")} | {
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "OMP_NUM_THREADS": "1",
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
        "WANDB_DATA_DIR": str(tmp_path / "data"),
        "WANDB__DISABLE_STATS": "true",
    }
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*torchrun, str(script), str(checkpoint)]
    process = subprocess.run(
        command, env=environment, cwd=tmp_path, timeout=200, capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr
    assert "It is recommended to use `self.log('attack/" not in process.stderr
    with (tmp_path / "csv" / "version_0" / "metrics.csv").open() as file:
        (row,) = csv.DictReader(file)
    logged = {name: float(value) for name, value in row.items() if name.startswith("attack/")}

    data, trainer = Digits(), make_trainer(tmp_path, make_callback())
    seed_everything(0, verbose=False)
    trainer.validate(make_surrogate(checkpoint), datamodule=data, verbose=False)
    assert logged == pytest.approx(attack_metrics(trainer), nan_ok=True)
    assert logged["attack/fgsm/n"] == 61  # not a multiple of 2; no image is counted twice
    (table,) = tmp_path.glob("wandb/offline-run-*/files/media/table/samples/fgsm/*.json")
    content = json.loads(table.read_text())
    ids = [row[content["columns"].index("id")] for row in content["data"]]
    assert ids == chosen(data.split("val"), 0, 61).ids.tolist()
