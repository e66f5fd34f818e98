"""Attacks by import path: other libraries' as they are by themselves, and one's own."""

import json
import random
import re
import sys
import time
import warnings
from contextlib import contextmanager, nullcontext
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchattacks
from art.attacks.evasion import ProjectedGradientDescent
from art.estimators.classification import PyTorchClassifier
from torch import nn

from lightning_advknn.attacks import AttackSettings
from lightning_advknn.attacks.libraries import _on, load_function
from lightning_advknn.evaluation import perturb
from lightning_advknn.models import DkNNB, Surrogate

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # foolbox 3.3.4 imports a name that scipy moved
    import foolbox

SETTINGS = {
    "torchattacks.MIFGSM": {"eps": 0.2, "alpha": 0.05, "steps": 5},
    "torchattacks.PGD": {"eps": 0.2, "alpha": 0.05, "steps": 3},
    "foolbox.attacks.LinfPGD": {"eps": 0.2, "steps": 3},
    "foolbox.attacks.L2DeepFoolAttack": {"steps": 10},
    "foolbox.attacks.L2CarliniWagnerAttack": {
        "steps": 20,
        "stepsize": 0.1,
        "initial_const": 1.0,
        "binary_search_steps": 3,
    },
    "art.attacks.evasion.ProjectedGradientDescent": {
        "eps": 0.2,
        "eps_step": 0.05,
        "max_iter": 3,
        "num_random_init": 3,
    },
}
RANDOM = ("torchattacks.PGD", "foolbox.attacks.LinfPGD", "art.attacks.evasion.ProjectedGradientDescent")
each_attack = pytest.mark.parametrize("path", SETTINGS)
each_random = pytest.mark.parametrize("path", RANDOM)


def convnet(device):
    """A small random network, frozen."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = nn.Sequential(
            nn.Conv2d(2, 6, 3, stride=2),
            nn.ReLU(),
            nn.Conv2d(6, 8, 3),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(72, 5),
        )
    return network.to(device).eval().requires_grad_(False)


def batch(device, size=8):
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(size, 2, 11, 11, generator=generator)
    images[:, 0, :3], images[:, 1, -3:] = 0, 1  # pixels that clipping to [0, 1] touches
    images = images.to(device)
    # Classes of the network, so that attacks have something to do.
    return images, convnet(device)(images).argmax(1)


def attack(path, **changes):
    return AttackSettings(path, {**SETTINGS.get(path, {}), **changes}).bind()


def direct(path, network, images, labels, seed):
    """The library's attack as its own documentation calls it."""
    library, settings = path.split(".")[0], dict(SETTINGS[path])
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - ART draws from it
    if library == "torchattacks":
        return getattr(torchattacks, path.split(".")[-1])(network, **settings)(images, labels)
    if library == "foolbox":
        eps = settings.pop("eps", None)
        model = foolbox.PyTorchModel(network, bounds=(0, 1), device=images.device)
        return getattr(foolbox.attacks, path.split(".")[-1])(**settings)(model, images, labels, epsilons=eps)[
            1
        ]
    with _on(images.device):  # where ART computes
        classifier = PyTorchClassifier(
            network, nn.CrossEntropyLoss(), input_shape=(2, 11, 11), nb_classes=5, clip_values=(0, 1)
        )
    theirs = ProjectedGradientDescent(classifier, **settings, verbose=False)
    return torch.from_numpy(theirs.generate(images.cpu().numpy(), labels.cpu().numpy())).to(images.device)


