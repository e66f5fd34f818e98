"""Rows and metrics against hand-made rows and reductions in plain Python."""

import math
import random
import re
from statistics import fmean

import pytest
import torch

from lightning_advknn import evaluation
from lightning_advknn.attacks import bim
from lightning_advknn.classifiers import DkNN
from lightning_advknn.data import Batch
from lightning_advknn.evaluation import _AttackMetrics, summarize
from lightning_advknn.models import ConvNet, FeatureNetwork

# Of `hand_dknn`; votes and the true-class votes of calibration are worked out in test_classifiers.py.
# k = 3, L = 2, C = 3; calibration votes (2, 2), (1, 1), (1, 1).
#
# point     votes: both, height   knn on both   DkNN: sums     credibility, strict: on both   of both layers
# (0, .1)   (2 1 0) (2 1 0)       0             (4 2 0): 0     2 > 1 1: 2/3                   4 > 2 2: 2/3
# (1, .9)   (0 1 2) (0 1 2)       2             (0 2 4): 2     2 > 1 1: 2/3                   4 > 2 2: 2/3
# (.5, .5)  (1 1 1) (2 1 0)       0             (3 2 1): 0     1 > none: 0                    3 > 2 2: 2/3
# The network says 0 below y = .5 and 2 above; at .5 its logits tie, so nothing is claimed there.
POINTS = [(0, 0.1), (1, 0.9), (0.5, 0.5)]
VOTES = [[[2, 1, 0], [2, 1, 0]], [[0, 1, 2], [0, 1, 2]], [[1, 1, 1], [2, 1, 0]]]


@pytest.fixture
def victim(hand_dknn):
    calibration = torch.tensor(POINTS)[:, None, None].float()
    return hand_dknn.calibrate([Batch(calibration, torch.tensor([0, 1, 1]), torch.arange(3))])


def points(device):
    return torch.tensor(POINTS, device=device)[:, None, None].float()


def column(values, device="cpu", dtype=torch.int64):
    return torch.tensor(values, device=device, dtype=dtype)


@pytest.mark.parametrize("batch_size", [1, 2, 500])
def test_judge_by_hand(victim, device, batch_size):
    verdicts = evaluation.judge(victim, "both", points(device), batch_size)
    assert verdicts.dnn[:2].tolist() == [0, 2]
    assert verdicts.knn.tolist() == [0, 2, 0]
    assert verdicts.dknn.tolist() == [0, 2, 0]
    assert verdicts.votes.tolist() == VOTES
    assert verdicts.knn_credibility.tolist() == pytest.approx([2 / 3, 2 / 3, 0])
    assert verdicts.dknn_credibility.tolist() == pytest.approx([2 / 3, 2 / 3, 2 / 3])


def test_observe_is_what_decide_needs(victim, device):
    dnn, votes = evaluation.observe(victim, points(device), batch_size=2)
    assert not votes.requires_grad
    assert votes.tolist() == VOTES
    verdicts = evaluation.decide(dnn, votes, 1, column([[2, 2], [1, 1], [1, 1]], device), "ge")
    assert verdicts.dnn is dnn
    assert verdicts.knn.tolist() == [0, 2, 0]  # on height: (2 1 0), (0 1 2), (2 1 0)
    assert verdicts.knn_credibility.tolist() == [1, 1, 1]
    assert verdicts.dknn_credibility.tolist() == pytest.approx([1, 1, 2 / 3])


@pytest.mark.parametrize(("together", "searches"), [(1, [1] * 5), (2, [2, 2, 1]), (9, [5])])
def test_forward_passes_are_searched_together(victim, device, monkeypatch, together, searches):
    monkeypatch.setattr("lightning_advknn.search.queries._TOGETHER", {"cpu": together, "cuda": together})
    images, asked, votes = points(device)[[0, 1, 2, 1, 0]], [], victim.votes

    def counted(features):
        asked.append(len(features["both"]))
        return votes(features)

    monkeypatch.setattr(victim, "votes", counted)
    found = evaluation.observe(victim, images, batch_size=1)
    assert asked == searches
    assert found[0][[0, 1, 3, 4]].tolist() == [0, 2, 2, 0]
    assert found[1].tolist() == [VOTES[row] for row in (0, 1, 2, 1, 0)]
    # Some of them, in the same forward passes of 2: images 1 to 3.
    dnn, few = evaluation.observe(victim, images, batch_size=2, rows=range(1, 4))
    assert torch.equal(dnn, found[0][1:4])
    assert torch.equal(few, found[1][1:4])


