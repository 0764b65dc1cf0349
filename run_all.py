"""The five stages for one or several seeds, and one table of mean and deviation: baseline against student, and on
request the student's rivals and the student without one of its parts.

    python run_all.py --data-root data/FGSC-23 --output runs/fgsc --seeds 0 1 2 --jobs 2
    python run_all.py --data-root data/FGSC-23 --output runs/fgsc --seeds 0 1 2 --yardsticks --ablations --resume
    python run_all.py --data-root data/mine --output runs/mine --init none --epochs 20 --schedule one-cycle --lr 0.01

Flags of the stage scripts are passed on to every stage that has them; --init is the baseline's alone, the other stages
start from the baseline. DIR/seed0/t1 and so on are the stages' folders; DIR/comparison.{txt,json,png} compares them."""

import argparse
import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import baseline_cl_s_weight
import baseline_cl_t1
import baseline_cl_t2
import baseline_cl_t3
import baseline_resnet50
import dota_baseline_cl_s_weight
import dota_baseline_cl_t1
import dota_baseline_cl_t2
import dota_baseline_cl_t3
import dota_baseline_resnet50
from common.charts import optional_picture
from common.files import atomic_path, read_json, write_json
from common.flags import add_flags, flag_text, with_flags
from common.run_folder import is_extended, is_finished
from common.runtime import UserError, resolve_device, run_script, say
from recognition import report
from recognition.engine import check_run
from recognition.job_queue import Job, run_jobs, slots
from recognition.settings import Settings, parse_settings, released, unused_settings

# Flags of a single stage, and flags that this script sets itself.
NOT_PASSED_ON = ("output", "seed", "init", "t1", "t2", "t3", "sampler", "train", "loss", "logit_adjustment",
                 "distillation", "test_only", "weights", "expect_accuracy")

STAGES = {"baseline": baseline_resnet50, "t1": baseline_cl_t1, "t2": baseline_cl_t2, "t3": baseline_cl_t3,
          "student": baseline_cl_s_weight}
DOTA_STAGES = {"baseline": dota_baseline_resnet50, "t1": dota_baseline_cl_t1, "t2": dota_baseline_cl_t2,
               "t3": dota_baseline_cl_t3, "student": dota_baseline_cl_s_weight}
# Settings of the baseline's script, which trains each rival from the finished baseline, for as many steps as the
# student.
RIVALS = {
    "class_aware": {"sampler": "class-aware"},
    "balanced_softmax": {"loss": "balanced-softmax"},
    "logit_adjustment": {"logit_adjustment": 1.0},
    "ldam_drw": {"loss": "ldam-drw"},
    "crt": {"train": "classifier", "sampler": "class-aware"},
}
ABLATIONS = ("student_no_hierarchy", "student_class_aware", "student_one_teacher", "student_balanced_softmax")
ALONE = ("t2_alone", "t3_alone")  # teachers trained without teachers
ROWS = {
    "baseline": "baseline",
    "class_aware": "class-aware sampling",
    "balanced_softmax": "balanced softmax",
    "logit_adjustment": "logit adjustment",
    "ldam_drw": "LDAM-DRW",
    "crt": "classifier re-training",
    "student": "T2FTS student",
    "student_no_hierarchy": "T2FTS student, no hierarchy",
    "student_class_aware": "T2FTS student, class-aware sampling",
    "student_one_teacher": "T2FTS student, one teacher",
    "student_balanced_softmax": "T2FTS student, balanced softmax",
}


def parse(argv: Sequence[str] | None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, metavar="DIR", help="folder of all the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="one run of everything for each seed")
    parser.add_argument("--dota", action="store_true", help="run the dota_ scripts: data/DOTA by default, and with "
                        "--recipe released the starts of the authors' scripts for DOTA")
    parser.add_argument("--init", help="initial weights of the baseline: none, imagenet or a file (default: as in its "
                        "script)")
    parser.add_argument("--yardsticks", action="store_true", help="also train the student's rivals, from the finished "
                        "baseline on and for as many steps as the student: class-aware sampling, balanced softmax, "
                        "logit adjustment, LDAM-DRW, classifier re-training")
    parser.add_argument("--ablations", action="store_true", help="also train the student with teachers trained without "
                        "teachers, with class-aware sampling, with the baseline as its only teacher, and with balanced "
                        "softmax")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="train up to N independent stages at "
                        "once; each gets an Nth of the CPU's threads (or OMP_NUM_THREADS of them), and where there are "
                        "several GPUs one of its own; output in DIR/seed*/*.log")
    add_flags(parser, [field for field in dataclasses.fields(Settings) if field.name not in NOT_PASSED_ON])
    return vars(parser.parse_args(argv))