def random_state():
    """Of every global generator."""
    numpys = np.random.get_state()  # noqa: NPY002
    return torch.get_rng_state().tolist(), numpys[1].tolist(), numpys[2:], random.getstate()


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Writes a module of one's own, in a folder on the path as that of a script is; returns an attack's import path."""

    def write(name, code):
        (tmp_path / f"{name}.py").write_text(code)
        monkeypatch.syspath_prepend(tmp_path)
        return f"{name}.attack"

    return write


@each_attack
@pytest.mark.parametrize("seed", [0, 3])
def test_it_is_the_librarys_own(device, path, seed):
    network, (images, labels) = convnet(device), batch(device)
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # ART 1.20 makes arrays of tensors as NumPy 1 did
        expected = direct(path, network, images, labels, seed)
    found = attack(path, seed=seed)(network, images, labels)
    assert torch.equal(found, expected.clamp(0, 1))
    assert (found != images).flatten(1).any(1).all()
    assert found.dtype == torch.float32


@each_attack
def test_it_attacks_through_a_surrogate(device, path):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        dknnb = DkNNB(72, 5).to(device).requires_grad_(False)
    surrogate = Surrogate(convnet(device), "3", dknnb).eval()
    images, _ = batch(device)
    labels = surrogate(images).argmax(1)
    found = perturb(attack(path), surrogate, images, labels)
    # The same network, as plain layers.
    expected = perturb(attack(path), nn.Sequential(*convnet(device)[:5], dknnb), images, labels)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert (surrogate(found).argmax(1) != labels).any()


@each_random
def test_random_numbers_are_of_the_seed_alone(device, path):
    network, (images, labels) = convnet(device), batch(device)
    before = random_state()
    first = attack(path)(network, images, labels)
    assert random_state() == before
    torch.rand(1), np.random.rand(1)  # noqa: NPY002
    assert torch.equal(attack(path, seed=0)(network, images, labels), first)
    assert not torch.equal(attack(path, seed=1)(network, images, labels), first)


def test_a_seed_that_an_attack_has_itself_is_the_same():
    # torchattacks' Square draws from the time where its own seed is None.
    network, (images, labels) = convnet("cpu"), batch("cpu")
    square = [
        attack("torchattacks.Square", n_queries=20, eps=0.05, seed=seed)(network, images, labels)
        for seed in (1, 1, 2)
    ]
    assert torch.equal(square[0], square[1])
    assert not torch.equal(square[0], square[2])


@each_attack
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_works_where_gradients_are_off(device, path, mode):
    network, (images, labels) = convnet(device), batch(device)
    expected = attack(path)(network, images, labels)
    with mode():
        found = attack(path)(network, images + 0, labels + 0)
        assert not torch.is_grad_enabled()
    assert torch.equal(found, expected)
    assert attack(path)(network, images[:0], labels[:0]).shape == (0, 2, 11, 11)


@each_attack
@pytest.mark.parametrize("precision", ["float32", "winograd", "bfloat16", "tf32"])
def test_a_network_is_attacked_at_a_precision_and_left_as_it_was(device, path, precision):
    network, (images, labels) = convnet(device).train().requires_grad_(True), batch(device)
    network[3].eval()
    kept, state = images.clone(), {name: value.clone() for name, value in network.state_dict().items()}
    patched = []
    network[0].register_forward_pre_hook(lambda module, _: patched.append("forward" in vars(module)))
    found = perturb(attack(path), network, images, labels, precision)
    assert all(patched)
    exact = perturb(attack(path), convnet(device), images, labels)
    assert (found - exact).abs().mean() < (1e-3 if precision != "bfloat16" else 0.02)
    assert torch.equal(images, kept)
    assert [module.training for module in network] == [True, True, True, False, True, True]
    assert network.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in network.parameters())
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())


@each_attack
def test_libraries_compute_on_the_gpu_of_the_images(device, path, monkeypatch):
    # ART, for one, computes on the current GPU.
    network, (images, labels) = convnet(device), batch(device)
    current, seen = [], []

    @contextmanager
    def on(device):
        current.append(device)
        with _on(device):
            yield
        current.pop()

    monkeypatch.setattr("lightning_advknn.attacks.libraries._on", on)
    network.register_forward_hook(lambda *_: seen.append(list(current)))
    attack(path)(network, images, labels)
    assert seen == [[images.device]] * len(seen)
    assert seen
    assert not current


def test_a_gpu_is_made_current_and_a_cpu_needs_nothing(monkeypatch):
    asked = []
    monkeypatch.setattr("torch.cuda.device", lambda device: asked.append(device) or nullcontext())
    for name in ("cpu", "cuda:1"):
        with _on(torch.device(name)):
            pass
    assert asked == [torch.device("cuda", 1)]


class Linear(nn.Module):
    """Two classes with logits f(x) and -f(x) for f(x) = w.x + b, so that the nearest other class is |f(x)| / ||w|| away."""

    def __init__(self, weight, bias):
        super().__init__()
        self.register_buffer("weight", weight)
        self.bias = bias

    def margin(self, images):
        return images.flatten(1) @ self.weight + self.bias

    def forward(self, images):
        return torch.stack([self.margin(images), -self.margin(images)], 1)


@pytest.mark.parametrize(
    ("path", "settings"),
    [
        ("foolbox.attacks.L2DeepFoolAttack", {"overshoot": 0.002}),
        ("torchattacks.DeepFool", {"overshoot": 0.002}),
        ("art.attacks.evasion.DeepFool", {"epsilon": 0.002, "batch_size": 6}),
        (
            "foolbox.attacks.L2CarliniWagnerAttack",
            {
                "initial_const": 1e-4,
                "confidence": 0,
                "steps": 200,
                "stepsize": 0.02,
                "binary_search_steps": 9,
            },
        ),
    ],
)
def test_smallest_perturbations_of_a_linear_model(device, path, settings):
    generator = torch.Generator().manual_seed(2)
    images = 0.35 + 0.3 * torch.rand(6, 1, 5, 5, generator=generator)  # the nearest other class is in [0, 1]
    model = Linear(torch.randn(25, generator=generator), -0.1).to(device)
    images = images.to(device)
    labels = (model.margin(images) < 0).long()
    smallest = model.margin(images).abs() / model.weight.norm()
    assert smallest.min() > 0.02
    adversarial = AttackSettings(path, settings).bind()(model, images, labels)
    assert (model(adversarial).argmax(1) != labels).all()
    distances = (adversarial - images).flatten(1).norm(dim=1)
    assert (distances >= smallest * (1 - 1e-5)).all()
    assert (distances <= smallest * 1.01).all()


def test_eps_bounds_a_smallest_perturbation(device):
    network, (images, labels) = convnet(device), batch(device)
    path = "foolbox.attacks.L2DeepFoolAttack"
    unbounded = (attack(path)(network, images, labels) - images).flatten(1).norm(dim=1)
    eps = unbounded.median().item()
    bounded = (attack(path, eps=eps)(network, images, labels) - images).flatten(1).norm(dim=1)
    torch.testing.assert_close(bounded, unbounded.clamp(max=eps), rtol=1e-4, atol=1e-5)


def test_an_image_stays_where_foolbox_finds_nothing(device):
    network, (images, labels) = convnet(device), batch(device)
    path, settings = "foolbox.attacks.L2CarliniWagnerAttack", {"steps": 1, "binary_search_steps": 1}
    model = foolbox.PyTorchModel(network, bounds=(0, 1), device=device)
    theirs = foolbox.attacks.L2CarliniWagnerAttack(**settings)(model, images, labels, epsilons=None)[1]
    assert not theirs.any()  # black
    assert torch.equal(AttackSettings(path, settings).bind()(network, images, labels), images)


def test_labels_are_what_it_moves_away_from(device):
    # Those that are given, not the network's own predictions, which some libraries take by default.
    network, (images, _) = convnet(device), batch(device)
    labels = (network(images).argmax(1) + 1) % 5
    for path in ("torchattacks.PGD", "foolbox.attacks.LinfPGD", *RANDOM[2:]):
        before, after = (
            F.cross_entropy(network(each), labels) for each in (images, attack(path)(network, images, labels))
        )
        assert after > before


@pytest.mark.parametrize(
    ("path", "settings", "message"),
    [
        (
            "torchattacks.MIFGSM",
            {"step_size": 1},
            r"among \['seed', 'eps', 'alpha', 'steps', 'decay'\], but got",
        ),
        ("torchattacks.MIFGSM", {"eps": "8/255"}, "eps is the text '8/255', not a number such as 0.03"),
        ("torchattacks.MIFGSM", {"seed": -1}, "Seed must be between 0 and"),
        ("torchattacks.MIFGSM", {"seed": None}, "'seed': None"),
        ("foolbox.attacks.LinfPGD", {"steps": 3}, "eps is missing"),
        ("foolbox.attacks.LinfPGD", {"eps": -0.1}, "eps is -0.1, not a finite number of at least 0"),
        (
            "foolbox.attacks.L2DeepFoolAttack",
            {"step": 3},
            r"\['seed', 'eps', 'steps', 'candidates', .*'step'",
        ),
        ("foolbox.attacks.Attack", {"eps": 0.1}, "abstract"),
        (
            RANDOM[2],
            {"eps": -1.0},
            r"'eps': -1.0}: ValueError: The perturbation size `eps` has to be nonnegative",
        ),
        (RANDOM[2], {"steps": 3}, r"'num_random_init', .*unexpected keyword argument 'steps'"),
        (RANDOM[2], {"targeted": True}, "`targeted` must be false"),
        ("torchattacks.MIFSGM", {}, "one of .*'MIFGSM'.*, but it is not there"),
        (
            "torch.nn.Linear",
            {},
            r"torch.nn.Linear to be a function, or a class that extends one of \['torcha",
        ),
        ("art.attacks.poisoning.PoisoningAttackBackdoor", {}, "to be a function, or a class that extends"),
    ],
)
def test_settings_are_judged_before_anything_runs(path, settings, message):
    before = random_state()
    with pytest.raises(ValueError, match=message):
        AttackSettings(path, settings).bind()
    assert random_state() == before


@pytest.mark.parametrize(
    ("path", "missing", "remedy"),
    [
        ("torchattacks.MIFGSM", "torchattacks", "pip install torchattacks`"),
        ("foolbox.attacks.LinfPGD", "foolbox", "pip install foolbox`"),
        (RANDOM[2], "art", "pip install adversarial-robustness-toolbox`"),
        ("no_such_package.attack", "no_such_package", "Install no_such_package, or put it beside the script"),
    ],
)
def test_a_library_that_is_not_there(monkeypatch, path, missing, remedy):
    for name in [name for name in sys.modules if name.split(".")[0] == missing]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Hidden(missing), *sys.meta_path])
    with pytest.raises(ImportError, match=f"Expected {path} to be importable.*No module.*{remedy}"):
        AttackSettings(path, {"eps": 0.1}).bind()


class Hidden:
    """A finder that does not find one package."""

    def __init__(self, name):
        self.name = name

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == self.name:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


EXTENDED = """
import torchattacks

