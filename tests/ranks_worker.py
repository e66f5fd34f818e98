"""What two processes under torchrun do in `test_ranks`: python -m torch.distributed.run ... -m tests.ranks_worker FOLDER."""

import json
import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import attack
from lightning_advknn.experiment.attack_stages import AttackStages
from lightning_advknn.ranks import join
from lightning_advknn.search import Exchange, MemoryBank, ShardedBank
from lightning_advknn.search.sharded import search_each, votes_of_each
from lightning_advknn.training_cli import AdvKNNCLI

K, ROWS, CLASSES = 6, 40, 3
SHARDS = (list(range(3, 40)), [0, 1, 2])  # rows by rank: the second has fewer than k, and the first of all
METRICS = ("cosine", "euclidean")


def points() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Features with many ties, over both shards; labels; ids, of which some are two rows'."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randint(-1, 2, (ROWS, 3), generator=generator).float()
    labels = torch.randint(0, CLASSES, (ROWS,), generator=generator)
    return features, labels, torch.arange(ROWS) // 2 + 100


def questions(rank: int) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    """Queries and their own ids: other ones on each rank, and another number of them."""
    features, _, ids = points()
    if rank:
        return [(features[:7] + 0.5, None)]
    rows = torch.arange(0, ROWS, 3)
    return [(features[:1] * 2, None), (features[rows], ids[rows]), (features[:0], None)]


def search(folder: Path) -> None:
    """Answers of sharded banks, which the ranks ask at the same time."""
    ranks = join(60)
    features, labels, ids = points()
    mine = torch.tensor(SHARDS[ranks.rank])
    found = {}
    with ranks.group("banks", torch.device("cpu")):
        exchange = Exchange(partial(ranks.barrier, "a search"))
        banks = {
            metric: ShardedBank(
                MemoryBank(features[mine], labels[mine], ids[mine], CLASSES, metric),
                mine,
                labels,
                ids,
                exchange,
            )
            for metric in METRICS
        }
        # Each rank begins with the other bank.
        for metric in METRICS[:: -1 if ranks.rank else 1]:
            for number, (queries, own_ids) in enumerate(questions(ranks.rank)):
                distances, rows = banks[metric].search(queries, K, own_ids)
                votes = banks[metric].votes(queries, K, own_ids)
                if own_ids is None:  # both banks, in one exchange with the other rank's one question
                    both = votes_of_each(banks, dict.fromkeys(METRICS, queries), K)
                    assert torch.equal(both[:, METRICS.index(metric)], votes)
                    assert search_each(banks, dict.fromkeys(METRICS, queries), K).keys() == banks.keys()
                found[f"{metric}/{number}"] = [distances.tolist(), rows.tolist(), votes.tolist()]
        exchange.serve()
    (folder / f"found{ranks.rank}.json").write_text(json.dumps(found))


def fit(folder: Path) -> None:
    """A surrogate by Lightning's own DDP, as train.py does."""
    cpu2 = Path(attack.__file__).with_name("configs") / "trainer" / "cpu2.yaml"
    AdvKNNCLI(["fit", f"--config={folder / 'fit.yaml'}", f"--config={cpu2}"])
    dist.destroy_process_group()


def dying(make: Callable[..., dict[str, torch.Tensor]]) -> Callable[..., dict[str, torch.Tensor]]:
    """An attack of which rank 1 dies."""

    def attack_images(stages: AttackStages, *arguments: Any) -> dict[str, torch.Tensor]:
        if stages.judges.ranks.rank:
            os.kill(os.getpid(), signal.SIGKILL)
        return make(stages, *arguments)

    return attack_images


def main(folder: Path) -> None:
    """All of it in one job, as starting Python twice takes longer."""
    search(folder)
    for name in ("two", "shard"):
        assert attack.main(["evaluate", f"--config={folder / name}.yaml", "--timeout=60"]) == 0
    fit(folder)
    (folder / f"done{os.environ['RANK']}").touch()
    AttackStages._attack = dying(AttackStages._attack)  # type: ignore[method-assign]
    attack.main(["evaluate", f"--config={folder / 'dies.yaml'}", "--timeout=60"])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
