"""PAA and LAD detectors of mmdetection and of LAD's authors: names, and what the converted network computes."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from detection import convert
from detection.checkpoint import load_detector
from detection.geometry.anchors import make_anchors
from detection.network.detector import Architecture, Detector
from detection.network.paa_head import AUXILIARIES, COP_PADDINGS, conditional_objectness
from tests.support import error_line, run_tool

NAMES = ["ship", "storage tank", "harbor"]
run = partial(run_tool, convert)
# mmdetection's names of what a head predicts besides, and the channels.
PARTS = {"iou": {"atss_centerness": 1}, "iop": {"objectness": 1, "obj_bias": 1}, "cop": {"coeff_conv": 9}}


def architecture(auxiliary):
    return Architecture(18, 64, 1, head="paa", auxiliary=auxiliary, cop_padding="logit0" if "cop" in auxiliary else
                        "prob0")


def random_state(auxiliary, seed=0):
    """A state dict in mmdetection's names."""
    torch.manual_seed(seed)
    network = Detector(3, architecture(auxiliary))
    with torch.no_grad():
        for parameter in network.head.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return convert.to_mmdet(network.state_dict(), "paa")


def given(content, tmp_path):
    torch.save({"state_dict": content, "meta": {"CLASSES": NAMES}}, tmp_path / "w.pth")
    return tmp_path / "w.pth"


@pytest.mark.parametrize("auxiliary", AUXILIARIES)
def test_the_names_are_mmdetections_and_go_there_and_back(auxiliary):
    state = random_state(auxiliary)
    shapes = {name.removesuffix(".weight"): tuple(value.shape) for name, value in state.items()
              if name.startswith("bbox_head.") and name.endswith(".weight") and value.ndim == 4}
    outputs = {"atss_cls": 3, "atss_reg": 4}
    for part in auxiliary.split("+"):
        outputs |= PARTS[part]
    assert shapes == {f"bbox_head.{name}": (count, 64, 3, 3) for name, count in outputs.items()} | {
        f"bbox_head.{tower}.0.conv": (64, 64, 3, 3) for tower in ("cls_convs", "reg_convs")}
    assert convert.read_architecture(state, "x") == (architecture(auxiliary), 3)
    with torch.device("meta"):
        names = Detector(3, architecture(auxiliary)).state_dict()
    back = convert.to_mmdet(convert.from_mmdet(state, names, "paa"), "paa")
    assert set(back) == set(state) and all(torch.equal(back[name], value) for name, value in state.items())


def test_a_converted_detector_computes_what_plain_convolutions_compute(tmp_path, capsys):
    """One of CoLAD's: with an objectness that conditional objectness does not use, and its peer in the same file."""
    state = random_state("iou+cop")
    unused = {f"bbox_head.objectness.{part}": torch.ones(()) for part in ("weight", "bias")}
    peer = {f"teacher_{name}": value for name, value in random_state("iou", 1).items()}
    path = given({**state, **unused, **peer}, tmp_path)
    assert run(path, tmp_path / "student.pt") == 0 and run(path, tmp_path / "peer.pt", "--teacher") == 0
    said = capsys.readouterr().out
    assert "PAA (iou+cop) on ResNet-18, 3 classes" in said and "PAA (iou) on ResNet-18" in said
    assert load_detector(tmp_path / "peer.pt")[0].architecture == architecture("iou")
    network, description = load_detector(tmp_path / "student.pt")
    assert network.architecture == architecture("iou+cop") and description["classes"] == NAMES
    with torch.no_grad():
        outputs = network(torch.randn(1, 3, 64, 96))
        towers = [(network.head.class_tower(level), network.head.box_tower(level)) for level in outputs.features]

    def last(name, x):
        return F.conv2d(x, state[f"bbox_head.{name}.weight"], state[f"bbox_head.{name}.bias"], padding=1)

    def rows(maps):
        return torch.cat([level.flatten(2).transpose(1, 2) for level in maps], dim=1)

    classes = [last("atss_cls", tower) for tower, _ in towers]
    deltas = [last("atss_reg", tower) * state[f"bbox_head.scales.{level}.scale"]
              for level, (_, tower) in enumerate(towers)]
    products = [conditional_objectness(logits, last("coeff_conv", tower), COP_PADDINGS["logit0"])
                for logits, (_, tower) in zip(classes, towers, strict=True)]
    ious = rows([last("atss_centerness", tower) for _, tower in towers])
    assert torch.allclose(outputs.logits, rows(classes), atol=1e-4) and outputs.logits.std() > 0.1
    assert torch.allclose(outputs.deltas, rows(deltas), atol=1e-4)
    assert torch.allclose(outputs.scores, (rows(products) * ious.sigmoid()).sqrt(), atol=1e-4)
    assert outputs.boxes(make_anchors(outputs.sizes)).isfinite().all()


@pytest.mark.parametrize(("flags", "change", "words"), [
    (["--teacher"], {}, "holds no teacher beside the detector"),
    ([], {"bbox_head.atss_reg.weight": None}, "lacks bbox_head.atss_reg.weight"),
    ([], {"bbox_head.obj_bias.bias": torch.ones(1)}, "holds the unknown bbox_head.obj_bias.bias"),
])
def test_what_does_not_fit_is_one_line(tmp_path, capsys, flags, change, words):
    state = {name: value for name, value in {**random_state("iou"), **change}.items() if value is not None}
    assert run(given(state, tmp_path), tmp_path / "out.pt", *flags) == 2
    assert words in error_line(capsys) and not (tmp_path / "out.pt").exists()
