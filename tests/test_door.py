"""The README's first example, scikit-learn's checks, and other libraries that query victims."""

import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torchattacks
from art.attacks.evasion import HopSkipJump
from art.estimators.classification import PyTorchClassifier
from sklearn.base import clone, is_classifier
from sklearn.datasets import load_digits
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, cross_val_predict, cross_val_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.utils.validation import check_is_fitted
from torch import nn

import lightning_advknn as advknn

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # foolbox 3.3.4 imports a name that scipy moved
    import foolbox

ROOT = Path(__file__).parents[1]
PIXELS, LABELS = load_digits(return_X_y=True)
IMAGES = (PIXELS / 16).reshape(-1, 1, 8, 8)


def test_the_readmes_first_example(capsys):
    code = re.search(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)[1]
    assert len(code.splitlines()) <= 12
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(0)
        exec(compile(code, "README.md", "exec"), {})  # noqa: S102
    printed, said = capsys.readouterr()
    assert re.match("Trained a surrogate on avgpool, as none was given: it agrees with the kNN on 9", said)
    accuracies = {
        name: [float(share) for share in shares]
        for name, *shares in re.findall(
            r"^(network|kNN on avgpool|DkNN) +([\d.]+)% +([\d.]+)%$", printed, re.MULTILINE
        )
    }
    before, after = accuracies["DkNN"]
    assert before >= 75
    assert after <= 5
    assert accuracies.keys() == {"network", "kNN on avgpool", "DkNN"}
    mean_l2 = float(re.search(r"^true L2: mean ([\d.]+),", printed, re.MULTILINE)[1])
    assert 0 < mean_l2 < 3
    assert printed.startswith("50 images")


def test_what_the_readme_says_that_it_prints_has_that_form():
    said = re.search(r"^```text\n(.*?)^```", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)[1]
    victim = advknn.DkNN(network(), layers=["1", "3"], k=5, device="cpu").fit(IMAGES[:1500], LABELS[:1500])
    images, labels = torch.tensor(IMAGES[1500:1600]).float(), torch.tensor(LABELS[1500:1600])
    adversarial = advknn.fgsm(victim, images, labels, eps=0.3)
    printed = str(advknn.evaluate(victim, images, labels, adversarial))

    def form(text):
        return re.sub(r"[\d.]+", "#", text.replace("avgpool", "3")).split()

    assert form(printed) == form(said)


