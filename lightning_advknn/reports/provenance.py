"""Which commands, settings, versions and devices made the results, and how long that took."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_advknn.reports.layout import Lines, Table, attack_text
from lightning_advknn.reports.results import KINDS, Planned, Results

STAGES = ("train", "build", "attack", "query")


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
                    (str(n),),
                    (run["date"], run["device"]),
                    (f"`{run['command']}`",),
                ]
            )
            anchors.append(anchor(results.name) if position == 0 else "")
    header = ["experiment", "seed", "test images", "date, device", "command"]
    return Table("What made each number.", header, rows, headings=2, anchors=anchors)


def settings_table(found: Sequence[Results]) -> Table:
    """One row a results folder: victims, what was attacked, attacks."""
    rows: list[list[Lines]] = []
    for results in found:
        if results.runs:
            settings, victim = results.settings, results.victim
            who = (
                f"k {victim['k']}, {victim['metric']}, kNN on {victim['layer']}, DkNN on {', '.join(results.layers)}",
                f"credibility convention {victim['convention']}",
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
    once: dict[str, dict[str, float]] = {stage: {} for stage in STAGES}
    for results in found:
        for seed, run in results.runs.items():
            row = parts.setdefault(f"{results.data}/{results.part}", {})
            for label, seconds in run["seconds"].items():
                stage = label.partition(" ")[0]
                row[stage] = row.get(stage, 0.0) + seconds
                shared = once.setdefault(stage, {})
                key = _work(run["settings"], label, results.name, seed) + run["device"]
                shared[key] = max(shared.get(key, 0.0), seconds)
    stages = list(once)
    parts["all, shared stages once"] = {stage: sum(shared.values()) for stage, shared in once.items()}
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


def anchor(name: str) -> str:
    """Where links to an experiment go."""
    return "made-" + "".join(letter if letter.isalnum() else "-" for letter in name)


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss.

    >>> duration(3725.4)
    '1:02:05'
    """
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def _training(results: Results, name: str) -> str:
    training, method = results.settings["trainings"][name], results.methods[name]
    arguments = training["model"]["init_args"]
    epochs = (
        f"{training['trainer'].get('max_epochs', '-')} epochs, learning rate {arguments['learning_rate']:g}"
    )
    if method.layer is None:
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


def _work(settings: Mapping[str, Any], label: str, folder: str, seed: int) -> str:
    """What a stage depends on: equal for one that several experiments share."""
    stage, _, what = label.partition(" ")
    method, _, attack = what.partition("/")
    trainings, victim = settings["trainings"], settings["victim"]
    used: list[Any] = [stage, seed, settings["data"], trainings["origin"]]
    if stage in ("attack", "query") and attack in settings["attacks"] and method in trainings:
        used += [trainings[method], settings["attacks"][attack], settings["label_source"]]
        used += [victim["layer"], victim["k"], victim["metric"]]
    elif stage == "query" and what in ("clean", "calibration"):
        used += [what, victim["k"], victim["metric"]]
    elif stage == "train" and what in trainings:
        used += [trainings[what]]
    else:  # built anew by each
        used += [label, folder]
    return json.dumps(used, sort_keys=True)
