"""Teachers and losses, each against the obvious way to compute it, image by image."""

import copy

import pytest
import torch
import torch.nn.functional as F

from benchmarks import reference
from recognition.distillation import each_teacher, feature_mse, freeze, imitate, own_teacher, recalibrate, sums_by_class
from resnet50 import ResNet50


@pytest.fixture(scope="module")
def teachers():
    torch.manual_seed(0)
    return {name: freeze(ResNet50(6), "eval") for name in ("t1", "t2", "t3")}


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(7, 1, 32, 32, generator=generator), torch.tensor([0, 2, 1, 1, 0, 2, 2])


def test_feature_mse_golden():
    features = torch.tensor([[[[0.0, 0.0], [0.0, 0.0]]], [[[1.0, 2.0], [3.0, 4.0]]]])
    teacher = torch.tensor([[[[1.0, 1.0], [1.0, 3.0]]], [[[1.0, 2.0], [3.0, 6.0]]]])
    assert feature_mse(features, teacher).tolist() == pytest.approx([3.0, 1.0], rel=1e-6)
    assert feature_mse(features, teacher).mean().item() == pytest.approx(F.mse_loss(features, teacher).item(), rel=1e-6)


def test_feature_mse_has_the_gradient_of_the_mse_and_keeps_the_memory_format():
    generator = torch.Generator().manual_seed(4)
    features, teacher = torch.randn(2, 3, 8, 5, 5, generator=generator)
    features[0] = teacher[0]  # where there is nothing left to learn, the gradient is 0 and not 0 / 0
    seen = []
    features = features.contiguous(memory_format=torch.channels_last).requires_grad_()
    (same := features * 1).register_hook(seen.append)
    feature_mse(same, teacher).mean().backward()
    expected = 2 * (features - teacher) / features.numel()
    assert torch.allclose(features.grad, expected, rtol=1e-4, atol=1e-9) and features.grad[0].abs().max() == 0
    assert seen[0].is_contiguous(memory_format=torch.channels_last)


def test_feature_mse_is_fp32_under_bf16():
    features, teacher = torch.randn(2, 3, 4, 5, 5)
    found = feature_mse(features.bfloat16(), teacher.bfloat16())
    assert found.dtype == torch.float32
    assert torch.allclose(found, feature_mse(features, teacher), rtol=0.02)


def test_each_image_goes_through_its_own_teacher_only(teachers, batch):
    images, groups = batch
    features = torch.randn(7, 1024, 2, 2)
    found = imitate(features, own_teacher(teachers, images, groups, whole_batch=False))["mse_own"]
    for i in range(7):
        own = teachers[f"t{groups[i] + 1}"].layer3_features(images[i:i + 1])
        assert found[i].item() == pytest.approx(((own[0] - features[i]) ** 2).mean().item(), rel=1e-4)


def test_a_teacher_without_an_image_is_not_called(teachers, batch, monkeypatch):
    images, _ = batch
    monkeypatch.setattr(teachers["t2"], "layer3_features", None)
    found = imitate(torch.zeros(7, 1024, 2, 2), own_teacher(teachers, images, torch.zeros(7, dtype=torch.int64)))
    assert found["mse_own"].shape == (7,)


def test_every_teacher_sees_the_whole_batch_in_stages_2_and_3(teachers, batch):
    images, groups = batch
    features = torch.randn(7, 1024, 2, 2)
    found = imitate(features, each_teacher({name: teachers[name] for name in ("t1", "t2")}, images, groups))
    assert set(found) == {"mse_t1", "mse_t2"}
    for name in ("t1", "t2"):
        for i in range(7):
            own = teachers[name].layer3_features(images[i:i + 1])[0]
            assert found[f"mse_{name}"][i].item() == pytest.approx(((own - features[i]) ** 2).mean().item(), rel=1e-4)


def test_a_student_that_equals_its_teachers_loses_nothing(teachers, batch):
    images, _ = batch
    with torch.no_grad():
        features = teachers["t1"].layer3_features(images)
    same = {"t1": teachers["t1"], "t2": teachers["t1"], "t3": teachers["t1"]}
    assert imitate(features, own_teacher(same, images, torch.zeros(7, dtype=torch.int64)))["mse_own"].abs().max() == 0


def test_gradients_reach_the_student_and_never_a_teacher(teachers, batch):
    images, groups = batch
    before = {name: copy.deepcopy(teacher.state_dict()) for name, teacher in teachers.items()}
    features = torch.randn(7, 1024, 2, 2, requires_grad=True)
    targets = {**own_teacher(teachers, images, groups), **each_teacher(teachers, images, groups)}
    losses = imitate(features, targets)
    assert set(losses) == {"mse_own", "mse_t1", "mse_t2", "mse_t3"}
    sum(loss.mean() for loss in losses.values()).backward()
    assert features.grad.abs().sum() > 0
    for name, teacher in teachers.items():
        assert not teacher.training and all(parameter.grad is None for parameter in teacher.parameters())
        assert all(torch.equal(value, before[name][key]) for key, value in teacher.state_dict().items())


def with_batch_statistics(network):
    """The network with its batch norms alone in training mode."""
    for module in network.eval().modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.train()
    return network


