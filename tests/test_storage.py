"""Atomic files, damaged files, locks and digests."""

import hashlib
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lightning_advknn.models import ConvNet, Normalize
from lightning_advknn.storage import (
    atomic_path,
    check_writable,
    code_of,
    digest,
    file_digest,
    load_tensors,
    read_json,
    save_tensors,
    tensors_digest,
    weights_digest,
    write_json,
)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_when_it_is_whole(tmp_path):
    path = tmp_path / "new" / "deep" / "file.txt"
    with atomic_path(path) as temporary:
        temporary.write_text("whole")
        assert not path.exists()
        assert temporary.parent == path.parent, "a move across file systems is not atomic"
    assert path.read_text() == "whole"
    assert names(path.parent) == ["file.txt"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")

    def fail():
        with atomic_path(path) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file.txt"]
    with atomic_path(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new"


def test_nothing_written_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_path(tmp_path / "file"):
        pass
    assert names(tmp_path) == []


@pytest.mark.parametrize("write", [check_writable, lambda folder: write_json(folder / "x.json", 1)])
def test_a_folder_that_cannot_be_written_is_named_with_the_remedy(tmp_path, write):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(
            OSError, match=rf"write in {re.escape(str(folder))}, but got: .*Choose another output folder"
        ):
            write(folder)


def test_check_writable_makes_the_folder_and_leaves_no_probe(tmp_path):
    check_writable(tmp_path / "a" / "b")
    assert names(tmp_path / "a" / "b") == []


def test_write_json_is_read_back(tmp_path):
    content = {"a": [1, 2.5, None], "b": {"c": "ü"}}
    write_json(tmp_path / "x.json", content)
    assert read_json(tmp_path / "x.json") == content
    with pytest.raises(TypeError):
        write_json(tmp_path / "x.json", {"a": torch.ones(1)})
    assert read_json(tmp_path / "x.json") == content


def test_every_change_of_json_is_found(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {2: [1.5, 20], "text": "ü, or else", 10: None})  # as strings, keys sort differently
    content = {"2": [1.5, 20], "text": "ü, or else", "10": None}
    assert read_json(path) == content
    whole = path.read_bytes()
    found = 0
    for position in range(len(whole)):
        for bit in range(8):
            path.write_bytes(whole[:position] + bytes([whole[position] ^ 1 << bit]) + whole[position + 1 :])
            try:
                read = read_json(path)
            except ValueError:
                found += 1
            else:  # changed white space, or a changed name of the digest
                assert {key: read.get(key) for key in content} == content
    assert found > 7 * len(whole)


def test_json_without_digest_is_of_an_earlier_version(tmp_path):
    (tmp_path / "x.json").write_text('{"a": [1]}')
    assert read_json(tmp_path / "x.json") == {"a": [1]}


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff", b"[" * 100_000], ids=["empty", "cut", "bytes", "deep"]
)
def test_what_is_no_json(tmp_path, content):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.json to be as it was written, but it is damaged"):
        read_json(tmp_path / "x.json")


def test_lists_of_numbers_are_written_in_one_line(tmp_path):
    content = {
        "pairs": [[0.5, 1], [-1e-7, 20]],
        "none": [],
        "texts": ["[\n  1,\n  2\n]", "[ 1 ]"],
        "mixed": [1, "2"],
    }
    write_json(tmp_path / "x.json", content)
    text = (tmp_path / "x.json").read_text()
    assert read_json(tmp_path / "x.json") == content
    lines = [line.strip() for line in text.splitlines()]
    assert lines[1:5] == ['"pairs": [', "[0.5, 1],", "[-1e-07, 20]", "],"]


def test_digest_is_sha256_of_sorted_json():
    expected = hashlib.sha256(b'{"a": 1, "b": [2, 3]}').hexdigest()[:16]
    assert digest({"b": [2, 3], "a": 1}) == digest({"a": 1, "b": [2, 3]}) == expected


def test_digest_tells_contents_apart():
    contents = [
        {"a": 1},
        {"a": 2},
        {"b": 1},
        {"a": [1]},
        {"a": "1"},
        {"a": None},
        {"a": 1.5},
        {"a": True},
        [],
        {},
    ]
    assert len({digest(content) for content in contents}) == len(contents)


def test_digest_refuses_what_json_cannot_hold():
    with pytest.raises(TypeError):
        digest({"a": torch.ones(1)})


def test_weights_digest_sees_every_weight_and_persistent_buffer(device):
    network = ConvNet().to(device)
    before = weights_digest(network)
    assert before == weights_digest(network)
    seen = {before}
    for tensor in network.state_dict().values():
        kept = tensor.clone()
        tensor.view(-1)[-1] += 1
        seen.add(weights_digest(network))
        tensor.copy_(kept)
        assert weights_digest(network) == before
    assert len(seen) == 1 + len(network.state_dict())


def test_weights_digest_does_not_see_where_and_how_they_are_held(device):
    network = ConvNet(mean=(0.5,))
    before = weights_digest(network)
    network.register_buffer("scratch", torch.ones(3), persistent=False)
    network.eval().requires_grad_(False)
    assert weights_digest(network.to(device)) == before
    copy = ConvNet()
    assert weights_digest(copy) != before
    copy.load_state_dict(network.state_dict())
    assert weights_digest(copy) == before
    assert weights_digest(copy.to(memory_format=torch.channels_last)) == before


def test_weights_digest_sees_names():
    first, second = (
        nn.ModuleDict({"a": Normalize([0.0], [1.0])}),
        nn.ModuleDict({"b": Normalize([0.0], [1.0])}),
    )
    assert weights_digest(first) != weights_digest(second)


def test_weights_digest_sees_shapes_and_types() -> None:
    tensors = [
        torch.zeros(2, 3),
        torch.zeros(3, 2),
        torch.zeros(2, 3).bfloat16(),
        torch.zeros(2, 3).int(),
        torch.tensor(0.0),
    ]
    assert len({tensors_digest({"a": tensor}) for tensor in tensors}) == len(tensors)
    assert tensors_digest({"a": tensors[0], "b": tensors[1]}) == tensors_digest(
        {"b": tensors[1], "a": tensors[0]}
    )


def test_tensors_are_read_back_with_their_metadata(tmp_path: Path, device: torch.device) -> None:
    tensors = {
        "a": torch.arange(6, device=device).view(2, 3).T,  # not contiguous
        "b": torch.tensor([0.5, float("nan")], dtype=torch.bfloat16),
        "c": torch.empty(0, 4, dtype=torch.int64),
    }
    save_tensors(tmp_path / "kept.safetensors", tensors, {"stage": "bank"})
    found, metadata = load_tensors(tmp_path / "kept.safetensors")
    assert metadata == {"stage": "bank"}
    for name, tensor in tensors.items():
        assert torch.equal(found[name].nan_to_num(), tensor.cpu().nan_to_num())
        assert found[name].dtype == tensor.dtype
    assert [path.name for path in tmp_path.iterdir()] == ["kept.safetensors"]


def test_every_flipped_bit_of_tensors_is_found(tmp_path: Path) -> None:
    path = tmp_path / "kept.safetensors"
    save_tensors(path, {"a": torch.arange(5), "b": torch.ones(2)}, {"stage": "bank", "seconds": "1.5"})
    whole = path.read_bytes()
    for position in range(len(whole)):
        for bit in (1, 32):
            path.write_bytes(whole[:position] + bytes([whole[position] ^ bit]) + whole[position + 1 :])
            with pytest.raises(ValueError, match=r"Expected .*kept\.safetensors to be as it was written"):
                load_tensors(path)


def test_tensors_without_a_digest_are_refused(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "kept.safetensors", {"stage": "bank"})
    with pytest.raises(ValueError, match="has changed since"):
        load_tensors(tmp_path / "kept.safetensors")


def test_edited_code_is_other_code(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    source = tmp_path / "code_that_is_edited.py"
    source.write_text("def attack(victim):\n    return 1\n")
    before = code_of("code_that_is_edited.attack")
    assert before == code_of("code_that_is_edited.attack") == [file_digest(source), ""]
    source.write_text("def attack(victim):\n    return 2\n")
    assert code_of("code_that_is_edited.attack") != before
    # The module that defines it counts, not the one that imports it.
    (tmp_path / "code_by_another_name.py").write_text("from code_that_is_edited import attack\n")
    assert code_of("code_by_another_name.attack") == code_of("code_that_is_edited.attack")
    assert code_of("torch.nn.Linear")[1] == torch.__version__