class attack(torchattacks.attack.Attack):
    def __init__(self, model, add=0.0):
        super().__init__("own", model)
        self.add = add

    def forward(self, images, labels):
        return images.ceil() + self.add
"""


MISBEHAVING = """
import numpy as np
import torch
import torchattacks

class attack(torchattacks.attack.Attack):
    def __init__(self, model, how, n_classes=10):
        super().__init__("own", model)
        self.how, self.n_classes = how, n_classes
        self.supported_mode = ["default", "targeted"]
        if how == "targeted":
            self.set_mode_targeted_by_label(quiet=True)

    def forward(self, images, labels):
        if self.how == "changes":
            images.zero_(), labels.zero_()
        return {
            "numpy": lambda: images.numpy(),
            "tuple": lambda: (images, labels),
            "nothing": lambda: None,
            "list": lambda: [images],
            "bytes": lambda: (images * 255).byte(),
            "black bytes": lambda: torch.zeros_like(images).byte(),
            "to 255": lambda: images * 255,
            "channels last": lambda: images.permute(0, 2, 3, 1),
            "one image": lambda: images[:1],
            "double": lambda: images.double(),
            "half": lambda: images.half(),
            "attached": lambda: images.requires_grad_() + 0,
            "changes": lambda: images,
            "raises": lambda: images[0, :, :, 99],
            "classes": lambda: torch.full_like(images, self.n_classes / 100),
        }[self.how]()
