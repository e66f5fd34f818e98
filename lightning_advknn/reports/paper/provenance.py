"""Which commands, settings, versions and devices made the results, and how long that took."""

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_advknn.reports.paper.tables import attack_text
from lightning_advknn.reports.records.over_seeds import KINDS, Planned, Results
from lightning_advknn.reports.records.summary import which_images
from lightning_advknn.reports.render.page import Lines, Table, anchor


def commands_table(found: Sequence[Results]) -> Table:
    """One row an experiment: its command, device, date."""
    rows: list[list[Lines]] = []
    anchors = []
    for results in found:
        for position, (seed, run) in enumerate(results.runs.items()):
            n = run.get("images", results.measurements()[0].n)
            rows.append(
                [
                    (results.name,),
                    (str(seed),),
                    (which_images(results.settings, n),),
                    (run["date"], run["device"]),
                    (f"`{run['command']}`",),
                ]
            )
            anchors.append(anchor(results.name) if position == 0 else "")
    header = ["experiment", "seed", "images", "date, device", "command"]
    return Table("What made each number.", header, rows, headings=2, anchors=anchors)


def settings_table(found: Sequence[Results]) -> Table:
    """One row a results folder: victims, what was attacked, attacks."""
    rows: list[list[Lines]] = []
    for results in found:
        if results.runs:
            settings, victim = results.settings, results.victim
            who = (
                f"k {victim['k']}, {victim['metric']}, kNN on {victim['layer']}, DkNN on {', '.join(victim.get('layers', results.layers))}",
                f"credibility convention {victim['convention']}",
                *([f"approximate neighbours: {_listed(victim['index'])}"] if "index" in victim else []),
            )
            attacks = [
                f"{name}: {attack_text(attack)}, gradients in {attack['precision']}"
                for name, attack in settings["attacks"].items()
            ]
            rows.append(
                [
                    (results.name,),
                    who,
                    tuple(_training(results, name) for name in settings["trainings"]),
                    (*attacks, f"they ascend the {settings['label_source']} label"),
                    _data(settings),
                ]
            )
    header = ["experiment", "victims", "what is attacked", "attacks", "data"]
    return Table("Settings; all of them are in each folder's `experiment.json`.", header, rows, prose=True)


def versions_sentence(found: Sequence[Results]) -> str:
    """Versions, each set with the experiments that had it."""
    sets: dict[str, list[str]] = {}
    for results in found:
        for seed, run in results.runs.items():
            versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
            sets.setdefault(versions, []).append(f"{results.name} seed {seed}")
    if len(sets) == 1:
        return f"All experiments: {next(iter(sets))}."
    return " ".join(f"{', '.join(names)}: {versions}." for versions, names in sets.items())


def time_table(found: Sequence[Results]) -> Table:
    """Wall time by stage and part; the last row counts a stage that several experiments share once."""
    parts: dict[str, dict[str, float]] = {}
    once: dict[str, tuple[str, float]] = {}
    for results in found:
        for seed, run in results.runs.items():
            row = parts.setdefault(f"{results.data}/{results.part}", {})
            for label, seconds in run["seconds"].items():
                _add(row, label, seconds)
            own = f"{results.name}/{seed}"
            for name, (label, seconds) in _pieces(run).items():
                # Banks are not kept: each experiment builds its own.
                once[f"{own}/{name}" if name.startswith("bank/") else name] = label, seconds
    last: dict[str, float] = {}
    for label, seconds in once.values():
        _add(last, label, seconds)
    parts["all, shared stages once"] = last
    stages = list(dict.fromkeys(stage for row in parts.values() for stage in row))
    rows: list[list[Lines]] = [
        [(part,), *((duration(row.get(stage, 0.0)),) for stage in stages), (duration(sum(row.values())),)]
        for part, row in parts.items()
    ]
    return Table(
        "Wall time in h:mm:ss of the stages that each part's experiments need, all seeds, also of those that an earlier"
        " experiment made and this one read.",
        ["part", *stages, "sum"],
        rows,
    )


def missing_table(found: Sequence[Results]) -> Table:
    """One row an experiment that has not run."""
    rows: list[list[Lines]] = [
        [(results.name,), (str(planned.seed),), (reason(results, planned),), (f"`{planned.command}`",)]
        for results in found
        for planned in results.to_run
    ]
    return Table("Not run.", ["experiment", "seed", "why", "command"], rows, headings=2)


def reason(results: Results, planned: Planned) -> str:
    """Why an experiment has not run, and where its data can be had if that is what is missing."""
    if not planned.missing:
        return "not run"
    get = (
        f'python -c "from lightning_advknn.data import {results.dataset}; {results.dataset}().prepare_data()"'
    )
    return f"not run: data missing, get it with `{get}` ({planned.missing.rstrip('.')})"


def not_run(found: Sequence[Results]) -> list[str]:
    """A sentence for each experiment of some results that is missing."""
    return [
        f"{results.name}, seed {planned.seed}: {reason(results, planned)}. Its command: `{planned.command}`"
        for results in found
        for planned in results.to_run
    ]


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss.

    >>> duration(3725.4)
    '1:02:05'
    """
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def _pieces(run: Mapping[str, Any]) -> Mapping[str, tuple[str, float]]:
    """Stages by the name of what they made; summaries of before there were names have each stage for themselves."""
    return run.get("pieces") or {
        f"bank/{label}": (label, seconds) for label, seconds in run["seconds"].items()
    }


def _add(row: dict[str, float], label: str, seconds: float) -> None:
    """Add a stage's wall time to those of its kind."""
    stage = label.partition(" ")[0]
    row[stage] = row.get(stage, 0.0) + seconds


def _listed(index: Mapping[str, Any]) -> str:
    return ", ".join(str(value) if name == "backend" else f"{name} {value}" for name, value in index.items())


def _training(results: Results, name: str) -> str:
    training, method = results.settings["trainings"][name], results.methods.get(name)
    arguments = training["model"]["init_args"]
    epochs = (
        f"{training['trainer'].get('max_epochs', '-')} epochs, learning rate {arguments['learning_rate']:g}"
    )
    if method is None or method.layer is None:
        return f"{name}: {arguments['network']['class_path'].rpartition('.')[2]}, {epochs}"
    weights = f"{arguments['cls_weight']:g} L_CLS + {arguments['cl_weight']:g} L_CL"
    return f"{name}: {KINDS[method.kind]} on {method.layer}, {weights}, k {arguments['k']}, {epochs}"


def _data(settings: Mapping[str, Any]) -> Lines:
    arguments = settings["trainings"]["origin"]["data"]["init_args"]
    return (
        settings["data"]["name"],
        f"{arguments['val_size']} validation, {arguments['calibration_per_class']} calibration images a class",
        f"splits of seed {arguments['split_seed']}",
    )
