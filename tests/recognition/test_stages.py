"""Whole scripts on tiny data, as a user runs them: all five stages, the test entry, resuming, several processes."""

import csv
import json
import math
import os
import signal

import pytest
import torch

import baseline_cl_s_weight
import baseline_cl_t1
import baseline_resnet50
import run_all
from ClassAwareSampler import ClassAwareBatchSampler
from common.runtime import UserError
from dataset import network_input
from recognition import engine
from recognition.distillation import sums_by_class
from recognition.run import start_run
from recognition.settings import Settings, parse_settings, why_epochs_are_fixed
from recognition.stage import read_lists
from resnet50 import ResNet50
from tests.support import (
    QUICK,
    authors_state,
    log_of,
    run_main,
    run_program,
    run_two_processes,
    stop_at_step,
    student_flags,
)

pytestmark = pytest.mark.usefixtures("without_pictures")  # of the tests: the fixtures' runs draw theirs
STAGES = ("baseline", "t1", "t2", "t3", "student")
RIVALS = ("class_aware", "balanced_softmax", "logit_adjustment", "ldam_drw", "crt")


@pytest.fixture(scope="module")
def pipeline(tiny, tmp_path_factory):
    """(folder, finished process) of run_all.py over the tiny data, two stages at once, each of one thread."""
    folder = tmp_path_factory.mktemp("runs") / "all"
    done = run_program("run_all.py", "--data-root", tiny, "--output", folder, "--init", "none", *QUICK, "--yardsticks",
                       "--jobs", 2, env={"OMP_NUM_THREADS": "1"})
    return folder, done


def test_all_stages_run_and_leave_their_files(pipeline):
    folder, done = pipeline
    assert done.returncode == 0, done.stderr
    for stage in (*STAGES, *RIVALS):
        assert f"seed0/{stage}: finished after" in done.stdout
        assert "best epoch" in (folder / "seed0" / f"{stage}.log").read_text()
        assert set(os.listdir(folder / "seed0" / stage)) == {
            "settings.json", "log.jsonl", "last.pt", "best.pt", "results.json", "results.txt", "curves.png",
            "confusion.png", "mistakes.png"}
        assert [record["epoch"] for record in log_of(folder / "seed0" / stage)] == [1, 2]
    table = (folder / "comparison.txt").read_text()
    assert "baseline" in table and "T2FTS student - " in table and "LDAM-DRW" in table and "class mean" in table
    assert table.strip() in done.stdout
    rows = json.loads((folder / "comparison.json").read_text())["rows"]
    results = json.loads((folder / "seed0" / "student" / "results.json").read_text())
    assert rows["T2FTS student"]["overall"]["mean"] == results["overall"]


def test_stages_at_once_compute_what_they_compute_alone(pipeline, tiny, tmp_path):
    """The class-aware rival, beside which the teachers were trained."""
    together = pipeline[0] / "seed0" / "class_aware"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert run_main(baseline_resnet50, "--data-root", tiny, *QUICK, "--init", together.parent / "baseline" /
                        "best.pt", "--lr-steps", "52", "--sampler", "class-aware", "--output", tmp_path / "alone") == 0
    finally:
        torch.set_num_threads(threads)
    first, second = (torch.load(folder / "last.pt", weights_only=True) for folder in (together, tmp_path / "alone"))
    assert all(torch.equal(value, second["model"][name]) for name, value in first["model"].items())
    assert log_of(together) == log_of(tmp_path / "alone")


def test_a_finished_run_goes_on_to_its_table_alone(pipeline, tiny):
    """--resume with fewer rows asked for: nothing is trained, and no row is lost."""
    folder, flags = pipeline[0], ["--data-root", str(tiny), "--init", "none", *QUICK]
    before = (folder / "comparison.json").read_text()
    run_all.main([*flags, "--output", str(folder), "--resume"])
    assert (folder / "comparison.json").read_text() == before
    with pytest.raises(UserError, match="baseline: holds a run with lr 0.01, not 0.02"):
        run_all.main([*flags, "--output", str(folder), "--resume", "--lr", "0.02"])


def test_rivals_leave_plain_networks(pipeline):
    """LDAM's cosines as a linear layer, and classifier re-training with the baseline's network below a new layer."""
    best = {name: torch.load(pipeline[0] / "seed0" / name / "best.pt", weights_only=True)["model"]
            for name in ("baseline", "ldam_drw", "crt")}
    assert torch.allclose(best["ldam_drw"]["fc.weight"].norm(dim=1), torch.tensor(30.0))
    assert not best["ldam_drw"]["fc.bias"].any()
    different = {name for name, value in best["crt"].items() if not torch.equal(value, best["baseline"][name])}
    assert different == {"fc.weight", "fc.bias"}