def test_the_knn_is_judged_on_its_own_layer_alone(device):
    # Layer 0 says class 1, layer 1 says class 0 by more; calibration differs by layer too.
    votes = column([[[1, 2, 0], [3, 0, 0]]], device)
    calibration = column([[0, 3], [1, 3], [3, 3]], device)
    first = evaluation.decide(column([2], device), votes, 0, calibration, "strict")
    second = evaluation.decide(column([2], device), votes, 1, calibration, "strict")
    assert (first.knn.item(), second.knn.item()) == (1, 0)
    assert (first.dknn.item(), second.dknn.item()) == (0, 0)
    assert first.knn_credibility.item() == pytest.approx(2 / 3)  # 2 > 0, 1
    assert second.knn_credibility.item() == 0  # 3 > none
    assert first.dknn_credibility.item() == pytest.approx(1 / 3)  # 4 > 3


@pytest.mark.parametrize("value", [math.nan, -0.1, 1.1])
def test_images_out_of_range_are_not_judged(victim, device, value):
    images = points(device)
    images[1, 0, 0, 1] = value
    with pytest.raises(ValueError, match=r"Expected finite images in \[0, 1\]"):
        evaluation.judge(victim, "both", images)


def test_judging_on_an_unknown_layer(victim, device):
    with pytest.raises(ValueError, match=r"`layer` to be one of \['both', 'height'\], but got 'relu3'"):
        evaluation.judge(victim, "relu3", points(device))


@pytest.fixture(params=[1, 2, 3, 7])
def batch_size(request, monkeypatch):
    """Images that `perturb` attacks at once."""
    monkeypatch.setattr(evaluation, "CPU_BATCH", request.param)
    monkeypatch.setattr(evaluation, "GPU_BATCH", request.param)
    return request.param


def test_perturb_attacks_every_image_with_its_label(device, batch_size):
    seen = []

    def attack(logits_fn, images, labels):
        seen.append(len(images))
        return (images + 0.1 * labels[:, None, None, None]).double()

    images = torch.zeros(5, 1, 2, 2, device=device)
    labels = torch.arange(5, device=device)
    adversarial = evaluation.perturb(attack, lambda images: images, images, labels)
    assert adversarial.dtype == torch.float32
    assert adversarial[:, 0, 0, 0].tolist() == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    # The last batch is filled up.
    assert seen == {1: [1] * 5, 2: [2, 2, 2], 3: [3, 3], 7: [7]}[batch_size]


def test_perturb_fills_batches_up_to_a_given_size(device):
    seen = []

    def attack(logits_fn, images, labels):
        seen.append(images[:, 0, 0, 0].tolist())
        return images

    images = torch.arange(5, device=device).view(5, 1, 1, 1) / 8
    labels = torch.zeros(5, dtype=torch.int64, device=device)
    adversarial = evaluation.perturb(attack, lambda images: images, images, labels, batch_size=3)
    assert torch.equal(adversarial, images)
    assert seen == [[0, 0.125, 0.25], [0.375, 0.5, 0]]


def test_rows_come_to_the_cpu_as_they_are(device):
    rows = {
        "id": torch.arange(5),
        "right": torch.tensor([True, False, True, True, False]),
        "l2": torch.tensor([0.1, torch.inf, -0.0, 1e-45, 3]),
        "votes": torch.arange(30).view(5, 2, 3) - 7,
        "wrong": torch.tensor([False, False, True, False, False]),
        "credibility": torch.rand(5, dtype=torch.float64),
    }
    for n in (5, 1, 0):
        found = evaluation.on_cpu({name: column[:n].to(device) for name, column in rows.items()})
        assert list(found) == list(rows)
        for name, column in rows.items():
            assert (found[name].dtype, found[name].device.type) == (column.dtype, "cpu")
            assert torch.equal(found[name], column[:n])


