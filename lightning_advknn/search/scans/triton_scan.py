"""The int8 scan on CUDA in one kernel, so that scores are not written to memory."""

import os
from functools import cache

import torch
from torch import Tensor

from lightning_advknn.search.scans.torch_scan import Query, TorchScan

_QUERIES, _ROWS, _WIDTH = 128, 128, 128  # of a block: one program multiplies these, in so many columns a step
_KEPT = 8  # the best rows of a block that a query keeps
_WARPS, _STAGES = 8, 3


class TritonScan(TorchScan):
    """The scan of `TorchScan`, with products, scores and the choice of the best in one Triton kernel.

    The kernel keeps the 8 best of each query's 128 scores with a block of rows: a 16th of the bytes that all
    scores take once, where `TorchScan` writes and reads them about ten times. The n best are among those
    kept, unless one block holds more than 8 of them. This shows, as the least that a block keeps is then
    among the n best. Such queries are scanned by `TorchScan`. Blocks take rows at equal steps through the
    bank, so that rows which are alike by their order are in different blocks. With n at most the number of
    blocks, chance fills a block so in fewer than one query of 100.

    So it finds the same rows as `TorchScan`, other than among equal scores. Scores are equal bit for bit: int8
    products are exact, and the kernel rounds as `torch.addcmul` does on the device. The bounds on rounding
    hold with and without fused multiplications.

    Codes on disk, and scans for more rows than there are blocks, are `TorchScan`'s. `int8` is the precision.
    """

    def _best_in(self, query: Query, rows: slice, n: int) -> tuple[Tensor, Tensor]:
        blocks = -(-(rows.stop - rows.start) // _ROWS)
        if n > blocks or not isinstance(self.codes.values, Tensor):
            return super()._best_in(query, rows, n)
        scores, places = self._kept(query, rows, blocks)  # (B, blocks, _KEPT)
        best, chosen = scores.flatten(1).topk(n, sorted=False)
        indices = places.flatten(1).gather(1, chosen).long()
        full = (scores[:, :, -1] > best.amin(1, keepdim=True)).any(1)
        again = full.nonzero().squeeze(1)
        if len(again):
            part = query._replace(values=query.values[again], left=[term[again] for term in query.left])
            best[again], indices[again] = super()._best_in(part, rows, n)
        return best, indices

    def _kept(self, query: Query, rows: slice, blocks: int) -> tuple[Tensor, Tensor]:
        """The best of each block, float32, and their places among the rows, int32: ``(B, blocks, _KEPT)``."""
        from lightning_advknn.search.scans.triton_kernel import best_of_blocks  # Triton is not everywhere

        values = self.codes.values[rows]
        left = torch.cat(query.left, dim=1).T.contiguous()  # (T, B)
        right = torch.stack([term[rows] for term in self._right])  # (T, M)
        shape = len(query.values), blocks, _KEPT
        scores = torch.empty(shape, device=self.device)
        places = torch.empty(shape, dtype=torch.int32, device=self.device)
        best_of_blocks[(-(-shape[0] // _QUERIES) * blocks,)](
            query.values,
            values,
            self._weights[rows],
            left,
            right,
            scores,
            places,
            len(query.values),
            len(values),
            blocks,
            values.shape[1],
            right.stride(0),
            terms=len(right),
            fused=_fuses(self.device),
            kept=_KEPT,
            block_queries=_QUERIES,
            block_rows=_ROWS,
            block_width=_WIDTH,
            num_warps=_WARPS,
            num_stages=_STAGES,
            enable_fp_fusion=False,  # only where `fused` says so
        )
        return scores, places


def runs_on(device: torch.device) -> bool:
    """Whether the kernel runs on a device: on GPUs with room for its blocks, and in Triton's interpreter."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return True
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


@cache
def _fuses(device: torch.device) -> bool:
    """Whether `addcmul` rounds once here: whether it sees what the product of two float32 lost by rounding."""
    number = torch.full((64, 1), 1 + 2.0**-12, device=device)
    lost = torch.addcmul(-number * number, number, number)
    return bool(lost.any())