"""


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (
            "numpy",
            "shape (2, 2, 11, 11), but got a numpy.ndarray. Return the adversarial images alone, as a torch.Tensor.",
        ),
        ("tuple", "but got a tuple."),
        ("nothing", "but got a NoneType."),
        ("list", "but got a list."),
        ("bytes", "but got torch.uint8. Return images in [0, 1]: divide bytes by 255."),
        ("black bytes", "but got torch.uint8."),
        ("to 255", "to return finite images in [0, 1], but got values in [25"),
        ("channels last", "shape (2, 2, 11, 11), but got shape (2, 11, 11, 2)."),
        ("one image", "but got shape (1, 2, 11, 11). Return one image for each image."),
        (
            "raises",
            "with {'how': 'raises'} to attack images of shape (2, 2, 11, 11), but it raised IndexError: index 99 is out",
        ),
        ("targeted", "`targeted` must be false"),
    ],
)
def test_what_goes_wrong_is_an_error_that_names_the_attack(own, how, message):
    path = own("misbehaving", MISBEHAVING)
    settings, (images, labels) = AttackSettings(path, {"how": how}), batch("cpu", 2)
    with pytest.raises(ValueError, match=f"misbehaving.attack.*{re.escape(message)}") as found:
        settings.bind((2, 11, 11), 5)
    if how == "raises":
        assert isinstance(found.value.__cause__, IndexError)
    if how != "targeted":  # where it attacks, also
        with pytest.raises(ValueError, match=r"misbehaving.attack"):
            load_function(path)(convnet("cpu"), images, labels, how=how)


@pytest.mark.parametrize("how", ["double", "half", "attached", "changes"])
def test_images_are_images_however_a_library_makes_them(own, how):
    settings, (images, labels) = AttackSettings(own("misbehaving", MISBEHAVING), {"how": how}), batch("cpu")
    kept, were = images.clone(), labels.clone()
    found = settings.bind((2, 11, 11), 5)(convnet("cpu"), images, labels)
    assert found.dtype == torch.float32
    assert not found.requires_grad
    assert torch.equal(images, kept)
    assert torch.equal(labels, were)
    expected = torch.zeros_like(images) if how == "changes" else images
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3 if how == "half" else 0)


def test_classes_are_counted(own):
    path, (images, labels) = own("misbehaving", MISBEHAVING), batch("cpu", 2)
    given = AttackSettings(path, {"how": "classes", "n_classes": 5}).bind((2, 11, 11), 5)
    counted = AttackSettings(path, {"how": "classes"}).bind((2, 11, 11), 5)
    for attack in (given, counted):
        assert attack(convnet("cpu"), images, labels).mean().item() == pytest.approx(0.05)
    # Of more than 10, AutoAttack's authors aim at the nearest 9 others.
    AttackSettings(path, {"how": "classes", "n_classes": 10}).bind((2, 11, 11), 43)
    for wrong, classes in ((10, 5), (4, 5), (9, 43), (44, 43)):
        settings = AttackSettings(path, {"how": "classes", "n_classes": wrong})
        with pytest.raises(
            ValueError, match=f"n_classes is {wrong}, but there are {classes} classes; leave it out"
        ):
            settings.bind((2, 11, 11), classes)
    with pytest.raises(ValueError, match="n_classes is 4, but there are 5 classes"):
        load_function(path)(convnet("cpu"), images, labels, how="classes", n_classes=4)


@pytest.mark.parametrize(
    ("path", "settings"),
    [
        ("torchattacks.APGDT", {"eps": 0.05, "steps": 3}),
        ("torchattacks.FAB", {"eps": 0.05, "steps": 3, "multi_targeted": True}),
        ("torchattacks.FAB", {"eps": 0.05, "steps": 3}),
    ],
)
def test_targets_are_the_other_classes(path, settings):
    """On 4 classes, where the library's own 10 ends in an IndexError; as if 4 were given."""
    (images, labels), network = batch("cpu", 6), nn.Sequential(convnet("cpu"), FirstFour())
    labels = network(images).argmax(1)
    counted = AttackSettings(path, settings).bind((2, 11, 11), 4)(network, images, labels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        name = path.rpartition(".")[2]
        theirs = getattr(torchattacks, name)(network, n_classes=4, **settings)(images, labels)
    assert torch.equal(counted, theirs.clamp(0, 1))


class FirstFour(nn.Module):
    def forward(self, logits):
        return logits[:, :4]


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("name", ["APGDT", "AutoAttack"])
def test_a_loss_that_ranks_four_classes_is_refused_on_fewer(name, classes):
    with pytest.raises(ValueError, match=f"there are {classes} classes, and its DLR loss needs 4; take APGD"):
        AttackSettings(f"torchattacks.{name}", {"eps": 0.9}).bind((1, 8, 8), classes)


def test_two_classes():
    for path, settings in SETTINGS.items():
        AttackSettings(path, settings).bind((1, 8, 8), 2)
    AttackSettings("torchattacks.APGD", {"steps": 2}).bind((1, 8, 8), 2)
    with pytest.raises(ValueError, match="there are 2 classes, and its DLR loss needs 3"):
        AttackSettings("torchattacks.APGD", {"steps": 2, "loss": "dlr"}).bind((1, 8, 8), 2)


@pytest.mark.parametrize(
    ("path", "settings", "raised"),
    [
        ("foolbox.attacks.GenAttack", {"eps": 0.1, "steps": 2}, "ValueError: unsupported criterion"),
        ("torchattacks.TIFGSM", {"steps": 1}, "RuntimeError: Given groups=3"),  # on grey images
        (
            "art.attacks.evasion.SimBA",
            {},
            "ValueError: This attack requires an estimator predicting probabilities",
        ),
        ("torchattacks.PGD", {"steps": 1.5}, "TypeError: 'float' object cannot be interpreted as an integer"),
        ("torchattacks.Square", {"n_queries": 10, "loss": "cross"}, "AssertionError"),
    ],
)
def test_what_only_shows_in_a_run_is_found_before_it(path, settings, raised):
    before = random_state()
    with pytest.raises(ValueError, match=f"Expected {path} with .* to attack .* but it raised {raised}"):
        AttackSettings(path, settings).bind((1, 8, 8), 10)
    assert random_state() == before


def test_a_trial_ends(own):
    path = own(
        "endless",
        "def attack(logits_fn, images, labels, *, steps: int):\n"
        "    for _ in range(steps): logits_fn(images)\n"
        "    return images\n",
    )
    begun = time.perf_counter()
    attack = AttackSettings(path, {"steps": 10**6}).bind()
    AttackSettings("torchattacks.AutoAttack", {"eps": 0.01}).bind((3, 16, 16), 4)
    AttackSettings("foolbox.attacks.BoundaryAttack").bind((3, 16, 16), 4)
    assert time.perf_counter() - begun < 30  # on a busy machine; without an end, hours
    assert torch.equal(partial(attack, steps=2)(lambda each: each.flatten(1), *batch("cpu")), batch("cpu")[0])


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 16, 12)])
@pytest.mark.parametrize("classes", [2, 7, 1000])
def test_an_attack_of_ones_own_is_tried_on_a_module_like_the_data(own, shape, classes):
    path = own(
        f"careful_{shape[0]}_{classes}",
        "import copy, torch\n"
        "from torch import nn\n"
        "def attack(model, images, labels):\n"
        "    assert isinstance(model, nn.Module) and not model.training and list(model.modules())\n"
        "    weight = next(model.parameters())\n"
        "    assert weight.device == images.device and not weight.requires_grad and model.state_dict()\n"
        "    copy.deepcopy(model).eval()\n"
        f"    assert images.shape == (2, *{shape}) and labels.tolist() == [0, 1]\n"
        "    leaf = images.clone().requires_grad_()\n"
        "    logits = model(leaf)\n"
        f"    assert logits.shape == (2, {classes}) and torch.equal(logits.argmax(1), labels)\n"
        "    nn.functional.cross_entropy(logits, labels).backward()\n"
        "    assert leaf.grad.any()\n"
        "    return (images + .1 * torch.rand_like(images)).clamp(0, 1)\n",
    )
    before = random_state()
    AttackSettings(path).bind(shape, classes)
    assert random_state() == before


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (
            "images.numpy()",
            "to return a floating-point tensor of shape (2, 1, 28, 28), but got a numpy.ndarray.",
        ),
        ("(images, labels)", "but got a tuple. Return the adversarial images alone"),
        ("None", "but got a NoneType."),
        ("images[:1]", "but got shape (1, 1, 28, 28)."),
        ("(images * 255).byte()", "but got torch.uint8."),
        ("images.no_such", "but it raised AttributeError: 'Tensor' object has no attribute 'no_such'"),
        (
            "logits_fn.backbone",
            "with {} to attack two images of shape (1, 28, 28) and a small module of 10 classes, but it raised AttributeError",
        ),
    ],
)
def test_what_an_attack_of_ones_own_returns_is_judged_at_the_start(own, returned, message):
    path = own(
        f"wrong_{returned.encode().hex()}", f"def attack(logits_fn, images, labels):\n    return {returned}\n"
    )
    with pytest.raises(ValueError, match=f"Expected {path}.*{re.escape(message)}"):
        AttackSettings(path).bind()