@pytest.mark.usefixtures("batch_size")
def test_perturb_of_no_images(device):
    images, labels = torch.zeros(0, 1, 2, 2, device=device), torch.zeros(0, dtype=torch.int64, device=device)
    assert evaluation.perturb(lambda f, x, y: x, lambda x: x, images, labels).shape == (0, 1, 2, 2)


@pytest.mark.parametrize("precision", ["float32", "winograd"])
def test_perturb_to_the_bit_whatever_else_is_attacked(precision):
    # On CPU: cuDNN may add up in any order.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = ConvNet(mean=(0.13,), std=(0.31,))
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(70, 1, 28, 28, generator=generator)
    labels = torch.randint(10, (70,), generator=generator)

    def attack(logits_fn, images, labels):
        return bim(logits_fn, images, labels, eps=0.2, step_size=0.02, steps=4)

    together = evaluation.perturb(attack, network, images, labels, precision)
    order = torch.randperm(70, generator=generator)
    for rows in (order[:1], order[:7], order):
        adversarial = evaluation.perturb(attack, network, images[rows], labels[rows], precision)
        assert torch.equal(adversarial, together[rows])


@pytest.mark.parametrize(
    ("attack", "message"),
    [
        (lambda f, x, y: x[..., :1], r"'mine'.* shape \(64, 1, 1, 2\), but got shape \(64, 1, 1, 1\)"),
        (lambda f, x, y: x[:-1], r"'mine'.* shape \(64, 1, 1, 2\), but got shape \(63, 1, 1, 2\)"),
        (lambda f, x, y: x + 1, r"'mine' to return finite images in \[0, 1\], but got values in \[1"),
        (lambda f, x, y: x + 2e-6, r"'mine' to return finite images in \[0, 1\]"),
        (lambda f, x, y: x * math.nan, r"'mine' to return finite images in \[0, 1\].*nan"),
        (lambda f, x, y: x.numpy(), r"'mine' .*got a numpy.ndarray"),
        (lambda f, x, y: (x, y), r"'mine' .*got a tuple"),
        (lambda f, x, y: None, r"'mine' .*got a NoneType"),
        (lambda f, x, y: (255 * x).byte(), r"'mine' .*got torch.uint8.*255"),
        (lambda f, x, y: 1 / 0, r"'mine' failed: ZeroDivisionError: division by zero"),
    ],
)
def test_perturb_refuses_what_is_no_image(attack, message):
    with pytest.raises(ValueError, match=message):
        evaluation.perturb(attack, lambda images: images, points("cpu"), column([0, 1, 2]), name="mine")


def test_predict_is_the_highest_logit(device):
    logits = torch.tensor([[0.0, 2, 1], [3, 0, 1], [0, 0, 9]], device=device)
    for batch_size in (1, 2, 500):
        assert evaluation.predict(lambda rows: rows, logits, batch_size).tolist() == [1, 0, 2]


def test_make_rows_puts_before_and_after_side_by_side(victim, device):
    images = points(device)
    adversarial = images.flip(0)
    before, after = evaluation.judge(victim, "both", images), evaluation.judge(victim, "both", adversarial)

    ids, labels = column([7, 8, 9], device), column([0, 2, 1], device)
    classes = column([0, 1, 0], device), column([1, 1, 0], device)
    rows = evaluation.make_rows(ids, labels, images, adversarial, before, after, classes)
    plain = evaluation.make_rows(ids, labels, images, adversarial, before, after)
    assert set(rows) - set(plain) == {"surrogate_before", "surrogate_after"}
    assert rows["surrogate_before"].tolist() == [0, 1, 0]
    assert rows["surrogate_after"].tolist() == [1, 1, 0]
    assert rows["id"].tolist() == [7, 8, 9]
    assert rows["label"].tolist() == [0, 2, 1]
    # (0, .1) and (.5, .5) swap, (1, .9) stays.
    assert rows["l2"].tolist() == pytest.approx([math.sqrt(0.25 + 0.16), 0, math.sqrt(0.25 + 0.16)])
    assert rows["linf"].tolist() == pytest.approx([0.5, 0, 0.5])
    for name in ("knn", "dknn", "votes", "knn_credibility", "dknn_credibility"):
        assert rows[f"{name}_before"].tolist() == rows[f"{name}_after"].flip(0).tolist()
    assert rows["votes_before"].tolist() == VOTES
    assert rows["knn_credibility_after"].tolist() == pytest.approx([0, 2 / 3, 2 / 3])


