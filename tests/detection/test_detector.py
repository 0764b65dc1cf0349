"""The network of a detector: its parts against plain convolutions, what is frozen, and where its weights start from."""

import copy

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torchvision.models import ResNet18_Weights
from torchvision.models.feature_extraction import create_feature_extractor

from common.runtime import UserError
from detection.assigners.atss import assign_by_atss
from detection.assigners.targets import ground_truth
from detection.data.transforms import MEAN, STD
from detection.geometry.anchors import make_anchors, pyramid_sizes
from detection.losses.gfl import gfl_losses
from detection.network.backbone import DEPTHS, Backbone, in_colour, initialise
from detection.network.detector import Architecture, Detector
from detection.network.gfl_head import GFLHead, flatten
from detection.network.pyramid import FeaturePyramid, StridedConv2d
from resnet50 import ResNet50

TINY = Architecture(depth=18, channels=32, tower_convs=1)
SIZES = ((8, 12), (4, 6), (2, 3), (1, 2), (1, 1))  # of 64 x 96
A = 129


@pytest.fixture(scope="module")
def tiny():
    """A detector that no test may change."""
    torch.manual_seed(0)
    return Detector(3, TINY).eval()


@pytest.fixture(scope="module")
def images():
    return torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def torchvisions():
    """The weights of torchvision's ResNet-18, random."""
    torch.manual_seed(1)
    return torchvision.models.resnet18().state_dict()


# ---- shapes and names ------------------------------------------------------------------------------------------------


def test_the_shapes_of_a_tiny_detector(tiny, images):
    with torch.no_grad():
        outputs = tiny(images)
    assert outputs.logits.shape == (2, A, 3) and outputs.edges.shape == (2, A, 4, 17) and outputs.quality is None
    assert outputs.sizes == SIZES == pyramid_sizes(64, 96)
    assert [tuple(feature.shape) for feature in outputs.features] == [(2, 32, *size) for size in SIZES]
    assert len(make_anchors(outputs.sizes).boxes) == A
    assert outputs.logits.isfinite().all() and outputs.edges.isfinite().all()


@pytest.mark.parametrize("quality", [False, True])
@pytest.mark.parametrize("classes, reg_max", [(1, 4), (5, 7)])
def test_classes_and_bins_and_quality(classes, reg_max, quality):
    with torch.no_grad():
        outputs = Detector(classes, Architecture(18, 32, 0, reg_max, quality))(torch.zeros(1, 3, 64, 96))
    assert outputs.logits.shape == (1, A, classes) and outputs.edges.shape == (1, A, 4, reg_max + 1)
    assert (outputs.quality.shape == (1, A, 1)) if quality else outputs.quality is None


def test_the_published_detector():
    assert Architecture() == Architecture(50, 256, 4, 16, False)
    with torch.device("meta"):
        network = Detector(80, Architecture())
        outputs = network(torch.zeros(1, 3, 800, 1344))
    assert outputs.logits.shape == (1, 22_400, 80) and outputs.edges.shape == (1, 22_400, 4, 17)
    assert all(feature.shape[1] == 256 for feature in outputs.features)
    assert [convolution.in_channels for convolution in network.neck.lateral] == [512, 1024, 2048]
    assert len(network.head.class_tower) == len(network.head.box_tower) == 4


