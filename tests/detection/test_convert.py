"""Detectors of mmdetection: every entry gets its name, and the network computes what plain convolutions compute."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from detection import convert
from detection.checkpoint import load_detector
from detection.network.detector import Architecture, Detector
from tests.support import error_line, norm_entries, random_entries, run_tool

NAMES = ["ship", "storage tank", "harbor"]
BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
CHANNELS, TOWERS, REG_MAX = 64, 2, 8


run = partial(run_tool, convert)


# ---- what mmdetection writes -----------------------------------------------------------------------------------------


def backbone(depth):
    yield "backbone.conv1.weight", (64, 3, 7, 7)
    yield from norm_entries("backbone.bn1", 64)
    into, widen = 64, 4 if depth >= 50 else 1
    for layer, blocks in enumerate(BLOCKS[depth], 1):
        width = 32 * 2**layer
        for block in range(blocks):
            name = f"backbone.layer{layer}.{block}"
            shapes = [(width, into, 3, 3), (width, width, 3, 3)]
            if depth >= 50:
                shapes = [(width, into, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)]
            for number, shape in enumerate(shapes, 1):
                yield f"{name}.conv{number}.weight", shape
                yield from norm_entries(f"{name}.bn{number}", shape[0])
            if block == 0 and into != width * widen:
                yield f"{name}.downsample.0.weight", (width * widen, into, 1, 1)
                yield from norm_entries(f"{name}.downsample.1", width * widen)
            into = width * widen


def entries(depth, quality=False, channels=CHANNELS, towers=TOWERS, reg_max=REG_MAX, classes=3):
    """(name, shape) of every entry of a GFL detector."""
    def convolution(name, *shape):
        yield f"{name}.weight", shape
        yield f"{name}.bias", shape[:1]

    yield from backbone(depth)
    for level in range(3):
        width = (512 if depth >= 50 else 128) * 2**level
        yield from convolution(f"neck.lateral_convs.{level}.conv", channels, width, 1, 1)
    for level in range(5):
        yield from convolution(f"neck.fpn_convs.{level}.conv", channels, channels, 3, 3)
    for tower in ("cls_convs", "reg_convs"):
        for number in range(towers):
            yield f"bbox_head.{tower}.{number}.conv.weight", (channels, channels, 3, 3)
            yield from ((f"bbox_head.{tower}.{number}.gn.{part}", (channels,)) for part in ("weight", "bias"))
    # GFocal V2's quality focal loss takes probabilities (use_sigmoid=False), and its head adds a channel for that.
    yield from convolution("bbox_head.gfl_cls", classes + quality, channels, 3, 3)
    yield from convolution("bbox_head.gfl_reg", 4 * (reg_max + 1), channels, 3, 3)
    yield from ((f"bbox_head.scales.{level}.scale", ()) for level in range(5))
    if quality:
        yield from convolution("bbox_head.reg_conf.0", 64, 20, 1, 1)
        yield from convolution("bbox_head.reg_conf.2", 1, 64, 1, 1)


@pytest.fixture(scope="module", params=[False, True], ids=["GFL", "GFocal V2"])
def state(request):
    """A state dict of mmdetection. No test may change it."""
    return random_entries(entries(18, request.param))


@pytest.fixture(scope="module")
def plain_state():
    return random_entries(entries(18))


# ---- a forward pass without modules ----------------------------------------------------------------------------------


def batch_norm(state, name, x):
    return F.batch_norm(x, *(state[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")))


def slow_backbone(state, x):
    """C3, C4, C5 of a ResNet-18."""
    x = F.relu(batch_norm(state, "backbone.bn1", F.conv2d(x, state["backbone.conv1.weight"], None, 2, 3)))
    x, maps = F.max_pool2d(x, 3, 2, 1), []
    for layer in range(1, 5):
        for block in range(2):
            name, stride = f"backbone.layer{layer}.{block}", 2 if layer > 1 and block == 0 else 1
            y = F.conv2d(x, state[f"{name}.conv1.weight"], None, stride, 1)
            y = F.conv2d(F.relu(batch_norm(state, f"{name}.bn1", y)), state[f"{name}.conv2.weight"], None, 1, 1)
            if f"{name}.downsample.0.weight" in state:
                x = F.conv2d(x, state[f"{name}.downsample.0.weight"], None, stride)
                x = batch_norm(state, f"{name}.downsample.1", x)
            x = F.relu(batch_norm(state, f"{name}.bn2", y) + x)
        maps.append(x)
    return maps[1:]


def slow_neck(state, maps):
    def convolve(name, x, **options):
        return F.conv2d(x, state[f"neck.{name}.conv.weight"], state[f"neck.{name}.conv.bias"], **options)

    merged = [convolve(f"lateral_convs.{level}", x) for level, x in enumerate(maps)]
    for level in (1, 0):
        merged[level] = merged[level] + F.interpolate(merged[level + 1], size=merged[level].shape[2:])
    pyramid = [convolve(f"fpn_convs.{level}", x, padding=1) for level, x in enumerate(merged)]
    for level in (3, 4):
        pyramid.append(convolve(f"fpn_convs.{level}", pyramid[-1], padding=1, stride=2))
    return pyramid


def slow_head(state, pyramid):
    """Logits (A, C), distributions (A, 4, R + 1) and qualities (A,) of the only image, location by location."""
    def tower(name, x):
        for number in range(TOWERS):
            x = F.conv2d(x, state[f"bbox_head.{name}.{number}.conv.weight"], padding=1)
            weight, bias = (state[f"bbox_head.{name}.{number}.gn.{part}"] for part in ("weight", "bias"))
            x = F.relu(F.group_norm(x, 32, weight, bias))
        return x

    def last(name, x, padding=1):
        return F.conv2d(x, state[f"bbox_head.{name}.weight"], state[f"bbox_head.{name}.bias"], padding=padding)

    logits, edges, qualities = [], [], []
    for level, feature in enumerate(pyramid):
        scores, sides = last("gfl_cls", tower("cls_convs", feature)), last("gfl_reg", tower("reg_convs", feature))
        sides = sides * state[f"bbox_head.scales.{level}.scale"]
        for y in range(feature.shape[2]):
            for x in range(feature.shape[3]):
                logits.append(scores[0, :, y, x])
                edges.append(torch.stack(sides[0, :, y, x].split(REG_MAX + 1)))
        if "bbox_head.reg_conf.0.weight" in state:
            top = sides.unflatten(1, (4, REG_MAX + 1)).softmax(2).topk(4, dim=2).values  # (1, 4, 4, H, W)
            statistics = torch.cat([top, top.mean(2, keepdim=True)], dim=2).flatten(1, 2)
            quality = last("reg_conf.2", F.relu(last("reg_conf.0", statistics, 0)), 0).sigmoid()
            qualities += quality.flatten().tolist()
    return torch.stack(logits), torch.stack(edges), torch.tensor(qualities)


# ---- conversion ------------------------------------------------------------------------------------------------------


def test_a_converted_detector_computes_what_plain_convolutions_compute(state, tmp_path, capsys):
    content = {"meta": {"CLASSES": tuple(NAMES), "epoch": 12, "config": "model = dict()"}, "state_dict": state,
               "optimizer": {"state": {}}}
    torch.save(content, tmp_path / "epoch_12.pth")
    assert run(tmp_path / "epoch_12.pth", tmp_path / "out" / "gfl.pt", "--short", "480", "--long", "640") == 0
    quality = "bbox_head.reg_conf.0.weight" in state
    said = capsys.readouterr().out
    assert "on ResNet-18, 3 classes, " in said and ("GFocal V2" in said) == quality
    network, description = load_detector(tmp_path / "out" / "gfl.pt")
    assert network.architecture == Architecture(18, CHANNELS, TOWERS, REG_MAX, quality)
    assert (description["stage"], description["epoch"], description["classes"]) == ("converted", 0, NAMES)
    assert (description["preprocessing"]["short"], description["preprocessing"]["long"]) == (480, 640)
    image = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        outputs = network(image)
        pyramid = slow_neck(state, slow_backbone(state, image))
        logits, edges, qualities = slow_head(state, pyramid)
    assert edges.std() > 0.1 and logits.std() > 0.1
    for found, expected in zip(outputs.features, pyramid, strict=True):
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4)
    assert torch.allclose(outputs.logits[0], logits[:, :3], rtol=1e-4, atol=1e-4)
    assert torch.allclose(outputs.edges[0], edges, rtol=1e-4, atol=1e-4)
    assert not quality or torch.allclose(outputs.quality[0, :, 0], qualities, rtol=1e-4, atol=1e-5)
    assert (outputs.quality is not None) == quality


def test_there_and_back_again_every_entry_is_the_same(state):
    with torch.device("meta"):
        names = Detector(3, convert.read_architecture(state, "x")[0]).state_dict()
    ours = convert.from_mmdet(convert.without_background(state), names)
    assert set(ours) == set(names) and ours["head.scales"].shape == (5,)
    back = convert.to_mmdet(ours)
    assert set(back) == set(state)
    assert all(torch.equal(back[name], value) for name, value in convert.without_background(state).items())


# ---- mmrotate --------------------------------------------------------------------------------------------------------


def of_mmrotate(network):
    """The state dict of a rotated RetinaNet, or Rotated-LD, as mmrotate names it."""
    renamed = {}
    for name, value in network.state_dict().items():
        part, *path = name.split(".")
        if part == "neck":
            kind, number, leaf = path
            number = int(number) + 3 * (kind == "extra")
            name = f"neck.{'lateral_convs' if kind == 'lateral' else 'fpn_convs'}.{number}.conv.{leaf}"
        elif part == "head" and path[0] in ("class_tower", "box_tower"):
            name = f"bbox_head.{'cls' if path[0] == 'class_tower' else 'reg'}_convs.{path[1]}.conv.{path[3]}"
        elif part == "head":
            name = f"bbox_head.retina_{'cls' if path[0] == 'classify' else 'reg'}.{path[1]}"
        renamed[name] = value
    return {**renamed, "bbox_head.integral.project": torch.linspace(-2, 2, 9)}


@pytest.mark.parametrize("reg_max", [8, 0], ids=["Rotated-LD", "rotated RetinaNet"])
def test_detectors_of_mmrotate(tmp_path, capsys, reg_max):
    torch.manual_seed(0)
    network = Detector(3, Architecture(18, CHANNELS, TOWERS, reg_max, head="rotated")).eval()
    theirs = of_mmrotate(network)
    torch.save({"state_dict": theirs, "meta": {"CLASSES": NAMES}}, tmp_path / "theirs.pth")
    assert run(tmp_path / "theirs.pth", tmp_path / "ours.pt", "--short", "1024", "--long", "1024") == 0
    assert "rotated RetinaNet on ResNet-18, 3 classes" in capsys.readouterr().out
    converted, description = load_detector(tmp_path / "ours.pt")
    assert converted.architecture == network.architecture and description["preprocessing"]["long"] == 1024
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(converted(images).bins, network(images).bins)
    del theirs["bbox_head.integral.project"]
    back = convert.to_mmdet(converted.state_dict(), "rotated")
    assert set(back) == set(theirs) and all(torch.equal(value, theirs[name]) for name, value in back.items())


def test_a_retinanet_of_horizontal_boxes_is_refused(tmp_path, capsys):
    network = Detector(3, Architecture(18, CHANNELS, TOWERS, 0, head="rotated"))
    theirs = of_mmrotate(network)
    for name in ("weight", "bias"):
        theirs[f"bbox_head.retina_reg.{name}"] = theirs[f"bbox_head.retina_reg.{name}"][:36]
    torch.save({"state_dict": theirs, "meta": {"CLASSES": NAMES}}, tmp_path / "theirs.pth")
    assert run(tmp_path / "theirs.pth", tmp_path / "ours.pt") == 2
    assert "27 scores and 36 values of boxes a location; expected multiples of 9 and 45" in error_line(capsys)


# ---- all depths ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quality", [False, True])
@pytest.mark.parametrize("depth", BLOCKS)
def test_names_and_shapes_are_those_of_mmdetection_at_every_depth(depth, quality):
    with torch.device("meta"):
        theirs = {name: torch.empty(shape) for name, shape in entries(depth, quality, 256, 4, 16, 80)}
        architecture, num_classes = convert.read_architecture(theirs, "x")
        ours = convert.to_mmdet(Detector(num_classes, architecture).state_dict())
    assert (architecture, num_classes) == (Architecture(depth, 256, 4, 16, quality), 80)
    theirs = convert.without_background(theirs)
    assert {name: value.shape for name, value in ours.items()} == {name: value.shape for name, value in theirs.items()}


@pytest.fixture
def given(monkeypatch, tmp_path):
    """A function that lets a file hold a content, without writing tens of megabytes; it returns the file's path."""
    def give(content):
        path = tmp_path / "w.pth"
        path.write_bytes(b"stands for a checkpoint")
        monkeypatch.setattr(convert, "load_checkpoint", lambda _: content)
        return path

    return give


