"""The network, its initialisation, and weights from files of every kind."""

import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import ResNet50_Weights, resnet50

from common.runtime import UserError
from resnet50 import ResNet50, SmallMapConv2d, initialise, load_network, read_weights
from tests.support import authors_state


def plain_forward(state, images):
    """The authors' network as plain function calls on their own names. Returns logits and layer3's output."""

    def norm(x, name):
        shape = (1, -1, 1, 1)
        mean, var = state[f"{name}.running_mean"].view(shape), state[f"{name}.running_var"].view(shape)
        scale, bias = state[f"{name}.weight"].view(shape), state[f"{name}.bias"].view(shape)
        return (x - mean) / (var + 1e-5).sqrt() * scale + bias

    def bottleneck(x, name, stride):
        y = norm(F.conv2d(x, state[f"{name}.conv1.weight"]), f"{name}.bn1").relu()
        y = norm(F.conv2d(y, state[f"{name}.conv2.weight"], stride=stride, padding=1), f"{name}.bn2").relu()
        y = norm(F.conv2d(y, state[f"{name}.conv3.weight"]), f"{name}.bn3")
        if f"{name}.downsample.0.weight" in state:
            x = norm(F.conv2d(x, state[f"{name}.downsample.0.weight"], stride=stride), f"{name}.downsample.1")
        return (y + x).relu()

    x = norm(F.conv2d(images, state["conv2.weight"], stride=2, padding=3), "bn1").relu()
    x = F.max_pool2d(x, 3, 2, 1)
    for layer, blocks in ((1, 3), (2, 4), (3, 6), (4, 3)):
        for block in range(blocks):
            x = bottleneck(x, f"layer{layer}.{block}", 2 if layer > 1 and block == 0 else 1)
        if layer == 3:
            features = x
    return x.mean((2, 3)) @ state["fclass.weight"].T + state["fclass.bias"], features


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("classes", [23, 15])
def test_released_weights_give_the_logits_of_a_plain_forward(tmp_path, prefix, classes):
    state = authors_state(classes, prefix)
    assert len(state) == 321
    torch.save(state, tmp_path / "baselinestuweight_alpha_29")
    network, description = load_network(tmp_path / "baselinestuweight_alpha_29", classes)
    images = torch.randn(2, 1, 64, 64)
    with torch.no_grad():
        logits, features = network.eval()(images)
        plain_logits, plain_features = plain_forward(authors_state(classes), images)
    assert description is None and logits.shape == (2, classes)
    assert torch.allclose(features, plain_features, rtol=1e-3, atol=1e-4 * plain_features.abs().max())
    assert torch.allclose(logits, plain_logits, rtol=1e-3, atol=1e-4 * plain_logits.abs().max())


def test_layer3_features_are_where_the_paper_has_them():
    network = ResNet50(23).eval()
    images = torch.randn(1, 1, 224, 224)
    with torch.no_grad():
        logits, features = network(images)
        assert features.shape == (1, 1024, 14, 14) and logits.shape == (1, 23)
        assert torch.equal(network.layer3_features(images), features)


def test_size_and_cost_of_the_network():
    network = ResNet50(23).eval()
    parameters = sum(parameter.numel() for parameter in network.parameters())
    assert parameters + 64 * 3 * 7 * 7 == pytest.approx(23.56e6, rel=1e-3)  # with the authors' unused stem
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.zeros(1, 1, 224, 224))
    assert counter.get_total_flops() == pytest.approx(8.02e9, rel=2e-3)


def test_convolutions_start_as_the_recipe_says():
    torch.manual_seed(0)
    network = ResNet50(5)
    for name in ("conv1", "layer3.2.conv2", "layer4.0.downsample.0"):
        weight = network.get_submodule(name).weight
        out, _, height, width = weight.shape
        assert weight.std().item() == pytest.approx(math.sqrt(2 / (height * width * out)), rel=0.05)
        assert abs(weight.mean().item()) < 0.1 * weight.std().item()
    assert network.bn1.weight.eq(1).all() and network.bn1.bias.eq(0).all()


def test_imagenet_weights_sum_the_stem_and_leave_the_classifier(monkeypatch, tmp_path):
    torch.manual_seed(3)
    state = resnet50().state_dict()
    monkeypatch.setattr(type(ResNet50_Weights.IMAGENET1K_V1), "get_state_dict", lambda self, **options: dict(state))
    network = ResNet50(7)
    classifier = network.fc.weight.clone()
    said, _ = initialise(network, "imagenet")
    assert "318 entries" in said and "fc.weight" in said
    assert torch.equal(network.conv1.weight, state["conv1.weight"].sum(1, keepdim=True))
    assert torch.equal(network.fc.weight, classifier)
    assert torch.equal(network.layer3[5].conv3.weight, state["layer3.5.conv3.weight"])
    torch.save(state, tmp_path / "resnet50-0676ba61.pth")
    from_file = ResNet50(7)
    assert "318 entries" in initialise(from_file, str(tmp_path / "resnet50-0676ba61.pth"))[0]
    assert torch.equal(from_file.conv1.weight, network.conv1.weight)