@pytest.mark.parametrize("depth", DEPTHS)
def test_the_backbone_has_the_entries_of_torchvision_without_the_classifier(depth):
    with torch.device("meta"):
        ours, theirs = Backbone(depth, frozen=False), getattr(torchvision.models, f"resnet{depth}")()
        maps = ours(torch.zeros(1, 3, 64, 64))
    shapes = {name: value.shape for name, value in theirs.state_dict().items() if not name.startswith("fc.")}
    assert {name: value.shape for name, value in ours.state_dict().items()} == shapes
    assert [tuple(each.shape[1:]) for each in maps] == [(count, 8 // 2**i, 8 // 2**i)
                                                        for i, count in enumerate(ours.out_channels)]


def test_the_backbone_computes_what_torchvision_computes(tiny, images):
    theirs = torchvision.models.resnet18()
    theirs.load_state_dict({**theirs.state_dict(), **tiny.backbone.state_dict()})
    theirs = create_feature_extractor(theirs.eval(), ["layer2", "layer3", "layer4"])
    with torch.no_grad():
        for ours, expected in zip(tiny.backbone(images), theirs(images).values(), strict=True):
            assert torch.allclose(ours, expected, atol=1e-5)


# ---- feature pyramid -------------------------------------------------------------------------------------------------


def test_the_pyramid_against_plain_convolutions():
    torch.manual_seed(2)
    neck = FeaturePyramid((3, 5, 7), 4)
    maps = [torch.randn(2, 3, 12, 8), torch.randn(2, 5, 6, 4), torch.randn(2, 7, 3, 2)]
    with torch.no_grad():
        found = neck(maps)
        c3, c4, c5 = (F.conv2d(each, layer.weight, layer.bias) for each, layer in zip(maps, neck.lateral, strict=True))
        c4 = c4 + c5.repeat_interleave(2, 2).repeat_interleave(2, 3)
        c3 = c3 + c4.repeat_interleave(2, 2).repeat_interleave(2, 3)
        expected = [F.conv2d(each, layer.weight, layer.bias, padding=1)
                    for each, layer in zip((c3, c4, c5), neck.output, strict=True)]
        for layer in neck.extra:  # P6 of P5, P7 of P6
            expected.append(F.conv2d(expected[-1], layer.weight, layer.bias, stride=2, padding=1))
    for level, each in zip(found, expected, strict=True):
        assert torch.allclose(level, each, atol=1e-5)
    rectified = F.conv2d(found[3].relu(), neck.extra[1].weight, neck.extra[1].bias, stride=2, padding=1)
    assert found[3].min() < 0 and not torch.allclose(found[4], rectified, atol=1e-3)  # no ReLU between P6 and P7


def test_the_pyramid_starts_as_xavier_says():
    torch.manual_seed(3)
    neck = FeaturePyramid((64, 64, 64), 64)
    for layer in (*neck.lateral, *neck.output, *neck.extra):
        fan = 64 * layer.kernel_size[0] ** 2
        assert layer.weight.abs().max().item() == pytest.approx((6 / (2 * fan)) ** 0.5, rel=0.02)
        assert layer.bias.abs().max() == 0


# ---- head ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 2])
def test_the_gradient_of_a_strided_convolution_in_bf16_is_near_that_in_fp32(width):
    torch.manual_seed(0)
    convolution, feature, gradients = StridedConv2d(64, 64), torch.randn(2, 64, 4, width), []
    for enabled in (True, False) * 4:
        spoilt = torch.full((64 * 64 * 9,), torch.nan, dtype=torch.bfloat16)
        del spoilt  # memory that is freed is what a gradient that is not set would be made of
        with torch.autocast("cpu", torch.bfloat16, enabled):
            loss = convolution(feature).float().square().mean()
        gradients.append(torch.autograd.grad(loss, convolution.weight)[0])
    for gradient in gradients:
        torch.testing.assert_close(gradient, gradients[1], rtol=0.1, atol=0.02 * gradients[1].abs().max().item())


@pytest.fixture
def head():
    torch.manual_seed(4)
    return GFLHead(3, channels=32, tower_convs=2, reg_max=5, quality=True)


@pytest.fixture
def pyramid():
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(2, 32, *size, generator=generator) for size in SIZES]