def test_concatenate_joins_columns(device):
    first = {"id": column([1, 2], device), "votes": column([[[1]], [[2]]], device)}
    second = {"id": column([3], device), "votes": column([[[3]]], device)}
    rows = evaluation.concatenate([first, second])
    assert rows["id"].tolist() == [1, 2, 3]
    assert rows["votes"].tolist() == [[[1]], [[2]], [[3]]]


# Metrics

HAND = {
    "id": [0, 1, 2, 3],
    "label": [0, 1, 2, 0],
    "dnn_after": [0, 0, 0, 0],  #   right, wrong, wrong, right
    "knn_after": [1, 1, 2, 0],  #   wrong, right, right, right
    "dknn_after": [1, 0, 0, 1],  #  all wrong
    "l2": [1.0, 2.0, 4.0, 0.5],
    "linf": [0.1, 0.3, 0.2, 0.1],
    "knn_credibility_after": [0.5, 0.25, 0.0, 1.0],
    "dknn_credibility_after": [0.1, 0.2, 0.3, 0.4],
}


def as_rows(columns, device="cpu"):
    floats = ("l2", "linf", "knn_credibility_after", "dknn_credibility_after")
    return {
        name: column(values, device, torch.float64 if name in floats else torch.int64)
        for name, values in columns.items()
    }


def test_summarize_by_hand(device):
    assert summarize(as_rows(HAND, device)) == pytest.approx(
        {
            "n": 4,
            "l2": 7.5 / 4,
            "linf": 0.3,
            "dnn_acc": 0.5,
            "dnn_l2_success": 3.0,
            "knn_acc": 0.75,
            "knn_l2_success": 1.0,
            "knn_credibility": 1.75 / 4,
            "knn_credibility_success": 0.5,
            "dknn_acc": 0.0,
            "dknn_l2_success": 7.5 / 4,
            "dknn_credibility": 0.25,
            "dknn_credibility_success": 0.25,
        }
    )


def random_columns(seed, n, surrogate=True):
    draw = random.Random(seed)  # noqa: S311  # not for secrets
    predictions = ("dnn_after", "knn_after", "dknn_after") + (("surrogate_after",) if surrogate else ())
    columns = {"id": list(range(n)), "label": [draw.randrange(3) for _ in range(n)]}
    columns |= {name: [draw.randrange(3) for _ in range(n)] for name in predictions}
    for name in ("l2", "linf", "knn_credibility_after", "dknn_credibility_after"):
        columns[name] = [draw.random() for _ in range(n)]
    return columns


def reduce_plainly(columns):
    result = {"n": len(columns["id"]), "l2": fmean(columns["l2"]), "linf": max(columns["linf"])}
    for name in ("dnn", "knn", "dknn", "surrogate"):
        if f"{name}_after" not in columns:
            continue
        right = [a == b for a, b in zip(columns[f"{name}_after"], columns["label"], strict=True)]
        result[f"{name}_acc"] = fmean(right)

        def over_successes(values, right=right):
            chosen = [value for value, correct in zip(values, right, strict=True) if not correct]
            return fmean(chosen) if chosen else math.nan

        result[f"{name}_l2_success"] = over_successes(columns["l2"])
        if name in ("knn", "dknn"):
            result[f"{name}_credibility"] = fmean(columns[f"{name}_credibility_after"])
            result[f"{name}_credibility_success"] = over_successes(columns[f"{name}_credibility_after"])
    return result


@pytest.mark.parametrize("surrogate", [True, False])
@pytest.mark.parametrize(("seed", "n"), [(0, 1), (1, 7), (2, 200)])
def test_summarize_agrees_with_plain_python(device, seed, n, surrogate):
    columns = random_columns(seed, n, surrogate)
    assert summarize(as_rows(columns, device)) == pytest.approx(
        reduce_plainly(columns), nan_ok=True, rel=1e-12
    )


