"""The relatives of the ResNet: ResNeXt, Res2Net and deformable convolutions, against loops over groups, parts and
pixels; mmdetection's checkpoints of them; and runs of detectors on them."""

import json
import math
import re
from itertools import product

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.resnet import Bottleneck

from common.runtime import UserError
from common.weights import cast_convolutions, fold_batch_norm
from demo.draw_scenes import write_demo
from detection import convert, train_gfl, train_ld
from detection.checkpoint import load_detector
from detection.network.backbone import DEPTHS, Backbone, initialise
from detection.network.deformable import ModulatedDeformConv2d
from detection.network.detector import Architecture, Detector
from tests.support import QUICK_DETECTOR, error_line, norm_entries, random_entries, run_detector, run_tool

FEW = [2, 2, 1, 1]  # blocks of the layers of a backbone of "depth 50", so that it is small
CASES = [("resnet", "c3-c5"), ("resnext", "c4-c5"), ("res2net", "c3-c5")]


@pytest.fixture
def few_blocks(monkeypatch):
    monkeypatch.setitem(DEPTHS, 50, (Bottleneck, FEW, DEPTHS[50][2]))


# ---- what mmdetection writes -----------------------------------------------------------------------------------------


def backbone_entries(blocks, family, deformable):
    """(name, shape) of every entry of a backbone of bottlenecks. deformable: numbers of the layers."""
    def convolution(name, outputs, inputs, size):
        yield f"{name}.weight", (outputs, inputs, size, size)

    if family == "res2net":
        for number, (outputs, inputs) in enumerate(((32, 3), (32, 32), (64, 32))):
            yield from convolution(f"stem.{3 * number}", outputs, inputs, 3)
            yield from norm_entries(f"stem.{3 * number + 1}", outputs)
    else:
        yield from convolution("conv1", 64, 3, 7)
        yield from norm_entries("bn1", 64)
    into = 64
    for layer, count in enumerate(blocks, 1):
        planes = 32 * 2**layer
        parts, width = {"resnet": (1, planes), "resnext": (32, planes // 16), "res2net": (4, planes * 26 // 64)}[family]
        inner = parts * width
        middle = [("conv2", "bn2", inner)]
        if family == "res2net":
            middle = [(f"convs.{number}", f"bns.{number}", width) for number in range(3)]
        for block in range(count):
            name = f"layer{layer}.{block}"
            yield from convolution(f"{name}.conv1", inner, into, 1)
            yield from norm_entries(f"{name}.bn1", inner)
            for each, its_norm, channels in middle:
                yield from convolution(f"{name}.{each}", channels, width, 3)
                yield from norm_entries(f"{name}.{its_norm}", channels)
                if layer in deformable:
                    yield from convolution(f"{name}.{each}.conv_offset", 27, channels, 3)
                    yield f"{name}.{each}.conv_offset.bias", (27,)
            yield from convolution(f"{name}.conv3", 4 * planes, inner, 1)
            yield from norm_entries(f"{name}.bn3", 4 * planes)
            if block == 0:
                first = 1 if family == "res2net" else 0  # a pooling, which has no entries, comes before
                yield from convolution(f"{name}.downsample.{first}", 4 * planes, into, 1)
                yield from norm_entries(f"{name}.downsample.{first + 1}", 4 * planes)
            into = 4 * planes


def entries(blocks, family, dcn):
    """(name, shape) of every entry of a small GFL detector; those of neck and head are tested elsewhere."""
    deformable = {"none": (), "c3-c5": (2, 3, 4), "c4-c5": (3, 4)}[dcn]
    with torch.device("meta"):
        rest = convert.to_mmdet(Detector(3, Architecture(50, 64, 1)).state_dict())
    yield from ((f"backbone.{name}", shape) for name, shape in backbone_entries(blocks, family, deformable))
    yield from ((name, tuple(value.shape)) for name, value in rest.items() if not name.startswith("backbone."))


# ---- a forward pass without modules ----------------------------------------------------------------------------------


def bilinear(image, y, x):
    """The (C,) values of an image (C, H, W) at a place between its pixels, 0 outside of it."""
    top, left = math.floor(y), math.floor(x)
    value = torch.zeros(len(image))
    for row, column in product((top, top + 1), (left, left + 1)):
        if 0 <= row < image.shape[1] and 0 <= column < image.shape[2]:
            value += (1 - abs(y - row)) * (1 - abs(x - column)) * image[:, row, column]
    return value


def slow_deformable(x, offsets, weight, stride, groups):
    """y(p) = sum_k w_k m_k x(p + p_k + d_k), pixel by pixel. x: (1, C, H, W). offsets: (1, 27, H', W'): d as (dy, dx)
    of each place of the kernel, row by row, then the logits of m."""
    image, weights, outputs = x[0], weight.chunk(groups), torch.zeros(1, len(weight), *offsets.shape[2:])
    for row, column, k in product(range(offsets.shape[2]), range(offsets.shape[3]), range(9)):
        dy, dx, logit = (offsets[0, index, row, column].item() for index in (2 * k, 2 * k + 1, 18 + k))
        sample = bilinear(image, stride * row - 1 + k // 3 + dy, stride * column - 1 + k % 3 + dx)
        parts = [own[:, :, k // 3, k % 3] @ part for own, part in zip(weights, sample.chunk(groups), strict=True)]
        outputs[0, :, row, column] += torch.cat(parts) / (1 + math.exp(-logit))
    return outputs


def slow_backbone(state, family, x):
    """C3, C4, C5 of one image."""
    def normalised(name, x):
        return F.batch_norm(x, *(state[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")))

    def convolved(name, x, stride=1):
        """3x3, group by group; deformable if it has offsets."""
        weight = state[f"{name}.weight"]
        groups = x.shape[1] // weight.shape[1]
        if f"{name}.conv_offset.weight" in state:
            offsets = F.conv2d(x, state[f"{name}.conv_offset.weight"], state[f"{name}.conv_offset.bias"], stride, 1)
            return slow_deformable(x, offsets, weight, stride, groups)
        return torch.cat([F.conv2d(part, own, None, stride, 1)
                          for part, own in zip(x.chunk(groups, 1), weight.chunk(groups), strict=True)], 1)

    def middle(name, x, stride, first):
        if family != "res2net":
            return F.relu(normalised(f"{name}.bn2", convolved(f"{name}.conv2", x, stride)))
        x1, x2, x3, x4 = x.chunk(4, 1)
        scale = [lambda x, number=number: F.relu(normalised(
            f"{name}.bns.{number}", convolved(f"{name}.convs.{number}", x, stride))) for number in range(3)]
        y1 = scale[0](x1)
        y2 = scale[1](x2 if first else x2 + y1)
        y3 = scale[2](x3 if first else x3 + y2)
        return torch.cat([y1, y2, y3, F.avg_pool2d(x4, 3, 2, 1) if stride == 2 else x4], 1)

    if family == "res2net":
        for number, stride in ((0, 2), (3, 1), (6, 1)):
            x = F.conv2d(x, state[f"stem.{number}.weight"], None, stride, 1)
            x = F.relu(normalised(f"stem.{number + 1}", x))
    else:
        x = F.relu(normalised("bn1", F.conv2d(x, state["conv1.weight"], None, 2, 3)))
    x, maps = F.max_pool2d(x, 3, 2, 1), []
    for layer, count in enumerate(FEW, 1):
        for block in range(count):
            name, stride = f"layer{layer}.{block}", 2 if layer > 1 and block == 0 else 1
            y = F.relu(normalised(f"{name}.bn1", F.conv2d(x, state[f"{name}.conv1.weight"])))
            y = F.conv2d(middle(name, y, stride, block == 0), state[f"{name}.conv3.weight"])
            if block == 0 and family == "res2net":
                x = normalised(f"{name}.downsample.2",
                               F.conv2d(F.avg_pool2d(x, stride), state[f"{name}.downsample.1.weight"]))
            elif block == 0:
                x = normalised(f"{name}.downsample.1", F.conv2d(x, state[f"{name}.downsample.0.weight"], None, stride))
            x = F.relu(normalised(f"{name}.bn3", y) + x)
        maps.append(x)
    return maps[1:]


def assert_near(maps, expected, tolerance):
    for found, each in zip(maps, expected, strict=True):
        assert each.std() > 0.1 and (found.float() - each).abs().max() < tolerance * each.abs().max()


# ---- conversion ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family, dcn", CASES)
def test_a_converted_backbone_computes_what_loops_compute(few_blocks, tmp_path, capsys, family, dcn):
    """So it does with its batch norms folded, and in bf16 as a teacher does."""
    state = random_entries(entries(FEW, family, dcn))
    torch.save({"meta": {"CLASSES": list("abc")}, "state_dict": state}, tmp_path / "w.pth")
    assert run_tool(convert, tmp_path / "w.pth", tmp_path / "out.pt") == 0
    network, _ = load_detector(tmp_path / "out.pt")
    assert network.architecture == Architecture(50, 64, 1, backbone=family, dcn=dcn)
    assert f"on {network.backbone.name}, 3 classes" in capsys.readouterr().out
    back = convert.to_mmdet(network.state_dict())
    assert set(back) == set(state) and all(torch.equal(back[name], value) for name, value in state.items())
    image = torch.randn(1, 3, 32, 64, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        state = {name.removeprefix("backbone."): value for name, value in state.items()}
        expected = slow_backbone(state, family, image)
        assert_near(network.backbone(image), expected, 1e-5)
        folded = fold_batch_norm(network).to(memory_format=torch.channels_last)
        assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
        assert_near(folded.backbone(image), expected, 1e-5)
        cast_convolutions(folded, torch.bfloat16)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert_near(folded.backbone(image), expected, 0.05)


@pytest.mark.parametrize("family, dcn", [*CASES, ("resnext", "none"), ("res2net", "none")])
def test_names_and_shapes_are_those_of_mmdetection_at_depth_101(family, dcn):
    with torch.device("meta"):
        theirs = {name: torch.empty(shape) for name, shape in entries((3, 4, 23, 3), family, dcn)}
        architecture, num_classes = convert.read_architecture(theirs, "x")
        ours = convert.to_mmdet(Detector(num_classes, architecture).state_dict())
    assert architecture == Architecture(101, 64, 1, backbone=family, dcn=dcn)
    assert {name: value.shape for name, value in ours.items()} == {name: value.shape for name, value in theirs.items()}


@pytest.mark.parametrize("change, complaint", [
    (lambda state: {name: value for name, value in state.items() if not re.search("layer4.*conv_offset", name)},
     "has 1 bottleneck blocks in layer3 and deformable convolutions in layer2, layer3; expected a ResNet-18, 34, 50, "
     "101, or of bottlenecks also a ResNeXt or Res2Net and deformable convolutions in layer2 to layer4 or in "),
    (lambda state: {name: value[:18] if ".conv_offset." in name else value for name, value in state.items()},
     "conv2.conv_offset.weight has shape (18, 128, 3, 3); expected (27, 128, 3, 3)"),  # DCNv1
    (lambda state: {name: torch.empty(256, 4, 3, 3) if name == "backbone.layer1.0.conv2.weight" else value
                    for name, value in state.items()}, "expected (128, 64, 1, 1)"),  # of ResNeXt-50 64x4d
], ids=["c3-c4", "DCNv1", "64x4d"])
def test_other_backbones_are_refused(few_blocks, monkeypatch, tmp_path, capsys, change, complaint):
    state = {name: torch.empty(shape) for name, shape in entries(FEW, "resnet", "c3-c5")}
    content = {"state_dict": change(state), "meta": {"CLASSES": list("abc")}}
    (tmp_path / "w.pth").write_bytes(b"stands for a checkpoint")
    monkeypatch.setattr(convert, "load_checkpoint", lambda _: content)
    assert run_tool(convert, tmp_path / "w.pth", tmp_path / "out.pt") == 2
    assert complaint in error_line(capsys) and not (tmp_path / "out.pt").exists()


# ---- deformable convolutions -----------------------------------------------------------------------------------------


@pytest.fixture(params=[(1, 1), (2, 2)], ids=["plain", "strided, grouped"])
def plain(request):
    torch.manual_seed(5)
    stride, groups = request.param
    return nn.Conv2d(4, 6, 3, stride, padding=1, groups=groups, bias=False)


@pytest.fixture
def image():
    return torch.randn(1, 4, 7, 6, generator=torch.Generator().manual_seed(6))


def test_a_deformable_convolution_against_a_loop_over_pixels(plain, image):
    layer = ModulatedDeformConv2d(plain)
    for parameter in layer.conv_offset.parameters():
        nn.init.normal_(parameter, std=0.5)
    with torch.no_grad():
        offsets = layer.conv_offset(image)
        assert offsets.abs().max() > 3  # some samples are outside of the image
        expected = slow_deformable(image, offsets, plain.weight, plain.stride[0], plain.groups)
        assert torch.allclose(layer(image), expected, atol=1e-5)


def test_without_offsets_and_with_full_modulation_it_is_the_ordinary_convolution(plain, image):
    layer = ModulatedDeformConv2d(plain)
    with torch.no_grad():
        assert torch.allclose(layer(image), plain(image) / 2, atol=1e-6)  # as it starts: sigmoid(0)
        layer.conv_offset.bias[18:] = 30
        assert torch.allclose(layer(image), plain(image), atol=1e-6)


def test_its_offsets_learn_also_under_bf16(plain, image):
    layer = ModulatedDeformConv2d(plain)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = layer(image.bfloat16())
    outputs.float().square().sum().backward()
    assert outputs.dtype == torch.bfloat16
    assert all((parameter.grad.abs() > 0).any() for parameter in layer.parameters())


def test_its_flops_are_those_of_the_ordinary_convolution_and_of_its_offsets(plain, image):
    def flops(*layers):
        with FlopCounterMode(display=False) as counter:
            for layer in layers:
                layer(image)
        return counter.get_total_flops()

    layer = ModulatedDeformConv2d(plain)
    assert flops(layer) == flops(plain, layer.conv_offset) > flops(layer.conv_offset) > 0


# ---- where the weights come from -------------------------------------------------------------------------------------


def test_a_resnext_50_has_the_entries_of_torchvision():
    with torch.device("meta"):
        ours, theirs = Backbone(50, False, "resnext"), torchvision.models.resnext50_32x4d()
    shapes = {name: value.shape for name, value in theirs.state_dict().items() if not name.startswith("fc.")}
    assert {name: value.shape for name, value in ours.state_dict().items()} == shapes


def test_a_file_of_a_classifier_has_no_offsets_which_stay_at_zero(few_blocks, tmp_path):
    state = dict(Backbone(50, False, "res2net").state_dict())
    torch.save({**state, "fc.weight": torch.ones(1000, 2048)}, tmp_path / "res2net.pth")
    backbone = Backbone(50, True, "res2net", "c3-c5")
    found = initialise(backbone, str(tmp_path / "res2net.pth"))
    loaded = backbone.state_dict()
    offsets = [value for name, value in loaded.items() if name not in state]
    assert found == f"{len(loaded)} entries from {tmp_path / 'res2net.pth'}"
    assert all(torch.equal(loaded[name], value) for name, value in state.items())
    assert len(offsets) == 2 * 3 * sum(FEW[1:]) and not any(value.any() for value in offsets)
    frozen = {name.split(".")[0] for name, parameter in backbone.named_parameters() if not parameter.requires_grad}
    assert frozen == {"stem", "layer1"}


@pytest.mark.parametrize("depth, family, model", [(101, "resnext", "resnext101_32x4d"), (50, "res2net", "res2net50")])
def test_imagenet_weights_that_torchvision_does_not_have(depth, family, model):
    with torch.device("meta"):
        backbone = Backbone(depth, True, family)
    with pytest.raises(UserError, match=f"--init imagenet: torchvision has no weights of {model}; .*--init FILE"):
        initialise(backbone, "imagenet")


def test_a_recognition_network_is_no_res2net(tmp_path):
    torch.save({"conv1.weight": torch.ones(64, 1, 7, 7)}, tmp_path / "best.pt")
    with torch.device("meta"):
        backbone = Backbone(50, True, "res2net")
    with pytest.raises(UserError, match=r"expected the \d+ entries of a Res2Net-50 26w x 4s without its classifier"):
        initialise(backbone, str(tmp_path / "best.pt"))


# ---- runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes") / "tiny"
    write_demo(folder, seed=0, train=4, test=2, size=64)
    return ("--train", folder / "train.json", "--test", folder / "test.json", *QUICK_DETECTOR, "--depth", "50",
            "--epochs", "1")


def test_detectors_on_each_backbone_train_teach_and_are_tested(few_blocks, without_pictures, flags, tmp_path, capsys):
    runs = [(train_gfl, family, dcn, "fp32", ()) for family, dcn in CASES[:2]]
    runs.append((train_ld, *CASES[2], "bf16", ("--teacher", tmp_path / "resnext" / "final.pt")))
    for script, family, dcn, precision, more in runs:
        assert run_detector(script, *flags, *more, "--backbone", family, "--dcn", dcn, "--precision", precision,
                            "--output", tmp_path / family) == 0
        final = torch.load(tmp_path / family / "final.pt", weights_only=True)
        offsets = [value for name, value in final["model"].items() if name.endswith("conv_offset.weight")]
        assert offsets and all(value.any() for value in offsets)  # they have learned
        assert (final["description"]["model"]["backbone"], final["description"]["model"]["dcn"]) == (family, dcn)
        assert json.loads((tmp_path / family / "results.json").read_text())["AP"] is not None
    said = capsys.readouterr().out
    assert "initialised: Res2Net-50 26w x 4s with deformable convolutions in c3-c5 with random weights" in said
    assert "gfl at epoch 1, ResNeXt-50 32x4d with deformable convolutions in c4-c5" in said


@pytest.mark.parametrize("more", [("--backbone", "resnext"), ("--backbone", "res2net"), ("--dcn", "c4-c5")])
def test_blocks_without_a_bottleneck_are_of_the_plain_resnet(flags, tmp_path, capsys, more):
    assert run_detector(train_gfl, *flags, *more, "--depth", "34", "--output", tmp_path / "run") == 2
    error = error_line(capsys)
    assert " ".join(more) in error and "--depth 34: expected --depth 50 or 101" in error
    assert not (tmp_path / "run").exists()