def test_the_head_against_plain_convolutions(head, pyramid):
    """Both towers, and where each number of a location goes."""
    for norm in (module for module in head.modules() if isinstance(module, torch.nn.GroupNorm)):
        torch.nn.init.normal_(norm.weight, 1, 0.2)
        torch.nn.init.normal_(norm.bias, 0, 0.2)
    torch.nn.init.normal_(head.regress.bias)
    with torch.no_grad():
        head.scales.copy_(torch.tensor([0.5, 1, 2, 3, 4]))
        outputs, start = head(pyramid), 0
        for level, feature in enumerate(pyramid):
            towers = []
            for tower in (head.class_tower, head.box_tower):
                x = feature
                for convolution, norm, _ in tower:
                    assert convolution.bias is None
                    x = F.relu(F.group_norm(F.conv2d(x, convolution.weight, padding=1), 32, norm.weight, norm.bias))
                towers.append(x)
            logits, edges = (F.conv2d(x, layer.weight, layer.bias, padding=1)
                             for x, layer in zip(towers, (head.classify, head.regress), strict=True))
            for i, row, column in ((0, 0, 0), (1, 0, SIZES[level][1] - 1), (0, SIZES[level][0] - 1, 0)):
                a = start + row * SIZES[level][1] + column
                assert torch.allclose(outputs.logits[i, a], logits[i, :, row, column], atol=1e-5)
                for side in range(4):  # the numbers of the left side come first, then top, right and bottom
                    own = edges[i, 6 * side:6 * side + 6, row, column] * head.scales[level]
                    assert torch.allclose(outputs.edges[i, a, side], own, atol=1e-5)
            start += SIZES[level][0] * SIZES[level][1]
    assert start == outputs.logits.shape[1] == A


def test_the_quality_against_a_loop(head, pyramid):
    for layer, deviation in ((head.regress, 0.2), (head.quality[0], 1), (head.quality[2], 0.2)):
        torch.nn.init.normal_(layer.weight, std=deviation)
    with torch.no_grad():
        outputs = head(pyramid)
        for i, a in ((0, 0), (1, 17), (0, 100), (1, A - 1)):
            statistics = []
            for side in outputs.edges[i, a].softmax(dim=1).tolist():
                top = sorted(side, reverse=True)[:4]
                statistics += [*top, sum(top) / 4]
            hidden = (head.quality[0].weight[:, :, 0, 0] @ torch.tensor(statistics) + head.quality[0].bias).relu()
            expected = (head.quality[2].weight[:, :, 0, 0] @ hidden + head.quality[2].bias).sigmoid()
            assert torch.allclose(outputs.quality[i, a], expected, atol=1e-5)
    assert outputs.quality.std() > 0.01 and 0 < outputs.quality.min() < outputs.quality.max() < 1


def test_every_score_starts_at_1_percent(tiny, images):
    with torch.no_grad():
        scores = tiny(images).logits.sigmoid()
    assert tiny.head.classify.bias.tolist() == pytest.approx([-4.59512] * 3, abs=1e-5)
    assert scores.mean().item() == pytest.approx(0.01, rel=0.1) and scores.max() < 0.03
    assert tiny.head.scales.tolist() == [1] * 5 and tiny.head.regress.bias.abs().max() == 0
    assert tiny.head.classify.weight.std().item() == pytest.approx(0.01, rel=0.1)
    assert tiny.head.box_tower[0][0].weight.std().item() == pytest.approx(0.01, rel=0.1)


def test_locations_row_by_row():
    feature = torch.arange(2 * 6 * 3 * 4).view(2, 6, 3, 4)
    found = flatten(feature, 2)
    assert found.shape == (2, 12, 2, 3)
    assert found[1, 4 * 2 + 3, 1].tolist() == feature[1, 3:, 2, 3].tolist()


def test_under_bf16_the_outputs_are_fp32_and_near(tiny, images):
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = tiny(images)
    assert outputs.logits.dtype == outputs.edges.dtype == torch.float32
    with torch.no_grad():
        assert torch.allclose(outputs.logits, tiny(images).logits, atol=0.1)


# ---- what is trained -------------------------------------------------------------------------------------------------


