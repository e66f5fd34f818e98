"""Offline W&B runs in tests, read back by wandb's own reader."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import wandb


class OfflineRun(NamedTuple):
    """What W&B recorded."""

    folder: Path
    records: list[dict[str, Any]]

    def of(self, kind: str) -> list[dict[str, Any]]:
        """Contents of the records of a type."""
        return [record[kind] for record in self.records if record["type"] == kind]

    def history(self, key: str) -> list[dict[str, Any]]:
        """Steps that logged a key."""
        items = [record["item"] for record in self.of("history")]
        return [item for item in items if any(name == key or name.startswith(f"{key}.") for name in item)]

    @property
    def config(self) -> dict[str, Any]:
        """Top levels of the run's config."""
        updates = [self.of("run")[0]["config"], *self.of("config")]
        return {name: value for update in updates for name, value in update["update"].items()}

    @property
    def axes(self) -> dict[str, str | None]:
        """What each metric is drawn over."""
        metrics = [metric for metric in self.of("metric") if "name" in metric]
        return {metric["name"]: metric.get("step_metric") for metric in metrics}

    def media(self, key: str) -> Path:
        """The last file that was logged under a key."""
        return self.folder / "files" / self.history(key)[-1][f"{key}.path"]

    def table(self, key: str) -> dict[str, list[Any]]:
        """The last table that was logged under a key, by column."""
        content = json.loads(self.media(key).read_text())
        return dict(zip(content["columns"], zip(*content["data"], strict=True), strict=True))


def read_runs(folder: Path) -> list[OfflineRun]:
    """The finished offline runs of a folder in order of time."""
    runs = []
    for run in sorted((folder / "wandb").glob("offline-run-*")):
        inspect = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(run)]
        lines = subprocess.run(inspect, capture_output=True, text=True, timeout=60, check=True).stdout
        runs.append(OfflineRun(run, [json.loads(line) for line in lines.splitlines()]))
    return runs


@contextmanager
def offline_wandb(folder: Path) -> Iterator[pytest.MonkeyPatch]:
    """W&B offline and quiet, with all that it keeps in a folder."""
    wandb.teardown()  # an earlier test's session has other settings
    with pytest.MonkeyPatch.context() as environment:
        environment.delenv("WANDB_API_KEY", raising=False)
        for name, value in {
            "MODE": "offline",
            "SILENT": "true",
            "CONSOLE": "off",
            "_DISABLE_STATS": "true",
            "DISABLE_GIT": "true",
            **{f"{place}_DIR": str(folder / place.lower()) for place in ("DATA", "CACHE", "CONFIG")},
        }.items():
            environment.setenv(f"WANDB_{name}", value)
        yield environment
        wandb.finish()
        wandb.teardown()