def test_a_class_of_ones_own_that_extends_a_librarys(own):
    images, labels = batch("cpu")
    path = own("extended", EXTENDED)
    rounded = attack(path, add=5e-7)(convnet("cpu"), images, labels)
    assert torch.equal(rounded, (images.ceil() + 5e-7).clamp(max=1))
    for value in (1e-5, -1.5, float("nan")):
        before = random_state()
        with pytest.raises(ValueError, match=r"Expected extended.attack to return finite images in \[0, 1\]"):
            attack(path, add=value)(convnet("cpu"), images, labels)
        assert random_state() == before


def test_a_function_of_ones_own(own, hand_dknn):
    path = own(
        "mine",
        "def attack(logits_fn, images, labels, *, brightness: float):\n"
        "    if brightness < 0: raise ValueError('dark')\n"
        "    assert logits_fn(images).shape[0] == images.shape[0] == labels.shape[0]\n"
        "    return (images + brightness).clamp(max=1)\n",
    )
    images, labels = batch("cpu")
    settings = AttackSettings(path, {"brightness": 0.25})
    assert torch.equal(perturb(settings.bind(), convnet("cpu"), images, labels), (images + 0.25).clamp(max=1))
    assert not settings.on_victim
    for wrong, message in (
        ({}, r"Expected the settings of mine.attack to be \['brightness'\]"),
        ({"brightness": -1}, "dark"),
        ({"brightness": "low"}, "Expected `brightness` of mine.attack to be float, but got 'low'"),
    ):
        with pytest.raises(ValueError, match=message):
            AttackSettings(path, wrong).bind()