@pytest.mark.parametrize("content", [
    lambda state: {f"module.{name}": value for name, value in state.items()},
    lambda state: {"state_dict": {**state, **{f"{prefix}.{name}": value for name, value in list(state.items())[:5]
                                              for prefix in ("teacher", "teacher_model")}}},
    lambda state: {**state, "bbox_head.integral.project": torch.arange(9.0), "backbone.fc.weight": torch.ones(9, 512),
                   "backbone.fc.bias": torch.ones(9)},
    lambda state: {name: value.half() if value.is_floating_point() else value for name, value in state.items()},
], ids=["module.", "teacher", "integral and fc", "half"])
def test_prefixes_teachers_buffers_and_half_precision_make_no_difference(plain_state, given, tmp_path, content):
    (tmp_path / "names.txt").write_text("\n".join(NAMES) + "\n\n")
    made = convert.convert(given(content(plain_state)), tmp_path / "names.txt", 800, 1333)
    back = convert.to_mmdet(made["model"])
    assert made["description"]["classes"] == NAMES and set(back) == set(plain_state)
    for name, value in plain_state.items():
        assert back[name].dtype == value.dtype and torch.allclose(back[name], value, rtol=1e-3, atol=1e-3)


def test_an_output_holds_its_own_numbers_alone(plain_state, given, tmp_path):
    """Entries that are views of something larger would bring all of it."""
    whole = torch.ones(1000, *plain_state["bbox_head.gfl_cls.bias"].shape)
    content = {"meta": {"dataset_meta": {"classes": NAMES}}, "state_dict": {
        **plain_state, "bbox_head.gfl_cls.bias": whole[0]}}
    model = convert.convert(given(content), None, 800, 1333)["model"]
    assert model["head.classify.bias"].tolist() == [1, 1, 1]
    assert all(value.untyped_storage().nbytes() == value.numel() * value.element_size() for value in model.values())


