"""Features like those of layers after a ReLU, made on the device, and the right votes on them."""

from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.gpu.sizes import Sizes
from lightning_advknn.functional import count_votes

CLASSES = 10
_RANK = 64
_PART = 256  # queries of a float64 product


def relu_rows(n: int, width: int, seed: int, device: torch.device) -> Tensor:
    """Rectified rows of low rank with noise, float32 ``(n, D)``."""
    torch.manual_seed(seed)  # also of the GPU
    basis = torch.randn(_RANK, width, device=device)
    factors = torch.randn(n, _RANK, device=device)
    noise = torch.randn(n, width, device=device)
    return (factors @ basis / 8 + 0.3 * noise).relu_()


class Scene(NamedTuple):
    """A bank and queries of one width."""

    device: torch.device
    sizes: Sizes
    bank: Tensor
    """float32 ``(M, D)``."""
    labels: Tensor
    """int64 ``(M,)``."""
    queries: Tensor
    """Near some of the bank's rows, float32 ``(B, D)``."""
    right: Tensor
    """Votes of the first queries by float64 brute force, int64 ``(checked, C)``."""

    @property
    def width(self) -> int:
        """D."""
        return self.bank.shape[1]


def scene(width: int, queries: int, device: torch.device, sizes: Sizes) -> Scene:
    """Make a bank and queries on a device, always the same ones."""
    bank = relu_rows(sizes.rows, width, width, device)
    labels = torch.arange(sizes.rows, device=device) % CLASSES
    near = bank[torch.arange(queries, device=device) * 6 % sizes.rows]
    asked = (near + 0.05 * relu_rows(queries, width, 1, device)).relu_()
    right = right_votes(bank, labels, asked[: sizes.checked], sizes.k)
    return Scene(device, sizes, bank, labels, asked, right)


def right_votes(bank: Tensor, labels: Tensor, queries: Tensor, k: int) -> Tensor:
    """Votes int64 ``(B, C)`` by brute force in float64, by cosine to 12 decimals, then by bank row."""
    lengths = torch.linalg.vector_norm(bank, dim=1, dtype=torch.float64)
    found = []
    for part in torch.split(queries.double(), _PART):
        products = torch.cat([part @ some.double().T for some in torch.split(bank, 8192)], dim=1)
        sizes = part.norm(dim=1, keepdim=True) * lengths
        cosines = torch.where(sizes > 0, products / sizes, 0.0).round(decimals=12)
        nearest = cosines.sort(dim=1, descending=True, stable=True).indices[:, :k]
        found.append(count_votes(labels[nearest], CLASSES))
    return torch.cat(found)


def differing(votes: Tensor, right: Tensor) -> dict[str, int | bool]:
    """How many queries got other votes than the right ones."""
    wrong = int((votes[: len(right)] != right).any(1).sum())
    return {"exact": not wrong, "differing": wrong, "checked": len(right)}
