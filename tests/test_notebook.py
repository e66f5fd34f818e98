"""The notebook runs, and shows what it says."""

import base64
import re
from pathlib import Path

import nbformat
import pytest
from matplotlib.image import imread
from nbclient import NotebookClient
from nbformat import NotebookNode

DOCS = Path(__file__).parents[1] / "docs"

pytestmark = pytest.mark.xdist_group("notebook")  # one worker, so that it runs once


@pytest.fixture(scope="module")
def notebook(tmp_path_factory: pytest.TempPathFactory) -> NotebookNode:
    """The notebook, run from its first cell to its last in a folder of its own, on one thread."""
    folder = tmp_path_factory.mktemp("notebook")
    notebook = nbformat.read(DOCS / "digits.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "committed with outputs: clear them"
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        monkeypatch.setenv("PYTHONPATH", str(DOCS.parent))
        monkeypatch.setenv("IPYTHONDIR", str(folder / "ipython"))
        client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}})
        client.execute()
    assert sorted(path.name for path in folder.iterdir()) in ([], ["ipython"])  # it leaves nothing behind
    return notebook


def test_nothing_is_written_to_the_error_stream(notebook: NotebookNode) -> None:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert [output.text for output in outputs if output.get("name") == "stderr"] == []


def test_victims_fall_for_the_attacks(notebook: NotebookNode) -> None:
    text = "".join(
        output.text
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if output.get("name") == "stdout"
    )
    percent = {
        name: float(value) for name, value in re.findall(r"^ *(dnn|knn|dknn): +([\d.]+)%", text, re.MULTILINE)
    }
    assert min(percent.values()) > 85  # of 10 classes
    table = {
        name: (float(knn), float(dknn), float(l2))
        for name, knn, dknn, l2 in re.findall(
            r"^ *(\w+(?: \w+)? on .*?)  +([\d.]+)% +([\d.]+)% +([\d.]+)$", text, re.MULTILINE
        )
    }
    assert len(table) == 5
    for knn, dknn, _ in table.values():
        assert knn < percent["knn"]
        assert dknn < percent["dknn"]
    # Of few images, and an equal number on some processors.
    assert table["BIM on the surrogate"][0] <= table["BIM on the backbone"][0]
    # The same victim falls for less.
    smallest, bim = table["minimum norm on DkNN"], table["BIM on the surrogate"]
    assert smallest[1] < 10
    assert smallest[2] < bim[2]


def test_pictures_are_drawn(notebook: NotebookNode, tmp_path: Path) -> None:
    pictures = [
        output.data["image/png"]
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    ]
    assert len(pictures) == 3
    for picture in pictures:
        path = tmp_path / "picture.png"
        path.write_bytes(base64.b64decode(picture))
        assert imread(path)[..., :3].std() > 0.05  # not blank