def as_flags(values: dict[str, Any]) -> list[str]:
    """{"batch_size": 8, "resume": True} -> ["--batch-size", "8", "--resume"]."""
    flags = []
    for name, value in values.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(flag if value else flag.replace("--", "--no-", 1))
        else:
            flags += [flag, flag_text(value)]
    return flags


# ---- the jobs --------------------------------------------------------------------------------------------------------


def jobs_of(seed: int, folder: Path, init: str | None, given: dict[str, Any],
            stages: dict[str, ModuleType] = STAGES) -> list[Job]:
    """All jobs of one seed, each after the jobs that it needs.

    given: the settings to be passed on to every stage that uses them. stages: their scripts."""
    best = {name: folder / name / "best.pt" for name in ("baseline", *ALONE)}
    student = with_flags(stages["student"].SETTINGS, given, {"released": released(stages["student"].STAGE)})
    as_student = {name: getattr(student, name) for name in ("epochs", "lr_steps")}
    teachers = ("baseline", "t1", "t2", "t3")

    def job(name: str, stage: str, needs: tuple[str, ...], **own: Any) -> Job:
        script = stages[stage]
        unused = unused_settings(script.STAGE)
        passed_on = {setting: value for setting, value in given.items() if setting not in unused}
        flags = as_flags({**passed_on, **own, "seed": seed, "output": folder / name})
        return Job(folder / name, script, flags, tuple(folder / need for need in needs))

    return [
        job("baseline", "baseline", (), **({"init": init} if init else {})),
        job("t1", "t1", teachers[:1]),
        job("t2", "t2", teachers[:2]),
        job("t3", "t3", teachers[:3]),
        job("student", "student", teachers),
        *(job(name, "baseline", ("baseline",), init=best["baseline"], **as_student, **own)
          for name, own in RIVALS.items()),
        job("t2_alone", "t2", ("baseline",), distillation=False),
        job("t3_alone", "t3", ("baseline",), distillation=False),
        job("student_no_hierarchy", "student", ("baseline", "t1", *ALONE), t2=best["t2_alone"], t3=best["t3_alone"]),
        job("student_class_aware", "student", teachers, sampler="class-aware"),
        job("student_one_teacher", "student", ("baseline",), **dict.fromkeys(("t1", "t2", "t3"), best["baseline"])),
        job("student_balanced_softmax", "student", teachers, loss="balanced-softmax"),
    ]


def wanted(jobs: list[Job], yardsticks: bool, ablations: bool) -> list[Job]:
    """Those of all jobs that a comparison needs: the rows that the flags ask for, and what an earlier run has finished
    of other rows."""
    names = {*STAGES, *(RIVALS if yardsticks else ()), *((*ALONE, *ABLATIONS) if ablations else ())}
    return [job for job in jobs if job.folder.name in names
            or job.folder.name in ROWS and (job.folder / "results.json").exists()]


def rows_of(jobs: list[Job], seeds: list[int]) -> dict[str, list[Path]]:
    """{folder name: [results.json of each seed]} of the rows of the table; prints a note where some seeds are
    missing."""
    rows = {name: [job.folder / "results.json" for job in jobs if job.folder.name == name] for name in ROWS}
    for name, row in rows.items():
        if 0 < len(row) < len(seeds):
            flag = "--yardsticks" if name in RIVALS else "--ablations"
            say(f"note: {ROWS[name]} is there for {len(row)} of {len(seeds)} seeds; {flag} trains the others")
    return {name: row for name, row in rows.items() if row}


def finished_already(job: Job) -> bool:
    """Whether a job's folder holds its finished run. Raises UserError where the stage would refuse its settings, its
    lists or its folder: the error of the stage itself, before the stages that come first have taken their hours."""
    settings, _ = parse_settings(job.script.STAGE, job.script.SETTINGS, "", job.flags)
    check_run(job.script.STAGE, settings, resolve_device(settings.device))
    if is_extended(settings):
        raise UserError(f"{job.folder}: holds a run of fewer epochs than {settings.epochs}, which other stages may "
                        "have learned from; give another --output, or extend this stage by its own script")
    return is_finished(settings)


