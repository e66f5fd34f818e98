"""Which class has which label is said in a line, and kept."""

import re
from collections import Counter
from pathlib import Path

from sklearn.datasets import load_digits

from lightning_advknn.data import GTSRB, Digits
from lightning_advknn.reports.records.classes import classes_line, names_of


def test_few_classes_are_all_named_with_their_images() -> None:
    line = classes_line(Digits())
    assert line.startswith("Classes of Digits, each with its label and its training/test images: 0 ")
    counts = {
        int(label): int(train) + int(test) for label, train, test in re.findall(r"(\d+) (\d+)/(\d+)", line)
    }
    assert counts == Counter(load_digits().target.tolist())


def test_of_many_classes_some_are_named(gtsrb_root: Path) -> None:
    data = GTSRB(
        str(gtsrb_root), val_size=129, calibration_per_class=5, download=False, verify_checksums=False
    )
    line = classes_line(data)
    # 3 tracks of 4 frames and 8 test images of each of the 43 classes.
    assert ": 0 speed limit 20 12/8, 1 speed limit 30 12/8, " in line
    assert line.endswith("..., 42 end of no passing over 3.5 t 12/8; at least 12/8, at most 12/8")
    assert line.count("12/8") == 9


def test_labels_stand_for_names_that_are_not_as_many() -> None:
    data = Digits()
    data.class_names = ("zero", "one")
    assert names_of(data) == [str(label) for label in range(10)]
