"""What banks and searches take in memory and on disk."""

from types import SimpleNamespace

import pytest
import torch

from lightning_advknn.search.memory_plan import check_room, in_memory, working_bytes
from lightning_advknn.search.scans import quantize, similarities, torch_scan


def test_the_smallest_banks_stay_in_memory():
    # 60,000 rows of 10, 1152, 6272 and 12544 float32 features, and as many bytes again for codes: 3 MB, 346
    # MB, 1.9 GB and 3.8 GB.
    widths = {"relu1": 12544, "relu2": 6272, "relu3": 1152, "logits": 10}
    assert in_memory(60000, widths, 8) == set(widths)
    assert in_memory(60000, widths, 4) == {"relu2", "relu3", "logits"}
    assert in_memory(60000, widths, 1.2) == {"relu3", "logits"}
    assert in_memory(60000, widths, 0.7) == {"logits"}
    with pytest.raises(
        ValueError, match=r"`memory_gib` to be at least 0\.6\d to search .* 60000 rows .* but got 0\.25"
    ):
        in_memory(60000, widths, 0.25)


def test_memory_counts_what_backends_keep_beside_the_rows():
    # 60,000 rows of 1000 features: 240 MB, beside 671 for searches.
    for backend, bytes_of_a_feature in (
        ("float32", 4),
        ("int8", 5),
        ("bfloat16", 6),
        ("auto", 6),
        ("faiss", 12),
    ):
        gib = (671.09e6 + 60000 * (120 + 1000 * bytes_of_a_feature)) / 2**30
        assert in_memory(60000, {"relu": 1000}, 1.001 * gib, backend) == {"relu"}
        assert in_memory(60000, {"relu": 1000}, 0.999 * gib, backend) == set()


def test_memory_counts_the_index_wherever_the_rows_are():
    # 40,000 rows of 1000 features. In 200 lists: codes of a byte, twice while lists grow, with 8 bytes of
    # number, and four copies of 64 rows a list to learn from, 4 bytes a feature.
    index = 40000 * (2 * 1000 + 8) + 4 * 4 * 12800 * 1000
    least = (640 * 2**20 + 120 * 40000 + index) / 2**30
    assert in_memory(40000, {"relu": 1000}, 1.001 * least, "ivf") == set()
    with pytest.raises(ValueError, match="to search banks of 40000 rows from disk"):
        in_memory(40000, {"relu": 1000}, 0.999 * least, "ivf")
    whole = least + 40000 * 1000 * 4 / 2**30
    assert in_memory(40000, {"relu": 1000}, 1.001 * whole, "ivf") == {"relu"}
    assert in_memory(40000, {"relu": 1000}, 0.999 * whole, "ivf") == set()


def test_a_disk_without_room_is_found_before_it_is_full(tmp_path, monkeypatch):
    # 1000 rows of 30 features: 4 bytes each, and 1 of codes.
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=149_999))
    with pytest.raises(OSError, match=r"features of 1000 images \(relu1, relu2\).*raise `memory_gib`"):
        check_room(tmp_path, 1000, {"relu1": 10, "relu2": 20}, "int8")
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=150_000))
    check_room(tmp_path, 1000, {"relu1": 10, "relu2": 20}, "int8")
    check_room(None, 1000, {}, "int8")
    with pytest.raises(OSError, match=r"\(relu1, relu2\), 2 times, but it has"):
        check_room(tmp_path, 1000, {"relu1": 10, "relu2": 20}, "int8", 2)


class GPU:
    """A GPU of 16 GiB, of which 10 are free and torch holds 2 more without using them."""

    device = torch.device("cuda", 1)
    total_memory = 16 * 2**30

    def __init__(self, monkeypatch):
        sizes = {"memory_reserved": 3 * 2**30, "memory_allocated": 2**30, "mem_get_info": (10 * 2**30, None)}
        for name, size in {**sizes, "get_device_properties": self}.items():
            monkeypatch.setattr(f"torch.cuda.{name}", lambda device, size=size: self._of(device, size))

    def _of(self, device, size):
        assert device == self.device
        return size


def test_without_a_limit_a_gpus_banks_fit_into_its_free_memory(monkeypatch, capsys):
    # 12 GiB are there for use, of which 9.6 for banks and searches, which take 1 GiB, a sixteenth of all.
    gpu, rows = GPU(monkeypatch), 2**20
    assert working_bytes(gpu.device) == 2**30
    left = 0.8 * 12 * 2**30 - 2**30 - 2 * 120 * rows
    fits = int(left / rows / 5) - 100  # one byte of a code beside the four of a feature
    assert in_memory(rows, {"few": 100, "many": fits}, None, "int8", None, gpu.device) == {"few", "many"}
    assert capsys.readouterr().err == ""
    assert in_memory(rows, {"few": 100, "many": fits + 1}, None, "int8", None, gpu.device) == {"few"}
    assert "Banks of many are kept on disk: of 1048576 images they do not fit into 9.6 GiB" in (
        capsys.readouterr().err
    )
    with pytest.raises(ValueError, match=r"at least 12\.\d\d GiB free for banks on cuda:1 .* but got 9\.6\."):
        in_memory(10**8, {"few": 1}, None, "int8", None, gpu.device)
    # A limit that is set is kept to, whatever is free; a CPU has none unless one is set.
    assert in_memory(rows, {"few": 100}, 1.5, "int8", None, gpu.device) == set()
    assert in_memory(10**9, {"many": 10**5}, None) == {"many"}


def test_blocks_of_a_scan_fit_into_the_memory_of_a_search(monkeypatch):
    gpu = GPU(monkeypatch)
    assert 4 * sum(torch_scan._limits(gpu.device)) <= working_bytes(gpu.device)
    assert 8 * 4 * similarities._elements(gpu.device) <= working_bytes(gpu.device)
    assert 8 * 4 * quantize._elements(gpu.device) <= working_bytes(gpu.device)
    gpu.total_memory = 2**40
    assert working_bytes(gpu.device) == 4 * 2**30
