"""Checks of torch's settings, labels and integers, and float32 arithmetic."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from lightning_advknn.choices import whole
from lightning_advknn.functional import (
    check_images,
    check_labels,
    count_votes,
    dknn_prediction,
    float32_arithmetic,
    ieee_arithmetic,
    knn_prediction,
    l2_distortion,
    linf_distortion,
    tf32_arithmetic,
    vote_distribution,
)

LABELS = torch.tensor([0, 2, 1])
BACKENDS: Any = torch.backends  # whose attributes are set where type checkers do not see them
NEW = {
    "cuda.matmul": BACKENDS.cuda.matmul,
    "cudnn.conv": BACKENDS.cudnn.conv,
    "cudnn.rnn": BACKENDS.cudnn.rnn,
    "mkldnn.matmul": BACKENDS.mkldnn.matmul,
    "mkldnn.conv": BACKENDS.mkldnn.conv,
    "mkldnn.rnn": BACKENDS.mkldnn.rnn,
}
OLD: dict[str, Callable[[], Any]] = {
    "torch.get_float32_matmul_precision": torch.get_float32_matmul_precision,
    "cudnn.allow_tf32": lambda: BACKENDS.cudnn.allow_tf32,
    "cuda.matmul.allow_tf32": lambda: BACKENDS.cuda.matmul.allow_tf32,
}


def switches() -> dict[str, Any]:
    """What all of torch's switches of float32 products say; None where torch refuses to read an old one."""

    def read(get: Callable[[], Any]) -> Any:
        try:
            return get()
        except RuntimeError:
            return None

    new = {name: switch.fp32_precision for name, switch in NEW.items()}
    more = {"deterministic": BACKENDS.cudnn.deterministic, "benchmark": BACKENDS.cudnn.benchmark}
    return new | more | {name: read(get) for name, get in OLD.items()}


def _nothing() -> None: ...


def _old() -> None:
    torch.set_float32_matmul_precision("medium")
    BACKENDS.cudnn.allow_tf32 = False


def _new() -> None:
    BACKENDS.cudnn.conv.fp32_precision = "ieee"  # but not that of recurrent layers
    BACKENDS.mkldnn.conv.fp32_precision = BACKENDS.mkldnn.rnn.fp32_precision = "bf16"


def _all() -> None:
    BACKENDS.fp32_precision = "tf32"


def _both() -> None:
    torch.set_float32_matmul_precision("high")
    BACKENDS.mkldnn.matmul.fp32_precision = "ieee"
    BACKENDS.cudnn.benchmark = True


@pytest.fixture
def torch_as_new() -> Iterator[None]:
    """Set torch's switches to their defaults before and afterwards."""

    def reset() -> None:
        BACKENDS.fp32_precision = "none"
        torch.set_float32_matmul_precision("highest")
        BACKENDS.cudnn.allow_tf32, BACKENDS.cudnn.benchmark = True, False
        for name in ("mkldnn.matmul", "mkldnn.conv", "mkldnn.rnn", "cuda.matmul"):
            NEW[name].fp32_precision = "none"

    reset()
    yield
    reset()


@pytest.mark.usefixtures("torch_as_new")
@pytest.mark.parametrize("setting", [_nothing, _old, _new, _all, _both])
def test_products_are_ieee_or_tf32_and_every_switch_is_restored(setting: Callable[[], None]) -> None:
    setting()
    before = switches()
    with ieee_arithmetic():
        inside = switches()
        assert {inside[name] for name in NEW} <= {"none", "ieee"}
        assert BACKENDS.fp32_precision == "none" or {inside[name] for name in NEW} == {"ieee"}
        # The old ones can be read and say the same, for networks and libraries that do.
        assert [inside[name] for name in OLD] == ["highest", False, False]
        assert (inside["deterministic"], inside["benchmark"]) == (True, False)
        with tf32_arithmetic():
            gpu = [switches()[name] for name in ("cuda.matmul", "cudnn.conv", "cudnn.rnn")]
            assert gpu == ["tf32"] * 3
            assert [switches()[name] for name in OLD] == ["high", True, True]
            cpu = [name for name in NEW if name.startswith("mkldnn")]
            assert {name: switches()[name] for name in cpu} == {name: inside[name] for name in cpu}
            with ieee_arithmetic():
                assert {switches()[name] for name in NEW} <= {"none", "ieee"}
        assert switches() == inside
    assert switches() == before


@pytest.mark.usefixtures("torch_as_new")
def test_switches_are_restored_after_an_error() -> None:
    before = switches()
    assert before["cudnn.conv"] == "tf32", "torch's default, by which features would be off by 1e-3"
    with pytest.raises(KeyError), ieee_arithmetic(), tf32_arithmetic():
        raise KeyError
    assert switches() == before