def test_imagenet_out_of_reach_says_what_to_do(monkeypatch):
    def refuse(self, **options):
        raise OSError("no network")

    monkeypatch.setattr(type(ResNet50_Weights.IMAGENET1K_V1), "get_state_dict", refuse)
    with pytest.raises(UserError, match="could not be fetched .*--init FILE"):
        initialise(ResNet50(3), "imagenet")


def test_a_checkpoint_of_this_project_brings_its_description(tmp_path):
    network = ResNet50(4)
    description = {"stage": "t1", "classes": [], "groups": {}, "preprocessing": {"image_size": 64}, "epoch": 3,
                   "selected_on": "val"}
    torch.save({"model": network.state_dict(), "description": description}, tmp_path / "best.pt")
    state, found = read_weights(tmp_path / "best.pt")
    assert found == description and torch.equal(state["fc.bias"], network.fc.bias)
    said, found = initialise(ResNet50(4), str(tmp_path / "best.pt"))
    assert found == description and said == f"all 320 entries from {tmp_path / 'best.pt'}, t1 at epoch 3"


@pytest.mark.parametrize("description", ["words", {"stage": "t1"}, None, 3])
def test_a_checkpoint_of_another_project_has_no_description(tmp_path, description):
    torch.save({"model": ResNet50(4).state_dict(), "description": description}, tmp_path / "model.pt")
    assert read_weights(tmp_path / "model.pt")[1] is None


def without(state, name):
    return {key: value for key, value in state.items() if key != name}


@pytest.mark.parametrize("change, complaint", [
    (lambda s: without(s, "layer2.1.bn1.bias"), "lacks layer2.1.bn1.bias"),
    (lambda s: without(without(s, "fc.bias"), "bn1.weight"), "lacks bn1.weight and 1 more"),
    (lambda s: {**s, "extra.weight": torch.zeros(1)}, "unknown extra.weight"),
    (lambda s: {**s, "bn1.bias": torch.zeros(3)}, r"bn1.bias has shape \(3,\); expected \(64,\)"),
    *[(lambda s, wrong=wrong: wrong, "not a state dict") for wrong in ([1, 2], {"a": 1}, {}, torch.zeros(3))],
])
def test_a_wrong_state_dict_is_named(tmp_path, change, complaint):
    torch.save(change(ResNet50(4).state_dict()), tmp_path / "weights.pt")
    with pytest.raises(UserError, match=complaint):
        load_network(tmp_path / "weights.pt", 4)


def test_another_class_count_is_named(tmp_path):
    torch.save(ResNet50(15).state_dict(), tmp_path / "weights.pt")
    with pytest.raises(UserError, match="is for 15 classes; the data set has 23"):
        load_network(tmp_path / "weights.pt", 23)


class Exploit:
    def __reduce__(self):
        return (open, ("exploited", "w"))


def test_a_pickle_that_would_run_code_is_refused_unrun(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"conv1.weight": Exploit()}, tmp_path / "weights.pt")
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps(Exploit(), protocol=2))
    for name in ("weights.pt", "plain.pkl"):
        with pytest.raises(UserError, match="not a usable checkpoint"):
            read_weights(tmp_path / name)
    assert not (tmp_path / "exploited").exists()


@pytest.mark.parametrize("keep", [0, 1, 100, 0.5, 0.999])
def test_a_truncated_checkpoint_is_one_error(tmp_path, keep):
    torch.save({"model": {"a": torch.randn(20_000)}}, tmp_path / "whole.pt")
    content = (tmp_path / "whole.pt").read_bytes()
    (tmp_path / "part.pt").write_bytes(content[:int(keep * len(content)) if 0 < keep < 1 else keep])
    with pytest.raises(UserError, match="not a usable checkpoint"):
        read_weights(tmp_path / "part.pt")


@pytest.mark.parametrize("size, stride, side", [(1, 1, 4), (1, 2, 8), (3, 1, 4), (3, 2, 8), (3, 1, 1), (3, 2, 5),
                                                (1, 1, 30), (3, 1, 7)])
def test_a_small_map_is_convolved_as_by_torch(size, stride, side):
    """Output and both gradients, below and above the size at which it becomes a matrix product."""
    torch.manual_seed(0)
    ours = SmallMapConv2d(6, 5, size, stride, padding=size // 2, bias=False)
    images, upstream = torch.randn(3, 6, side, side), None
    results = []
    for convolve in (ours, lambda x: F.conv2d(x, ours.weight, None, stride, size // 2)):
        inputs = images.clone().contiguous(memory_format=torch.channels_last).requires_grad_()
        output = convolve(inputs)
        upstream = torch.randn_like(output) if upstream is None else upstream
        ours.zero_grad()
        output.backward(upstream)
        results.append((output.detach(), inputs.grad, ours.weight.grad))
    for found, expected in zip(*results, strict=True):
        assert found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_only_training_on_a_cpu_takes_the_matrix_product(monkeypatch):
    taken = []
    linear = F.linear
    monkeypatch.setattr(F, "linear", lambda *given: taken.append(given[0].shape) or linear(*given))
    convolution = SmallMapConv2d(4, 4, 3, padding=1, bias=False)
    convolution(torch.zeros(1, 4, 4, 4))
    assert taken == [(1, 4, 4, 36)]
    convolution(torch.zeros(1, 4, 5, 5))
    convolution.eval()(torch.zeros(1, 4, 4, 4))
    assert len(taken) == 1
