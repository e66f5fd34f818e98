"""Networks that do not return logits are refused."""

import pytest
from torch import nn

from lightning_advknn.models import FeatureNetwork
from lightning_advknn.modules.checks import check_network


def test_logits_beside_other_things_are_refused():
    class Gives(nn.Module):
        def __init__(self):
            super().__init__()
            self.flat = nn.Flatten()

        def forward(self, images):
            return {"logits": self.flat(images)}

    with pytest.raises(
        ValueError, match=r"logits of shape \(B, 4\), but got a dict\. Let its `forward` return"
    ):
        check_network(FeatureNetwork(Gives(), ["flat"]), (1, 2, 2), 4)