# ---- what cannot be converted ----------------------------------------------------------------------------------------


def without(name):
    return lambda state: {key: value for key, value in state.items() if key != name}


def having(name, value):
    return lambda state: {**state, name: value}


@pytest.mark.parametrize("change, complaint", [
    (without("neck.fpn_convs.4.conv.bias"), "lacks neck.fpn_convs.4.conv.bias; expected the "),
    (without("bbox_head.scales.2.scale"), "lacks bbox_head.scales.2.scale; "),
    (without("bbox_head.gfl_cls.weight"), "lacks bbox_head.gfl_cls.weight; expected a GFL"),
    (having("bbox_head.atss_centerness.bias", torch.ones(1)), "holds the unknown bbox_head.atss_centerness.bias; "),
    (having("neck.fpn_convs.4.conv.bias", torch.ones(3)),
     "neck.fpn_convs.4.conv.bias has shape (3,); expected (64,)"),
    (having("backbone.layer4.0.conv2.conv_offset.weight", torch.ones(27, 9, 3, 3)),
     "has 2 basic blocks in layer3 and deformable convolutions in layer4; expected a ResNet-18, 34, 50, 101, or "),
    (having("backbone.layer2.0.conv2_offset.bias", torch.ones(18)),
     "holds the unknown backbone.layer2.0.conv2_offset.bias; "),
    (having("backbone.layer3.2.conv1.weight", torch.ones(256, 256, 3, 3)),
     "has 3 basic blocks in layer3 and deformable convolutions in no layer; expected a ResNet-18, 34, 50, 101"),
    (having("neck.lateral_convs.0.conv.bias", torch.ones(64).to_sparse()),
     "neck.lateral_convs.0.conv.bias is no dense tensor"),
    (having("neck.lateral_convs.0.conv.bias", torch.ones(1).expand(64)),
     "neck.lateral_convs.0.conv.bias is no dense tensor"),
    (having("hook", "a text"), "hook is no dense tensor of numbers"),
    (having("bbox_head.gfl_reg.weight", torch.ones(8, 64, 3, 3)),
     "reg_max=1, quality=False, head='gfl', "),
])
def test_what_is_missing_unknown_or_misshapen_is_named(plain_state, given, tmp_path, capsys, change, complaint):
    path = given({"state_dict": change(plain_state), "meta": {"CLASSES": NAMES}})
    assert run(path, tmp_path / "out.pt") == 2
    said = error_line(capsys)
    assert str(path) in said and complaint in said
    assert not (tmp_path / "out.pt").exists()