def test_results_have_what_the_reader_is_promised(pipeline, tiny):
    results = json.loads((pipeline[0] / "seed0" / "student" / "results.json").read_text())
    for key in ("dataset", "split", "selected_on", "weights_sha256", "images", "overall", "head", "middle", "tail",
                "head_class_mean", "middle_class_mean", "tail_class_mean", "mean_per_class", "per_class", "parameters",
                "flops", "ms_per_image", "device", "precision"):
        assert results[key] is not None, key
    assert results["dataset"] == "tiny" and results["split"] == "test" and results["selected_on"] == "val"
    assert results["images"] == 24 and len(results["weights_sha256"]) == 64
    assert [row["train"] for row in results["per_class"]] == [14, 12, 9, 8, 5, 4]
    assert sum(map(sum, results["confusion"])) == 24
    teacher = json.loads((pipeline[0] / "seed0" / "t3" / "results.json").read_text())
    assert [row["id"] for row in teacher["per_class"]] == [4, 5] and teacher["head"] is None


def test_each_stage_logs_its_own_losses(pipeline):
    terms = {stage: {key for key in log_of(pipeline[0] / "seed0" / stage)[0] if key.startswith(("mse", "cross"))}
             for stage in STAGES}
    assert terms == {"baseline": {"cross_entropy"}, "t1": {"cross_entropy"}, "t2": {"cross_entropy", "mse_t1"},
                     "t3": {"cross_entropy", "mse_t1", "mse_t2"}, "student": {"cross_entropy", "mse_own"}}
    for stage in STAGES:
        for record in log_of(pipeline[0] / "seed0" / stage):
            assert record["loss"] == pytest.approx(sum(record[term] for term in terms[stage]))


def test_best_checkpoints_say_what_they_are(pipeline):
    best = torch.load(pipeline[0] / "seed0" / "t2" / "best.pt", weights_only=True)
    description = best["description"]
    assert description["stage"] == "t2" and description["classes"] == list("abcdef")
    assert description["groups"]["tail"] == [4, 5] and description["preprocessing"]["image_size"] == 32
    assert description["settings"]["batch_size"] == 8 and description["versions"]["torch"] == torch.__version__
    assert len(best["model"]) == 320


def test_a_second_run_needs_another_folder_or_resume(pipeline, tiny, capsys):
    folder = pipeline[0] / "seed0" / "baseline"
    before = (folder / "results.json").stat().st_mtime_ns
    flags = ("--data-root", tiny, "--output", folder, "--init", "none", *QUICK)
    assert run_main(baseline_resnet50, *flags) == 2
    assert "holds a run already; go on with it by --resume" in capsys.readouterr().err
    assert run_main(baseline_resnet50, *flags, "--resume", "--lr", "0.02") == 2
    assert "holds a run with lr 0.01, not 0.02" in capsys.readouterr().err
    assert run_main(baseline_resnet50, *flags, "--resume") == 0
    assert "is finished already" in capsys.readouterr().out
    assert (folder / "results.json").stat().st_mtime_ns == before


def test_resuming_ends_with_the_weights_of_a_run_never_stopped(pipeline, tiny, tmp_path, monkeypatch, capsys):
    """The student has the most state: its sampler's class weights, and the flips."""
    first = pipeline[0] / "seed0"
    flags = ["--data-root", tiny, *student_flags(first), *QUICK, "--epochs", "3"]
    assert run_main(baseline_cl_s_weight, *flags, "--output", tmp_path / "whole") == 0
    steps_an_epoch = 7  # 52 images in batches of 8

    stop_at_step(monkeypatch, engine, steps_an_epoch + 2)
    assert run_main(baseline_cl_s_weight, *flags, "--output", tmp_path / "parts") == 128 + signal.SIGTERM
    monkeypatch.undo()
    assert f"stopped after 1 of 3 epochs and 2 of {steps_an_epoch} steps, kept in" in capsys.readouterr().out
    assert len(log_of(tmp_path / "parts")) == 1
    assert run_main(baseline_cl_s_weight, *flags, "--output", tmp_path / "parts", "--resume") == 0
    whole, parts = (torch.load(tmp_path / run / "last.pt", weights_only=True)["model"] for run in ("whole", "parts"))
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())
    assert log_of(tmp_path / "whole") == log_of(tmp_path / "parts")


