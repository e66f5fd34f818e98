"""The report: every table and figure of the paper from result folders, differences, what is missing."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from lightning_advknn.reports.leaderboards.page import leaderboards_section
from lightning_advknn.reports.paper import findings
from lightning_advknn.reports.paper.credibility import distributions, filter_sentence
from lightning_advknn.reports.paper.curve_areas import fit_sentence, weight_sentence
from lightning_advknn.reports.paper.differences import DEVIATIONS, differences_table, subset_sentences
from lightning_advknn.reports.paper.exhibits import Exhibits
from lightning_advknn.reports.paper.provenance import (
    commands_table,
    missing_table,
    not_run,
    settings_table,
    time_table,
    versions_sentence,
)
from lightning_advknn.reports.paper.tables import clean_table
from lightning_advknn.reports.records.grouping import grouped
from lightning_advknn.reports.records.over_seeds import Plan, Results, load
from lightning_advknn.reports.render.blocks import Block, Lines, Section, Table
from lightning_advknn.reports.render.page import render_html, render_markdown
from lightning_advknn.storage import atomic_path

_ROLES = ("tables", "transfer", "layers", "neighbours", "cls_weight", "eps")


def write_report(plan: Plan, results: Path, output: Path) -> None:
    """Write ``index.html``, ``report.md`` and the figures as PNG and PDF; equal results give equal files.

    Args:
        plan: What the grid asks for. The report names what is missing of it.
        results: Folder of result folders.
        output: Folder of the report.

    Raises:
        ValueError: If a result is damaged.
        OSError: If the output cannot be written.
    """
    found = load(plan, results)
    make = Exhibits(output)
    others = [part for part in dict.fromkeys(each.part for each in found) if part not in _ROLES]
    tables = [each for each in found if each.part == "tables"]
    section = partial(_section, found)
    sections = [
        _summary(found),
        Section(
            "table1", "Table 1: clean accuracy", [clean_table(tables)] if tables else ["Not in the grid."]
        ),
        section("table2", "Table 2: accuracy under attack", "tables", make.attacked),
        section("table3", "Table 3: transfer to another network", "transfer", make.transferred),
        section("figure3", "Figure 3: neighbours before and after", "tables", make.neighbours, brief=True),
        section("figure4", "Figure 4: layers", "layers", make.layers),
        section("figure5", "Figure 5: credibility", "layers", make.credibility, brief=True),
        section(
            "figure6", "Figure 6: adversarials under growing eps", "layers", make.adversarials, brief=True
        ),
        section("figure7", "Figure 7: k", "neighbours", make.growing_k),
        section("lambda", "Lambda, which the paper leaves out", "cls_weight", make.weights),
        section("eps", "Which eps", "eps", make.eps),
        *(section(f"part-{part}", f"Part {part}", part, make.attacked) for part in others),
        leaderboards_section(results, output),
        _differences(found),
        _provenance(found),
        _missing(found),
    ]
    done, to_run = sum(len(each.runs) for each in found), sum(len(each.to_run) for each in found)
    introduction = [
        "Tables and figures of Li et al., AdvKNN: Adversarial Attacks on K-Nearest Neighbor Classifiers with"
        " Approximate Gradients, measured anew by `lightning_advknn`, with the paper's numbers beside. L2 is"
        " true L2, of pixels in [0, 1], unless said otherwise.",
        f"Finished experiments: {done}; missing of what was planned: {to_run}.",
    ]
    for name, render in (("index.html", render_html), ("report.md", render_markdown)):
        with atomic_path(output / name) as temporary:
            temporary.write_text(render("AdvKNN, reproduced", introduction, sections), encoding="utf-8")


def _section(
    found: Sequence[Results],
    anchor: str,
    title: str,
    part: str,
    make: Callable[[list[Results]], list[Block]],
    brief: bool = False,
) -> Section:
    """A part by data set, and what has not run; `brief` where an earlier section has said it."""
    groups = _by_data(found, part)
    blocks: list[Block] = [] if groups else ["Not in the grid."]
    for group in groups:
        done = [each for each in group if each.runs]
        blocks += make(done) if done else []
        blocks += [sentence for each in done for sentence in each.notes]
        if not brief:
            blocks += not_run(group)
        elif not done:
            blocks.append(f"{group[0].title}: not run; the last section has the command.")
    return Section(anchor, title, blocks)


def _summary(found: Sequence[Results]) -> Section:
    """Which claims hold."""
    done = {part: [each for each in found if each.part == part and each.runs] for part in _ROLES}
    claims = [finding for each in done["tables"] if (finding := findings.clean_accuracies_agree(each))]
    claims += [finding for each in done["tables"] for finding in findings.ordering(each)]
    for each in done["transfer"]:
        claims += [finding for network in each.networks for finding in findings.transfer(each, network)]
    claims += [finding for each in done["layers"] if (finding := findings.best_layer(each))]
    for group in _by_data(done["neighbours"], "neighbours"):
        claims += findings.growing_k(group)
    rows: list[list[Lines]] = [
        [(claim.claim,), ("✓ holds" if claim.holds else "✗ does not hold",), (claim.detail,)]
        for claim in claims
    ]
    sentences = [filter_sentence(each, distributions(each)) for each in done["layers"]]
    sentences += [weight_sentence(group) for group in _by_data(done["cls_weight"], "cls_weight")]
    sentences += [fit_sentence(each) for each in done["eps"]]
    holding = sum(claim.holds for claim in claims)
    table = Table(
        f"Claims, by seed means: {holding} of {len(claims)} hold.", ["claim", "here", "numbers"], rows
    )
    return Section("summary", "What holds", [*([table] if rows else []), *filter(None, sentences)])


def _differences(found: Sequence[Results]) -> Section:
    """Differences from the paper's numbers."""
    table = differences_table(found)
    blocks: list[Block] = [*([table] if table else []), *subset_sentences(found), DEVIATIONS]
    return Section("differences", "Differences from the paper", blocks)


def _provenance(found: Sequence[Results]) -> Section:
    """Commands, settings, versions, time."""
    blocks: list[Block] = ["Nothing has run."]
    if any(each.runs for each in found):
        tables = [commands_table(found), settings_table(found)]
        blocks = [*tables, versions_sentence(found), time_table(found)]
    return Section("provenance", "Commands, settings, versions, time", blocks)


def _missing(found: Sequence[Results]) -> Section:
    """What has not run."""
    table = missing_table(found)
    return Section("missing", "What is missing", [table if table.rows else "Nothing."])


def _by_data(found: Sequence[Results], part: str) -> list[list[Results]]:
    return list(grouped((each for each in found if each.part == part), lambda each: each.data).values())
