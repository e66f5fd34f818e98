"""Checksums of tensors."""

import math

import pytest
import torch

from lightning_advknn.integrity import tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.uint8, torch.bool, torch.bfloat16])
def test_a_checksum_knows_every_byte_and_its_place(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(tensors._BLOCK, "cpu", 64)  # several blocks, the last one not full
    generator = torch.Generator().manual_seed(0)
    for shape, offset in (((7, 11), 0), ((7, 11), 1), ((1,), 0), ((0, 3), 0), ((), 0)):
        whole = torch.randint(2, (100,), generator=generator).to(dtype)
        tensor = whole[offset : offset + math.prod(shape)].view(shape)
        first = tensors._checksum(tensor)
        assert torch.equal(tensors._checksum(tensor.clone()), first)
        for place in range(tensor.numel()):
            changed = tensor.clone()
            changed.view(-1)[place] = 1 - changed.view(-1)[place].float()
            assert not torch.equal(tensors._checksum(changed), first)
    numbers = torch.arange(40).to(dtype) if dtype != torch.bool else torch.arange(40) % 2 == 0
    for left, right in ((0, 1), (0, 39), (3, 20)):
        swapped = numbers.clone()
        swapped[[left, right]] = numbers[[right, left]]
        assert torch.equal(tensors._checksum(swapped), tensors._checksum(numbers)) == torch.equal(
            swapped, numbers
        )
