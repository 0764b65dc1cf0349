"""From a checkpoint to a detector, and from its outputs to boxes in pixels of the original image."""

import copy
import dataclasses
import math

import pytest
import torch

from common.files import save_checkpoint
from common.runtime import UserError
from detection import checkpoint as checkpoints
from detection import inference
from detection.checkpoint import describe_model, describe_preprocessing, is_description, load_detector
from detection.data.transforms import normalise
from detection.geometry.anchors import make_anchors
from detection.geometry.suppression import Selection
from detection.inference import detect, inference_network
from detection.network.detector import Architecture, Detector
from detection.network.gfl_head import Outputs
from resnet50 import ResNet50

SIZES = ((8, 12), (4, 6), (2, 3), (1, 2), (1, 1))  # of 64 x 96
A, C, R = 129, 3, 6
SMALL = Architecture(depth=18, channels=64, tower_convs=1, reg_max=8)


# ---- decoding --------------------------------------------------------------------------------------------------------


def random_outputs(seed=0, quality=False):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(2, A, C, generator=generator) - 3
    edges = 2 * torch.randn(2, A, 4, R + 1, generator=generator)
    sure = torch.rand(2, A, 1, generator=generator) if quality else None
    return Outputs(logits, edges, [torch.zeros(2, 1, *size) for size in SIZES], sure)