@pytest.mark.parametrize("sizes", [(1, 199), (100, 100), (50, 0, 150), (3,) * 60 + (20,)])
def test_updates_in_parts_equal_one(device, sizes):
    columns = random_columns(3, 200)
    metrics = _AttackMetrics().to(device)
    start = 0
    for size in sizes:
        metrics.update(
            as_rows({name: values[start : start + size] for name, values in columns.items()}, device)
        )
        start += size
    assert start == 200
    result = {name: value.item() for name, value in metrics.compute().items()}
    assert result == pytest.approx(reduce_plainly(columns), rel=1e-12)
    assert all(value.dtype == torch.float64 for value in metrics.compute().values())
    metrics.reset()
    metrics.update(as_rows(HAND, device))
    assert metrics.compute()["n"] == 4


def test_no_success_has_no_mean_distortion(device):
    columns = random_columns(4, 5) | {"label": [1] * 5, "dnn_after": [1] * 5, "knn_after": [1] * 5}
    result = summarize(as_rows(columns, device))
    assert result["dnn_acc"] == result["knn_acc"] == 1
    assert math.isnan(result["dnn_l2_success"])
    assert math.isnan(result["knn_credibility_success"])


def test_rows_of_a_run_are_summarized(victim, device):
    # End to end: the point (0, .1) is moved to where the bank holds class 2, the others stay.
    images, labels = points(device), column([0, 2, 0], device)

    def attack(logits_fn, images, labels):
        moved = images.clone()
        moved[0, 0, 0] = torch.tensor([1.0, 1.0])
        return moved

    adversarial = evaluation.perturb(attack, lambda images: images, images, labels)
    before, after = evaluation.judge(victim, "both", images), evaluation.judge(victim, "both", adversarial)
    result = summarize(
        evaluation.make_rows(column([0, 1, 2], device), labels, images, adversarial, before, after)
    )
    assert result["n"] == 3
    assert result["knn_acc"] == result["dknn_acc"] == pytest.approx(2 / 3)
    assert result["dknn_l2_success"] == pytest.approx(math.sqrt(1 + 0.81))
    assert result["l2"] == pytest.approx(math.sqrt(1 + 0.81) / 3)
    assert result["linf"] == pytest.approx(1)
    assert "surrogate_acc" not in result


def test_an_attack_cannot_end_the_program_or_return_nothing_but_a_shape() -> None:
    images, labels = torch.full((2, 1, 1, 2), 0.5), torch.zeros(2, dtype=torch.int64)
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(2, 2)).eval()

    def leave(*_: object) -> torch.Tensor:
        raise SystemExit(0)

    with pytest.raises(ValueError, match=r"'leave' failed: it called sys\.exit\(0\)"):
        evaluation.perturb(leave, network, images, labels)
    with pytest.raises(ValueError, match="device meta"):
        evaluation.perturb(lambda _, images, labels: images.to("meta"), network, images, labels)


# evaluate, for users


def attacked(device):
    """Of the points, (.5, .5) goes where class 2 is, (1, .9) moves a little and stays what it is."""
    moved = points(device).clone()
    moved[2, 0, 0], moved[1, 0, 0, 0] = torch.tensor([1.0, 0.9]), 0.97
    return moved


def test_evaluate_is_judge_and_make_rows(victim, device):
    images, labels, adversarial = points(device), column([0, 2, 0], device), attacked(device)
    found = evaluation.evaluate(victim, images, labels, adversarial, surrogate=victim.network)
    before, after = (evaluation.judge(victim, "height", each) for each in (images, adversarial))
    ids = column([0, 1, 2], device)
    classes = evaluation.predict(victim.network, images), evaluation.predict(victim.network, adversarial)
    expected = evaluation.make_rows(ids, labels, images, adversarial, before, after, classes)
    assert found.rows.keys() == expected.keys()
    assert all(torch.equal(found.rows[name], each.cpu()) for name, each in expected.items())
    assert found.metrics["after"] == pytest.approx(summarize(expected), nan_ok=True)
    clean = evaluation.make_rows(ids, labels, images, images, before, before, (classes[0], classes[0]))
    assert found.metrics["before"] == pytest.approx(summarize(clean), nan_ok=True)
    again = evaluation.evaluate(
        victim, images.cpu().numpy(), labels.tolist(), adversarial.double(), batch_size=1
    )
    assert again.metrics["after"]["dknn_acc"] == found.metrics["after"]["dknn_acc"]


