"""Result folders are read as they are, not as they are named."""

import json
from pathlib import Path
from types import ModuleType

import pytest

from lightning_advknn.reports.records.csv_files import _seed_digest
from lightning_advknn.reports.records.over_seeds import Planned, load
from lightning_advknn.storage import read_json, write_json


def test_cells_are_means_over_finished_seeds(tmp_path: Path, folders: ModuleType) -> None:
    folder = tmp_path / "mnist"
    values = {0: 10.0, 1: 20.0, 2: 60.0}
    folders.write_results(folder, folders.settings(), lambda v, m, a, seed: values[seed], (0, 1, 2))
    (folder / "seed2.json").unlink()  # came to nothing: killed before its summary
    (found,) = load(folders.plan_of(["mnist/tables"], (0, 1, 2)), tmp_path)
    cells = {(each.victim, each.method.name, each.attack): each for each in found.measurements()}
    cell = cells["dknn", "dknnb_cl", "bim"]
    assert cell.accuracy.values == (10.0, 20.0)
    assert (cell.paper, cell.function, cell.eps, cell.n) == (5.97, "bim", 0.25, 9250)
    assert len(cells) == 2 * 3 * 3
    assert [planned.seed for planned in found.to_run] == [2]


def test_a_method_is_what_its_settings_say(tmp_path: Path, folders: ModuleType) -> None:
    methods = {
        **folders.ORIGIN,
        "dknnb": folders.surrogate("relu1", 0.1),
        "b": folders.surrogate("logits", 1, 0),
    }
    own = folders.settings(methods=methods, attacks={"mine": folders.attack("bim", 0.1)})
    folders.write_results(tmp_path / "mnist" / "layers", own, lambda *_: 50.0)
    (found,) = load(folders.plan_of(["mnist/layers"]), tmp_path)
    kinds = {name: (m.kind, m.layer, m.cls_weight) for name, m in found.methods.items()}
    assert kinds == {
        "origin": ("origin", None, None),
        "dknnb": ("dknnb_cl", "relu1", 0.1),
        "b": ("dknnb", "logits", 1),
    }
    assert {each.function for each in found.measurements()} == {"clean", "bim"}


def test_a_plan_names_its_folders(tmp_path: Path, folders: ModuleType) -> None:
    names = ["mnist/tables", "mnist/transfer", "mnist/neighbours/k=5", "mnist/neighbours/k=75", "svhn/tables"]
    found = load(folders.plan_of(names, (0, 1)), tmp_path)
    assert [each.name for each in found] == names
    below = ["mnist", "mnist/transfer", "mnist/neighbours/k=5", "mnist/neighbours/k=75", "svhn"]
    assert [each.folder for each in found] == [tmp_path / name for name in below]
    assert all(len(each.to_run) == 2 and not each.runs for each in found)


def test_a_damaged_summary_is_named(tmp_path: Path, folders: ModuleType) -> None:
    folder = tmp_path / "mnist"
    folders.write_results(folder, folders.settings(), lambda *_: 50.0)
    (folder / "seed0.json").write_text(json.dumps({})[:-1])
    with pytest.raises(ValueError, match=r"Expected .*seed0\.json to be as it was written"):
        load(folders.plan_of(["mnist/tables"]), tmp_path)


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("50.0", "51.0", "has changed since"),
        ("50.0,", "", "lines differ in length"),
        ("50.0,", '"50.0,', "damaged"),
        ("seed", "sead", "has changed since"),
    ],
)
def test_a_changed_table_is_found(tmp_path: Path, folders: ModuleType, old: str, new: str, told: str) -> None:
    folder = tmp_path / "mnist"
    folders.write_results(folder, folders.settings(), lambda *_: 50.0)
    table, summary = folder / "table2.csv", read_json(folder / "seed0.json")
    write_json(folder / "seed0.json", {**summary, "tables": {"table2": _seed_digest(table, 0)}})
    plan = {"mnist": {"tables": [Planned(0, "c")]}}
    (whole,) = load(plan, tmp_path)
    assert whole.measurements()[0].accuracy.values == (50.0,)

    text = table.read_text()
    position = text.rindex(old)
    table.write_text(text[:position] + new + text[position + len(old) :])
    (changed,) = load(plan, tmp_path)
    with pytest.raises(ValueError, match=rf"Expected .*table2\.csv to .*{told}"):
        changed.measurements()
