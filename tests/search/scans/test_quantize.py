"""Codes: what they lose, and where int8 is fast and exact."""

import pytest
import torch

from lightning_advknn.search.scans import quantize
from tests.search.oracle import make_bank


@pytest.mark.parametrize("precision", ["int8", "bfloat16"])
@pytest.mark.parametrize(
    "kind", ["normal", "rectified", "outlier", "one and tiny ones", "negative", "constant"]
)
def test_residuals_hold_what_codes_lose(device, precision, kind):
    rows = torch.randn(5, 2**14, generator=torch.Generator().manual_seed(32))
    if kind == "rectified":
        rows = rows.relu()
    if kind == "outlier":
        rows[:, 0] = 1e6
    if kind == "one and tiny ones":  # a level is 1: each of these is lost, and float32 forgets it beside 128
        rows = torch.full_like(rows, 2.0**-18)
        rows[:, 0] = 255
    if kind == "negative":
        rows = -rows.abs()
    if kind == "constant":
        rows[:] = 1 / 3
    norms = rows.double().norm(dim=1).to(device)
    found = quantize.encode(rows.to(device), norms, precision)
    decoded = found.scale[:, None] * (found.values[:].double() - found.zero[:, None])
    assert ((decoded.cpu() - rows.double()).norm(dim=1) <= found.residual.cpu()).all()
    assert (found.sums == (found.values[:].sum(1) if precision == "int8" else 0)).all()


def test_auto_takes_float32_for_narrow_features_and_the_fastest_for_wide_ones(monkeypatch):
    monkeypatch.setattr("torch.cpu._is_vnni_supported", lambda: True)
    monkeypatch.setattr("lightning_advknn.search.scans.quantize._int8_is_exact", lambda device: True)
    assert make_bank(torch.ones(3, 10), "cosine")._scanner().precision == "float32"
    assert make_bank(torch.ones(3, 1152), "cosine")._scanner().precision == "int8"
    monkeypatch.setattr("torch.cpu._is_vnni_supported", lambda: False)
    assert make_bank(torch.ones(3, 1152), "cosine")._scanner().precision == "float32"


def test_int8_has_a_greatest_width(monkeypatch):
    monkeypatch.setattr("torch.cpu._is_vnni_supported", lambda: True)
    monkeypatch.setattr("lightning_advknn.search.scans.quantize._int8_is_exact", lambda device: True)
    wide = torch.ones(2, 2**16 + 1)
    assert make_bank(wide, "cosine")._scanner().precision == "float32"
    with pytest.raises(ValueError, match=r"at most 65536 features for `backend='int8'`, but got 65537"):
        make_bank(wide, "cosine", "int8").votes(wide, 1)


def test_int8_products_are_exact_at_their_greatest_width(device):
    # Processors without an instruction for int8 sum pairs of products in 16 bits, which 127 x 127 overflows.
    extremes = torch.tensor([127, -128], dtype=torch.int8, device=device).repeat(9)[:, None]
    values = extremes.expand(18, 2**16).contiguous()
    assert torch.equal(quantize.products(values, values), 2**16 * extremes.int() * extremes.int().T)


@pytest.mark.parametrize(
    ("capability", "precision"), [((7, 0), "float32"), ((7, 5), "int8"), ((9, 0), "int8")]
)
def test_a_gpu_is_fastest_in_int8_if_it_has_tensor_cores_for_it(monkeypatch, capability, precision):
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: capability)
    monkeypatch.setattr("lightning_advknn.search.scans.quantize._int8_is_exact", lambda device: True)
    assert quantize.fastest(torch.device("cuda"), 1152) == precision


@pytest.fixture
def unknown_int8():
    """Nothing is known yet of the device's products, nor afterwards."""
    quantize._int8_is_exact.cache_clear()
    yield
    quantize._int8_is_exact.cache_clear()


@pytest.mark.parametrize("works", [True, False])
def test_int8_is_refused_where_it_overflows(monkeypatch, unknown_int8, works):
    def saturating(left, right):  # as oneDNN without VNNI: pairs of products in 16 bits
        if not works:
            raise RuntimeError("not implemented")
        pairs = (left.int()[:, None] * right.T.int()).unflatten(2, (-1, 2)).sum(3)
        return pairs.clamp(-(2**15), 2**15 - 1).sum(2).int()

    monkeypatch.setattr("torch.cpu._is_vnni_supported", lambda: True)
    monkeypatch.setattr("torch._int_mm", saturating)
    wide = torch.ones(3, 1152)
    assert make_bank(wide, "cosine")._scanner().precision == "float32"
    with pytest.raises(ValueError, match="Expected exact int8 products for `backend='int8'`"):
        make_bank(wide, "cosine", "int8").votes(wide, 1)
