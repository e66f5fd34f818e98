"""Tensors as they were: small ones as copies, large ones as checksums."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.utils.weak import WeakTensorKeyDictionary

_BLOCK = {"cpu": 2**20, "cuda": 2**26}  # bytes of a partial sum: they fit a CPU's cache, and keep a GPU busy

# Checksums of large tensors after the last attack, so that each attack computes them once.
_checksums = WeakTensorKeyDictionary()


class KeptTensor(NamedTuple):
    """A parameter or buffer, as it was."""

    tensor: Tensor
    memory: Tensor
    """Its memory at that time, also after another tensor is assigned to its ``data``."""
    content: Tensor
    """A copy or a checksum."""
    copied: bool
    requires_grad: bool

    @classmethod
    def keep(cls, tensor: Tensor, copied: bool) -> "KeptTensor":
        """Keep a tensor, with a copy of its content or a checksum."""
        memory = tensor.detach()
        content = memory.clone() if copied else _last_checksum(tensor)
        return cls(tensor, memory, content, copied, tensor.requires_grad)

    def is_unchanged(self) -> bool:
        """Whether the tensor has its former content, bit for bit."""
        now = self.tensor.detach()
        if self.copied:
            return same(now, self.content)
        if not alike(now, self.memory):
            return False
        total = _checksum(now)
        _checksums[self.tensor] = _version(now), total
        return torch.equal(total, self.content)

    def difference(self) -> str:
        """How the tensor has changed, as the end of a sentence; "" if only a checksum is known."""
        now = self.tensor.detach()
        if not alike(now, self.memory):
            return f" to {now.dtype} of shape {tuple(now.shape)} on {now.device}"
        if not self.copied:
            return ""
        gap = (now.double() - self.content.double()).abs().nan_to_num(torch.inf).max().item()
        return f" by up to {gap:.3g}"

    def restore(self) -> bool:
        """Restore the former content; whether that was possible."""
        if not self.is_unchanged():
            with torch.inference_mode():  # in which tensors made in inference mode can be written too
                if self.copied and not same(self.memory, self.content):
                    self.memory.copy_(self.content)
            self.tensor.data = self.memory
        if self.tensor.requires_grad != self.requires_grad:
            self.tensor.requires_grad_(self.requires_grad)
        return self.copied or self.is_unchanged()


def has_content(tensor: Tensor) -> bool:
    """Whether a tensor holds dense values."""
    return not is_lazy(tensor) and not tensor.is_meta and tensor.layout == torch.strided


def same(left: Tensor, right: Tensor) -> bool:
    """Whether tensors are equal, where NaN equals NaN."""
    if not alike(left, right):
        return False
    return torch.equal(left, right) or bool(((left == right) | ((left != left) & (right != right))).all())


def alike(left: Tensor, right: Tensor) -> bool:
    """Whether tensors have the same dtype, shape and device."""
    return (left.dtype, left.shape, left.device) == (right.dtype, right.shape, right.device)


def _last_checksum(tensor: Tensor) -> Tensor:
    """The checksum after the last attack, unless torch has counted a change since; then a new one."""
    version, total = _checksums.get(tensor, (None, None))  # type: ignore[no-untyped-call]
    return total if isinstance(total, Tensor) and version == _version(tensor) else _checksum(tensor.detach())


def _version(tensor: Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), -1 if tensor.is_inference() else tensor._version


@torch.no_grad()
def _checksum(tensor: Tensor) -> Tensor:
    """One int64 for each block of bytes: the sum of its words of 8 bytes, each times an odd number."""
    size = _BLOCK.get(tensor.device.type, _BLOCK["cpu"])
    weights = torch.arange(size // 8, device=tensor.device) * -7046029254386353131 | 1  # 2^64 / golden ratio
    sums = []
    for block in torch.split(tensor.reshape(-1), size // tensor.element_size()):
        octets = (block.clone() if block.data_ptr() % 8 else block).view(torch.uint8)
        if missing := -len(octets) % 8:
            octets = torch.cat([octets, octets.new_zeros(missing)])
        words = octets.view(torch.int64)
        sums.append((words * weights[: len(words)]).sum())
    return torch.stack(sums) if sums else weights[:0]
