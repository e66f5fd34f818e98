"""The picture shows the images, neighbours and verdicts that it should."""

import torch
from torch import nn

from lightning_advknn.classifiers import DkNNClassifier, build_banks
from lightning_advknn.data import Batch
from lightning_advknn.evaluation import Victim, judge, make_rows
from lightning_advknn.models import FeatureNetwork
from lightning_advknn.reports.figures import NEIGHBOURS, neighbours_figure, telling_rows


def test_neighbours_are_those_of_brute_force(device: torch.device) -> None:
    torch.manual_seed(0)
    images, labels = torch.rand(40, 1, 4, 4), torch.arange(40) % 4
    network = FeatureNetwork(nn.Sequential(nn.Flatten(), nn.Linear(16, 4)), ["0", "1"]).eval().to(device)
    batch = Batch(images, labels, torch.arange(40))
    dknn = DkNNClassifier(network, build_banks(network, [batch], 4, "euclidean"), k=3).to(device)
    dknn.calibrate([batch])
    clean, adversarial = torch.rand(2, 1, 4, 4, device=device), torch.rand(2, 1, 4, 4, device=device)
    victim = Victim(dknn, "0")
    rows = make_rows(
        torch.arange(2),
        torch.tensor([1, 2]),
        clean.cpu(),
        adversarial.cpu(),
        *(type(v)(*(c.cpu() for c in v)) for v in (judge(victim, clean), judge(victim, adversarial))),
    )
    figure = neighbours_figure(dknn, "0", images, clean, adversarial, rows, "title")
    axes = [axis for axis in figure.axes if axis.images]
    # Per sample: the clean image and its neighbours, then the adversarial, the difference and its neighbours.
    assert len(axes) == 2 * (2 * (1 + NEIGHBOURS) + 1)
    for sample in range(2):
        block = axes[sample * (3 + 2 * NEIGHBOURS) :]
        for image, shown in (
            (clean[sample], block[: 1 + NEIGHBOURS]),
            (adversarial[sample], [block[1 + NEIGHBOURS], *block[3 + NEIGHBOURS :]]),
        ):
            assert torch.equal(torch.tensor(shown[0].images[0].get_array().data), image[0].cpu())
            order = (images - image.cpu()).flatten(1).double().norm(dim=1).argsort()[:NEIGHBOURS]
            for axis, row in zip(shown[1:], order, strict=False):
                assert torch.equal(torch.tensor(axis.images[0].get_array().data), images[row, 0])
                assert axis.get_title() == f"label {labels[row]}"
        verdict = block[0].get_ylabel()
        assert f"kNN {rows['knn_before'][sample]}, DkNN {rows['dknn_before'][sample]}" in verdict


def test_telling_rows_fool_both_victims_one_a_class_first() -> None:
    rows = {
        "label": torch.tensor([0, 0, 0, 1, 1, 2]),
        "knn_before": torch.tensor([0, 0, 0, 1, 1, 0]),
        "dknn_before": torch.tensor([0, 0, 0, 1, 1, 2]),
        "knn_after": torch.tensor([1, 1, 0, 0, 0, 0]),
        "dknn_after": torch.tensor([1, 1, 1, 0, 0, 0]),
    }
    # Sample 2 fools only DkNN, sample 5 was wrong before.
    assert telling_rows(rows, 2) == [0, 3]
    assert telling_rows(rows, 4) == [0, 3, 1, 4]
    rows["knn_after"] = rows["dknn_after"] = rows["label"]
    assert len(telling_rows(rows, 3)) == 3  # nothing to tell: any will do
