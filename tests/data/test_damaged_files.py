"""Missing and damaged files, and wrong labels and shapes."""

import hashlib
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torchvision

from lightning_advknn.data import MNIST, SVHN
from tests.data.small import IDX_FILES, SMALL, each_data_set, read_whole


def md5(path):
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()


@each_data_set
def test_a_missing_file_is_named_with_the_remedy(kind, root, request, tmp_path):
    copy = Path(shutil.copytree(request.getfixturevalue(root), tmp_path / "copy"))
    for file in sorted(path for path in copy.rglob("*") if path.is_file()):
        content = file.read_bytes()
        file.unlink()
        for method in ("prepare_data", "setup"):
            with pytest.raises(
                FileNotFoundError, match=f"{kind.__name__}'s file .*{file.name}.*missing.*`root`.*`download`"
            ):
                getattr(kind(root=str(copy), **SMALL), method)()
        file.write_bytes(content)
    read_whole(kind, copy)


@pytest.mark.parametrize("file", IDX_FILES)
def test_one_flipped_bit_fails_the_checksum(mnist_copy, monkeypatch, file):
    raw = mnist_copy / "MNIST" / "raw"
    monkeypatch.setattr(MNIST, "md5_by_file", {name: md5(raw / name) for name in IDX_FILES})
    read_whole(MNIST, mnist_copy, verify_checksums=True)
    content = bytearray((raw / file).read_bytes())
    content[100] ^= 4
    (raw / file).write_bytes(content)
    for method in ("prepare_data", "setup"):
        data = MNIST(root=str(mnist_copy), **{**SMALL, "verify_checksums": True})
        with pytest.raises(
            ValueError, match=rf"Expected .*{file} to have the official MD5 sum .*verify_checksums"
        ):
            getattr(data, method)()


@pytest.mark.parametrize("file", ["train_32x32.mat", "test_32x32.mat"])
def test_one_flipped_bit_fails_svhns_checksum(svhn_copy, monkeypatch, file):
    official = torchvision.datasets.SVHN.split_list
    own = {
        split: [url, name, md5(svhn_copy / name)]
        for split, (url, name, _) in official.items()
        if split != "extra"
    }
    monkeypatch.setattr(torchvision.datasets.SVHN, "split_list", own)
    read_whole(SVHN, svhn_copy, verify_checksums=True)
    content = bytearray((svhn_copy / file).read_bytes())
    content[5000] ^= 4
    (svhn_copy / file).write_bytes(content)
    for method in ("prepare_data", "setup"):
        data = SVHN(root=str(svhn_copy), **{**SMALL, "verify_checksums": True})
        with pytest.raises(ValueError, match=rf"Expected .*{file} to have the official MD5 sum"):
            getattr(data, method)()


@each_data_set
def test_own_files_are_not_the_official_ones(kind, root, request):
    with pytest.raises(ValueError, match="official MD5 sum"):
        read_whole(kind, request.getfixturevalue(root), verify_checksums=True)


