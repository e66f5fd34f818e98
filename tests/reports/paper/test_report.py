"""The page says what the result folders say, stands alone, and names what is missing."""

import csv
import json
import re
import statistics
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType

import pytest

from lightning_advknn.reports.paper.report import write_report
from lightning_advknn.reports.records.over_seeds import Plan, Planned
from lightning_advknn.storage import write_json

VOID = {"meta", "img", "br", "link", "hr", "input"}


class Page(HTMLParser):
    """Checks that elements nest, and keeps text, attributes and tables."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.tables: list[list[list[str]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attributes}) == len(attributes)
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if "td" in self.open or "th" in self.open:
            self.tables[-1][-1][-1] += f"{data} "

    def table(self, *header: str) -> list[list[str]]:
        """Rows of the first table whose header begins so."""
        for table in self.tables:
            if [cell.strip() for cell in table[0][: len(header)]] == list(header):
                return table[1:]
        raise AssertionError(f"no table {header}")


@pytest.fixture(scope="module")
def output(grid: tuple[Plan, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    write_report(*grid, folder)
    return folder


@pytest.fixture(scope="module")
def page(output: Path) -> Page:
    return Page((output / "index.html").read_text(encoding="utf-8"))


def test_the_page_stands_alone(page: Page, output: Path) -> None:
    tags = Counter(tag for tag, _ in page.elements)
    assert not tags["script"]
    assert not tags["link"]
    images = [attributes for tag, attributes in page.elements if tag == "img"]
    assert len(images) == 8
    assert all((image["src"] or "").startswith("data:image/png;base64,") for image in images)
    assert all(len(image["alt"] or "") > 20 for image in images)
    for name in ("http", "url(", "@import"):
        assert name not in (output / "index.html").read_text(encoding="utf-8").split("</style>")[0]


def test_links_and_files(page: Page, output: Path) -> None:
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(set(ids)) == len(ids)
    links = [attributes["href"] or "" for tag, attributes in page.elements if tag == "a"]
    assert len(links) > 40
    for link in links:
        assert link[1:] in ids if link.startswith("#") else (output / link).is_file(), link
    markdown = (output / "report.md").read_text(encoding="utf-8")
    files = re.findall(r"\]\(([^)]+)\)", markdown)
    assert len(files) == 16
    assert all((output / file).is_file() for file in files)
    written = {path.name for path in output.iterdir()}
    assert written == {"index.html", "report.md", *files}


def test_tables_have_headers_and_captions(page: Page) -> None:
    tags = Counter(tag for tag, _ in page.elements)
    assert tags["caption"] == tags["thead"] == tags["table"] == len(page.tables)
    assert all(attributes.get("scope") in ("col", "row") for tag, attributes in page.elements if tag == "th")
    for table in page.tables:
        assert len({len(row) for row in table}) == 1


def test_cells_are_those_of_the_files(page: Page, grid: tuple[Plan, Path]) -> None:
    """Each cell of Table 2, MNIST, from the CSV file by other means."""
    with (grid[1] / "mnist" / "table2.csv").open(encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    rows = page.table("victim", "method", "clean", "FGSM, eps 0.25", "BIM, eps 0.25")
    assert len(rows) == 6
    methods = {"Origin": "origin", "DkNNB": "dknnb", "DkNNB+CL": "dknnb_cl"}
    for victim, method, *cells in rows:
        for attack, cell in zip(("clean", "fgsm", "bim"), cells, strict=True):
            own = [
                line
                for line in lines
                if (line["victim"], line["method"], line["attack"])
                == (victim.strip().lower(), methods[method.strip()], attack)
            ]
            accuracy = [float(line["accuracy"]) for line in own]
            mean, theirs = statistics.mean(accuracy), float(own[0]["paper"])
            expected = (
                f"{mean:.2f} ± {statistics.stdev(accuracy):.2f} (3) paper {theirs:.2f}, {mean - theirs:+.2f} "
            )
            if attack != "clean":
                expected += f"L2 {statistics.mean(float(line['l2_mean']) for line in own):.2f}, cred. 0.25 "
            assert cell == expected


def test_markdown_has_the_same_numbers(page: Page, output: Path) -> None:
    markdown = (output / "report.md").read_text(encoding="utf-8")
    tables = re.findall(r"((?:^\|.*\|\n?)+)", markdown, re.MULTILINE)
    shown = [
        [
            cell.replace("<br>", " ").replace("&amp;", "&").replace("`", "").split()
            for cell in line.strip("| ").split(" | ")
        ]
        for table in tables
        for line in table.strip().splitlines()
        if not line.startswith("| ---")
    ]
    assert [[word for cell in row for word in cell] for row in shown] == [
        [word for cell in row for word in cell.split()] for table in page.tables for row in table
    ]


def test_what_is_missing_is_named(page: Page, output: Path) -> None:
    rows = page.table("experiment", "seed", "why", "command")
    assert [row[0].strip() for row in rows] == ["mnist/neighbours/k=300", "svhn/tables"]
    assert rows[1][2].startswith("not run: data missing, get it with")
    assert "from lightning_advknn.data import SVHN; SVHN().prepare_data()" in rows[1][2]
    assert rows[1][3].strip() == "python attack.py evaluate --config=configs/svhn/attack.yaml"
    # Its command is in the first section that needs it and in the last; the others say so in brief.
    command, brief = rows[1][3].strip(), "SVHN: not run; the last section has the command."
    assert (page.text.count(command), page.text.count(brief)) == (2, 1)
    assert page.text.index(command) < page.text.index(brief) < page.text.rindex(command)
    (svhn,) = [row for row in page.table("data", "DNN") if row[0].strip() == "SVHN"]
    assert svhn[1].split() == ["not", "run", "paper", "89.93"]
    assert "Finished experiments: 19; missing of what was planned: 2." in page.text


def test_shared_stages_count_once(page: Page) -> None:
    rows = {
        row[0].strip(): [cell.strip() for cell in row[1:]]
        for row in page.table("part", "train", "build", "query")
    }
    assert rows["mnist/tables"] == ["0:03:00", "0:01:00", "0:01:30", "0:05:30"]
    assert rows["mnist/neighbours"] == ["0:08:00", "0:02:40", "0:04:00", "0:14:40"]
    # A minute's training for each of 3 seeds of MNIST and 2 of Fashion-MNIST, 20 s of building for each of 19 experiments,
    # half a minute of queries for those 5 and for 2 seeds of 3 further k.
    assert rows["all, shared stages once"] == ["0:05:00", "0:06:20", "0:05:30", "0:16:50"]


def test_equal_results_give_equal_files(output: Path, grid: tuple[Plan, Path], tmp_path: Path) -> None:
    write_report(*grid, tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {
        p.name: p.read_bytes() for p in output.iterdir()
    }


@pytest.mark.parametrize("kept", ["none", "mnist/transfer", "mnist/neighbours/k=5", "mnist/cls_weight"])
def test_any_part_alone(kept: str, grid: tuple[Plan, Path], tmp_path: Path) -> None:
    plan, results = grid
    if kept != "none":
        (tmp_path / "results" / kept).parent.mkdir(parents=True)
        (tmp_path / "results" / kept).symlink_to(results / kept)
    write_report(plan, tmp_path / "results", tmp_path / "report")
    page = Page((tmp_path / "report" / "index.html").read_text(encoding="utf-8"))
    missing = {row[0].strip() for row in page.table("experiment", "seed", "why", "command")}
    assert "mnist/tables" in missing
    assert kept not in missing
    assert ("Nothing has run." in page.text) is (kept == "none")


def test_an_empty_grid(tmp_path: Path) -> None:
    write_report({}, tmp_path / "results", tmp_path / "report")
    page = Page((tmp_path / "report" / "index.html").read_text(encoding="utf-8"))
    assert page.text.count("Not in the grid.") == 10


def test_approximate_neighbours_are_named(tmp_path: Path, folders: ModuleType) -> None:
    index = {"backend": "ivf", "nlist": 234, "nprobe": 8}
    own = folders.settings()
    own["victim"]["index"] = index
    found = {"origin": {**index, "k": 75, "images": 100, "recall": {"relu3": 0.98765}}}
    folders.write_results(tmp_path / "mnist", own, lambda *_: 50.0, approximation=found)
    write_report({"mnist": {"tables": [Planned(0, "run")]}}, tmp_path, tmp_path / "report")
    text = (tmp_path / "report" / "report.md").read_text()
    recall = "recall@75 on 100 validation images is relu3 0.9877."
    section = text[text.index("Table 2: accuracy") : text.index("Table 3: transfer")]
    assert (
        f"mnist/tables, seed 0, origin: Approximate neighbours (ivf, nlist 234, nprobe 8): {recall}"
        in section
    )
    assert "approximate neighbours: ivf, nlist 234, nprobe 8" in text


def test_nothing_from_a_file_becomes_markup(tmp_path: Path, folders: ModuleType) -> None:
    folder = tmp_path / "results" / "mnist"
    own = folders.settings()
    folders.write_results(folder, own, lambda *_: 50.0)
    summary = json.loads((folder / "seed0.json").read_text())
    summary |= {"device": "<script>alert(1)</script> & |", "command": 'python "<b>`x`"'}
    write_json(folder / "seed0.json", {key: value for key, value in summary.items() if key != "digest"})
    plan = {"mnist": {"tables": [Planned(0, "c"), Planned(1, "c", missing="<i>'\"")]}}
    write_report(plan, tmp_path / "results", tmp_path / "report")
    page = Page((tmp_path / "report" / "index.html").read_text(encoding="utf-8"))
    assert not {"script", "b", "i"} & {tag for tag, _ in page.elements}
    assert "<script>alert(1)</script> & |" in page.text
    markdown = (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
    assert "&lt;script>alert(1)&lt;/script> &amp; \\|" in markdown
