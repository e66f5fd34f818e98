"""Queries of several forward passes, searched together."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from lightning_advknn.search.memory_plan import working_bytes

# Queries searched together, if forward passes are smaller. A CPU is as fast on few, and needs less memory.
_TOGETHER = {"cpu": 1, "cuda": 4096}


def together(batches: Iterable[Mapping[str, Tensor]]) -> Iterator[Mapping[str, Tensor]]:
    """Join consecutive batches of features into larger ones where this makes searches faster, which is on a GPU.

    Args:
        batches: Features by layer, float32 ``(n, D)``; each batch stays whole.

    Yields:
        The same rows, in the same order.
    """
    waiting: list[Mapping[str, Tensor]] = []
    for batch in batches:
        waiting.append(batch)
        if (len(waiting) + 1) * _rows(batch) > _most(batch):  # as the next is probably of this size
            yield _joined(waiting)
            waiting = []
    if waiting:
        yield _joined(waiting)


def _rows(batch: Mapping[str, Tensor]) -> int:
    return max(1, *(len(features) for features in batch.values()))


def _most(batch: Mapping[str, Tensor]) -> int:
    """Queries of such features that are searched together."""
    device, width = next(iter(batch.values())).device, sum(each.shape[1] for each in batch.values())
    return min(_TOGETHER[device.type], working_bytes(device) // (16 * width))  # a quarter of it, in float32


def _joined(batches: Sequence[Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
    if len(batches) == 1:
        return batches[0]
    return {layer: torch.cat([batch[layer] for batch in batches]) for layer in batches[0]}