def test_an_attack_of_ones_own_on_a_victim(own, hand_dknn):
    # It asks the victim for classes, of which there are three, and puts them where pixels were.
    path = own(
        "on_victim",
        "import lightning_advknn as advknn\n"
        "@advknn.attack(on='victim')\n"
        "def attack(victim, images, labels, *, surrogate):\n"
        "    classes = victim.predict(images)\n"
        "    return (classes / 2)[:, None, None, None].expand_as(images)\n",
    )
    settings = AttackSettings(path, through="dknnb")
    assert settings.on_victim
    images = torch.tensor([[0.05, 0.1], [0.95, 0.9]]).to(next(hand_dknn.buffers()).device)[:, None, None]
    labels = torch.zeros(2, dtype=torch.int64, device=images.device)
    expected = torch.tensor([0.0, 1.0], device=images.device)[:, None, None, None].expand_as(images)
    adversarial = perturb(partial(settings.bind(), surrogate=None), hand_dknn, images, labels)
    assert torch.equal(adversarial, expected)


@each_attack
def test_a_description_is_json(path):
    settings = AttackSettings(path, SETTINGS[path])
    settings.bind()
    described = settings.describe()
    assert json.loads(json.dumps(described)) == described
    assert described["settings"] == SETTINGS[path]
    assert described["function"] == path