def test_an_extended_run_ends_as_one_that_was_as_long_from_the_start(tiny, tmp_path, capsys):
    def train(name, epochs, *more):
        return run_main(baseline_cl_t1, "--data-root", tiny, "--output", tmp_path / name, "--init", "none", *QUICK,
                        "--schedule", "steps", "--lr-steps", "2", "--epochs", epochs, *more)

    assert train("whole", 2) == train("parts", 1) == 0
    capsys.readouterr()
    assert train("parts", 2, "--resume") == 0
    assert "last.pt, 1 of 2 epochs done" in capsys.readouterr().out
    assert log_of(tmp_path / "parts") == log_of(tmp_path / "whole")
    whole, parts = (torch.load(tmp_path / run / "last.pt", weights_only=True)["model"] for run in ("whole", "parts"))
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())
    for name in ("settings.json", "results.json"):
        whole, parts = (json.loads((tmp_path / run / name).read_text()) for run in ("whole", "parts"))
        assert whole.get("epochs") == parts.get("epochs") and whole.get("confusion") == parts.get("confusion")
    assert train("parts", 1, "--resume") == 2  # no way back
    assert "holds a run with epochs 2, not 1; give the settings" in capsys.readouterr().err
    assert train("parts", 2, "--resume") == 0 and "is finished already" in capsys.readouterr().out


def test_a_run_whose_past_depends_on_its_length_is_not_extended(pipeline, tiny, capsys):
    assert run_main(baseline_resnet50, "--data-root", tiny, "--output", pipeline[0] / "seed0" / "baseline", "--init",
                    "none", *QUICK, "--epochs", "3", "--resume") == 2
    assert ("holds a run with epochs 2, not 3 and cannot be extended, as the learning rate of --schedule one-cycle "
            "depends on the number of epochs; give") in capsys.readouterr().err
    assert "--loss ldam-drw" in why_epochs_are_fixed(Settings(loss="ldam-drw"))
    assert "--min-steps" in why_epochs_are_fixed(Settings(min_steps=9)) and not why_epochs_are_fixed(Settings())


def test_the_last_checkpoint_describes_itself_and_can_be_tested(pipeline, tiny, tmp_path):
    last = pipeline[0] / "seed0" / "t1" / "last.pt"
    assert torch.load(last, weights_only=True)["description"]["epoch"] == 2
    assert run_main(baseline_cl_t1, "--test-only", "--weights", last, "--data-root", tiny, "--output",
                    tmp_path / "test", "--device", "cpu") == 0
    results = json.loads((tmp_path / "test" / "results.json").read_text())
    assert [row["name"] for row in results["per_class"]] == ["a", "b"] and results["image_size"] == 32


def test_one_student_step_is_that_of_the_paper(pipeline, tiny):
    """The losses of a batch, and the class weights after it, against a loop over its images."""
    folder = pipeline[0] / "seed0"
    flags = ["--data-root", tiny, "--output", folder / "student_again", *QUICK]
    device, stage = torch.device("cpu"), baseline_cl_s_weight.STAGE
    settings, _ = parse_settings(stage, baseline_cl_s_weight.SETTINGS, "", [str(flag) for flag in flags])
    run = start_run(stage, settings, read_lists(stage, settings), device, "fp32")
    # Drawn by the class-aware first batch of a sampler with the same seed.
    expected = ClassAwareBatchSampler(run.data.train.labels, 8, settings.seed).draw()
    batch = next(iter(run.sampler))
    assert batch == expected.tolist()
    images, labels = run.data.train.__getitems__(batch)
    images = network_input(images)
    groups = run.data.info.group_of_class()[labels]
    losses = engine.step_losses(run, run.network.train(), images, labels, groups)
    logits, features = run.network(images)
    by_class = {}
    for i, label in enumerate(labels.tolist()):
        teacher = run.teachers[("t1", "t1", "t2", "t2", "t3", "t3")[label]]
        target = teacher.layer3_features(images)[i]
        own = ((features[i] - target) ** 2).mean().item()
        assert losses["mse_own"][i].item() == pytest.approx(own, rel=1e-3)
        assert losses["cross_entropy"][i].item() == pytest.approx(-logits[i].log_softmax(0)[label].item(), rel=1e-4)
        by_class.setdefault(label, []).append(own)
    run.sampler.update(*sums_by_class(losses["mse_own"], labels, 6))
    weights = {label: math.log(1 + sum(own) / len(own)) for label, own in by_class.items()}
    mean = sum(weights.values()) / len(weights)
    weights = [weights.get(label, mean) for label in range(6)]
    assert run.sampler.class_weights().tolist() == pytest.approx([w / sum(weights) for w in weights], rel=1e-3)


