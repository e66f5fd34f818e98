"""Images and labels in every form that users have them in."""

import re

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from lightning_advknn.data import Batch, Digits
from lightning_advknn.data.given import as_batches, as_images, as_labels

N = 1203  # more than two batches of what does not come in batches
IMAGES = torch.rand(N, 1, 2, 2, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(N) % 7


class Counted(Dataset):
    """Says how many of its items have been read."""

    def __init__(self):
        self.reads = 0

    def __len__(self):
        return N

    def __getitem__(self, index):
        self.reads += 1
        return IMAGES[index], int(LABELS[index])


class Streamed(IterableDataset):
    def __iter__(self):
        yield from zip(IMAGES, LABELS.tolist(), strict=True)


def batches_of_batches():
    return [
        Batch(*part)
        for part in zip(*(each.split(100) for each in (IMAGES, LABELS, torch.arange(N))), strict=True)
    ]


FORMS = {
    "tensors": (IMAGES, LABELS),
    "arrays": (IMAGES.numpy(), LABELS.numpy()),
    "float64 and int32": (IMAGES.numpy().astype(np.float64), LABELS.numpy().astype(np.int32)),
    "bytes as labels": (IMAGES, LABELS.to(torch.uint8)),
    "lists": (list(IMAGES), LABELS.tolist()),
    "lists of arrays": (list(IMAGES.numpy()), list(LABELS.numpy())),
    "lists of numbers": (IMAGES.tolist(), LABELS.tolist()),
    "Dataset": (Counted(), None),
    "Subset": (Subset(Counted(), range(N)), None),
    "TensorDataset": (TensorDataset(IMAGES, LABELS), None),
    "DataLoader": (DataLoader(Counted(), batch_size=64), None),
    "DataLoader with a sampler": (DataLoader(Counted(), batch_size=64, sampler=list(range(N))), None),
    "DataLoader with batches of its own": (DataLoader(Counted(), batch_sampler=[range(1000), range(1000, N)]), None),
    "IterableDataset": (DataLoader(Streamed(), batch_size=64), None),
    "batches": (batches_of_batches(), None),
    "a generator": ((batch for batch in batches_of_batches()), None),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_every_form_holds_the_same_images(form):
    batches = as_batches(*FORMS[form])
    for _ in range(2):  # it can be read again
        found = list(batches)
        assert [len(batch.images) for batch in found] == batches.sizes
        assert len(batches) == len(found)
        images, labels, ids = (torch.cat(parts) for parts in zip(*found, strict=True))
        assert torch.equal(images, IMAGES)
        assert images.dtype == torch.float32
        assert torch.equal(labels, LABELS)
        assert labels.dtype == torch.int64
        assert ids.tolist() == list(range(N))


def test_a_dataset_is_read_batch_by_batch():
    dataset = Counted()
    batches = as_batches(dataset)
    assert dataset.reads == 0
    first = next(iter(batches))
    assert dataset.reads == len(first.images) == batches.sizes[0] < N


def test_batches_keep_their_ids_and_splits_are_datasets():
    split = Digits().split("test")
    expected = split.__getitems__(range(len(split)))
    for given in (split, Digits().loader("test"), Subset(split, range(len(split)))):
        images, labels, ids = (torch.cat(parts) for parts in zip(*as_batches(given), strict=True))
        assert torch.equal(images, expected.images)
        assert torch.equal(labels, expected.labels)
        assert torch.equal(ids, expected.ids)
        assert ids.tolist() != list(range(len(ids)))  # positions in the original split


def test_a_loader_that_drops_its_last_batch():
    batches = as_batches(DataLoader(Counted(), batch_size=500, drop_last=True))
    assert batches.sizes == [500, 500]
    assert [len(batch.images) for batch in batches] == [500, 500]


def test_read_only_arrays_are_copied():
    pixels = IMAGES.numpy().copy()
    pixels.flags.writeable = False
    assert torch.equal(as_images(pixels), IMAGES)


def pictures():
    return [Image.fromarray(np.zeros((4, 4), dtype=np.uint8)) for _ in range(2)]


class Items(Dataset):
    def __init__(self, *items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((IMAGES, None), "Expected `labels` beside the images, but got none"),
        ((IMAGES.numpy(), None), "Expected `labels` beside the images, but got none"),
        ((list(IMAGES), None), "a list of a torch.Tensor without labels"),
        (([(IMAGES, LABELS)], None), r"`data.Batch` (images, labels, ids), but got a list of a tuple"),
        ((TensorDataset(IMAGES, LABELS), LABELS), "no `labels` beside a torch.utils.data.dataset.TensorDataset"),
        ((IMAGES, LABELS[:-1]), f"of shape ({N},), one for each image, but got torch.int64 of shape ({N - 1},)"),
        ((IMAGES, LABELS.float()), "Convert them with `.long()`"),
        ((IMAGES, LABELS > 3), "got torch.bool of shape"),
        ((IMAGES, LABELS - 1), "Expected `labels` at least 0, but got -1 to 5"),
        ((IMAGES[:2], ["one", "two"]), "labels as a tensor, a NumPy array or a list of them, but got a list of a str"),
        ((IMAGES[:2], np.array(["one", "two"])), "Number the classes from 0."),
        ((pictures(), [0, 1]), "but got a list of a PIL.Image.Image. Convert them, for example by `torchvision"),
        (([IMAGES[0], IMAGES[0, :, :1]], [0, 1]), "of one shape, but got shapes [(1, 1, 2), (1, 2, 2)]"),
        (([[0.5], [0.5, 0.5]], [0, 1]), "all numbers and of one shape, but got"),
        (({"images": IMAGES}, LABELS), "Expected images as a tensor, a NumPy array or a list of them, but got a dict"),
        ((Items({"image": 1}), None), "a Dataset of (image, label), but one of its items is a dict"),
        ((Items((pictures()[0], 0)), None), "but got a tuple of a PIL.Image.Image"),
        ((DataLoader(Items(*IMAGES), batch_size=2), None), "batches of (images, labels), but got a torch.Tensor"),
        ((DataLoader(TensorDataset(IMAGES, LABELS, LABELS)), None), "(images, labels), but got a list of 3"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_says_why(given, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        list(as_batches(*given))


def test_labels_are_whole_numbers_one_an_image():
    assert as_labels(torch.tensor([2, 0], dtype=torch.int16), 2).tolist() == [2, 0]
    with pytest.raises(ValueError, match="one-hot"):
        as_labels(torch.eye(3), 3)