def test_a_printed_evaluation(victim, device):
    # Before, all are right, by all votes and on height. After, (.5, .5) is 2. Its L2 is |(.5, .4)|, the
    # other's is .03.
    found = evaluation.evaluate(victim, points(device), column([0, 2, 0], device), attacked(device))
    lines = str(found).splitlines()
    assert lines[0].split() == ["3", "images", "before", "after"]
    printed = {line[:22].strip(): line[22:].split() for line in lines[1:]}
    for name in ("kNN on height", "DkNN"):
        assert printed[name] == ["100.00%", "66.67%"]
    assert printed["mean credibility"] == ["0.667", "0.667"]
    size, mean = math.sqrt(0.25 + 0.16), (math.sqrt(0.25 + 0.16) + 0.03) / 3
    assert f"true L2: mean {mean:.3f}, median 0.030 over all images;" in lines
    assert f"  mean {size:.3f}, median {size:.3f} over the 1 that DkNN gets wrong after the attack" in lines
    assert "largest Linf: 0.500" in lines
    assert lines[-1] == "Credibility against the votes of 3 calibration images."


def test_a_printed_evaluation_without_an_attack_or_calibration(hand_dknn, device):
    found = str(evaluation.evaluate(hand_dknn.only("both"), points(device), column([0, 2, 1], device)))
    assert found.splitlines()[0].split() == ["3", "images", "before"]
    assert re.search(r"^kNN on both +66\.67%$", found, re.MULTILINE)
    assert "L2" not in found
    assert "DkNN" not in found
    assert found.endswith(
        "Credibility against leave-one-out votes of 6 training images; `calibrate` takes held-out ones."
    )


def test_no_success_is_said_so(victim, device):
    found = str(evaluation.evaluate(victim, points(device), column([0, 2, 0], device), points(device)))
    assert "true L2: mean 0.000, median 0.000 over all images;" in found
    assert "mean -, median - over the 0 that DkNN gets wrong after the attack" in found


class Headless(torch.nn.Module):
    """Its layer gives pixels, but what it gives itself is no logits of three classes."""

    def __init__(self, output):
        super().__init__()
        self.pixels = torch.nn.Flatten()
        self.output_of = output

    def forward(self, images):
        return self.output_of(self.pixels(images))


@pytest.mark.parametrize(
    "output", [lambda rows: {"rows": rows}, lambda rows: rows, lambda rows: rows[:, None], lambda rows: None]
)
def test_a_network_without_a_head_has_no_prediction(hand_dknn, device, output):
    images, labels = points(device), column([0, 2, 0], device)
    network = FeatureNetwork(Headless(output), ["pixels"])
    knn = DkNN.on_banks(network, {"pixels": hand_dknn.banks["both"]}, k=3)
    dnn, votes = evaluation.observe(knn, images, batch_size=2)
    assert dnn is None
    assert votes[:, 0].tolist() == [sample[0] for sample in VOTES]
    adversarial = evaluation.perturb(lambda _, images, labels: 1 - images, knn, images, labels)
    found = evaluation.evaluate(knn, images, labels, adversarial)
    assert not [name for name in found.rows if name.startswith("dnn")]
    assert "dnn_acc" not in found.metrics["after"]
    assert "network" not in str(found)
    judged = evaluation.judge_rows(found.rows, ["pixels"], column([[2], [1]], "cpu"), "strict")
    assert set(judged) == {"knn/pixels", "dknn"}


def test_a_headless_victim_is_watched_too(hand_dknn, device):
    images, labels = points(device), column([0, 2, 0], device)
    network = FeatureNetwork(Headless(lambda rows: None), ["pixels"])
    knn = DkNN.on_banks(network, {"pixels": hand_dknn.banks["both"]}, k=3)

    def patch(victim, images, labels):
        victim.network.network.pixels.__class__.forward = lambda self, images: images.flatten(1) / 2
        return images

    class Own(torch.nn.Flatten):
        pass

    knn.network.network.pixels = Own()
    with pytest.raises(ValueError, match="after it the same images get other answers"):
        evaluation.perturb(patch, knn, images, labels)
