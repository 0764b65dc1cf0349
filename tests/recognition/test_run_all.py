"""run_all.py: what it runs, what it passes on, what it finds finished, and the comparison it makes of it."""

import json

import pytest

import baseline_cl_s_weight
import baseline_resnet50
import run_all
from common.files import write_json
from common.runtime import UserError, resolve_device
from recognition.engine import check_run
from recognition.job_queue import Job
from recognition.settings import parse_settings

PERFECT = {"dataset": "d", "images": 4, "image_size": 32, "selected_on": "val", "device": "cpu",
           "per_class": [{"id": 0, "name": "a", "group": "head", "train": 9, "test": 4, "accuracy": 1.0}]}
FIVE = ["baseline", "t1", "t2", "t3", "student"]
RIVALS = ["class_aware", "balanced_softmax", "logit_adjustment", "ldam_drw", "crt"]
ALONE = ["t2_alone", "t3_alone"]
ABLATIONS = ["student_no_hierarchy", "student_class_aware", "student_one_teacher", "student_balanced_softmax"]


def write_accuracies(folder, **changed):
    """Results of a stage in `folder`. changed: the accuracies by measure, or `all` of them."""
    accuracies = {**dict.fromkeys(run_all.report.SUMMARY, changed.pop("all", 0.5)), **changed}
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "results.json", {**PERFECT, **accuracies})


@pytest.fixture
def jobs(monkeypatch):
    """Stages are not run but written down; each leaves results whose accuracy is its place in the order."""
    started = []

    def note(jobs, environments, finished):
        for job in jobs:
            if job.folder not in finished:
                started.append(job)
                write_accuracies(job.folder, all=len(started) / 100)

    monkeypatch.setattr(run_all, "run_jobs", note)
    monkeypatch.setattr(run_all, "finished_already", lambda job: (job.folder / "results.json").exists())
    return started


def run(folder, *flags):
    run_all.main(["--data-root", "data/x", "--output", str(folder), *flags])


def value_of(flags, name):
    return str(flags[flags.index(name) + 1])


def rows_of(folder):
    return json.loads((folder / "comparison.json").read_text())["rows"]


# ---- what is run -----------------------------------------------------------------------------------------------------


def test_five_stages_for_every_seed(jobs, tmp_path, capsys):
    run(tmp_path, "--seeds", "3", "5", "--epochs", "2", "--init", "none")
    assert [job.name for job in jobs] == [f"seed{seed}/{name}" for seed in (3, 5) for name in FIVE]
    for job in jobs:
        assert value_of(job.flags, "--output") == str(tmp_path / job.name)
        assert f"seed{value_of(job.flags, '--seed')}/" in job.name and value_of(job.flags, "--epochs") == "2"
        assert ("--init" in job.flags) == (job.folder.name == "baseline")
    rows = rows_of(tmp_path)
    assert rows["baseline"]["overall"]["values"] == [0.01, 0.06]
    assert rows["T2FTS student"]["tail"]["mean"] == pytest.approx(0.075)
    assert "3.5 ± 3.5" in (tmp_path / "comparison.txt").read_text() and "seeds 3, 5" in capsys.readouterr().out


def test_every_job_comes_after_what_it_needs(tmp_path):
    before = set()
    for job in run_all.jobs_of(0, tmp_path, None, {}):
        assert before.issuperset(job.needs)
        before.add(job.folder)
    needs = {job.folder.name: [need.name for need in job.needs] for job in run_all.jobs_of(0, tmp_path, None, {})}
    assert needs["baseline"] == [] and needs["t3"] == ["baseline", "t1", "t2"]
    assert needs["student"] == needs["student_class_aware"] == ["baseline", "t1", "t2", "t3"]
    assert needs["student_no_hierarchy"] == ["baseline", "t1", *ALONE]
    assert all(needs[name] == ["baseline"] for name in [*RIVALS, *ALONE, "student_one_teacher"])


