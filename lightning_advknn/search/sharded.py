"""A bank over several ranks: each searches its own rows for all queries, and the rank that asks merges."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_advknn.functional import count_votes
from lightning_advknn.search.bank import MemoryBank, most_of_one
from lightning_advknn.search.checks import check_k

_WHOLE_ONLY = frozenset(
    {"features", "norms", "as_exact", "combine", "leave_one_out_votes", "nearby", "of_class"}
)  # of a `MemoryBank`: what needs all rows on one rank


class _Request(NamedTuple):
    """A rank's question."""

    queries: Tensor
    k: int
    own_ids: Tensor | None


_Requests = Mapping[int, _Request]
"""Questions by the bank's number; each has at least one query."""


class Exchange:
    """Questions and answers about shared banks, among the ranks of the default process group.

    Ranks may ask different questions about different banks, and different numbers of questions. A question
    waits until every other rank asks one too, or serves. So a rank that has no question, or none left, must
    call `serve`. Questions about several banks at once take one exchange.

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

    def ask(self, requests: _Requests) -> dict[int, tuple[Tensor, Tensor]]:
        """The answers of all ranks, as `MemoryBank.search`, by the bank's number; this rank answers theirs."""
        return self._answer(self._headers(requests), requests)

    def serve(self) -> None:
        """Answer the others' questions until all ranks serve."""
        headers = self._headers({})
        while any(n for header in headers for n, *_ in header):
            self._answer(headers, {})
            headers = self._headers({})

    def _headers(self, requests: _Requests) -> list[list[list[int]]]:
        """Exchange what each rank asks each bank: the number of queries, k, and whether there are own ids."""
        if self._meet:
            self._meet()
        header = [[0, 0, 0] for _ in self._banks]
        for number, (queries, k, own_ids) in requests.items():
            header[number] = [len(queries), k, int(own_ids is not None)]
        mine = torch.tensor(header, device=self._banks[0].labels.device)
        headers = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(headers, mine)
        return [each.tolist() for each in headers]

    def _answer(
        self, headers: Sequence[Sequence[Sequence[int]]], requests: _Requests
    ) -> dict[int, tuple[Tensor, Tensor]]:
        """Answer the ranks' questions, one rank after another; the answers to this rank's own."""
        answers = {}
        for source, header in enumerate(headers):
            if not any(n for n, *_ in header):
                continue
            mine = source == dist.get_rank()
            asked = dict(sorted(requests.items())) if mine else self._room(header)
            self._send(asked, source)
            found = [self._banks[number].nearest_here(*request) for number, request in asked.items()]
            # All numbers in one message: distances as the bits that they are.
            message = torch.cat([column.view(torch.int64).flatten() for each in found for column in each])
            gathered = [torch.empty_like(message) for _ in headers]
            dist.all_gather(gathered, message)
            if mine:
                shapes = [column.shape for each in found for column in each]
                parts = [_unpacked(each, shapes) for each in gathered]
                for place, (number, request) in enumerate(asked.items()):
                    distances, rows = (
                        torch.cat([part[2 * place + i] for part in parts], 1) for i in range(2)
                    )
                    answers[number] = _merge(distances.view(torch.float64), rows, request.k)
        return answers

    def _room(self, header: Sequence[Sequence[int]]) -> _Requests:
        """Another rank's questions, before their queries have come."""
        room = {}
        for number, (n, k, with_ids) in enumerate(header):
            if n:
                bank = self._banks[number]
                own_ids = bank.ids.new_empty(n) if with_ids else None
                room[number] = _Request(torch.empty(n, bank.width, device=bank.labels.device), k, own_ids)
        return room

    @staticmethod
    def _send(requests: _Requests, source: int) -> None:
        """Broadcast queries and ids from a rank; on the others they are filled in."""
        columns = [request.queries for request in requests.values()]
        ids = [request.own_ids for request in requests.values() if request.own_ids is not None]
        for tensors in filter(None, (columns, ids)):
            message = torch.cat([each.flatten() for each in tensors])
            dist.broadcast(message, source)
            if source != dist.get_rank():
                sent = _unpacked(message, [each.shape for each in tensors])
                for into, values in zip(tensors, sent, strict=True):
                    into.copy_(values)


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
        self.number = exchange.add(self)

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
        return _search([self], [queries], k, own_ids)[0]

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


def search_each(
    banks: Mapping[str, Bank], queries: Mapping[str, Tensor], k: int
) -> dict[str, tuple[Tensor, Tensor]]:
    """Search each layer's bank for its queries, as `MemoryBank.search`; over ranks, all in one exchange."""
    found = _search_shared(banks, queries, k)
    return {
        layer: found[layer] if layer in found else bank.search(queries[layer], k)
        for layer, bank in banks.items()
    }


def votes_of_each(banks: Mapping[str, Bank], queries: Mapping[str, Tensor], k: int) -> Tensor:
    """Votes of each layer's bank on its queries, int64 ``(B, L, C)``; over ranks, all in one exchange."""
    found = _search_shared(banks, queries, k)
    return torch.stack(
        [
            count_votes(bank.labels[found[layer][1]], bank.num_classes)
            if layer in found
            else bank.votes(queries[layer], k)
            for layer, bank in banks.items()
        ],
        dim=1,
    )


@torch.no_grad()
def _search_shared(
    banks: Mapping[str, Bank], queries: Mapping[str, Tensor], k: int
) -> dict[str, tuple[Tensor, Tensor]]:
    """What banks over ranks find, by layer; nothing of others."""
    shared = {layer: bank for layer, bank in banks.items() if isinstance(bank, ShardedBank)}
    found = _search(list(shared.values()), [queries[layer] for layer in shared], k)
    return dict(zip(shared, found, strict=True))


def _search(
    banks: Sequence[ShardedBank], queries: Sequence[Tensor], k: int, own_ids: Tensor | None = None
) -> list[tuple[Tensor, Tensor]]:
    """Search banks of one exchange, each for its queries; without queries there is none."""
    for bank, asked in zip(banks, queries, strict=True):
        bank.check_k(k, leave_one_out=own_ids is not None)
        bank.check_queries(asked, own_ids)
    requests = {
        bank.number: _Request(asked, k, own_ids)
        for bank, asked in zip(banks, queries, strict=True)
        if len(asked)
    }
    answers = banks[0].exchange.ask(requests) if requests else {}
    return [
        answers[bank.number]
        if len(asked)
        else (asked.new_empty(0, k, dtype=torch.float64), asked.new_empty(0, k, dtype=torch.int64))
        for bank, asked in zip(banks, queries, strict=True)
    ]


def _unpacked(message: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
    """The tensors of these shapes that a message is made of."""
    parts = torch.split(message, [shape.numel() for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


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
