"""Teachers' features kept on disk: the same results as with the teachers running, and never those of other teachers."""

import shutil
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import baseline_cl_s_weight
import baseline_cl_t3
from benchmarks.bench_training import save_teachers
from ClassAwareSampler import ClassAwareBatchSampler
from common.runtime import UserError, autocast
from dataset import network_input, read_info
from recognition import engine, feature_cache
from tests.support import QUICK, log_of, run_main, stop_at_step, student_flags, student_run

pytestmark = pytest.mark.usefixtures("without_pictures")
# Features can be kept where they do not depend on the rest of the batch.
ALONE = ("--teacher-batch-norm", "recalibrated")
KEPT = (*ALONE, "--feature-cache", "1")


def caches(data):
    return sorted(file.name for file in (data / "cache").glob("features_*"))


@pytest.mark.parametrize("precision, tolerance", [("fp32", 2**-11), ("bf16", 2**-6)])
def test_what_is_kept_is_what_each_images_own_teacher_says(own_tiny, teachers, precision, tolerance):
    """To half a unit in the last of fp16's 11 bits. In bf16 nothing is lost in keeping, but the sums of a convolution
    are rounded in another order for batches of another size."""
    run = student_run(own_tiny, teachers, precision, *KEPT)
    indices, flip = [3, 0, 51, 30, 3], torch.tensor([True, False, False, True, False])
    kept = run.features.read(indices, flip, torch.zeros(5, dtype=torch.int64))["own"]
    assert kept.shape == (5, 1024, 2, 2)
    for position, index in enumerate(indices):
        image, label = run.data.train[index]
        teacher = run.teachers[("t1", "t1", "t2", "t2", "t3", "t3")[label]]
        with autocast(run.device, precision), torch.no_grad():
            expected = teacher.layer3_features(network_input(image[None], flip[position:position + 1]))[0].float()
        error = (kept[position].float() - expected).abs()
        assert (error <= tolerance * expected.abs() + tolerance * expected.abs().max() / 16).all()


def test_all_symmetries_are_kept(own_tiny, teachers):
    run = student_run(own_tiny, teachers, "fp32", *KEPT, "--augment", "dihedral")
    assert run.features.array.shape == (52, 8, 1, 2, 2, 1024)
    image, _ = run.data.train[0]  # of a head class
    for turns in range(4):
        for flip in (False, True):
            kept = run.features.read([0], torch.tensor([flip]), torch.tensor([turns]))["own"].float()
            pixels = np.rot90(np.fliplr(image[0]) if flip else image[0], turns).copy()
            with torch.no_grad():
                expected = run.teachers["t1"].layer3_features(network_input(torch.from_numpy(pixels)[None, None]))
            assert torch.allclose(kept, expected, rtol=2e-3, atol=2e-3 * expected.abs().max().item())


def test_a_students_steps_agree_with_and_without_it(own_tiny, teachers):
    """On the same batches and a network that stands still: training from random weights makes of any difference, in the
    seventh digit too, another one in the second within a few steps."""
    terms, weights = [], []
    for flags in (ALONE, KEPT):
        run = student_run(own_tiny, teachers, "fp32", "--lr", "1e-12", *flags)
        same = ClassAwareBatchSampler(run.data.train.labels, 8, seed=0)
        batches = [same.draw().tolist() for _ in range(4)]
        trained = run.network.train()
        terms.append(torch.stack([engine.train_step(run, trained, batch)[1] for batch in batches]))
        weights.append(run.sampler.class_weights())
    assert torch.allclose(terms[0], terms[1], rtol=2e-3) and torch.allclose(weights[0], weights[1], rtol=2e-3)
    assert not torch.equal(terms[0], terms[1])


def test_the_teachers_run_no_more_once_it_is_built(own_tiny, teachers, tmp_path, monkeypatch, capsys):
    built, features_of = [], feature_cache.features_of
    monkeypatch.setattr(feature_cache, "features_of", lambda *given: built.append(given[-1]) or features_of(*given))
    own_teacher = baseline_cl_s_weight.STAGE.targets
    asked = []
    monkeypatch.setitem(vars(baseline_cl_s_weight.STAGE), "targets",
                        lambda *given, **more: asked.append(len(given[1])) or own_teacher(*given, **more))
    flags = ["--data-root", own_tiny, *student_flags(teachers), *QUICK, *KEPT]
    assert run_main(baseline_cl_s_weight, *flags, "--output", tmp_path / "one") == 0
    assert sorted(index for indices in built[1:] for index in indices) == list(range(52))
    assert sum(asked) == 2 * (1 + 52)  # the first image to know the sizes, and all of them, both flips
    asked.clear()
    assert run_main(baseline_cl_s_weight, *flags, "--output", tmp_path / "two") == 0
    assert sum(asked) == 2
    assert log_of(tmp_path / "one") == log_of(tmp_path / "two")
    assert "teachers' features: " in capsys.readouterr().out