@pytest.mark.parametrize("names, meta, complaint", [
    (None, None, "does not name its 3 classes; give a text file with one name a line as --classes"),
    (None, {"CLASSES": "ship"}, "does not name its 3 classes"),
    (None, {"dataset_meta": {"CLASSES": ("ship", "harbor")}}, "w.pth: names 2 classes; expected 3"),
    ("ship\nharbor\n", {"CLASSES": NAMES}, "names.txt: names 2 classes; expected 3, as "),
    ("ship\nharbor\nship\n", None, "names.txt: 'ship' is no name, or not of one class alone"),
    (None, {"CLASSES": ["ship", "harbor", 3]}, "w.pth: 3 is no name"),
    (None, {"CLASSES": ["ship", "harbor", ["a"]]}, "w.pth: ['a'] is no name"),
])
def test_the_names_must_be_as_many_as_the_classes(plain_state, given, tmp_path, capsys, names, meta, complaint):
    if names:
        (tmp_path / "names.txt").write_text(names)
    flags = ["--classes", tmp_path / "names.txt"] if names else []
    assert run(given({"state_dict": plain_state, "meta": meta}), tmp_path / "out.pt", *flags) == 2
    assert complaint in error_line(capsys)


@pytest.mark.parametrize("content", [[], {}, {"state_dict": []}, {"state_dict": {1: torch.ones(1)}}, torch.ones(3)])
def test_what_holds_no_state_dict_is_refused(given, tmp_path, capsys, content):
    assert run(given(content), tmp_path / "out.pt") == 2
    assert "holds no weights; expected a state dict" in error_line(capsys)


def test_a_file_that_would_run_code_is_refused(tmp_path, capsys):
    torch.save({"state_dict": {}, "message_hub": UserWarning("x")}, tmp_path / "w.pth")
    assert run(tmp_path / "w.pth", tmp_path / "out.pt") == 2
    assert "refused, as loading it could run code" in error_line(capsys)


def test_the_input_is_not_overwritten(given, capsys):
    path = given({})
    assert run(path, path.parent / "." / path.name) == 2
    assert "is the file to convert; give another name" in error_line(capsys)
    assert path.read_bytes() == b"stands for a checkpoint"


def test_sides_out_of_range_are_refused(given, tmp_path, capsys):
    assert run(given({}), tmp_path / "out.pt", "--short", "7") == 2
    assert "--short 7 --long 1333: expected 32 to 100000 pixels" in error_line(capsys)
