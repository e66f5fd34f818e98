"""The report: every table and figure of the paper from result folders, with what differs and what is missing."""

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
from lightning_advknn.reports.paper.tables import table1
from lightning_advknn.reports.records.over_seeds import Plan, Results, load
from lightning_advknn.reports.render.page import Block, Lines, Section, Table, render_html, render_markdown
from lightning_advknn.storage import atomic_path

ROLES = ("tables", "transfer", "layers", "neighbours", "cls_weight", "eps")


def write_report(plan: Plan, results: Path, output: Path) -> None:
    """Write ``index.html``, ``report.md`` and the figures as PNG and PDF; equal results give equal files.

    Args:
        plan: What the grid asks for; what is not there yet is named as missing.
        results: Folder of result folders.
        output: Where the report goes.

    Raises:
        ValueError: If a result is damaged.
        OSError: If the output cannot be written.
    """
    found = load(plan, results)
    make = Exhibits(output)
    others = [part for part in dict.fromkeys(each.part for each in found) if part not in ROLES]
    tables = [each for each in found if each.part == "tables"]
    section = partial(_section, found)
    sections = [
        _summary(found),
        Section("table1", "Table 1: clean accuracy", [table1(tables)] if tables else ["Not in the grid."]),
        section("table2", "Table 2: accuracy under attack", "tables", make.table2),
        section("table3", "Table 3: transfer to another network", "transfer", make.table3),
        section("figure3", "Figure 3: neighbours before and after", "tables", make.figure3, brief=True),
        section("figure4", "Figure 4: layers", "layers", make.figure4),
        section("figure5", "Figure 5: credibility", "layers", make.figure5, brief=True),
        section("figure6", "Figure 6: adversarials under growing eps", "layers", make.figure6, brief=True),
        section("figure7", "Figure 7: k", "neighbours", make.figure7),
        section("lambda", "Lambda, which the paper leaves out", "cls_weight", make.weights),
        section("eps", "Which eps", "eps", make.eps),
        *(section(f"part-{part}", f"Part {part}", part, make.table2) for part in others),
        leaderboards_section(results, output),
        _differences(found),
        _provenance(found),
        _missing(found),
    ]
    done, to_run = sum(len(each.runs) for each in found), sum(len(each.to_run) for each in found)
    introduction = [
        "Tables and figures of Li et al., AdvKNN: Adversarial Attacks on K-Nearest Neighbor Classifiers with Approximate"
        " Gradients, measured anew by `lightning_advknn`, with the paper's numbers beside. L2 is true L2, of pixels in"
        " [0, 1], unless said otherwise.",
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
    """What each data set has of a part, and what is not run; in brief where a section before has said it."""
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
    """What holds and what does not."""
    done = {part: [each for each in found if each.part == part and each.runs] for part in ROLES}
    claims = [finding for each in done["tables"] if (finding := findings.clean_accuracy(each))]
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
    """Where ours and the paper's numbers differ."""
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
    own = [each for each in found if each.part == part]
    return [[each for each in own if each.data == data] for data in dict.fromkeys(each.data for each in own)]