def test_rivals_start_from_the_baseline_and_train_as_long_as_the_student(jobs, tmp_path):
    run(tmp_path, "--yardsticks", "--teacher-batch-norm", "eval")
    assert [job.folder.name for job in jobs] == [*FIVE, *RIVALS]
    own = {"class_aware": "--sampler class-aware", "balanced_softmax": "--loss balanced-softmax",
           "logit_adjustment": "--logit-adjustment 1.0", "ldam_drw": "--loss ldam-drw",
           "crt": "--train classifier --sampler class-aware"}
    epochs, best = baseline_cl_s_weight.SETTINGS.epochs, tmp_path / "seed0" / "baseline" / "best.pt"
    for job in jobs[5:]:
        assert job.script.STAGE.name == "baseline"
        assert " ".join(job.flags) == (
            f"--data-root data/x --init {best} --epochs {epochs} --lr-steps 53 {own[job.folder.name]} --seed 0 "
            f"--output {job.folder}")
    for job in jobs[:5]:  # a flag for teachers is passed on to the stages that have them
        assert ("--teacher-batch-norm" in job.flags) == bool(job.script.STAGE.teachers)


def test_the_authors_recipe_is_passed_on_and_dota_has_its_own_scripts(jobs, tmp_path):
    run(tmp_path, "--recipe", "released", "--dota", "--yardsticks")
    for job in jobs:
        assert job.script.__name__.startswith("dota_baseline") and value_of(job.flags, "--recipe") == "released"
    assert value_of(jobs[-1].flags, "--epochs") == "100" and value_of(jobs[-1].flags, "--lr-steps") == "53"


def test_ablations_are_students_without_one_part(jobs, tmp_path):
    run(tmp_path, "--ablations")
    assert [job.folder.name for job in jobs] == [*FIVE, *ALONE, *ABLATIONS]
    seed = tmp_path / "seed0"
    own = {"t2_alone": "--no-distillation", "t3_alone": "--no-distillation",
           "student_no_hierarchy": f"--t2 {seed / 't2_alone' / 'best.pt'} --t3 {seed / 't3_alone' / 'best.pt'}",
           "student_class_aware": "--sampler class-aware", "student_balanced_softmax": "--loss balanced-softmax",
           "student_one_teacher": " ".join(f"--{t} {seed / 'baseline' / 'best.pt'}" for t in ("t1", "t2", "t3"))}
    for job in jobs[5:]:
        assert job.script.STAGE.name == job.folder.name.split("_")[0]
        assert " ".join(job.flags) == f"--data-root data/x {own[job.folder.name]} --seed 0 --output {job.folder}"


def test_what_cannot_be_meant_is_refused(tmp_path, capsys):
    for flags, error in ((["--seeds", "1", "1"], "expected different seeds"), (["--jobs", "0"], "expected 1 or more"),
                         (["--batch-size", "0"], "--batch-size 0: expected 1 to 1e")):
        with pytest.raises(UserError, match=error):
            run(tmp_path, *flags)
    for name in ("sampler", "loss", "train", "logit-adjustment"):  # of single stages
        with pytest.raises(SystemExit):
            run(tmp_path, f"--{name}", "1")
    assert "unrecognized arguments" in capsys.readouterr().err and not list(tmp_path.iterdir())


SMALL = ["--device", "cpu", "--precision", "fp32", "--batch-size", "4", "--image-size", "64"]


def change_lists(root, change):
    """Rewrite each list of a data set: change(split, label) says whether an image stays."""
    for split in ("train", "val", "test"):
        lines = (root / f"{split}.txt").read_text().splitlines(True)
        (root / f"{split}.txt").write_text("".join(line for line in lines if change(split, int(line[-2]))))


@pytest.mark.parametrize("change, flags, error", [
    (lambda split, label: split != "val" or label < 4, [], "no image of the classes of stage t3 to choose the best "
     "epoch on .* give --select test, or make the data set of more images"),
    (lambda split, label: split != "test" or label < 4, [], "test.txt: no image of the classes of stage t3; add some"),
    (lambda split, label: True, ["--batch-size", "10"], "stage t3 has 9 training images, fewer than a batch of 10"),
])
def test_data_that_a_late_stage_cannot_use_stops_the_first(own_tiny, tmp_path, monkeypatch, change, flags, error):
    monkeypatch.setattr(run_all, "run_jobs", lambda *_: pytest.fail("a stage was started"))
    change_lists(own_tiny, change)
    with pytest.raises(UserError, match=error):
        run_all.main(["--data-root", str(own_tiny), "--output", str(tmp_path / "runs"), *SMALL, *flags])
    assert not (tmp_path / "runs").exists()