def one_step(network, images):
    """A step of SGD on a batch; returns the state dicts before and after it."""
    before = copy.deepcopy(network.state_dict())
    network.train()
    outputs = network(images)
    anchors = make_anchors(outputs.sizes)
    boxes = torch.tensor([[4.0, 6, 80, 60], [1, 1, 50, 50]])
    targets = assign_by_atss(anchors, ground_truth(boxes, torch.tensor([0, 2]), [1, 1], [(64, 96)] * 2, 3))
    sum(gfl_losses(outputs, targets, anchors).values()).backward()
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    torch.optim.SGD(parameters, lr=0.1, weight_decay=0.01).step()
    return before, network.state_dict()


FROZEN = ("backbone.conv1.", "backbone.bn1.", "backbone.layer1.")


def test_a_frozen_resnet_learns_from_layer2_on_and_keeps_all_statistics(tiny, images):
    network = Detector(3, TINY, frozen=True)
    network.load_state_dict(tiny.state_dict())
    before, after = one_step(network, images)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    kept = {name for name in before if name.startswith(FROZEN)
            or name.rsplit(".")[-1] in ("running_mean", "running_var", "num_batches_tracked")}
    unused = {f"neck.extra.{i}.{kind}" for i in range(2) for kind in ("weight", "bias")}
    assert not changed & kept
    assert set(before) - kept - unused <= changed
    assert {"backbone.layer2.0.bn1.weight", "backbone.layer4.1.bn2.bias", "head.scales"} <= changed
    assert all(parameter.grad is None for name, parameter in network.named_parameters() if name.startswith(FROZEN))


def test_a_resnet_from_scratch_learns_everything(tiny, images):
    network = Detector(3, TINY)
    network.load_state_dict(tiny.state_dict())
    before, after = one_step(network, images)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name for name in before if name.startswith("backbone.")} <= changed


def test_a_frozen_resnet_is_in_training_mode_but_for_its_batch_norms():
    with torch.device("meta"):
        network = Detector(3, TINY, frozen=True).train()
    assert network.training and network.backbone.layer3.training and not network.backbone.layer3[0].bn2.training
    assert not network.eval().backbone.layer3.training


# ---- where the weights of the ResNet come from -----------------------------------------------------------------------


@pytest.fixture
def backbone():
    return Backbone(18, frozen=True)


def saved(state, path):
    torch.save(state, path)
    return str(path)


def without(state, ending):
    return {name: value for name, value in state.items() if not name.endswith(ending)}


def assert_holds(backbone, state):
    for name, value in backbone.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_no_weights_leave_the_backbone_alone(backbone):
    before = copy.deepcopy(backbone.state_dict())
    assert initialise(backbone, "none") == "random weights"
    assert_holds(backbone, before)


def test_a_file_of_torchvision(backbone, torchvisions, tmp_path):
    path = saved(torchvisions, tmp_path / "resnet18-f37072fd.pth")
    assert initialise(backbone, path) == f"120 entries from {path}"
    assert_holds(backbone, torchvisions)


def test_imagenet_weights_as_torchvision_has_them(backbone, torchvisions, monkeypatch):
    """Those from before num_batches_tracked was counted are without it."""
    kind = type(ResNet18_Weights.IMAGENET1K_V1)
    monkeypatch.setattr(kind, "get_state_dict", lambda self, **options: without(torchvisions, "num_batches_tracked"))
    assert initialise(backbone, "imagenet") == "120 entries from imagenet"
    assert_holds(backbone, torchvisions)


def test_imagenet_out_of_reach_says_what_to_do(backbone, monkeypatch):
    def refuse(self, **options):
        raise OSError("no network")

    monkeypatch.setattr(type(ResNet18_Weights.IMAGENET1K_V1), "get_state_dict", refuse)
    with pytest.raises(UserError, match=r"could not be fetched \(no network\).*resnet18-.*--init FILE.*--init none"):
        initialise(backbone, "imagenet")