def overlap(a, b):
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0) * max(height, 0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared
    return shared / union if union > 0 else 0


def detections(outputs, sizes, scales, *suppression, **changes):
    """`inference.detections` of outputs for one anchor a location. changes: of the Selection."""
    anchors = make_anchors(outputs.sizes)
    return inference.detections(outputs, anchors, sizes, scales, Selection(**changes), *suppression)


def slow_detections(outputs, i, size, scale, candidates=1000):
    """[(score, label, box)] of image i, one anchor after the other."""
    scores = outputs.logits[i].sigmoid() * (1 if outputs.quality is None else outputs.quality[i])
    found, start = [], 0
    for level, (rows, columns) in enumerate(SIZES):
        own = []
        for a in range(start, start + rows * columns):
            row, column = divmod(a - start, columns)
            stride, sides = 8 * 2**level, []
            for logits in outputs.edges[i, a].tolist():
                shares = [math.exp(z) for z in logits]
                sides.append(sum(k * share for k, share in enumerate(shares)) / sum(shares) * stride)
            x, y = column * stride, row * stride
            box = [max(min(side, limit), 0) / ratio for side, limit, ratio in zip(
                (x - sides[0], y - sides[1], x + sides[2], y + sides[3]), 2 * size[::-1], 2 * scale, strict=True)]
            own.append((max(scores[a].tolist()), scores[a].tolist(), box))
        own = sorted(own, reverse=True)[:candidates]
        found += [(score, label, box) for _, values, box in own for label, score in enumerate(values) if score > 0.05]
        start += rows * columns
    kept = []
    for score, label, box in sorted(found, reverse=True):
        if all(label != other or overlap(box, place) <= 0.6 for _, other, place in kept):
            kept.append((score, label, box))
    return kept[:100]


@pytest.mark.parametrize("quality", [False, True])
@pytest.mark.parametrize("candidates", [2, 5, 1000])
def test_detections_against_a_loop(quality, candidates):
    outputs = random_outputs(1, quality)
    sizes, scales = [(64, 96), (40, 75)], [(0.5, 0.25), (1.5, 1.6)]
    for i, found in enumerate(detections(outputs, sizes, scales, candidates=candidates)):
        expected = slow_detections(outputs, i, sizes[i], scales[i], candidates)
        assert 5 < len(expected) == len(found["scores"])
        assert found["scores"].tolist() == pytest.approx([score for score, _, _ in expected], rel=1e-4)
        assert found["labels"].tolist() == [label for _, label, _ in expected]
        assert torch.allclose(found["boxes"], torch.tensor([box for _, _, box in expected]), atol=1e-3)


def outputs_of_one(score, anchor=0, sides=(1, 1, 1, 1)):
    """Outputs that are sure of one box, whose score is exactly `score`, and of nothing else."""
    logits, edges = torch.full((1, A, C), -100.0), torch.zeros(1, A, 4, R + 1)
    logits[0, anchor, 1] = 100  # a score of 1, times the quality
    for side, distance in enumerate(sides):
        edges[0, anchor, side, distance] = 100
    return Outputs(logits, edges, [torch.zeros(1, 1, *size) for size in SIZES], torch.full((1, A, 1), score))


def test_one_box_in_pixels_of_the_original():
    (found,) = detections(outputs_of_one(0.9, 12 * 2 + 3, (1, 2, 3, 4)), [(64, 96)], [(0.5, 2)])
    assert found["boxes"].tolist() == [[16 / 0.5, 0, 48 / 0.5, 48 / 2]]  # around x = 24, y = 16
    assert found["scores"].tolist() == pytest.approx([0.9]) and found["labels"].tolist() == [1]
    assert found["boxes"].dtype == torch.float32 and found["labels"].dtype == torch.int64


def test_boxes_end_where_the_image_without_its_padding_ends():
    (found,) = detections(outputs_of_one(0.9, 12 * 2 + 3, (6, 6, 6, 6)), [(50, 60)], [(1, 1)])
    assert found["boxes"].tolist() == [[0, 0, 60, 50]]


def test_a_score_must_be_above_the_least():
    least = torch.tensor(0.05)
    assert len(detections(outputs_of_one(least.item()), [(64, 96)], [(1, 1)])[0]["scores"]) == 0
    more = torch.nextafter(least, torch.tensor(1.0)).item()
    assert len(detections(outputs_of_one(more), [(64, 96)], [(1, 1)])[0]["scores"]) == 1


def test_nothing_found_has_the_shapes_of_something():
    for suppression in ("nms", "cluster", "cluster-diou-voting"):
        (found,) = detections(outputs_of_one(0.01), [(64, 96)], [(1, 1)], suppression)
        assert {name: tuple(value.shape) for name, value in found.items()} == {
            "boxes": (0, 4), "scores": (0,), "labels": (0,)}


def test_at_most_100_of_an_image_and_the_surest_first():
    outputs = random_outputs(2)
    (found, _) = detections(outputs, [(64, 96)] * 2, [(1, 1)] * 2, overlap=1.0)  # nothing is suppressed
    scores = outputs.logits[0].sigmoid().flatten()
    assert (scores > 0.05).sum() > 100 == len(found["scores"])
    assert torch.equal(found["scores"], scores.sort(descending=True).values[:100])


# ---- the network that answers ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def network():
    """A detector with running statistics as after training, which no test may change."""
    torch.manual_seed(0)
    found = Detector(C, dataclasses.replace(SMALL, quality=True))
    for module in found.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_mean, -0.5, 0.5)
            torch.nn.init.uniform_(module.running_var, 0.5, 2)
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, std=0.2)
    for layer in (found.head.classify, found.head.regress, found.head.quality[0], found.head.quality[2]):
        torch.nn.init.normal_(layer.weight, std=0.2)
    return found.eval()


