"""faiss as a scan, and its errors."""

from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch

from lightning_advknn.search.scans import faiss_scan
from tests.search.oracle import brute_force, check, make_bank


@pytest.mark.skipif(not find_spec("faiss"), reason="needs faiss")
def test_faiss_is_asked_for_no_more_rows_than_it_can_find(device):
    # On a GPU no more than 2048. Ties of three distinct rows widen the scan beyond.
    features = torch.eye(3).repeat(200, 1)
    bank = make_bank(features, "cosine", "faiss", device)
    scan = bank._scanner()
    original = scan._index.search
    scan._index = SimpleNamespace(
        ntotal=600, search=lambda queries, n: original(queries, n) if n <= 50 else None
    )
    scan._most = 50
    check(bank, torch.eye(3), 9, *brute_force(torch.eye(3), features, "cosine", 9))


@pytest.fixture
def fresh():
    """faiss has not been imported yet, nor is it known afterwards."""
    faiss_scan.import_faiss.cache_clear()
    yield
    faiss_scan.import_faiss.cache_clear()


def test_two_faiss_distributions_are_an_error(monkeypatch, fresh):
    names = ("torch", "faiss-gpu", "Faiss-CPU", None)
    monkeypatch.setattr(faiss_scan, "distributions", lambda: [SimpleNamespace(name=name) for name in names])
    with pytest.raises(
        ImportError, match=r"one faiss distribution, but found faiss-cpu, faiss-gpu.*pip uninstall"
    ):
        make_bank(torch.ones(3, 2), "cosine", "faiss").votes(torch.ones(1, 2), 1)


@pytest.mark.parametrize("error", [ImportError("No module named 'faiss'"), RuntimeError("libcudart.so")])
def test_unusable_faiss_is_an_error_that_names_the_remedy(monkeypatch, fresh, error):
    def broken(name, *args, **kwargs):
        if name == "faiss":
            raise error
        return original(name, *args, **kwargs)

    original = __import__
    monkeypatch.setattr("builtins.__import__", broken)
    monkeypatch.setattr(faiss_scan, "distributions", list)
    with pytest.raises(ImportError, match=r"Expected a working faiss.*faiss-cpu.*backend='auto'"):
        make_bank(torch.ones(3, 2), "cosine", "faiss").votes(torch.ones(1, 2), 1)