def network():
    """Of a few classes of digits knows most."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        for _ in range(60):
            optimizer.zero_grad()
            nn.functional.cross_entropy(
                model(torch.tensor(IMAGES[:1500]).float()), torch.tensor(LABELS[:1500])
            ).backward()
            optimizer.step()
    return model


@pytest.fixture(scope="module")
def victim():
    return advknn.DkNN(network(), layers=["2", "3"], k=5, device="cpu").fit(IMAGES[:1500], LABELS[:1500])


# scikit-learn


def test_on_pixels_it_is_scikit_learns_classifier():
    theirs = KNeighborsClassifier(5, algorithm="brute").fit(PIXELS[:1500], LABELS[:1500])  # in float64
    ours = advknn.KNN(nn.Flatten(), k=5, metric="euclidean", device="cpu").fit(IMAGES[:1500], LABELS[:1500])
    distances, _ = theirs.kneighbors(PIXELS[1500:], 6)
    clear = distances[:, 4] < distances[:, 5]  # elsewhere a tie decides who is the fifth
    assert clear.mean() > 0.9
    proba = theirs.predict_proba(PIXELS[1500:])
    np.testing.assert_allclose(ours.predict_proba(IMAGES[1500:])[clear], proba[clear], atol=1e-6)
    assert (ours.predict(IMAGES[1500:]).numpy() == theirs.predict(PIXELS[1500:]))[clear].all()
    found, _ = ours.neighbours(IMAGES[1500:])["output"]
    np.testing.assert_allclose(found * 16, distances[:, :5], rtol=1e-6)
    assert ours.score(IMAGES[1500:], LABELS[1500:]) == pytest.approx(
        theirs.score(PIXELS[1500:], LABELS[1500:]), abs=0.01
    )


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        (advknn.KNN, {"layer": "1", "k": np.int64(3), "metric": "euclidean", "mean": [0.5], "std": (0.2,)}),
        (advknn.KNN, {}),
        (advknn.DkNN, {"layers": ["1", "3"], "k": 3, "memory_gib": 1.0, "index": None, "device": "cpu"}),
    ],
)
def test_it_is_cloned(kind, arguments):
    original = kind(network(), **arguments)
    other = clone(original)
    assert type(other) is kind
    assert other.get_params().keys() == original.get_params().keys()
    assert arguments.items() <= other.get_params(deep=False).items()
    assert other.network.network is not original.network.network
    assert other.layers == original.layers
    with pytest.raises(NotFittedError):
        check_is_fitted(other)
    check_is_fitted(original.fit(IMAGES[:90], LABELS[:90]))
    with pytest.raises(NotFittedError):
        check_is_fitted(clone(original))


def test_parameters_are_changed():
    knn = advknn.KNN(nn.Flatten(), k=5).fit(IMAGES[:500], LABELS[:500])
    assert knn.set_params(k=1, metric="euclidean") is knn
    assert (knn.k, knn.metric, knn.layers) == (1, "euclidean", ("output",))
    with pytest.raises(NotFittedError, match=r"Call `fit"):
        knn.predict(IMAGES[:3])
    assert knn.fit(IMAGES[:500], LABELS[:500]).score(IMAGES[:500], LABELS[:500]) == 1
    with pytest.raises(
        ValueError, match=r"Expected arguments among \['model', .*'layer'\], but got \['n_neighbors'\]"
    ):
        knn.set_params(n_neighbors=3)


def test_it_is_validated_over_folds():
    knn, theirs = advknn.KNN(nn.Flatten(), k=5, metric="euclidean", device="cpu"), KNeighborsClassifier(5)
    assert is_classifier(knn)  # so folds have classes as in the whole
    expected = cross_val_score(theirs, PIXELS, LABELS, cv=3)
    np.testing.assert_allclose(cross_val_score(knn, IMAGES, LABELS, cv=3), expected, atol=0.01)
    predicted = cross_val_predict(knn, IMAGES, LABELS, cv=3)
    assert (predicted == cross_val_predict(theirs, PIXELS, LABELS, cv=3)).mean() > 0.99
    proba = cross_val_predict(knn, IMAGES, LABELS, cv=3, method="predict_proba")
    assert proba.shape == (1797, 10)
    assert (proba.argmax(1) == predicted).all()
    search = GridSearchCV(knn, {"k": [1, 250]}, cv=2).fit(IMAGES[:600], LABELS[:600])
    assert search.best_params_ == {"k": 1}


# Black boxes


def batch(victim, n=12):
    """Test images that a victim gets right."""
    images, labels = torch.tensor(IMAGES[1500:1530]).float(), torch.tensor(LABELS[1500:1530])
    right = victim.predict(images) == labels
    return images[right][:n], labels[right][:n]


def fooled_and_nearer(victim, adversarial, images, labels, than):
    """Whether the victim itself is fooled on nearly all, by less than another perturbation."""
    assert (victim.predict(adversarial) != labels).double().mean() > 0.9
    assert (adversarial - images).flatten(1).norm(dim=1).median() < than


def test_foolbox_asks_a_victim(victim):
    images, labels = batch(victim)
    before = victim.queries
    asked = foolbox.PyTorchModel(victim, bounds=(0, 1), device=images.device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        np.random.seed(0)  # noqa: NPY002 - foolbox draws from it
        start = foolbox.attacks.LinearSearchBlendedUniformNoiseAttack(steps=50)(
            asked, images, labels, epsilons=None
        )[1]
        adversarial = foolbox.attacks.BoundaryAttack(steps=400)(
            asked, images, labels, epsilons=None, starting_points=start
        )[1]
    assert victim.queries - before > 400 * len(images)
    fooled_and_nearer(victim, adversarial, images, labels, (start - images).flatten(1).norm(dim=1).median())
    assert not victim.training


def test_art_asks_a_victim(victim):
    images, labels = batch(victim, 4)
    before = victim.queries
    asked = PyTorchClassifier(
        victim,
        nn.CrossEntropyLoss(),
        input_shape=(1, 8, 8),
        nb_classes=10,
        clip_values=(0, 1),
        device_type="cpu",
    )
    settings = {"max_eval": 60, "init_eval": 10, "verbose": False}
    np.random.seed(0)  # noqa: NPY002 - ART draws from it
    adversarial = HopSkipJump(asked, max_iter=3, **settings).generate(images.numpy(), labels.numpy())
    assert victim.queries > before
    fooled_and_nearer(victim, torch.tensor(adversarial), images, labels, 4.0)


def test_torchattacks_asks_a_victim(victim):
    images, labels = batch(victim)
    adversarial = torchattacks.Square(victim, eps=0.3, n_queries=60, seed=0)(images, labels)
    assert (victim.predict(adversarial) != labels).any()


@pytest.mark.parametrize(
    ("function", "settings"),
    [
        ("foolbox.attacks.BoundaryAttack", {"steps": 60}),
        ("art.attacks.evasion.HopSkipJump", {"max_iter": 1, "max_eval": 20, "init_eval": 5}),
    ],
)
def test_they_ask_it_by_configuration_too(victim, function, settings):
    from lightning_advknn.evaluation import perturb

    images, labels = batch(victim, 4)
    attack = advknn.AttackSettings(function, settings, targets=["dknn"])
    assert attack.measure == "l2"
    before = victim.queries
    adversarial = perturb(attack.bind((1, 8, 8), 10), victim, images, labels)
    assert victim.queries - before > 4 * 20
    assert (victim.predict(adversarial) != labels).all()
    # The same seed, the same answers.
    assert torch.equal(perturb(attack.bind((1, 8, 8), 10), victim, images, labels), adversarial)


# Imports


def test_importing_it_imports_nothing_heavy():
    code = (
        "import sys, lightning_advknn\n"
        "print([name for name in ('torch', 'numpy', 'sklearn') if name in sys.modules])"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT, env=os.environ
    )
    assert found.stdout == "[]\n"


def test_every_name_is_there():
    for name in advknn.__all__:
        assert getattr(advknn, name) is not None
    assert {"DkNN", "KNN", "evaluate", "attack", "AttackSettings", "bim", "minimum_norm"} <= set(dir(advknn))
    with pytest.raises(AttributeError, match="no_such"):
        _ = advknn.no_such