IDX_DAMAGE = {
    "empty": lambda content: b"",
    "header only": lambda content: content[:8],
    "three bytes": lambda content: content[:3],
    "half": lambda content: content[: len(content) // 2],
    "one byte short": lambda content: content[:-1],
    "one byte long": lambda content: content + b"\0",
    "text": lambda content: b"<html>404</html>" * 100,
    "another type": lambda content: content[:2] + b"\x0d" + content[3:],
    "unknown type": lambda content: content[:2] + b"\x01" + content[3:],
    "no dimensions": lambda content: content[:3] + b"\0" + content[4:],
    "more dimensions": lambda content: content[:3] + b"\x7f" + content[4:],
    "another count": lambda content: content[:4] + b"\x7f" + content[5:],
}


@pytest.mark.parametrize("file", IDX_FILES)
@pytest.mark.parametrize("damage", IDX_DAMAGE)
def test_damaged_mnist_files(mnist_copy, file, damage):
    path = mnist_copy / "MNIST" / "raw" / file
    path.write_bytes(IDX_DAMAGE[damage](path.read_bytes()))
    with pytest.raises(ValueError, match=r"Expected (readable )?MNIST .* in .*copy"):
        read_whole(MNIST, mnist_copy)


def idx(array):
    return (
        struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
        + array.astype(np.uint8).tobytes()
    )


@pytest.mark.parametrize("labels", [np.full(300, 10), np.where(np.arange(300) == 17, 255, 3)])
def test_mnist_labels_out_of_range(mnist_copy, labels):
    (mnist_copy / "MNIST" / "raw" / "train-labels-idx1-ubyte").write_bytes(idx(labels))
    with pytest.raises(ValueError, match=r"Expected MNIST labels in \[0, 9\], but the files in .* hold \["):
        read_whole(MNIST, mnist_copy)


@pytest.mark.parametrize("shape", [(300, 27, 28), (300, 28, 29), (300, 784)])
def test_mnist_images_of_another_shape(mnist_copy, shape):
    (mnist_copy / "MNIST" / "raw" / "train-images-idx3-ubyte").write_bytes(idx(np.ones(shape)))
    with pytest.raises(ValueError, match="MNIST"):
        read_whole(MNIST, mnist_copy)


@pytest.mark.parametrize("n", [0, 299, 301])
def test_mnist_images_without_a_label_each(mnist_copy, n):
    (mnist_copy / "MNIST" / "raw" / "train-images-idx3-ubyte").write_bytes(idx(np.ones((n, 28, 28))))
    with pytest.raises(
        ValueError, match="readable MNIST files" if n == 0 else rf"one label for each, but got .*{n}.*300"
    ):
        read_whole(MNIST, mnist_copy)


def save_svhn(root, compress=False, **changed):
    content = scipy.io.loadmat(root / "train_32x32.mat")
    content = {"X": content["X"], "y": content["y"]} | changed
    content = {name: array for name, array in content.items() if array is not None}
    scipy.io.savemat(root / "train_32x32.mat", content, do_compression=compress)


@pytest.mark.parametrize(
    "changed",
    [
        {"X": None},
        {"y": None},
        {"X": np.zeros((32, 32, 3, 299), np.uint8)},
        {"X": np.zeros((32, 31, 3, 300), np.uint8)},
        {"X": np.zeros((32, 32, 1, 300), np.uint8)},
        {"X": np.zeros((300, 3072), np.uint8)},
        {"X": np.zeros((32, 32, 3, 300))},
        {"X": np.array(["text"])},
        {"y": np.ones((299, 1), np.uint8)},
        {"y": np.full((300, 1), 11, np.uint8)},
        {"y": np.full((300, 1), -1, np.int16)},
        {"y": np.array(["text"])},
    ],
    ids=lambda changed: "-".join(f"{name}{getattr(array, 'shape', '')}" for name, array in changed.items()),
)
def test_damaged_svhn_contents(svhn_copy, changed):
    save_svhn(svhn_copy)
    read_whole(SVHN, svhn_copy)
    save_svhn(svhn_copy, **changed)
    with pytest.raises(ValueError, match=r"Expected (readable )?SVHN "):
        read_whole(SVHN, svhn_copy)


@pytest.mark.parametrize("compress", [False, True])  # the official files are compressed
@pytest.mark.parametrize("share", [0, 0.00005, 0.0001, 0.001, 0.3, 0.5, 0.99, 0.99999])
def test_truncated_svhn_files(svhn_copy, compress, share):
    save_svhn(svhn_copy, compress)
    read_whole(SVHN, svhn_copy)
    file = svhn_copy / "train_32x32.mat"
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=r"Expected (readable )?SVHN "):
        read_whole(SVHN, svhn_copy)


@pytest.mark.parametrize(
    "position", [125, 128, 136, 137]
)  # version, type of the first element, zlib's header
def test_svhn_files_with_a_flipped_byte(svhn_copy, position):
    # Only these positions: scipy's reader crashes on some other damaged headers (checksums prevent that).
    save_svhn(svhn_copy, compress=True)
    file = svhn_copy / "train_32x32.mat"
    content = bytearray(file.read_bytes())
    content[position] ^= 0x5A
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"Expected readable SVHN files in .*copy"):
        read_whole(SVHN, svhn_copy)