def test_an_empty_group_stops_the_first_stage(own_tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(run_all, "run_jobs", lambda *_: pytest.fail("a stage was started"))
    content = json.loads((own_tiny / "dataset.json").read_text())
    content["groups"] = {"head": [0, 1, 2], "middle": [], "tail": [3, 4, 5]}
    write_json(own_tiny / "dataset.json", content)
    with pytest.raises(UserError, match="group 'middle' holds no class, .* other --head-min and --tail-max"):
        run_all.main(["--data-root", str(own_tiny), "--output", str(tmp_path / "runs"), *SMALL])


# ---- what is found finished ------------------------------------------------------------------------------------------


def test_a_finished_comparison_is_not_overwritten_and_keeps_its_rows(jobs, tmp_path, capsys):
    run(tmp_path, "--seeds", "0", "1", "--yardsticks", "--ablations")
    with pytest.raises(UserError, match="holds a comparison already; go on with it by --resume"):
        run(tmp_path)
    rows = rows_of(tmp_path)
    assert list(rows) == list(run_all.ROWS.values()) and len(rows) == 11
    done = len(jobs)
    run(tmp_path, "--seeds", "0", "1", "--resume")
    assert len(jobs) == done and rows_of(tmp_path) == rows
    # The teachers of an ablation are no row, so a finished ablation needs them no more.
    assert "28 stages, 28 of them finished already; 1 at once" in capsys.readouterr().out
    run(tmp_path, "--seeds", "0", "1", "2", "--yardsticks", "--resume")
    assert [job.name for job in jobs[done:]] == [f"seed2/{name}" for name in (*FIVE, *RIVALS)]
    again = rows_of(tmp_path)
    assert list(again)[:7] == list(rows)[:7] and len(again["LDAM-DRW"]["overall"]["values"]) == 3
    for name in list(rows)[7:]:  # what is there of the ablations is kept
        assert again.pop(f"{name} (2 of 3 seeds)") == rows[name]
    assert ("note: T2FTS student, one teacher is there for 2 of 3 seeds; --ablations trains the others"
            ) in capsys.readouterr().out


def finish(folder, script, flags):
    """What a stage started with these flags leaves, as far as run_all reads it."""
    stage = script.STAGE
    settings, _ = parse_settings(stage, script.SETTINGS, "", [*flags, "--output", str(folder)])
    _, _, identity = check_run(stage, settings, resolve_device(settings.device))
    write_json(folder / "settings.json", identity)
    write_accuracies(folder)


def test_stages_started_by_hand_are_found_finished(tiny, tmp_path):
    """The flags as one would give them to the scripts: no more than each needs."""
    common = ["--data-root", str(tiny), "--image-size", "64", "--batch-size", "4", "--epochs", "8", "--schedule",
              "one-cycle", "--lr", "0.01"]
    alone = ["--no-distillation"]
    for seed in (0, 1):
        folder = tmp_path / f"seed{seed}"
        best = str(folder / "baseline" / "best.pt")
        rival = ["--lr-steps", "53", "--init", best]
        flags = {
            "baseline": ["--init", "none"], "class_aware": [*rival, "--sampler", "class-aware"],
            "balanced_softmax": [*rival, "--loss", "balanced-softmax"], "t2_alone": alone, "t3_alone": alone,
            "logit_adjustment": [*rival, "--logit-adjustment", "1"], "ldam_drw": [*rival, "--loss", "ldam-drw"],
            "crt": [*rival, "--train", "classifier", "--sampler", "class-aware"],
            "student_no_hierarchy": ["--t2", str(folder / "t2_alone" / "best.pt"),
                                     "--t3", str(folder / "t3_alone" / "best.pt")],
            "student_class_aware": ["--sampler", "class-aware"],
            "student_one_teacher": ["--t1", best, "--t2", best, "--t3", best],
            "student_balanced_softmax": ["--loss", "balanced-softmax"]}
        for job in run_all.jobs_of(seed, folder, None, {}):
            own = flags.get(job.folder.name, [])
            finish(job.folder, job.script, [*common, "--seed", str(seed), *own])
    flags = [*common, "--output", str(tmp_path), "--seeds", "0", "1", "--init", "none"]
    run_all.main([*flags, "--yardsticks", "--ablations", "--resume", "--jobs", "2"])  # starts nothing
    assert len(rows_of(tmp_path)) == 11 and not list(tmp_path.glob("seed*/*.log"))
    with pytest.raises(UserError, match=r"seed0.baseline: holds a run with lr 0.01, not 0.02; give the settings"):
        run_all.main([*flags, "--resume", "--lr", "0.02"])
    (tmp_path / "comparison.json").unlink()
    with pytest.raises(UserError, match=r"seed0.baseline: holds a run already; go on with it by --resume"):
        run_all.main(flags)


def test_a_stage_that_others_learned_from_is_not_extended(tiny, tmp_path):
    flags = ["--data-root", str(tiny), "--image-size", "64", "--batch-size", "4"]
    finish(tmp_path / "seed0" / "baseline", baseline_resnet50, [*flags, "--epochs", "8"])
    with pytest.raises(UserError, match=r"seed0.baseline: holds a run of fewer epochs than 9, which other stages may"):
        run_all.main([*flags, "--output", str(tmp_path), "--epochs", "9", "--resume"])


# ---- the comparison --------------------------------------------------------------------------------------------------


def written(folder, accuracies):
    """{name: [results.json of each seed]} with these class means."""
    paths = {}
    for name, values in accuracies.items():
        paths[name] = [folder / f"seed{seed}" / name / "results.json" for seed in range(len(values))]
        for path, value in zip(paths[name], values, strict=True):
            write_accuracies(path.parent, all=0.4, mean_per_class=value)
    return paths


def test_the_student_and_the_best_rival_are_compared_seed_by_seed(tmp_path, capsys):
    paths = written(tmp_path, {"baseline": [0.1, 0.2, 0.3], "class_aware": [0.7, 0.2, 0.3], "crt": [0.3, 0.5, 0.7],
                               "student": [0.32, 0.51, 0.73], "student_one_teacher": [0.9, 0.9, 0.9]})
    run_all.compare(tmp_path, paths, [0, 1, 2])
    line = ("T2FTS student - classifier re-training (the best rival by class mean): class mean +2.0 ± 1.0, overall "
            "+0.0 ± 0.0, tail +0.0 ± 0.0")
    assert line in capsys.readouterr().out and line in (tmp_path / "comparison.txt").read_text()
    paired = json.loads((tmp_path / "comparison.json").read_text())["paired"]
    assert paired["rows"] == ["T2FTS student", "classifier re-training"]
    assert paired["differences"]["mean_per_class"]["values"] == pytest.approx([0.02, 0.01, 0.03])
    assert max(map(len, (tmp_path / "comparison.txt").read_text().splitlines())) < 140


def test_one_seed_has_differences_without_deviation_and_no_rivals_none(tmp_path, capsys):
    run_all.compare(tmp_path, written(tmp_path, {"baseline": [0.1], "ldam_drw": [0.4], "student": [0.35]}), [0])
    assert "T2FTS student - LDAM-DRW (the best rival by class mean): class mean -5.0, over" in capsys.readouterr().out
    run_all.compare(tmp_path, written(tmp_path, {"baseline": [0.1], "student": [0.35]}), [0])
    assert "rival" not in capsys.readouterr().out.lower()
    assert "paired" not in json.loads((tmp_path / "comparison.json").read_text())


def test_of_many_rows_three_are_drawn(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(run_all.report, "draw_comparison", lambda runs, path: drawn.append(list(runs)))
    names = ["baseline", "class_aware", "crt", "student"]
    for accuracies in ({name: [0.5] for name in names}, {name: [len(name)] for name in run_all.ROWS},
                       {name: [0.5] for name in ["baseline", "student", *ABLATIONS]}):
        run_all.compare(tmp_path, written(tmp_path, accuracies), [0])
    assert drawn == [[run_all.ROWS[name] for name in names], ["baseline", "balanced softmax", "T2FTS student"],
                     ["baseline", "T2FTS student"]]


@pytest.mark.parametrize("key, value", [("dataset", "other"), ("images", 5), ("image_size", 64),
                                        ("selected_on", "test")])
def test_results_of_different_tests_are_not_compared(tmp_path, key, value):
    paths = written(tmp_path, {"baseline": [0.1, 0.2], "student": [0.3, 0.4]})
    other = paths["student"][0]
    write_json(other, {**json.loads(other.read_text()), key: value})
    with pytest.raises(UserError) as error:
        run_all.compare(tmp_path, paths, [0, 1])
    assert str(error.value) == (f"{other}: {key} is {value}, in {paths['baseline'][0]} it is {PERFECT[key]}; results "
                                "of different tests cannot be compared")
    assert not (tmp_path / "comparison.txt").exists()


def test_a_log_lies_beside_its_folder(tmp_path):
    assert Job(tmp_path / "seed0" / "t1", None, []).log == tmp_path / "seed0" / "t1.log"
