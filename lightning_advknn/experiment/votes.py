"""The kNN votes that a surrogate learns from, and the features that it reads."""

from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor

from lightning_advknn.experiment.device import arithmetic
from lightning_advknn.experiment.networks import Networks
from lightning_advknn.experiment.settings import ORIGIN
from lightning_advknn.functional import float32_arithmetic
from lightning_advknn.models import FeatureNetwork
from lightning_advknn.ranks import Ranks
from lightning_advknn.search.bank import MemoryBank
from lightning_advknn.search.build import BankSettings, build_banks
from lightning_advknn.search.index_settings import describe_index
from lightning_advknn.search.queries import together
from lightning_advknn.storage import digest


class ImitatedKNN:
    """The kNN that a surrogate imitates, on the surrogate's layer; several surrogates may share one.

    Args:
        networks: Among them the surrogate, and the trained backbone.
        name: The surrogate's.
        ranks: All of them build the bank, at the same time.
    """

    def __init__(self, networks: Networks, name: str, ranks: Ranks) -> None:
        self.networks, self.ranks = networks, ranks
        self.module = networks.surrogate_module(name)
        self.network = FeatureNetwork(networks.backbone().network, [self.module.layer])
        self._bank: MemoryBank | None = None

    @property
    def key(self) -> str:
        """Hash of all that its votes on the data depend on."""
        module, rows = self.module, len(self.networks.data.split("train"))
        index = describe_index(module.backend, rows, module.index)
        known = [self.networks.key(ORIGIN), module.layer, module.k, module.metric, index]
        return digest([*known, arithmetic(self.networks.device)])

    def prepare(self) -> None:
        """Build the bank, on all ranks at the same time."""
        if self._bank is not None:
            return
        module, data = self.module, self.networks.data
        with self.ranks.group("the bank of a surrogate", self.networks.device):
            how = BankSettings(module.metric, module.backend, module.index)
            batches = data.loader("train", self.networks.device)
            banks = build_banks(self.network, batches, data.num_classes, how, over_ranks=self.ranks.size > 1)
        self._bank = banks[module.layer]

    def wait(self, what: str) -> None:
        """Wait for all ranks."""
        self.ranks.barrier(what)

    @cached_property
    def features(self) -> dict[str, Tensor]:
        """Features of training and validation images, by split, float32 ``(n, D)``."""
        self.prepare()
        rows, layer = range(len(self.networks.data.split("val"))), self.module.layer
        with torch.no_grad(), float32_arithmetic():
            val = [part[layer] for part in self._features("val", rows)]
        return {"train": self._required().features[:], "val": torch.cat(val)}

    @torch.no_grad()
    @float32_arithmetic()
    def votes(self, split: str, rows: range) -> Tensor:
        """Votes on some images of a split, int64 ``(n, C)``; leave-one-out for training images."""
        bank, k = self._required(), self.module.k
        if split == "train":
            if len(rows) == len(bank):
                return bank.leave_one_out_votes(k)
            return bank.votes(bank.features[rows.start : rows.stop], k, bank.ids[rows.start : rows.stop])
        layer = self.module.layer
        return torch.cat([bank.votes(part[layer], k) for part in together(self._features(split, rows))])

    def _features(self, split: str, rows: range) -> Iterator[dict[str, Tensor]]:
        """Features of some images, batch by batch, in forward passes as for all images of the split."""
        end = 0
        for batch in self.networks.data.loader(split, self.networks.device):
            start, end = end, end + len(batch.ids)
            some = slice(max(rows.start - start, 0), max(min(rows.stop, end) - start, 0))
            if some.start < some.stop:
                features = self.network.features(batch.images.to(self.networks.device))
                yield {layer: each[some] for layer, each in features.items()}

    def _required(self) -> MemoryBank:
        if self._bank is None:
            raise RuntimeError("Internal error: a bank was asked that is not in memory.")
        return self._bank
