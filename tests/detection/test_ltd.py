"""LTD: the calibration network, and each loss of CCD and TASD against a slow reference."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torchvision.ops import deform_conv2d

from detection.assigners.atss import assign_by_atss
from detection.assigners.targets import ground_truth
from detection.distillers.calibration import attention, attention_error, calibration_losses, pooled_error
from detection.distillers.regions import valuable_region
from detection.distillers.tasd import row_weights, tasd_losses
from detection.geometry.anchors import make_anchors
from detection.methods import gfl
from detection.methods.ltd import LTD, LTDSettings, weights
from detection.network.calibration import CalibratedMaps, CalibrationNetwork, LocalCalibration
from detection.network.deformable import deformable_convolution
from detection.network.gfl_head import Outputs

SIZES = ((8, 10), (4, 5), (2, 3), (1, 2), (1, 1))
CHANNELS, C, R = 6, 3, 4


def pyramid(seed, images=3):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(images, CHANNELS, *size, generator=generator).requires_grad_() for size in SIZES]


def maps_of(seed):
    return CalibratedMaps(pyramid(seed), pyramid(seed + 1))


# ---- the calibration network -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(5, 7), (1, 2), (1, 1)])
def test_a_deformable_convolution_is_torchvisions_with_its_gradients(size):
    torch.manual_seed(0)
    # Far offsets leave the map. None is a whole number: there the interpolation has a kink.
    parts = [torch.randn(2, 4, *size), 2 * torch.randn(2, 18, *size) + 1e-3, torch.randn(3, 4, 3, 3)]
    ours, theirs = ([part.clone().requires_grad_() for part in parts] for _ in range(2))
    found, expected = deformable_convolution(*ours), deform_conv2d(*theirs, padding=1)
    assert found.shape == (2, 3, *size)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    mask = torch.randn_like(found)
    for one, other in zip(torch.autograd.grad((found * mask).sum(), ours),
                          torch.autograd.grad((expected * mask).sum(), theirs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_local_calibration_begins_as_an_ordinary_convolution_whose_places_can_be_learned():
    torch.manual_seed(0)
    feature = torch.randn(2, CHANNELS, 5, 7)
    module = LocalCalibration(CHANNELS, zero_offsets=True)
    expected = F.conv2d(feature, module.weight, padding=1)
    torch.testing.assert_close(module(feature), expected, rtol=1e-5, atol=1e-6)
    module(feature).square().sum().backward()
    assert module.offsets.weight.grad.abs().max() > 0
    assert not torch.allclose(LocalCalibration(CHANNELS, zero_offsets=False)(feature), expected, atol=0.1)


def test_a_map_that_is_no_number_spoils_what_it_is_sampled_for_and_raises_nothing():
    module = LocalCalibration(CHANNELS, zero_offsets=False)
    feature = torch.ones(1, CHANNELS, 6, 6)
    feature[0, 0, 2, 2] = torch.nan
    with torch.no_grad():
        assert module(feature).isnan().any()


def slow_normed(feature):
    """Batch norm at its start, in training."""
    mean = feature.mean(dim=(0, 2, 3), keepdim=True)
    return (feature - mean) / (feature.var(dim=(0, 2, 3), unbiased=False, keepdim=True) + 1e-5).sqrt()


@pytest.mark.parametrize("lic", [True, False])
def test_the_network_against_its_formula(lic):
    torch.manual_seed(0)
    network, maps = CalibrationNetwork(CHANNELS, lic), [feature.detach() for feature in pyramid(1)]
    merged = None
    for level in reversed(range(5)):
        feature, kernel = maps[level], network.output[level][0].weight
        own = slow_normed(torch.einsum("oc,nchw->nohw", network.lateral[level][0].weight[..., 0, 0], feature))
        if merged is not None:
            height, width = feature.shape[2:]
            rows = [y * merged.shape[2] // height for y in range(height)]
            columns = [x * merged.shape[3] // width for x in range(width)]
            above = merged[:, :, rows][..., columns]
            gate = network.gates[level]
            both = torch.einsum("gc,nchw->gnhw", gate.weight[..., 0, 0], torch.cat([own, above], 1))
            alpha, beta = torch.sigmoid(both + gate.bias[:, None, None, None])
            own = alpha[:, None] * own + beta[:, None] * above
        merged = own
        found = network(maps)
        torch.testing.assert_close(found.fused[level], slow_normed(F.conv2d(merged, kernel, padding=1)), rtol=1e-3,
                                   atol=1e-4)
        torch.testing.assert_close(found.projected[level], network.project[level](feature))
    assert len(network.gates) == 4  # none for the coarsest level


def test_what_is_coarser_reaches_the_finest_map_through_the_gates_alone():
    torch.manual_seed(0)
    network, maps = CalibrationNetwork(CHANNELS), pyramid(1)
    slopes = torch.autograd.grad(network(maps).fused[0].square().mul(torch.rand(8, 10)).sum(), maps)
    assert all(slope.abs().max() > 0 for slope in slopes)
    for gate in network.gates:
        torch.nn.init.zeros_(gate.weight)
        gate.bias.data = torch.tensor([40.0, -200.0])  # (alpha, beta) = (1, 0)
    closed = network(maps).fused[0]
    with torch.no_grad():
        maps[4] += 5
    assert torch.equal(network(maps).fused[0], closed)


def test_bf16_autocast_is_near_fp32_and_has_gradients():
    torch.manual_seed(0)
    network, maps = CalibrationNetwork(CHANNELS, zero_offsets=False), pyramid(1)
    with torch.autocast("cpu", torch.bfloat16):
        found = network([feature.bfloat16() for feature in maps])
    losses = calibration_losses(maps, found, [feature.bfloat16() for feature in pyramid(4)])
    exact = calibration_losses(maps, network(maps), pyramid(4))
    for name, loss in losses.items():
        assert loss.dtype == torch.float32 and loss.item() == pytest.approx(exact[name].item(), rel=0.05)
    sum(losses.values()).backward()
    assert all(weight.grad.abs().max() > 0 for weight in network.parameters())


# ---- CCD -------------------------------------------------------------------------------------------------------------


def slow_attention(feature):
    """Of one image, (C, H, W) -> a list of lists, in double precision."""
    strength = feature.double().abs().mean(dim=0)
    powers = [[math.exp(value / 0.1) for value in row] for row in strength.tolist()]
    total = sum(map(sum, powers))
    return [[strength.numel() * power / total for power in row] for row in powers]


def slow_mse(one, other):
    return sum((a - b) ** 2 for a, b in zip(one, other, strict=True)) / len(one)


def slow_pool(feature, size):
    """Averages over a grid of cells, whose first and last row and column are rounded outwards."""
    (images, channels, height, width), cells = feature.shape, []
    for n in range(images):
        for c in range(channels):
            for i in range(size):
                for j in range(size):
                    rows = slice(i * height // size, -(-(i + 1) * height // size))
                    columns = slice(j * width // size, -(-(j + 1) * width // size))
                    values = feature[n, c, rows, columns].flatten().tolist()
                    cells.append(sum(values) / len(values))
    return cells


def slow_ccd(student, maps, teacher, pooled):
    fused_error = pooled_error = attention_error = 0.0
    for level, wanted in enumerate(teacher):
        fused_error += slow_mse(maps.fused[level].flatten().tolist(), wanted.flatten().tolist())
        weight, weights, error = 1.0, 1.0, 0.0
        for size in (4, 2, 1):
            if size < wanted.shape[2]:
                weight /= 2
                weights += weight
                error += weight * slow_mse(slow_pool(pooled[level], size), slow_pool(wanted, size))
        pooled_error += error / weights
        squares = 0.0
        for n in range(len(wanted)):
            masks = slow_attention(student[level][n]), slow_attention(wanted[n])
            for y in range(wanted.shape[2]):
                for x in range(wanted.shape[3]):
                    difference = maps.projected[level][n, :, y, x] - wanted[n, :, y, x]
                    squares += (masks[0][y][x] + masks[1][y][x]) / 2 * difference.double().square().sum().item()
        attention_error += math.sqrt(squares)
    return {"ccd_fused": fused_error, "ccd_pooled": pooled_error, "ccd_attention": attention_error}


@pytest.mark.parametrize("source", ["raw", "fused"])
def test_the_losses_of_ccd_against_loops(source):
    student, maps, teacher = pyramid(1), maps_of(2), pyramid(4)
    found = calibration_losses(student, maps, teacher, source)
    expected = slow_ccd(student, maps, teacher, student if source == "raw" else maps.fused)
    assert {name: loss.item() for name, loss in found.items()} == pytest.approx(expected, rel=1e-4)
    sum(found.values()).backward()
    assert all(feature.grad is None for feature in teacher)
    # Attention is a constant, and what is pooled is a setting: nothing else asks for the raw maps.
    assert [feature.grad is not None for feature in student] == [source == "raw" and size[0] > 1 for size in SIZES]
    with pytest.raises(ValueError, match="both"):
        calibration_losses(student, maps, teacher, "both")


def test_attention_has_a_mean_of_one_and_is_even_where_the_map_is():
    masks = attention(torch.randn(3, CHANNELS, 4, 5))
    assert masks.shape == (3, 4, 5)
    torch.testing.assert_close(masks.sum(dim=(1, 2)), torch.full((3,), 20.0))
    assert (masks.amax(dim=(1, 2)) > 1.5).all()
    even = torch.ones(2, CHANNELS, 4, 5)
    even[:, ::2] = -1
    torch.testing.assert_close(attention(even), torch.ones(2, 4, 5))


def test_a_student_that_is_its_teacher_has_no_loss_and_no_slope():
    student, teacher = pyramid(1), pyramid(1)
    losses = calibration_losses(student, CalibratedMaps(student, student), teacher)
    assert losses["ccd_fused"].item() == losses["ccd_pooled"].item() == 0
    assert losses["ccd_attention"].item() == pytest.approx(5 * 1e-3)  # five times sqrt(EPS)
    assert all(slope.abs().max() == 0 for slope in torch.autograd.grad(sum(losses.values()), student))


def test_pooling_to_cells_that_a_map_has_not_is_left_out():
    for height, expected in ((8, 7 / 15), (4, 3 / 7), (2, 1 / 3), (1, 0)):  # (1/2 + 1/4 + 1/8) / (1 + 1/2 + 1/4 + 1/8)
        student, teacher = torch.full((2, 3, height, 6), 3.0), torch.ones(2, 3, height, 6)
        assert float(pooled_error(student, teacher)) == pytest.approx(4 * expected)


def test_the_attention_term_grows_with_the_root_of_the_number_of_images():
    one, other, even = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4), torch.ones(2, 4, 4)
    doubled = [torch.cat([part, part]) for part in (one, other, even)]
    assert attention_error(*doubled).item() == pytest.approx(2**0.5 * attention_error(one, other, even).item())


# ---- TASD ------------------------------------------------------------------------------------------------------------

LEVELS = ((8, 8), (4, 4), (2, 2), (1, 1), (1, 1))
OBJECTS = [torch.tensor([[4.0, 6, 52, 60], [20, 2, 63, 50], [1, 1, 30, 40]]), torch.zeros(0, 4),
           torch.tensor([[8.0, 2, 60, 31]])]
IMAGE_SIZES = [(64, 64), (64, 64), (32, 64)]  # on the third half of the anchors are not valid


def answers(seed, images=3):
    generator = torch.Generator().manual_seed(seed)
    shape = images, sum(height * width for height, width in LEVELS)
    return Outputs((2 * torch.randn(*shape, C, generator=generator)).requires_grad_(),
                   (3 * torch.randn(*shape, 4, R + 1, generator=generator)).requires_grad_(), [])


@pytest.fixture(scope="module")
def anchors():
    return make_anchors(LEVELS)


def targets_of(anchors, objects=OBJECTS):
    labels = torch.cat([torch.arange(len(boxes)) % C for boxes in objects])
    return assign_by_atss(anchors, ground_truth(torch.cat(objects), labels, [len(boxes) for boxes in objects],
                                                IMAGE_SIZES, C))


@pytest.fixture
def batch(anchors):
    """Student, teacher, targets, anchors."""
    return answers(1), answers(2), targets_of(anchors), anchors


def slow_regions(targets, anchors):
    """{(image, anchor)} of the valuable region, and of its interior, object by object."""
    border, interior = set(), set()
    for g, box in enumerate(targets.gt_boxes):
        image = targets.image_of[g].item()
        only = valuable_region(anchors.boxes, box[None], torch.tensor([0]), targets.thresholds[g:g + 1],
                               targets.valid[image:image + 1])[0]
        for a in only.nonzero().flatten().tolist():
            border.add((image, a))
            x, y = anchors.centres[a].tolist()
            if box[0] < x < box[2] and box[1] < y < box[3]:
                interior.add((image, a))
    return border, interior


def slow_softmax(logits):
    powers = [math.exp(z - max(logits)) for z in logits]
    return [power / sum(powers) for power in powers]


def slow_kl(student, teacher, temperature):
    q, p = (slow_softmax([z / temperature for z in row.tolist()]) for row in (student, teacher))
    return temperature**2 * sum(t * math.log(t / s) for s, t in zip(q, p, strict=True)) / len(p)


def slow_score(row, kind):
    if kind == "logit_sum_parity":
        return sum(row.tolist()) / 5
    return sum(p * math.log(p) for p in slow_softmax(row.tolist()))


def slow_tasd(student, teacher, targets, anchors, cls_region, kind):
    border, interior = slow_regions(targets, anchors)
    main = {tuple(place) for place in targets.positive.nonzero().tolist()}
    losses = {}
    for name, of_boxes, of_classes in (("main", main, main),
                                       ("vlr", border, interior if cls_region == "centre" else border)):
        total = 0.0
        for level in range(5):
            rows = [(i, a, e) for i, a in of_boxes if anchors.levels[a] == level for e in range(4)]
            shares = slow_softmax([slow_score(teacher.edges[row], kind) for row in rows]) if rows else []
            total += sum(len(rows) * share * slow_kl(student.edges[row], teacher.edges[row], 10)
                         for row, share in zip(rows, shares, strict=True))
        losses[f"tasd_ld_{name}"] = total / 16
        losses[f"tasd_kd_{name}"] = sum(slow_kl(student.logits[place], teacher.logits[place], 2)
                                        for place in of_classes) / 16
    return losses


@pytest.mark.parametrize("kind", ["certainty", "logit_sum_parity"])
@pytest.mark.parametrize("cls_region", ["centre", "shared"])
def test_the_losses_of_tasd_against_loops(batch, cls_region, kind):
    found = tasd_losses(*batch, LTDSettings(tasd_cls_region=cls_region, tasd_row_weights=kind))
    expected = slow_tasd(*batch, cls_region, kind)
    assert min(expected.values()) > 0
    assert {name: loss.item() for name, loss in found.items()} == pytest.approx(expected, rel=1e-4)


def test_classes_are_distilled_in_the_interior_and_boxes_at_the_border_as_well(batch):
    student, teacher, targets, anchors = batch
    border, interior = slow_regions(targets, anchors)
    assert interior < border and interior
    sum(tasd_losses(*batch, LTDSettings()).values()).backward()
    assert teacher.edges.grad is None and teacher.logits.grad is None
    main = {tuple(place) for place in targets.positive.nonzero().tolist()}
    assert {tuple(place) for place in student.edges.grad.abs().amax((2, 3)).nonzero().tolist()} == main | border
    assert {tuple(place) for place in student.logits.grad.abs().amax(2).nonzero().tolist()} == main | interior


def test_a_student_that_is_its_teacher_learns_nothing_from_tasd(batch):
    student, _, targets, anchors = batch
    losses = tasd_losses(student, copy.deepcopy(student), targets, anchors, LTDSettings())
    assert len(losses) == 4 and all(abs(loss.item()) < 1e-6 for loss in losses.values())


def test_a_batch_without_objects_costs_nothing_and_has_gradients_of_zero(anchors):
    student = answers(1)
    losses = tasd_losses(student, answers(2), targets_of(anchors, [torch.zeros(0, 4)] * 3), anchors, LTDSettings())
    sum(losses.values()).backward()
    assert all(loss.item() == 0 for loss in losses.values())
    assert student.edges.grad.abs().max() == student.logits.grad.abs().max() == 0


def test_row_weights_are_one_on_average_on_each_level_and_a_matter_of_the_distribution():
    generator = torch.Generator().manual_seed(1)
    teacher, levels = 3 * torch.randn(5, 4, R + 1, generator=generator), torch.tensor([0, 0, 3, 0, 3])
    shifted = teacher + torch.randn(5, 4, 1, generator=generator)
    for kind in ("certainty", "logit_sum_parity"):
        found = row_weights(teacher, levels, 5, kind)
        for level in (0, 3):
            assert found[levels == level].mean().item() == pytest.approx(1, rel=1e-5)
    torch.testing.assert_close(row_weights(shifted, levels, 5), row_weights(teacher, levels, 5))
    # The released code's are changed by what changes no distribution.
    parity = [row_weights(logits, levels, 5, "logit_sum_parity") for logits in (teacher, shifted)]
    assert (parity[0] - parity[1]).abs().max() > 0.1
    sure = torch.zeros(1, 4, R + 1)
    sure[0, 0, 2] = 100.0  # one side is known, the others could be anything: exp(0) and 1 / (R + 1)
    expected = torch.tensor([[1.0, 0.2, 0.2, 0.2]]) / 0.4
    torch.testing.assert_close(row_weights(sure, torch.tensor([2]), 5), expected)
    with pytest.raises(ValueError, match="entropy"):
        row_weights(teacher, levels, 5, "entropy")


# ---- weights, notes --------------------------------------------------------------------------------------------------


def test_the_weights_are_the_published_ones_and_lds_are_0():
    assert LTD.weights(LTDSettings(), 10) == {
        **gfl.WEIGHTS, "ld_main": 0, "ld_vlr": 0, "kd_main": 0, "kd_vlr": 0, "imitation": 2.0, "tasd_ld_main": 0.025,
        "tasd_ld_vlr": 0.025, "tasd_kd_main": 0.5, "tasd_kd_vlr": 0.5, "ccd_fused": 0.5, "ccd_pooled": 0.5,
        "ccd_attention": 1e-3}
    assert weights(LTDSettings(lambda_kd_main="auto"), 10)["kd_main"] == 1.25


def test_notes_are_about_what_is_switched_on():
    assert list(LTD.notes(LTDSettings(), 10, 8)) == []
    assert [note.split()[0] for note in LTD.notes(LTDSettings(), 1, 16)] == ["TASD's", "with"]
    assert list(LTD.notes(LTDSettings(tasd=False), 1, 16)) == []
    assert [note.split()[0] for note in LTD.notes(LTDSettings(lambda_ld_main=0.25), 10, 8)] == ["LD's"]
