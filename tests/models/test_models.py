"""Networks against shapes from the literature, forward passes by hand, and linear algebra in NumPy."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_advknn.models import (
    ConvNet,
    DkNNB,
    FeatureNetwork,
    LeNet5,
    LibraryNetwork,
    Normalize,
    Surrogate,
)

LAYERS = ("relu1", "relu2", "relu3", "logits")


def images(device, *shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)).to(device)


@pytest.mark.parametrize(
    ("shape", "sizes", "maps"),
    [
        # floor((size + 2 padding - kernel) / stride) + 1, three times
        ((1, 28, 28), [12544, 6272, 1152, 10], [(64, 14, 14), (128, 7, 7), (128, 3, 3)]),
        ((3, 32, 32), [16384, 8192, 2048, 10], [(64, 16, 16), (128, 8, 8), (128, 4, 4)]),
        ((1, 20, 20), [6400, 3200, 128, 10], [(64, 10, 10), (128, 5, 5), (128, 1, 1)]),
    ],
)
def test_convnet_has_the_papers_layers(device, shape, sizes, maps):
    network = ConvNet(shape, mean=[0.5] * shape[0], std=[0.25] * shape[0]).to(device)
    outputs = []
    for name in ("conv1", "conv2", "conv3"):
        network.get_submodule(name).register_forward_hook(
            lambda _m, _i, output: outputs.append(output.shape[1:])
        )
    features = FeatureNetwork(network, LAYERS).features(images(device, 2, *shape))
    assert [tuple(output) for output in outputs] == maps
    assert {name: tuple(rows.shape) for name, rows in features.items()} == {
        name: (2, size) for name, size in zip(LAYERS, sizes, strict=True)
    }
    for name in LAYERS[:3]:
        assert features[name].min() == 0, "features are taken after the ReLU"


def test_convnet_is_this_function(device):
    network = ConvNet((3, 32, 32), num_classes=4, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7)).to(device)
    p = network.state_dict()
    x = images(device, 2, 3, 32, 32)
    h = (x - torch.tensor([0.1, 0.2, 0.3], device=device)[:, None, None]) / torch.tensor(
        [0.5, 0.6, 0.7], device=device
    )[:, None, None]
    h1 = F.relu(F.conv2d(h, p["conv1.weight"], p["conv1.bias"], stride=2, padding=3))
    h2 = F.relu(F.conv2d(h1, p["conv2.weight"], p["conv2.bias"], stride=2, padding=2))
    h3 = F.relu(F.conv2d(h2, p["conv3.weight"], p["conv3.bias"]))
    logits = h3.flatten(1) @ p["logits.weight"].T + p["logits.bias"]
    found, features = FeatureNetwork(network, LAYERS).logits_and_features(x)
    torch.testing.assert_close(found, logits)
    for layer, expected in zip(LAYERS, (h1, h2, h3, logits), strict=True):
        torch.testing.assert_close(features[layer], expected.flatten(1))
    torch.testing.assert_close(network(x), logits)


@pytest.mark.parametrize(
    ("shape", "mean", "std"),
    [
        ((1, 10, 10), (0.0,), (1.0,)),
        ((3, 32, 32), (0.1, 0.2), (1.0, 1.0)),
        ((3, 19, 32), (0.0,) * 3, (1.0,) * 3),
    ],
)
def test_convnet_of_impossible_images(shape, mean, std):
    with pytest.raises(
        ValueError, match=r"at least 20x20 pixels and one `mean` for each channel, but got \(.*\) and \(.*\)"
    ):
        ConvNet(shape, mean=mean, std=std)


def test_lenet5_is_this_function(device):
    network = LeNet5(num_classes=7, mean=(0.3,), std=(0.4,)).to(device)
    p = network.state_dict()
    x = images(device, 3, 1, 28, 28)
    h1 = F.relu(F.conv2d((x - 0.3) / 0.4, p["conv1.weight"], p["conv1.bias"], padding=2))
    h2 = F.relu(F.conv2d(F.max_pool2d(h1, 2), p["conv2.weight"], p["conv2.bias"]))
    h3 = F.relu(F.linear(F.max_pool2d(h2, 2).flatten(1), p["fc1.weight"], p["fc1.bias"]))
    h4 = F.relu(F.linear(h3, p["fc2.weight"], p["fc2.bias"]))
    logits = F.linear(h4, p["logits.weight"], p["logits.bias"])
    layers = ("relu1", "relu2", "relu3", "relu4", "logits")
    features = FeatureNetwork(network, layers).features(x)
    for layer, expected in zip(layers, (h1, h2, h3, h4, logits), strict=True):
        torch.testing.assert_close(features[layer], expected.flatten(1))
    assert [rows.shape[1] for rows in features.values()] == [6 * 28 * 28, 16 * 10 * 10, 120, 84, 7]
    # LeCun's C1, C3, C5, F6 and output: 156 + 2416 + 48120 + 10164 + 595 parameters
    assert sum(parameter.numel() for parameter in network.parameters()) == 61_451


def test_normalize_by_hand(device):
    layer = Normalize(mean=(0.5, 0.0), std=(0.5, 0.1)).to(device)
    x = torch.tensor([[[[0.0, 1.0]], [[0.0, 0.2]]]], device=device)
    torch.testing.assert_close(layer(x), torch.tensor([[[[-1.0, 1.0]], [[0.0, 2.0]]]], device=device))
    assert not list(layer.parameters())
    assert set(layer.state_dict()) == {"mean", "std"}, "the statistics travel with the weights"


@pytest.mark.parametrize(
    ("mean", "std"), [((0.0, 0.0), (1.0,)), ((0.0,), (0.0,)), ((0.0,), (-1.0,)), ((), ())]
)
def test_normalize_refuses(mean, std):
    with pytest.raises(ValueError, match="one `mean` and one positive `std` for each channel, but got"):
        Normalize(mean, std)


@pytest.mark.parametrize(
    ("mean", "std"),
    [
        ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),  # ImageNet's, of pixels from 0 to 255
        ((0.485, 0.456, 0.406), (58.395, 57.12, 57.375)),
        ((0.5, 0.5, 116.28), (0.5, 0.5, 0.5)),
        ((-1.0,), (1.0,)),
        ((1.01,), (1.0,)),
        ((0.5,), (1.01,)),
        ((float("nan"),), (1.0,)),
        ((0.5,), (float("nan"),)),
        ((0.5,), (float("inf"),)),
    ],
)
def test_means_and_deviations_are_of_images_in_the_unit_interval(mean, std):
    for make in (
        Normalize,
        lambda mean, std: ConvNet((len(mean), 28, 28), mean=mean, std=std),
        lambda mean, std: LibraryNetwork("torch.nn.Flatten", mean=mean, std=std),
        *([lambda mean, std: LeNet5(mean=mean, std=std)] if len(mean) == 1 else []),
    ):
        with pytest.raises(ValueError, match=r"`mean` and `std` in \[0, 1\].*divide both by 255"):
            make(mean, std)


def test_the_largest_means_and_deviations():
    # The mean of an all-white and of an all-black channel: the extremes for images in [0, 1].
    assert Normalize((1.0, 0.0), (1.0, 1e-3)).mean.flatten().tolist() == [1.0, 0.0]


def test_features_keep_the_order_that_was_asked_for(device):
    network = ConvNet().to(device)
    features = FeatureNetwork(network, ["logits", "relu1"]).features(images(device, 1, 1, 28, 28))
    assert list(features) == ["logits", "relu1"]
    assert FeatureNetwork(network, ["logits", "relu1"]).layers == ("logits", "relu1")


def test_features_of_a_nested_submodule(device):
    network = nn.Sequential(nn.Sequential(nn.Flatten(), nn.Linear(4, 3)), nn.Linear(3, 2)).to(device)
    x = images(device, 5, 1, 2, 2)
    features = FeatureNetwork(network, ["0.1"]).features(x)["0.1"]
    torch.testing.assert_close(features, network[0](x))


def test_feature_network_forwards_its_network_and_differentiates(device):
    network = ConvNet().to(device)
    wrapped = FeatureNetwork(network, LAYERS)
    x = images(device, 2, 1, 28, 28).requires_grad_()
    torch.testing.assert_close(wrapped(x), network(x))
    (gradient,) = torch.autograd.grad(wrapped.features(x)["relu3"].sum(), x)
    (expected,) = torch.autograd.grad(nn.Sequential(*list(network)[:7])(x).sum(), x)
    torch.testing.assert_close(gradient, expected)
    assert gradient.abs().max() > 0


def test_hooks_are_gone_afterwards(device):
    network = ConvNet().to(device)
    wrapped = FeatureNetwork(network, LAYERS)
    wrapped.features(images(device, 1, 1, 28, 28))
    with pytest.raises(RuntimeError):  # in the linear layer, after three hooks have fired
        wrapped.features(images(device, 1, 1, 40, 40))
    assert not any(module._forward_hooks for module in network.modules())


@pytest.mark.parametrize("layers", [["relu9"], ["relu1", "relu4"], [], ["relu1", "relu1"], [""]])
def test_unknown_layers_list_the_known_ones(layers):
    with pytest.raises(ValueError, match="Expected distinct `layers` of the network, but got") as caught:
        FeatureNetwork(ConvNet(), layers)
    for name in ("normalize", "conv1", "relu1", "relu2", "relu3", "flatten", "logits"):
        assert f"'{name}'" in str(caught.value)


def test_dknnb_is_one_linear_layer(device):
    block = DkNNB(6, 3).to(device)
    rows = images(device, 4, 6)
    expected = rows.cpu().numpy() @ block.weight.detach().cpu().numpy().T + block.bias.detach().cpu().numpy()
    np.testing.assert_allclose(block(rows).detach().cpu(), expected, rtol=1e-5, atol=1e-6)
    assert [tuple(parameter.shape) for parameter in block.parameters()] == [(3, 6), (3,)]


@pytest.mark.parametrize(("layer", "size"), [("relu1", 12544), ("relu3", 1152), ("logits", 10)])
def test_surrogate_is_linear_on_the_layers_raw_features(device, layer, size):
    network, block = ConvNet().to(device), DkNNB(size, 10).to(device)
    surrogate = Surrogate(network, layer, block)
    x = images(device, 3, 1, 28, 28)
    modules = list(network)[: 1 + [name for name, _ in network.named_children()].index(layer)]
    rows = nn.Sequential(*modules)(x)
    expected = rows.flatten(1).double() @ block.weight.double().T + block.bias.double()
    torch.testing.assert_close(surrogate(x).double(), expected, rtol=1e-4, atol=1e-5)


def test_surrogate_by_hand(device):
    # features: x + 1 and -x after the ReLU; scores: 2 f0 + 1 and f0 - f1
    network = nn.Sequential(nn.Flatten(), nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 2)).to(device)
    block = DkNNB(2, 2).to(device)
    with torch.no_grad():
        network[1].weight.copy_(torch.tensor([[1.0], [-1.0]]))
        network[1].bias.copy_(torch.tensor([1.0, 0.0]))
        block.weight.copy_(torch.tensor([[2.0, 0.0], [1.0, -1.0]]))
        block.bias.copy_(torch.tensor([1.0, 0.0]))
    surrogate = Surrogate(network, "2", block)
    x = torch.tensor([[0.5], [0.0], [1.0]], device=device).view(3, 1, 1, 1)
    assert surrogate(x).tolist() == [[4, 1.5], [3, 1], [5, 2]]
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(surrogate(x)[:, 0].sum(), x)
    assert gradient.flatten().tolist() == [2, 2, 2]


def test_layers_that_give_no_features_are_named():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.pair, self.unused, self.logits = Pair(), nn.ReLU(), nn.Linear(4, 2)

        def forward(self, images):
            return self.logits(self.pair(images.flatten(1))[0])

    class Pair(nn.Module):
        def forward(self, images):
            return images, images

    images = torch.rand(3, 1, 2, 2)
    with pytest.raises(ValueError, match=r"it skips \['unused'\]"):
        FeatureNetwork(Odd(), ["logits", "unused"]).features(images)
    with pytest.raises(ValueError, match="layer 'pair' to give a tensor, but got a tuple"):
        FeatureNetwork(Odd(), ["pair"]).features(images)


def test_an_in_place_layer_does_not_change_earlier_features():
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.ReLU(inplace=True))
    images = torch.rand(5, 1, 2, 2) - 0.5
    features = FeatureNetwork(network, ["1"]).features(images)["1"]
    assert torch.equal(features, network[1](images.flatten(1)))
    assert (features < 0).any()


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")  # deprecated, but still in use
@pytest.mark.parametrize(
    "made", [torch.jit.script, lambda network: torch.jit.trace(network, torch.rand(1, 2, 2))]
)
def test_layers_of_torchscript_are_refused(made):
    network = made(nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).eval())
    with pytest.raises(ValueError, match=r"ordinary modules, but \['1'\] are TorchScript"):
        FeatureNetwork(network, ["1"])
