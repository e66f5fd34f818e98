"""GTSRB, CIFAR-10, SVHN and KMNIST against the bytes of their files."""

import gzip
import hashlib
import io
import pickle
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from lightning_advknn.data import CIFAR10, GTSRB, KMNIST, MissingDataError

OWN = {"download": False, "verify_checksums": False}
REAL = Path(__file__).parents[3] / "shared" / "data"


def gtsrb(root, **settings):
    """The tiny GTSRB: 43 classes of 3 tracks of 4 frames, 8 test images a class."""
    return GTSRB(root=str(root), **{"val_size": 129, "calibration_per_class": 5, **OWN, **settings})


def split_tracks(data, name):
    """Class and track of each training image, from the order of the files: 12 a class, 4 a track."""
    return {(i // 12, i % 12 // 4) for i in data.split(name).ids.tolist()}


def test_gtsrb_holds_whole_tracks_out(gtsrb_root):
    data = gtsrb(gtsrb_root)
    train, val = split_tracks(data, "train"), split_tracks(data, "val")
    assert not train & val
    assert Counter(label for label, _ in val) == dict.fromkeys(range(43), 1)
    assert len(train) == 86
    assert split_tracks(gtsrb(gtsrb_root, split_seed=1), "val") != val
    assert torch.equal(data.split("calibration").labels.bincount(), torch.full((43,), 5))
    assert len(data.split("test")) == 43 * 3


def test_gtsrb_reads_files_of_its_size_as_they_are_and_says_so(gtsrb_root):
    data = gtsrb(gtsrb_root)
    path = gtsrb_root / "gtsrb" / "GTSRB" / "Training" / "00002" / "00001_00003.ppm"
    split = data.split("train" if (2, 1) in split_tracks(data, "train") else "val")
    (place,) = (split.ids == 2 * 12 + 1 * 4 + 3).nonzero()[0].tolist()
    assert np.array_equal(split.images[place].permute(1, 2, 0), np.asarray(Image.open(path)))
    assert split.labels[place] == 2
    assert "resized before" in data.note


def test_gtsrb_resizes_photographs_and_says_nothing(gtsrb_root, tmp_path):
    shutil.copytree(gtsrb_root, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "gtsrb" / "GTSRB" / "Training" / "00000" / "00000_00000.ppm"
    large = Image.fromarray(np.arange(3 * 40 * 50, dtype=np.uint32).astype(np.uint8).reshape(40, 50, 3))
    for each in (path, tmp_path / "gtsrb" / "GTSRB" / "Final_Test" / "Images" / "00000.ppm"):
        large.save(each)
    data = gtsrb(tmp_path)
    data.setup()
    images, _ = data.load(train=True)
    # torchvision resizes Pillow images with Pillow's antialiased bilinear filter.
    assert np.array_equal(
        images[0].permute(1, 2, 0), np.asarray(large.resize((32, 32), Image.Resampling.BILINEAR))
    )
    assert data.note == ""


def test_gtsrb_refuses_other_counts_damaged_files_and_missing_ones(gtsrb_root, tmp_path):
    with pytest.raises(ValueError, match="39209 train images"):
        gtsrb(gtsrb_root, verify_checksums=True).setup()
    with pytest.raises(MissingDataError, match="root"):
        gtsrb(tmp_path).prepare_data()
    shutil.copytree(gtsrb_root, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "gtsrb" / "GTSRB" / "Final_Test" / "Images" / "00007.ppm"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"00007\.ppm"):
        gtsrb(tmp_path).setup()
    with pytest.raises(ValueError, match="calibration_per_class"):
        gtsrb(gtsrb_root, calibration_per_class=8).setup()


def test_gtsrb_needs_two_tracks_of_a_class(gtsrb_root, tmp_path):
    shutil.copytree(gtsrb_root, tmp_path, dirs_exist_ok=True)
    for path in (tmp_path / "gtsrb" / "GTSRB" / "Training" / "00009").glob("0000[12]_*.ppm"):
        path.unlink()
    with pytest.raises(ValueError, match="two tracks of class 9"):
        gtsrb(tmp_path).setup()


def test_gtsrbs_labels_are_its_folders_numbers(gtsrb_root, tmp_path):
    shutil.copytree(gtsrb_root, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "gtsrb" / "GTSRB" / "Training" / "00007")
    data = gtsrb(tmp_path)
    assert sorted({*data.split("train").labels.tolist()}) == [label for label in range(43) if label != 7]


def test_gtsrbs_class_names_are_in_order():
    names = GTSRB.class_names
    assert len(names) == len(set(names)) == 43
    known = {0: "speed limit 20", 6: "end of speed limit 80", 8: "speed limit 120", 13: "yield", 14: "stop"}
    known |= {17: "no entry", 25: "road work", 33: "turn right ahead", 38: "keep right", 40: "roundabout"}
    assert {label: names[label] for label in known} == known


@pytest.mark.skipif(not (REAL / "gtsrb").is_dir(), reason="real GTSRB is not there")
def test_real_gtsrb():
    data = GTSRB(root=str(REAL), download=False)
    assert [len(data.split(name)) for name in ("train", "val", "calibration", "test")] == [
        35279,
        3930,
        860,
        11770,
    ]


def test_cifar10_holds_the_files_images(cifar10_root):
    data = CIFAR10(root=str(cifar10_root), val_size=60, calibration_per_class=7, **OWN)
    folder = cifar10_root / "cifar-10-batches-py"
    batches = [pickle.loads((folder / f"data_batch_{i}").read_bytes()) for i in range(1, 6)]
    images = np.concatenate([batch["data"] for batch in batches]).reshape(-1, 3, 32, 32)
    labels = [label for batch in batches for label in batch["labels"]]
    for name in ("train", "val"):
        split = data.split(name)
        assert np.array_equal(split.images, images[split.ids])
        assert split.labels.tolist() == [labels[i] for i in split.ids]
    assert len(data.split("train")) + len(data.split("val")) == len(labels) == 300
    assert data.class_names[3] == "cat"


def test_cifar10_runs_no_code_of_its_files(cifar10_root, tmp_path):
    shutil.copytree(cifar10_root, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "cifar-10-batches-py" / "test_batch"
    for protocol in (2, 4):
        path.write_bytes(pickle.dumps({"data": Evil(tmp_path / "ran"), "labels": []}, protocol))
        with pytest.raises(ValueError, match="would run"):
            CIFAR10(root=str(tmp_path), **OWN).setup()
        assert not (tmp_path / "ran").exists()


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_cifar10_and_kmnist_refuse_files_that_are_not_the_official_ones(cifar10_root, kmnist_root):
    for kind, root in ((CIFAR10, cifar10_root), (KMNIST, kmnist_root)):
        with pytest.raises(ValueError, match="official MD5"):
            kind(root=str(root), download=False).prepare_data()


def test_kmnists_files_are_what_its_archives_hold(kmnist_root, tmp_path, monkeypatch):
    shutil.copytree(kmnist_root, tmp_path, dirs_exist_ok=True)
    raw = tmp_path / "KMNIST" / "raw"
    sums = [
        (name, hashlib.md5((raw / name).read_bytes(), usedforsecurity=False).hexdigest())
        for name, _ in torchvision.datasets.KMNIST.resources
    ]
    monkeypatch.setattr(torchvision.datasets.KMNIST, "resources", sums)
    data = KMNIST(root=str(tmp_path), download=False, val_size=60, calibration_per_class=7)
    data.prepare_data()
    assert len(data.split("test")) == 330
    file = raw / "t10k-labels-idx1-ubyte"
    file.write_bytes(file.read_bytes()[:-1] + b"\x00")
    with pytest.raises(ValueError, match=r"content of .*, but it differs"):
        KMNIST(root=str(tmp_path), download=False).prepare_data()
    (raw / f"{file.name}.gz").unlink()
    with pytest.raises(MissingDataError, match=r"lacks .*\.gz.*verify_checksums"):
        KMNIST(root=str(tmp_path), download=False).prepare_data()


def test_kmnist_archives_are_gzip(kmnist_root):
    raw = kmnist_root / "KMNIST" / "raw"
    for path in raw.glob("*.gz"):
        assert (
            gzip.GzipFile(fileobj=io.BytesIO(path.read_bytes())).read() == path.with_suffix("").read_bytes()
        )