def test_weights_that_do_not_fit_are_named(backbone, torchvisions, tmp_path):
    before = copy.deepcopy(backbone.state_dict())
    with torch.device("meta"):
        deeper = list(Backbone(34, frozen=False).state_dict())
    scalar = torch.zeros(())
    cases = {
        r"holds the unknown layer1\.2\.conv1\.weight and \d+ more; .* ResNet-18": dict.fromkeys(deeper, scalar),
        r"lacks layer4\.1\.conv2\.weight; expected the 120 entries": without(torchvisions, "layer4.1.conv2.weight"),
        r"holds the unknown odd; expected": {**torchvisions, "odd": scalar},
        r"bn1\.bias has shape \(3,\); expected \(64,\)": {**torchvisions, "bn1.bias": torch.zeros(3)},
        r"conv1\.weight has shape \(64, 1, 3, 3\)": {**torchvisions, "conv1.weight": torch.zeros(64, 1, 3, 3)},
        r"lacks bn1\.running_mean": {**without(torchvisions, "bn1.running_mean"),
                                     "conv1.weight": torch.zeros(64, 1, 7, 7)},
    }
    for complaint, state in cases.items():
        path = saved(state, tmp_path / "odd.pth")
        with pytest.raises(UserError, match=complaint) as error:
            initialise(backbone, path)
        assert path in str(error.value) and "\n" not in str(error.value)
    assert_holds(backbone, before)


def test_files_that_hold_no_weights(backbone, torchvisions, tmp_path):
    path = saved(torchvisions, tmp_path / "cut.pth")
    with open(path, "r+b") as file:
        file.truncate(100_000)
    with pytest.raises(UserError, match=r"cut\.pth: not a usable checkpoint \(truncated"):
        initialise(backbone, path)
    with pytest.raises(UserError, match=r"absent\.pth: no such checkpoint"):
        initialise(backbone, str(tmp_path / "absent.pth"))
    with pytest.raises(UserError, match="not a state dict"):
        initialise(backbone, saved([torch.zeros(3)], tmp_path / "list.pth"))


def test_a_recognition_network_sees_the_grey_of_the_colours(tmp_path):
    torch.manual_seed(6)
    grey_network = ResNet50(7).eval()
    for name in ("running_mean", "bias"):
        torch.nn.init.normal_(getattr(grey_network.bn1, name))
    state = grey_network.state_dict()
    path = saved({"model": state, "description": {"stage": "baseline"}}, tmp_path / "best.pt")
    backbone = Backbone(50, frozen=True).eval()
    assert initialise(backbone, path) == f"318 entries from {path} (its grey stem sees the grey of the colours)"
    for name, value in backbone.state_dict().items():
        assert name in ("conv1.weight", "bn1.running_mean") or torch.equal(value, state[name])
    pixels = torch.randint(0, 256, (1, 3, 40, 48), generator=torch.Generator().manual_seed(7)).float()
    colours = [pixels, pixels[:, :1].expand(-1, 3, -1, -1)]  # of a colour picture, and of a grey one
    greys = [0.299 * pixels[:, 0:1] + 0.587 * pixels[:, 1:2] + 0.114 * pixels[:, 2:3], pixels[:, :1]]
    for colour, grey in zip(colours, greys, strict=True):
        mean, std = (torch.tensor(values)[None, :, None, None] for values in (MEAN, STD))
        with torch.no_grad():
            ours = backbone.bn1(backbone.conv1((colour - mean) / std))
            theirs = grey_network.bn1(grey_network.conv1(2 * grey / 255 - 1))
        inner = (..., slice(2, -2), slice(2, -2))  # the padding is another grey to each
        assert theirs.std() > 0.1 and torch.allclose(ours[inner], theirs[inner], atol=1e-4)
        assert not torch.allclose(ours, theirs, atol=1e-2)


def test_the_weights_given_are_not_changed():
    state = {"conv1.weight": torch.randn(64, 1, 7, 7), "bn1.running_mean": torch.randn(64)}
    before = copy.deepcopy(state)
    found = in_colour(state)
    assert found["conv1.weight"].shape == (64, 3, 7, 7)
    assert all(torch.equal(state[name], before[name]) for name in state)
