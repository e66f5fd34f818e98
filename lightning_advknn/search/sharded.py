"""A bank over several ranks: each searches its own rows for all queries, and the rank that asks merges."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_advknn.functional import count_votes
from lightning_advknn.search.bank import MemoryBank, most_of_one
from lightning_advknn.search.checks import check_k

_SERVING = -1  # instead of a bank's number: this rank asks nothing
_WHOLE_ONLY = frozenset(
    {"features", "norms", "as_exact", "combine", "leave_one_out_votes", "nearby", "of_class"}
)  # of a `MemoryBank`: what needs all rows on one rank


class _Request(NamedTuple):
    """A rank's question."""

    queries: Tensor
    k: int
    own_ids: Tensor | None


class Exchange:
    """Questions and answers about shared banks, among the ranks of the default process group.

    Ranks may ask different questions about different banks, and different numbers of questions. A question
    waits until every other rank asks one too, or serves. So a rank that has no question, or none left, must
    call `serve`.

    Args:
        meet: Called before each exchange; it waits for the other ranks and notices if one has died. Without
            it, the process group's timeout limits the time between two questions of a rank.
    """

    def __init__(self, meet: Callable[[], None] | None = None) -> None:
        self._meet = meet
        self._banks: list[ShardedBank] = []

    def add(self, bank: "ShardedBank") -> int:
        """Take part in questions about a bank. Its number is the same on ranks that add banks alike."""
        self._banks.append(bank)
        return len(self._banks) - 1

    def ask(self, bank: int, request: _Request) -> tuple[Tensor, Tensor]:
        """The answer of all ranks to at least one query, as `MemoryBank.search`; this rank answers theirs."""
        answer = self._answer(self._headers(bank, request), request)
        if answer is None:
            raise RuntimeError("Internal error: this rank's query got no answer.")
        return answer

    def serve(self) -> None:
        """Answer the others' questions until all ranks serve."""
        while True:
            headers = self._headers(_SERVING, None)
            if all(number == _SERVING for number, *_ in headers):
                return
            self._answer(headers, None)

    def _headers(self, bank: int, request: _Request | None) -> list[list[int]]:
        """Exchange what each rank asks: the bank, the number of queries, k, and whether there are own ids."""
        if self._meet:
            self._meet()
        header = [bank, 0, 0, 0]
        if request is not None:
            header[1:] = len(request.queries), request.k, int(request.own_ids is not None)
        mine = torch.tensor(header, device=self._banks[0].labels.device)
        headers = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(headers, mine)
        return [each.tolist() for each in headers]

    def _answer(
        self, headers: Sequence[Sequence[int]], request: _Request | None
    ) -> tuple[Tensor, Tensor] | None:
        """Answer the ranks' questions, one after another; the answer to this rank's own, if it has one."""
        answer = None
        for source, (number, n, k, with_ids) in enumerate(headers):
            if number == _SERVING:
                continue
            bank, mine = self._banks[number], source == dist.get_rank()
            if mine and request is not None:
                asked = request._replace(queries=request.queries.contiguous())
            else:
                device = bank.labels.device
                own_ids = torch.empty(n, dtype=torch.int64, device=device) if with_ids else None
                asked = _Request(torch.empty(n, bank.width, device=device), k, own_ids)
            dist.broadcast(asked.queries, source)
            if asked.own_ids is not None:
                dist.broadcast(asked.own_ids, source)
            found = bank.nearest_here(*asked)
            parts = [[torch.empty_like(column) for _ in headers] for column in found]
            for column, gathered in zip(found, parts, strict=True):
                dist.all_gather(gathered, column)
            if mine:
                answer = _merge(torch.cat(parts[0], 1), torch.cat(parts[1], 1), k)
        return answer


