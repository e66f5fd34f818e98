"""Commands, settings, versions, devices and wall time behind the results."""

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_advknn.reports.paper.tables import attack_text
from lightning_advknn.reports.records.grouping import columns_of, grouped, pivoted
from lightning_advknn.reports.records.names import KIND_TITLES
from lightning_advknn.reports.records.over_seeds import Planned, Results
from lightning_advknn.reports.records.summaries import which_images
from lightning_advknn.reports.render.blocks import Lines, Table
from lightning_advknn.reports.render.page import anchor


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
    """One row a results folder: victims, attacked networks, attacks, data."""
    rows: list[list[Lines]] = []
    for results in found:
        if results.runs:
            settings = results.settings
            attacks = [
                f"{name}: {attack_text(attack)}, gradients in {attack['precision']}"
                for name, attack in settings["attacks"].items()
            ]
            rows.append(
                [
                    (results.name,),
                    _who(results),
                    tuple(_training(results, name) for name in settings["trainings"]),
                    (*attacks, f"they ascend the {settings['label_source']} label"),
                    _data(settings),
                ]
            )
    header = ["experiment", "victims", "what is attacked", "attacks", "data"]
    return Table("Settings; all of them are in each folder's `experiment.json`.", header, rows, prose=True)


def versions_sentence(found: Sequence[Results]) -> str:
    """Each set of versions, with the experiments that had it."""
    runs = [(results, seed, run) for results in found for seed, run in results.runs.items()]
    sets = grouped(
        runs, lambda one: ", ".join(f"{name} {version}" for name, version in one[2]["versions"].items())
    )
    if len(sets) == 1:
        return f"All experiments: {next(iter(sets))}."
    names = {
        versions: ", ".join(f"{results.name} seed {seed}" for results, seed, _ in own)
        for versions, own in sets.items()
    }
    return " ".join(f"{own}: {versions}." for versions, own in names.items())


def time_table(found: Sequence[Results]) -> Table:
    """Wall time by part and stage. The last row counts a stage that several experiments share once."""
    spent: list[tuple[str, str, float]] = []  # part, stage, seconds
    once: dict[str, tuple[str, float]] = {}
    for results in found:
        for seed, run in results.runs.items():
            part = f"{results.data}/{results.part}"
            spent += [(part, label, seconds) for label, seconds in run["seconds"].items()]
            own = f"{results.name}/{seed}"
            for name, piece in _pieces(run).items():
                # Banks are not kept: each experiment builds its own.
                once[f"{own}/{name}" if name.startswith("bank/") else name] = piece
    spent += [("all, shared stages once", label, seconds) for label, seconds in once.values()]
    table = pivoted(spent, row=lambda one: one[0], column=lambda one: one[1].partition(" ")[0])
    stages = columns_of(table)
    rows: list[list[Lines]] = []
    for part, row in table.items():
        sums = {stage: sum(seconds for *_, seconds in row.get(stage, [])) for stage in stages}
        total = sum(sums[stage] for stage in row)
        rows.append([(part,), *((_duration(sums[stage]),) for stage in stages), (_duration(total),)])
    return Table(
        "Wall time in h:mm:ss of the stages that each part's experiments need, all seeds, also of those that"
        " an earlier experiment made and this one read.",
        ["part", *stages, "sum"],
        rows,
    )


def missing_table(found: Sequence[Results]) -> Table:
    """One row an experiment that has not run."""
    rows: list[list[Lines]] = [
        [(results.name,), (str(planned.seed),), (_reason(results, planned),), (f"`{planned.command}`",)]
        for results in found
        for planned in results.to_run
    ]
    return Table("Not run.", ["experiment", "seed", "why", "command"], rows, headings=2)


def _reason(results: Results, planned: Planned) -> str:
    """Why an experiment has not run, and how to get its data if they are missing."""
    if not planned.missing:
        return "not run"
    get = (
        f'python -c "from lightning_advknn.data import {results.dataset}; {results.dataset}().prepare_data()"'
    )
    return f"not run: data missing, get it with `{get}` ({planned.missing.rstrip('.')})"


def not_run(found: Sequence[Results]) -> list[str]:
    """A sentence for each missing experiment of some results."""
    return [
        f"{results.name}, seed {planned.seed}: {_reason(results, planned)}. Its command: `{planned.command}`"
        for results in found
        for planned in results.to_run
    ]


def _duration(seconds: float) -> str:
    """Seconds as h:mm:ss.

    >>> _duration(3725.4)
    '1:02:05'
    """
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def _pieces(run: Mapping[str, Any]) -> Mapping[str, tuple[str, float]]:
    """Stages by the name of their file; each for itself in summaries of earlier versions, without names."""
    return run.get("pieces") or {
        f"bank/{label}": (label, seconds) for label, seconds in run["seconds"].items()
    }


def _who(results: Results) -> Lines:
    victim = results.victim
    layers = ", ".join(victim.get("layers", results.layers))
    return (
        f"k {victim['k']}, {victim['metric']}, kNN on {victim['layer']}, DkNN on {layers}",
        f"credibility convention {victim['convention']}",
        *([f"approximate neighbours: {_listed(victim['index'])}"] if "index" in victim else []),
    )


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
    return f"{name}: {KIND_TITLES[method.kind]} on {method.layer}, {weights}, k {arguments['k']}, {epochs}"


def _data(settings: Mapping[str, Any]) -> Lines:
    arguments = settings["trainings"]["origin"]["data"]["init_args"]
    return (
        settings["data"]["name"],
        f"{arguments['val_size']} validation, {arguments['calibration_per_class']} calibration images a"
        " class",
        f"splits of seed {arguments['split_seed']}",
    )