def test_t3_keeps_the_features_of_both_its_teachers(own_tiny, teachers, tmp_path):
    flags = ["--data-root", own_tiny, *student_flags(teachers)[:6], *QUICK, "--epochs", "1"]
    assert run_main(baseline_cl_t3, *flags, *ALONE, "--output", tmp_path / "a") == 0
    assert run_main(baseline_cl_t3, *flags, *KEPT, "--output", tmp_path / "b") == 0
    (usual,), (kept,) = log_of(tmp_path / "a"), log_of(tmp_path / "b")
    for term in ("cross_entropy", "mse_t1", "mse_t2"):
        assert kept[term] == pytest.approx(usual[term], rel=1e-2)


def test_another_teacher_or_image_makes_another_cache(own_tiny, teachers, tmp_path):
    student_run(own_tiny, teachers, "fp32", *KEPT)
    first = caches(own_tiny)
    student_run(own_tiny, teachers, "fp32", *KEPT)
    assert caches(own_tiny) == first and len(first) == 1
    torch.manual_seed(1)
    save_teachers(tmp_path / "others", read_info(own_tiny), 32)
    student_run(own_tiny, tmp_path / "others", "fp32", *KEPT)
    second = caches(own_tiny)
    assert len(second) == 1 and second != first
    shutil.copy(own_tiny / "images" / "train_0_0.png", own_tiny / "images" / "train_5_0.png")
    student_run(own_tiny, tmp_path / "others", "fp32", *KEPT)
    assert len(caches(own_tiny)) == 1 and caches(own_tiny) != second


def test_a_half_built_one_is_never_used(own_tiny, teachers, monkeypatch):
    """A killed process leaves its temporary file, here with the name that the build gives it; the next build removes
    it."""
    run = student_run(own_tiny, teachers, "fp32", *KEPT)
    (name,) = caches(own_tiny)
    whole = np.array(run.features.array)
    left = own_tiny / "cache" / f".{name}.999999999.partial"
    (own_tiny / "cache" / name).rename(left)
    left.write_bytes(left.read_bytes()[:5000])
    again = student_run(own_tiny, teachers, "fp32", *KEPT)
    assert np.array_equal(again.features.array, whole) and not left.exists()


def test_a_data_set_too_large_for_it_is_said_and_trained_with_the_teachers_running(own_tiny, teachers, capsys):
    run = student_run(own_tiny, teachers, "fp32", *ALONE, "--feature-cache", "0.0008")
    assert run.features is None and not caches(own_tiny)
    assert ("note: the teachers' features of 52 images need 0.000852 GB; --feature-cache and the disk leave "
            "0.0008; the teachers run at every step instead") in capsys.readouterr().out


def test_features_beyond_16_bits_are_refused(own_tiny, teachers, monkeypatch):
    monkeypatch.setattr(feature_cache, "features_of", lambda *given: (("own",), torch.full((1, 2, 1, 2, 2, 1024), 1e6)))
    with pytest.raises(UserError, match="do not fit into torch.float16; train without --feature-cache"):
        student_run(own_tiny, teachers, "fp32", *KEPT)
    assert not caches(own_tiny) and not list(own_tiny.rglob("*.partial"))


@pytest.mark.parametrize("mode", ["train", "own"])
def test_features_that_depend_on_the_batch_cannot_be_kept(own_tiny, teachers, tmp_path, capsys, mode):
    assert run_main(baseline_cl_s_weight, "--data-root", own_tiny, *student_flags(teachers), *QUICK, *KEPT,
                    "--teacher-batch-norm", mode, "--output", tmp_path / "s") == 2
    assert "--feature-cache: teachers that normalise by a batch's statistics" in capsys.readouterr().err


def test_a_run_begun_with_kept_features_does_not_go_on_without(own_tiny, teachers, tmp_path, monkeypatch, capsys):
    """They are rounded, and the teachers are not: the weights would not be those of a run never stopped."""
    flags = ["--data-root", own_tiny, *student_flags(teachers), *QUICK, *KEPT, "--output", tmp_path / "s"]
    stop_at_step(monkeypatch, engine, 2)
    assert run_main(baseline_cl_s_weight, *flags) == 128 + signal.SIGTERM
    monkeypatch.undo()
    (own_tiny / "cache" / caches(own_tiny)[0]).unlink()
    with monkeypatch.context() as full:
        full.setattr(feature_cache.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
        assert run_main(baseline_cl_s_weight, *flags, "--resume") == 2
    assert "the run was begun with the teachers' features kept on disk and they are not now" in capsys.readouterr().err
    assert run_main(baseline_cl_s_weight, *flags, "--resume") == 0