def test_float32_inside_and_all_as_before_outside() -> None:
    matmul: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    left = torch.full((1, 1), 1 + 2.0**-12)  # is 1 in bfloat16
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            assert (left @ left).item() == 1
            with float32_arithmetic():
                assert (left @ left).item() == pytest.approx((1 + 2.0**-12) ** 2, abs=1e-7)
                assert matmul.fp32_precision == "ieee"
            assert (left @ left).dtype == torch.bfloat16
        assert matmul.fp32_precision == "bf16"
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (LABELS.int(), r"torch\.int32 of shape \(3,\)\. Convert them with `\.long\(\)`"),
        (LABELS.double(), r"torch\.float64"),
        (LABELS > 0, r"torch\.bool"),
        (LABELS[:, None], r"Take `labels\.squeeze\(1\)"),
        (torch.eye(3), r"take `labels\.argmax\(1\)`"),
        (LABELS[:2], r"shape \(2,\)\. Pass one label for each image"),
        (LABELS.numpy(), r"a numpy\.ndarray\. Convert them with `torch\.as_tensor"),
        (LABELS - 1, r"in \[0, 2\] \(the classes\), but got -1 to 1"),
        (LABELS + 1, r"in \[0, 2\] \(the classes\), but got 1 to 3"),
    ],
)
def test_other_labels_are_refused_with_a_remedy(labels: Any, message: str) -> None:
    check_labels(LABELS, 3, 3)
    check_labels(LABELS[:0], 0, 3)
    with pytest.raises(ValueError, match=message):
        check_labels(labels, 3, 3)


@pytest.mark.parametrize("value", [5, np.int64(5), np.uint8(5), np.array(5), torch.tensor(5)])
def test_whole_numbers_become_pythons(value: Any) -> None:
    assert type(whole("k", value)) is int
    assert whole("k", value) == 5


@pytest.mark.parametrize(
    "value", [5.0, True, np.True_, np.float64(5), "5", None, np.array([5, 6]), torch.tensor(5.0)]
)
def test_nothing_else_is_a_whole_number(value: Any) -> None:
    with pytest.raises(ValueError, match="`k` to be a whole number"):
        whole("k", value)


def test_votes_in_other_integers_are_counted_exactly() -> None:
    # 26 is the largest. In uint8, 26 * 10 overflows to 4.
    votes = torch.tensor([24, 26, 0, 0, 0, 0, 0, 0, 0, 25])
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32):
        assert knn_prediction(votes.to(dtype)) == 1
        assert count_votes(LABELS[None].to(dtype), 3).dtype == torch.int64
    with pytest.raises(ValueError, match=r"`votes` to be an int64 tensor, but got torch\.float32"):
        knn_prediction(votes / 75)
    with pytest.raises(ValueError, match=r"`neighbour_labels` to be an int64 tensor, but got ndarray"):
        count_votes(LABELS[None].numpy(), 3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"shape \(B, L, C\), but got \(1, 10\)"):
        dknn_prediction(votes[None])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_another_default_dtype_is_refused_and_changes_no_share(dtype: torch.dtype) -> None:
    torch.set_default_dtype(dtype)
    try:
        with pytest.raises(ValueError, match=f"default dtype to be torch.float32.*{dtype}"):
            check_images(torch.rand(1, 1, 2, 2, dtype=torch.float32))
        assert vote_distribution(torch.tensor([[1, 2]])).dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_another_default_device_is_refused() -> None:
    with torch.device("meta"), pytest.raises(ValueError, match="default device to be the CPU, but got meta"):
        check_images(torch.rand(1, 1, 2, 2, device="cpu"))
    with pytest.raises(ValueError, match="on the meta device"):
        check_images(torch.rand(1, 1, 2, 2, device="meta"))


@pytest.mark.parametrize("distortion", [l2_distortion, linf_distortion])
@pytest.mark.parametrize(
    ("images", "adversarial"),
    [
        (torch.zeros(2, 1, 2, 2), torch.ones(2, 3, 2, 2)),
        (torch.zeros(1, 3, 2, 2), torch.ones(2, 3, 2, 2)),
        (torch.zeros(2, 3, 2, 2).byte(), torch.ones(2, 3, 2, 2).byte()),
    ],
)
def test_distances_of_other_shapes_or_bytes_are_refused(
    distortion: Any, images: Any, adversarial: Any
) -> None:
    with pytest.raises(ValueError, match="of one shape, but got"):
        distortion(images, adversarial)