def main(argv: Sequence[str] | None = None) -> None:
    given = parse(argv)
    output, seeds, init, at_once = (given.pop(name) for name in ("output", "seeds", "init", "jobs"))
    yardsticks, ablations = given.pop("yardsticks"), given.pop("ablations")
    stages = DOTA_STAGES if given.pop("dota") else STAGES
    if len(set(seeds)) < len(seeds):
        raise UserError(f"--seeds {' '.join(map(str, seeds))}: expected different seeds")
    if at_once < 1:
        raise UserError(f"--jobs {at_once}: expected 1 or more")
    output = Path(output)
    if (output / "comparison.json").exists() and not given.get("resume"):
        raise UserError(f"{output}: holds a comparison already; go on with it by --resume, or give another --output")
    jobs = wanted([job for seed in seeds for job in jobs_of(seed, output / f"seed{seed}", init, given, stages)],
                  yardsticks, ablations)
    rows = rows_of(jobs, seeds)
    finished = {job.folder for job in jobs if finished_already(job)}
    environments = slots(at_once, given.get("device", "auto"))
    say(f"{len(jobs)} stages, {len(finished)} of them finished already; {len(environments)} at once")
    run_jobs(jobs, environments, finished)
    compare(output, rows, seeds)


# ---- the comparison --------------------------------------------------------------------------------------------------


def read_results(path: Path) -> dict[str, Any]:
    """The results of a stage. Raises UserError for any other file."""
    results = read_json(path)
    for key in ("dataset", "images", "image_size", "selected_on", "device", "per_class", *report.SUMMARY):
        if not isinstance(results, dict) or key not in results:
            raise UserError(f"{path}: holds no results of a stage ({key!r} is missing); remove it to test again")
    return results


def read_comparable(paths: list[Path]) -> dict[Path, dict[str, Any]]:
    """{path: results} of tests on the same images. Raises UserError naming two files of different tests."""
    results = {path: read_results(path) for path in paths}
    first = paths[0]
    for path in paths[1:]:
        # Results of an older version do not tell which images they are of.
        for key in ("dataset", "images", "image_size", "selected_on", "test_images"):
            if len({results[path].get(key), results[first].get(key)} - {None}) > 1:
                raise UserError(f"{path}: {key} is {results[path][key]}, in {first} it is {results[first][key]}; "
                                "results of different tests cannot be compared")
    return results


def compare(output: Path, paths: dict[str, list[Path]], seeds: list[int]) -> None:
    """Write and print the comparison of the finished runs.

    paths: {folder name: [results.json of each seed]}, in the order of the rows; some seeds of a rival or an ablation
    may be missing, which its name then says."""
    results = read_comparable([path for row in paths.values() for path in row])
    complete = {name for name, row in paths.items() if len(row) == len(seeds)}
    runs = {ROWS[name] + ("" if name in complete else f" ({len(row)} of {len(seeds)} seeds)"):
            [results[path] for path in row] for name, row in paths.items()}
    table = report.comparison(runs)
    student, rivals = ROWS["student"], [ROWS[name] for name in RIVALS if name in complete]
    best_rival = max(rivals, key=lambda name: table[name]["mean_per_class"][0], default=None)
    paired = report.paired_differences(table[student], table[best_rival]) if rivals else {}
    first = runs["baseline"][0]
    numbers = "seed" if len(seeds) == 1 else "mean ± standard deviation over seeds"
    lines = [
        f"{first['dataset']}: accuracy in per cent on {first['images']} test images, {numbers} "
        f"{', '.join(map(str, seeds))}",
        f"{first['image_size']} x {first['image_size']} pixels; {report.protocol(first)}; "
        f"{first['device']}",
        report.comparison_table(table)]
    if rivals:
        lines += ["Rivals start from the baseline and train for as many steps as the student.",
                  f"{student} - {best_rival} (the best rival by class mean): {report.paired_line(paired, len(seeds))}"]
    text = "\n".join(lines)
    with atomic_path(output / "comparison.txt") as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
    comparison = {"seeds": seeds, "rows": {name: as_json(row) for name, row in table.items()}}
    if rivals:
        comparison["paired"] = {"rows": [student, best_rival], "differences": as_json(paired)}
    write_json(output / "comparison.json", comparison)
    drawn = runs if len(runs) <= 4 else {name: runs[name] for name in ("baseline", best_rival, student) if name}
    with optional_picture(output / "comparison.png") as path:
        report.draw_comparison(drawn, path)
    print(f"\n{text}\n\ntable: {output / 'comparison.txt'}   every class: {output / 'comparison.png'}")
    print(f"curves, confusion matrices and results.json of each stage: {output}{os.sep}seed*{os.sep}*", flush=True)


def as_json(row: report.Row) -> dict[str, Any]:
    """A row of `report.comparison` as it is written."""
    return {measure: {"mean": mean, "deviation": deviation, "values": values}
            for measure, (mean, deviation, values) in row.items()}


if __name__ == "__main__":
    run_script(main)