# ---- the test entry --------------------------------------------------------------------------------------------------


def test_test_only_repeats_the_numbers_of_training(pipeline, tiny, tmp_path):
    weights = pipeline[0] / "seed0" / "student" / "best.pt"
    trained = json.loads((weights.parent / "results.json").read_text())
    done = run_program("dota_baseline_cl_s_weight.py", "--test-only", "--weights", weights, "--data-root", tiny,
                       "--output", tmp_path / "test", "--expect-accuracy", round(100 * trained["overall"], 2))
    assert done.returncode == 0, done.stderr
    tested = json.loads((tmp_path / "test" / "results.json").read_text())
    for key in ("confusion", "overall", "per_class", "weights_sha256", "selected_on", "image_size"):
        assert tested[key] == trained[key]
    assert (tmp_path / "test" / "results.txt").read_text().count("\n") == 6 + 4 + 1
    assert "as expected" in done.stdout


def test_an_accuracy_not_as_expected_is_status_1(pipeline, tiny, tmp_path, capsys):
    weights = pipeline[0] / "seed0" / "student" / "best.pt"
    assert run_main(baseline_cl_s_weight, "--test-only", "--weights", weights, "--data-root", tiny, "--output",
                    tmp_path / "test", "--expect-accuracy", "88.73", "--device", "cpu") == 1
    assert "expected an overall accuracy of 88.73 per cent, found" in capsys.readouterr().out


@pytest.mark.parametrize("prefix", ["", "module."])
def test_released_weights_are_tested_as_they_are(tiny, tmp_path, prefix):
    path = tmp_path / "baselinestuweight_alpha_29"
    torch.save(authors_state(6, prefix), path)
    assert run_main(baseline_cl_s_weight, "--test-only", "--weights", path, "--data-root", tiny, "--output",
                    tmp_path / "test", "--image-size", "32", "--device", "cpu") == 0
    results = json.loads((tmp_path / "test" / "results.json").read_text())
    assert results["images"] == 24 and results["selected_on"] == "unknown" and results["flops"] > 1e8


def test_testing_other_weights_into_a_run_is_refused(pipeline, tiny, tmp_path, capsys):
    torch.save(ResNet50(6).state_dict(), tmp_path / "other.pt")
    assert run_main(baseline_cl_s_weight, "--test-only", "--weights", tmp_path / "other.pt", "--data-root", tiny,
                    "--output", pipeline[0] / "seed0" / "student", "--device", "cpu") == 2
    assert "holds a run of its own" in capsys.readouterr().err


def test_a_second_test_does_not_overwrite_that_of_other_weights(pipeline, tiny, tmp_path, capsys):
    flags = ("--test-only", "--data-root", tiny, "--output", tmp_path / "test", "--device", "cpu")
    for stage, status in (("student", 0), ("student", 0), ("baseline", 2)):
        assert run_main(baseline_cl_s_weight, *flags, "--weights", pipeline[0] / "seed0" / stage / "best.pt") == status
    assert "results.json: is of other weights than" in capsys.readouterr().err
    assert json.loads((tmp_path / "test" / "results.json").read_text())["stage"] == "student"
    flags = ("--data-root", tiny, "--init", "none", *QUICK, "--output", tmp_path / "test")
    assert run_main(baseline_resnet50, *flags) == 2
    assert "holds the results of a test" in capsys.readouterr().err


def test_predict_names_what_is_in_a_folder(pipeline, tiny, tmp_path):
    weights = pipeline[0] / "seed0" / "student" / "best.pt"
    (tmp_path / "broken.png").write_bytes(b"not an image")
    (tmp_path / "list.txt").write_text(f"{tiny / 'images' / 'test_0_1.png'} 0\nbroken.png\nabsent.png")
    done = run_program("predict.py", "--weights", weights, tmp_path / "list.txt", tiny / "images", "--top", 2, "--csv",
                       tmp_path / "predictions.csv", "--json", tmp_path / "predictions.json", "--precision", "fp32")
    assert done.returncode == 1
    assert done.stderr == (f"{tmp_path / 'broken.png'}: not an image that Pillow can read\n"
                           f"{tmp_path / 'absent.png'}: no such image\n")
    rows = json.loads((tmp_path / "predictions.json").read_text())
    images = sorted(str(path) for path in (tiny / "images").iterdir())
    assert [row["path"] for row in rows[3:]] == images and "error" in rows[1] and "error" in rows[2]
    confusion = json.loads((weights.parent / "results.json").read_text())["confusion"]
    named = [row["predictions"] for row in rows[3:] if os.path.basename(row["path"]).startswith("test_")]
    for class_id in range(6):
        assert sum(first["id"] == class_id for first, _ in named) == sum(row[class_id] for row in confusion)
    with open(tmp_path / "predictions.csv", newline="") as file:
        table = list(csv.reader(file))
    assert table[0] == ["path", "class", "probability", "class_2", "probability_2"] and len(table) == len(images) + 2
    assert table[1][0] == str(tiny / "images" / "test_0_1.png") and float(table[1][2]) >= float(table[1][4])


