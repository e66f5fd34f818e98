"""Banks whose rows lie on several ranks: each searches its own rows for the queries of all, and the asker merges."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple, NoReturn

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_advknn.functional import count_votes
from lightning_advknn.search.bank import MemoryBank

_SERVING = -1  # in place of a bank: this rank asks nothing


class _Request(NamedTuple):
    """What a rank asks of all."""

    queries: Tensor
    k: int
    own_ids: Tensor | None


class Exchange:
    """Questions and answers among the ranks of the default process group, about the banks that they share.

    Ranks may ask different questions about different banks, and a different number of them: a question waits until every
    other rank asks one too, or serves. So whoever has none, or none left, calls `serve`.

    Args:
        meet: Called before each exchange, to wait for the other ranks in a way that notices their death. Without it, the
            process group's own timeout bounds the time between two of a rank's questions.
    """

    def __init__(self, meet: Callable[[], None] | None = None) -> None:
        self._meet = meet
        self._banks: list[ShardedBank] = []

    def add(self, bank: "ShardedBank") -> int:
        """Take part in the questions about a bank; its number, if all ranks add banks in one order."""
        self._banks.append(bank)
        return len(self._banks) - 1

    def ask(self, bank: int, request: _Request) -> tuple[Tensor, Tensor]:
        """Answer of all ranks, as `MemoryBank.search`, while this one answers theirs; a question of at least one query."""
        answer = self._answer(self._headers(bank, request), request)
        if answer is None:
            raise RuntimeError("Expected a rank that asks to be answered, but it was not: this is a bug.")
        return answer

    def serve(self) -> None:
        """Answer the others' questions until all ranks serve."""
        while True:
            headers = self._headers(_SERVING, None)
            if all(number == _SERVING for number, *_ in headers):
                return
            self._answer(headers, None)

    def _headers(self, bank: int, request: _Request | None) -> list[list[int]]:
        """What each rank asks: which bank, how many queries, k, whether with their own ids; and tell them what this one asks."""
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
        """Answer what each rank asks, one after another; the answer to this one's own question."""
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
                answer = merge(torch.cat(parts[0], 1), torch.cat(parts[1], 1), k)
        return answer


class ShardedBank(MemoryBank):
    """A bank of which each rank of the default process group has some rows, and whose neighbours are those among all.

    Neighbours, their order and votes are those of a `MemoryBank` on all rows: each rank finds its k nearest exactly (all that it
    has, if these are fewer), and of all ranks' the k nearest by (distance, bank row) are the answer. `labels` and `ids` are
    those of all rows on every rank; there are no `features`, so attacks that read them cannot have this victim.

    `search` and `votes` are exchanges among all ranks: see `Exchange` for what that asks of them.

    Args:
        own: The rows that this rank has, in order.
        rows: Which of all rows these are, int64 ``(n,)``, ascending.
        labels: Of all rows, int64 ``(M,)``.
        ids: Image ids of all rows, int64 ``(M,)``.
        exchange: That of all banks of these ranks.

    Raises:
        ValueError: If shapes disagree.
    """

    def __init__(
        self, own: MemoryBank, rows: Tensor, labels: Tensor, ids: Tensor, exchange: Exchange
    ) -> None:
        nn.Module.__init__(self)  # no features of its own
        if len(own) != len(rows) or len(labels) != len(ids) or not torch.equal(own.ids, ids[rows]):
            raise ValueError(
                f"Expected `rows` to say which of {len(ids)} rows the {len(own)} own ones are, but the image ids at these"
                " places are others."
            )
        self.own = own
        self.num_classes, self.metric, self.backend = own.num_classes, own.metric, own.backend
        self.width: int = own.features.shape[1]
        self._most_of_one = max(Counter(ids.tolist()).values())
        for name, buffer in {"rows": rows, "labels": labels, "ids": ids}.items():
            self.register_buffer(name, buffer, persistent=False)
        self.rows: Tensor
        self.exchange = exchange
        self._number = exchange.add(self)

    def __len__(self) -> int:
        return len(self.labels)

    @torch.no_grad()
    def search(self, queries: Tensor, k: int, own_ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As `MemoryBank.search`, by an exchange among all ranks if there are queries."""
        self.check_k(k, leave_one_out=own_ids is not None)
        self.own.check_queries(queries)
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
        """The k nearest of this rank's rows, as `MemoryBank.search`; filled up by rows at infinity that there are not."""
        # Rows of the queries' own images are found and then left out: there may be none of them here.
        n = min(len(self.own), k if own_ids is None else k + self._most_of_one)
        distances, indices = self.own.search(queries, n)
        if own_ids is not None:
            distances = distances.masked_fill(self.own.ids[indices] == own_ids[:, None], torch.inf)
        found = self.rows[indices].masked_fill(distances.isposinf(), len(self))
        missing = max(0, k - n)
        return merge(
            F.pad(distances, (0, missing), value=torch.inf), F.pad(found, (0, missing), value=len(self)), k
        )

    def leave_one_out_votes(self, k: int) -> NoReturn:
        """Not of rows that lie elsewhere: ask `votes` with `own_ids`."""
        self._refuse("`leave_one_out_votes`")

    def of_class(self, label: int) -> NoReturn:
        """Not of rows that lie elsewhere."""
        self._refuse("banks of one class")

    def nearby(self, queries: Tensor, n: int) -> NoReturn:
        """Not of rows that lie elsewhere."""
        self._refuse("`nearby`")

    def combine(self, rows: Tensor, weights: Tensor) -> NoReturn:
        """Not of rows that lie elsewhere."""
        self._refuse("sums of rows")

    def _refuse(self, what: str) -> NoReturn:
        raise ValueError(f"Expected a bank that is on one rank for {what}, but its rows lie on several.")


def merge(distances: Tensor, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k nearest of candidates, by (distance, row): distances float64 ``(B, n)`` and rows int64 ``(B, n)`` to ``(B, k)`` each."""
    rows, order = rows.sort(dim=1)
    distances, nearest = distances.gather(1, order).sort(dim=1, stable=True)
    return distances[:, :k].contiguous(), rows.gather(1, nearest)[:, :k].contiguous()