def test_folding_the_batch_norms_changes_no_output(network):
    images = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    before = copy.deepcopy(network.state_dict())
    folded = inference_network(network, torch.device("cpu"))
    with torch.no_grad():
        plain, found = network(images), folded(images)
    for one, other in ((plain.logits, found.logits), (plain.edges, found.edges), (plain.quality, found.quality),
                       *zip(plain.features, found.features, strict=True)):
        assert one.std() > 1e-3 and torch.allclose(one, other, rtol=1e-4, atol=1e-4)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in folded.modules())
    assert not folded.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_detect_is_the_network_on_normalised_images(network):
    generator = torch.Generator().manual_seed(2)
    images, sizes = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8, generator=generator), [(64, 90), (33, 96)]
    scales = [(1, 1), (0.5, 0.4)]
    before = images.clone()
    found = detect(network, images, sizes, scales, torch.device("cpu"), "fp32")
    with torch.no_grad():
        expected = detections(network(normalise(images, sizes)), sizes, scales)
    assert torch.equal(images, before)
    for one, other in zip(found, expected, strict=True):
        assert len(one["scores"]) > 0 and torch.equal(one["labels"], other["labels"])
        assert torch.allclose(one["boxes"], other["boxes"], atol=1e-2)
        assert torch.allclose(one["scores"], other["scores"], atol=1e-4)
        assert not any(value.requires_grad for value in one.values())


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def description(architecture=SMALL, **changes):
    """What a detector's checkpoint says of itself; changes name its parts, or `part__name` one of a part's."""
    found = {"stage": "gfl", "classes": ["ship", "plane", "tank"], "model": describe_model(architecture),
             "preprocessing": describe_preprocessing(64, 96), "epoch": 3}
    for name, value in changes.items():
        *parts, name = name.split("__")
        (found[parts[0]] if parts else found)[name] = value
    return found


def checkpoint(path, state=None, said=None):
    save_checkpoint(path, {"model": {} if state is None else state, "description": said or description()})
    return path


def complaint(path):
    """The one line that a file is refused with."""
    with pytest.raises(UserError) as error:
        load_detector(path)
    message = str(error.value)
    assert message.startswith(f"{path}: ") and "\n" not in message and len(message) < 600
    return message


def test_a_detector_comes_back_as_it_was_saved(network, tmp_path):
    said = description(network.architecture)
    found, found_description = load_detector(checkpoint(tmp_path / "final.pt", network.state_dict(), said))
    assert found_description == said and found.architecture == network.architecture
    assert found.num_classes == 3 and not found.training
    for name, value in network.state_dict().items():
        assert torch.equal(found.state_dict()[name], value)
    images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        assert torch.equal(found(images).logits, network(images).logits)


def test_a_checkpoint_that_names_neither_head_nor_backbone_has_those_of_gfl_on_a_resnet(network, tmp_path):
    said = description(network.architecture)
    for younger in ("head", "backbone", "dcn"):
        del said["model"][younger]
    found, _ = load_detector(checkpoint(tmp_path / "final.pt", network.state_dict(), said))
    architecture = network.architecture
    assert found.architecture == architecture
    assert (architecture.head, architecture.backbone, architecture.dcn) == ("gfl", "resnet", "none")


@pytest.mark.parametrize("changes", [
    {"classes": []}, {"classes": [1]}, {"classes": ["a"] * 10_001}, {"classes": "ship"}, {"stage": None},
    {"epoch": "3"}, {"model": None}, {"preprocessing": []}, {"model__depth": 19}, {"model__depth": "18"},
    {"model__channels": 100}, {"model__channels": 1 << 40}, {"model__channels": 64.0}, {"model__tower_convs": -1},
    {"model__tower_convs": 1000}, {"model__reg_max": 3}, {"model__reg_max": True}, {"model__quality": 1},
    {"model__head": "rcnn"}, {"model__head": ["gfl"]}, {"model__backbone": "vit"}, {"model__backbone": ["resnet"]},
    {"model__dcn": "c2-c5"}, {"model__dcn": True}, {"model__backbone": "resnext"}, {"model__dcn": "c3-c5"},
    {"model__anchor_size": 0}, {"model__anchor_size": "1"}, {"model__anchor_size": float("nan")},
    {"preprocessing__short": 0}, {"preprocessing__long": None}, {"preprocessing__long": 10**9},
    {"model__anchor_scale": torch.ones(2)}, {"model__strides": [torch.ones(2)] * 5}, {"model__strides": None},
    {"preprocessing__mean": torch.ones(3)}, {"preprocessing__value_range": [2047, 0]},
    {"preprocessing__value_range": (0, 2047)}, {"preprocessing__value_range": torch.tensor([0, 2047])}])
def test_a_description_that_is_none_is_refused(tmp_path, changes):
    said = description(**changes)
    assert not is_description(said) and is_description(description())
    assert "not a detector of this project" in complaint(checkpoint(tmp_path / "odd.pt", said=said))


