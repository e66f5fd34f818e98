"""Banks over ranks, in one process; `test_ranks` has several. What each rank answers; what needs all rows."""

import pytest
import torch

from lightning_advknn.search import Exchange, MemoryBank, ShardedBank, recall
from lightning_advknn.search.sharded import _merge
from tests.search.oracle import both_metrics, brute_force, check


def shard(features, labels, ids, rows, metric="cosine", classes=5):
    own = MemoryBank(features[rows], labels[rows], ids[rows], classes, metric, image_shape=(1, 2, 2))
    return ShardedBank(own, rows, labels, ids, Exchange())


class Together(Exchange):
    """Asks all shards of a bank, one after another, instead of all ranks at once."""

    def __init__(self, shards):
        super().__init__()
        self.shards = shards

    def ask(self, requests):
        ((number, request),) = requests.items()
        distances, rows = zip(*(each.nearest_here(*request) for each in self.shards), strict=True)
        return {number: _merge(torch.cat(distances, 1), torch.cat(rows, 1), request.k)}


@both_metrics
@pytest.mark.parametrize("leave_out", [False, True])
def test_shards_give_the_neighbours_of_all_rows(metric, leave_out):
    # One of the shards has fewer rows than k, and rows tie within and between shards.
    generator = torch.Generator().manual_seed(0)
    features = torch.randint(1, 4, (60, 3), generator=generator).float()
    labels, ids = torch.randint(0, 5, (60,), generator=generator), torch.randperm(60, generator=generator)
    order = torch.randperm(60, generator=generator)
    shards = [shard(features, labels, ids, part.sort().values, metric) for part in order.split([4, 26, 30])]
    bank = shards[0]
    bank.exchange = Together(shards)
    own = torch.arange(60) if leave_out else None
    expected = brute_force(features, features, metric, 7, own=own)
    check(bank, features, 7, *expected, own_ids=ids if leave_out else None)


def test_a_shard_is_asked_like_a_bank():
    features, labels, ids = torch.eye(4), torch.arange(4), torch.tensor([5, 5, 6, 7])
    bank = shard(features, labels, ids, torch.tensor([1, 3]))
    assert (len(bank), bank.num_classes, bank.metric, bank.backend) == (4, 5, "cosine", "auto")
    assert bank.image_shape == (1, 2, 2)
    assert torch.equal(bank.labels, labels)
    assert torch.equal(bank.ids, ids)
    bank.check_k(4)
    with pytest.raises(ValueError, match=r"`k` to be in \[1, 4\] \(the bank's rows\), but got 5"):
        bank.check_k(5)
    with pytest.raises(ValueError, match=r"\[1, 2\] \(the bank's rows less the image's own\), but got 3"):
        bank.search(features, 3, ids)
    with pytest.raises(ValueError, match=r"queries of shape \(B, 4\) as in the bank"):
        bank.votes(features[:, :3], 1)
    with pytest.raises(ValueError, match=r"`own_ids` of shape \(4,\), one for each query, but got \(2,\)"):
        bank.votes(features, 1, ids[:2])
    assert bank.search(features[:0], 2)[1].shape == (0, 2)


@pytest.mark.parametrize(
    "ask",
    [
        lambda bank: bank.features,
        lambda bank: bank.norms,
        lambda bank: bank.nearby(torch.eye(4), 2),
        lambda bank: bank.combine(torch.zeros(1, 1).long(), torch.ones(1, 1).double()),
        lambda bank: bank.of_class(1),
        lambda bank: bank.leave_one_out_votes(1),
        lambda bank: recall(bank, torch.eye(4)[:0], 1),
    ],
)
def test_what_needs_all_rows_is_refused(ask):
    bank = shard(torch.eye(4), torch.arange(4), torch.arange(4), torch.tensor([1, 3]))
    with pytest.raises(ValueError, match=r"all rows on one rank for `\w+`.*Set `victim\.shard` to false"):
        ask(bank)


def test_rows_that_are_not_at_their_place_are_refused():
    features, labels, ids = torch.eye(4), torch.arange(4), torch.arange(4)
    own = MemoryBank(features[:2], labels[:2], ids[:2], 5)
    with pytest.raises(ValueError, match="positions of this rank's 2 rows among all 4"):
        ShardedBank(own, torch.tensor([1, 3]), labels, ids, Exchange())