# ---- protocols and processes -----------------------------------------------------------------------------------------


def test_the_authors_protocol_trains_on_everything_and_says_so(tiny, tmp_path, capsys):
    assert run_main(baseline_resnet50, "--data-root", tiny, "--output", tmp_path / "b", "--init", "none", *QUICK,
                    "--epochs", "1", "--recipe", "released") == 0
    results = json.loads((tmp_path / "b" / "results.json").read_text())
    recipe = "released but for epochs, lr, schedule, image_size, init"  # of --init none and QUICK
    assert results["selected_on"] == "test" and results["recipe"] == recipe
    assert f"; recipe {recipe}; epoch chosen on the TEST part (the authors' protocol); " in capsys.readouterr().out
    assert [row["train"] for row in results["per_class"]] == [16, 14, 11, 10, 7, 6]


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(pipeline, tiny, tmp_path, capsys,
                                                                                  monkeypatch):
    """In the student, whose sampler would otherwise be the first to fail."""
    first = pipeline[0] / "seed0"
    step_losses, steps = engine.step_losses, []

    def fail_in_the_second_epoch(*arguments):
        steps.append(1)
        losses = step_losses(*arguments)
        return {**losses, "mse_own": losses["mse_own"] * math.nan} if len(steps) == 10 else losses

    monkeypatch.setattr(engine, "step_losses", fail_in_the_second_epoch)
    assert run_main(baseline_cl_s_weight, "--data-root", tiny, "--output", tmp_path / "s", *student_flags(first),
                    *QUICK) == 2
    assert "stage student, epoch 2, step 3: mse_own is nan" in capsys.readouterr().err
    last = torch.load(tmp_path / "s" / "last.pt", weights_only=True)
    assert last["epoch"] == 1 and all(value.isfinite().all() for value in last["model"].values())


def test_bf16_trains_too_and_the_last_epoch_can_be_kept(tiny, tmp_path, monkeypatch, capsys):
    """Here the later of two epochs, though it is the worse."""
    confusions = iter(torch.diag(torch.tensor(right)) + torch.tensor([[0, 1]] * 2) for right in ([9, 9], [1, 1]))
    with monkeypatch.context() as worse:
        worse.setattr(engine, "evaluate", lambda *_: next(confusions))
        assert run_main(baseline_resnet50, "--data-root", tiny, "--output", tmp_path / "b", "--init", "none", *QUICK,
                        "--precision", "bf16", "--select", "last") == 0
    assert json.loads((tmp_path / "b" / "settings.json").read_text())["precision"] == "bf16"
    results = json.loads((tmp_path / "b" / "results.json").read_text())
    assert (results["precision"], results["epoch"], results["selected_on"]) == ("bf16", 2, "last")
    output = capsys.readouterr().out
    assert "last epoch 2: val accuracy" in output and "24 test images; the last epoch; " in output


def test_two_processes_train_one_student_and_test_each_image_once(pipeline, tiny, tmp_path):
    first = pipeline[0] / "seed0"
    done = run_two_processes("baseline_cl_s_weight.py", "--data-root", tiny, "--output", tmp_path / "s",
                             *student_flags(first), *QUICK)
    assert done.returncode == 0, done.stderr
    assert "(4 on each of 2 processes)" in done.stdout and done.stdout.count("best epoch") == 1
    results = json.loads((tmp_path / "s" / "results.json").read_text())
    assert results["images"] == sum(map(sum, results["confusion"])) == 24
    assert len(log_of(tmp_path / "s")) == 2
    # What is random is drawn for the global batch, so as many numbers as by one process.
    alone, together = (torch.load(folder / "last.pt", weights_only=True)
                       for folder in (first / "student", tmp_path / "s"))
    assert torch.equal(alone["flips"], together["flips"])
    assert together["sampler"]["known"].any() and together["description"]["processes"] == 2