class ShardedBank(nn.Module):
    """A bank whose rows are spread over the ranks of the default process group.

    Neighbours, their order and votes are those of a `MemoryBank` on all rows. Each rank finds the k nearest
    of its own rows exactly (all of them, if it has fewer). The k nearest of these by (distance, bank row) are
    the answer. Every rank has `labels` and `ids` of all rows, but features of its own only.

    `search` and `votes` are exchanges among all ranks; `Exchange` says what each rank must do.

    Args:
        own: The rows of this rank, in order.
        rows: Their bank rows, int64 ``(n,)``, ascending.
        labels: Of all rows, int64 ``(M,)``.
        ids: Image ids of all rows, int64 ``(M,)``.
        exchange: The one of all banks of these ranks.

    Raises:
        ValueError: If shapes disagree; and when an attribute of `MemoryBank` is asked for that needs all
            rows.
    """

    labels: Tensor
    ids: Tensor
    rows: Tensor

    def __init__(
        self, own: MemoryBank, rows: Tensor, labels: Tensor, ids: Tensor, exchange: Exchange
    ) -> None:
        super().__init__()
        if len(own) != len(rows) or len(labels) != len(ids) or not torch.equal(own.ids, ids[rows]):
            raise ValueError(
                f"Expected `rows` to be the positions of this rank's {len(own)} rows among all {len(ids)},"
                " but the image ids there differ from its own. Pass the positions its rows were taken from."
            )
        self.own = own
        self.num_classes, self.metric = own.num_classes, own.metric
        self.backend, self.index = own.backend, own.index
        self.image_shape = own.image_shape
        self.width: int = own.features.shape[1]
        self._most_of_one = most_of_one(ids)
        for name, buffer in {"rows": rows, "labels": labels, "ids": ids}.items():
            self.register_buffer(name, buffer, persistent=False)
        self.exchange = exchange
        self._number = exchange.add(self)

    def __len__(self) -> int:
        return len(self.labels)

    def __getattr__(self, name: str) -> Any:  # only for names that are not there
        if name in _WHOLE_ONLY:
            raise ValueError(
                f"Expected a bank with all rows on one rank for `{name}`, but its rows are spread over"
                " several. Set `victim.shard` to false."
            )
        return super().__getattr__(name)

    def check_k(self, k: int, leave_one_out: bool = False) -> None:
        """As `MemoryBank.check_k`, for all rows."""
        check_k(k, len(self), self._most_of_one if leave_one_out else 0)

    def check_queries(self, queries: Tensor, own_ids: Tensor | None = None) -> None:
        """As `MemoryBank.check_queries`."""
        self.own.check_queries(queries, own_ids)

    @torch.no_grad()
    def search(self, queries: Tensor, k: int, own_ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As `MemoryBank.search`, by an exchange among all ranks if there are queries."""
        self.check_k(k, leave_one_out=own_ids is not None)
        self.check_queries(queries, own_ids)
        if not len(queries):
            empty = queries.new_empty(0, k, dtype=torch.float64)
            return empty, empty.long()
        return self.exchange.ask(self._number, _Request(queries, k, own_ids))

    @torch.no_grad()
    def votes(self, queries: Tensor, k: int, own_ids: Tensor | None = None) -> Tensor:
        """As `MemoryBank.votes`, by an exchange among all ranks if there are queries."""
        return count_votes(self.labels[self.search(queries, k, own_ids)[1]], self.num_classes)

    @torch.no_grad()
    def nearest_here(self, queries: Tensor, k: int, own_ids: Tensor | None) -> tuple[Tensor, Tensor]:
        """The k nearest of this rank's rows, as `MemoryBank.search`, padded with row M at infinity."""
        # Rows of a query's own image are found and then removed, as this rank may have none of them.
        n = min(len(self.own), k if own_ids is None else k + self._most_of_one)
        distances, indices = self.own.search(queries, n)
        if own_ids is not None:
            distances = distances.masked_fill(self.own.ids[indices] == own_ids[:, None], torch.inf)
        found = self.rows[indices].masked_fill(distances.isposinf(), len(self))
        missing = max(0, k - n)
        return _merge(
            F.pad(distances, (0, missing), value=torch.inf), F.pad(found, (0, missing), value=len(self)), k
        )


Bank = MemoryBank | ShardedBank
"""What a kNN asks: both have the same `search`, `votes`, checks and labels."""


def _merge(distances: Tensor, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k nearest of candidates, by (distance, row).

    Args:
        distances: float64 ``(B, n)``.
        rows: int64 ``(B, n)``.
        k: At most n.

    Returns:
        Distances float64 ``(B, k)`` and rows int64 ``(B, k)``.
    """
    rows, order = rows.sort(dim=1)
    distances, nearest = distances.gather(1, order).sort(dim=1, stable=True)
    return distances[:, :k].contiguous(), rows.gather(1, nearest)[:, :k].contiguous()