@pytest.mark.parametrize("changes, words", [
    ({"model__strides": [8, 16, 32, 64]}, "its strides is [8, 16, 32, 64]; expected [8, 16, 32, 64, 128]"),
    ({"model__anchor_scale": 4}, "its anchor_scale is 4; expected 8"),
    ({"model__anchor_size": 0.5}, "its anchor_scale is 8; expected 4"),
    ({"model__anchor_offset": 0.5}, "its anchor_offset is 0.5; expected 0"),
    ({"preprocessing__mean": [0, 0, 0]}, "its mean is [0, 0, 0]; expected [123.675, 116.28, 103.53]"),
    ({"preprocessing__std": [1, 1, 1]}, "its std is [1, 1, 1]; expected [58.395, 57.12, 57.375]")])
def test_a_detector_of_another_kind_is_refused(tmp_path, changes, words):
    assert words in complaint(checkpoint(tmp_path / "other.pt", said=description(**changes)))


def test_missing_unknown_and_misshapen_weights_are_named(tmp_path):
    with torch.device("meta"):
        names = list(Detector(3, SMALL).state_dict())
    scalar, path = torch.zeros(()), tmp_path / "odd.pt"
    state = dict.fromkeys(names, scalar)
    few = {name: value for name, value in state.items() if name not in ("neck.lateral.1.bias", "head.scales")}
    assert f"lacks neck.lateral.1.bias and 1 more; expected the {len(names)} entries of a detector on ResNet-18" in (
        complaint(checkpoint(path, few)))
    assert "holds the unknown teacher.fc;" in complaint(checkpoint(path, {**state, "teacher.fc": scalar}))
    assert "backbone.conv1.weight has shape (); expected (64, 3, 7, 7)" in complaint(checkpoint(path, state))
    stem = {**state, "backbone.conv1.weight": torch.zeros(64, 3, 7, 7)}
    assert "backbone.bn1.weight has shape ()" in complaint(checkpoint(path, stem))
    for value in (1.0, torch.zeros(64, 3, 7, 7).to_sparse(), torch.zeros(64, 3, 7, 7, dtype=torch.complex64)):
        odd = {**state, "backbone.conv1.weight": value}
        assert "backbone.conv1.weight is no dense tensor of numbers" in complaint(checkpoint(path, odd))
    assert "lacks backbone.conv1.weight and" in complaint(checkpoint(path, {}))
    assert "holds no weights" in complaint(checkpoint(path, [scalar]))


def test_a_small_file_that_claims_to_be_a_huge_network_takes_no_memory(tmp_path, monkeypatch):
    """Its layers would take 22 GB."""
    def without_memory(*arguments):
        assert torch.get_default_device().type == "meta"
        return Detector(*arguments)

    monkeypatch.setattr(checkpoints, "Detector", without_memory)
    huge = description(Architecture(101, 4096, 16))
    assert "lacks backbone.conv1.weight" in complaint(checkpoint(tmp_path / "huge.pt", said=huge))


def test_what_is_no_detector_is_refused(tmp_path):
    with torch.device("meta"):
        recognition = dict.fromkeys(ResNet50(3).state_dict(), torch.zeros(()))
    said = {"stage": "baseline", "classes": ["a", "b", "c"], "groups": {"head": [0]}, "epoch": 3, "selected_on": "val",
            "preprocessing": {"image_size": 64}}
    path = tmp_path / "best.pt"
    assert "not a detector of this project" in complaint(checkpoint(path, recognition, said))
    for content in (recognition, [1, 2], torch.zeros(3), {"model": {}, "description": [1]}):
        save_checkpoint(path, content)
        assert "not a detector of this project; expected final.pt or last.pt" in complaint(path)
    checkpoint(path)
    path.write_bytes(path.read_bytes()[:-100])
    assert "not a usable checkpoint" in complaint(path)
    assert "no such checkpoint" in complaint(tmp_path / "absent.pt")