@pytest.mark.parametrize("whole_batch", [True, False])
def test_the_statistics_are_those_of_the_images_shown_together(batch, whole_batch):
    """In mode `train` of the whole batch, in mode `own` of a teacher's own images in it."""
    images, groups = batch
    torch.manual_seed(0)
    networks = {name: with_batch_statistics(ResNet50(6)) for name in ("t1", "t2", "t3")}
    teachers = {name: freeze(copy.deepcopy(network)) for name, network in networks.items()}
    found = own_teacher(teachers, images, groups, whole_batch)["own"]
    for number, network in enumerate(networks.values()):
        mine = groups == number
        with torch.no_grad():
            expected = network.layer3_features(images)[mine] if whole_batch else network.layer3_features(images[mine])
        assert torch.allclose(found[mine], expected, rtol=1e-3, atol=1e-4)


def test_a_teacher_has_no_running_statistics_that_could_drift(batch):
    teacher = freeze(ResNet50(6))
    before = copy.deepcopy(teacher.state_dict())
    each_teacher({"t1": teacher}, *batch)
    assert not any("running" in name for name in before) and not teacher.training
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_one_network_as_the_teacher_of_several_groups_runs_once(batch, monkeypatch):
    images, groups = batch
    torch.manual_seed(0)
    teacher, asked = freeze(ResNet50(6)), []
    features = teacher.layer3_features
    monkeypatch.setattr(teacher, "layer3_features", lambda shown: asked.append(len(shown)) or features(shown))
    found = own_teacher(dict.fromkeys(("t1", "t2", "t3"), teacher), images, groups)["own"]
    assert asked == [7] and torch.equal(found, features(images))


def test_recalibrated_statistics_are_means_over_the_batches(batch):
    """Of the first two layers, against their own outputs; a teacher with them gives an image always the same."""
    torch.manual_seed(0)
    network = trained_looking(ResNet50(6))
    batches = torch.randn(3, 5, 1, 32, 32, generator=torch.Generator().manual_seed(5))
    recalibrate(network, batches)
    with torch.no_grad():
        stems = [network.conv1(images) for images in batches]  # (5, 64, 16, 16)
    means = torch.stack([stem.mean((0, 2, 3)) for stem in stems]).mean(0)
    variances = torch.stack([stem.var((0, 2, 3)) for stem in stems]).mean(0)
    assert torch.allclose(network.bn1.running_mean, means, atol=1e-5)
    assert torch.allclose(network.bn1.running_var, variances, rtol=1e-4)
    teacher = freeze(network, "recalibrated")
    images, _ = batch
    together, alone = teacher.layer3_features(images)[:2], teacher.layer3_features(images[:2])
    assert torch.allclose(together, alone, rtol=1e-3, atol=1e-4)


def trained_looking(network):
    """Batch norms as training leaves them, far from 1 / 0, in place."""
    generator = torch.Generator().manual_seed(3)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for values, low, high in ((module.weight, 0.5, 1.5), (module.bias, -0.2, 0.2),
                                      (module.running_mean, -0.2, 0.2), (module.running_var, 0.5, 1.5)):
                values.data.uniform_(low, high, generator=generator)
    return network


def test_a_teacher_gives_the_features_of_the_network_that_it_was(batch):
    """Though its batch norm is folded away; in bf16 it is as near to them as the network itself under autocast."""
    images, _ = batch
    torch.manual_seed(0)
    network = trained_looking(ResNet50(6)).eval()
    with torch.no_grad():
        exact = network.layer3_features(images)
        folded = freeze(copy.deepcopy(network), "eval").layer3_features(images)
        assert torch.allclose(folded, exact, rtol=1e-4, atol=1e-4 * exact.max())
        with torch.autocast("cpu", torch.bfloat16):
            usual = network.layer3_features(images)
            teacher = freeze(copy.deepcopy(network), "eval", "bf16").layer3_features(images)
    assert (teacher - exact).norm() < 1.3 * (usual - exact).norm() and (usual - exact).norm() > 0


def test_a_bf16_teacher_with_batch_statistics_gives_what_autocast_gives(batch):
    images, _ = batch
    torch.manual_seed(0)
    network = with_batch_statistics(ResNet50(6))
    rounded = freeze(copy.deepcopy(network), "train", "bf16")
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert torch.equal(rounded.layer3_features(images), network.layer3_features(images))
    assert rounded.bn1.weight.dtype == torch.float32


def test_sums_by_class_against_a_loop():
    generator = torch.Generator().manual_seed(2)
    losses, labels = torch.rand(20, generator=generator), torch.randint(0, 5, (20,), generator=generator)
    sums, counts = sums_by_class(losses, labels, 6)
    for c in range(6):
        own = [losses[i].item() for i in range(20) if labels[i] == c]
        assert counts[c] == len(own) and sums[c].item() == pytest.approx(sum(own), abs=1e-5)


def test_train_mode_teachers_lose_what_the_released_code_computes(batch):
    """Image by image, every teacher on the whole batch for each, against ours with the switch for it."""
    images, groups = batch
    labels, group_of_class = torch.tensor([0, 5, 3, 2, 1, 4, 4]), torch.tensor([0, 0, 1, 1, 2, 2])
    assert group_of_class[labels].tolist() == groups.tolist()
    torch.manual_seed(0)
    student, *networks = (ResNet50(6).train() for _ in range(4))
    cross_entropy, distillation = reference.student_losses(student, copy.deepcopy(networks), images, labels,
                                                           group_of_class)
    teachers = {f"t{number}": freeze(network, "train") for number, network in enumerate(networks, 1)}
    logits, features = student(images)
    ours = imitate(features, own_teacher(teachers, images, groups))["mse_own"]
    assert torch.allclose(ours, distillation, rtol=1e-4)
    assert torch.allclose(F.cross_entropy(logits, labels, reduction="none"), cross_entropy, rtol=1e-4)
