"""The five stages for one or several seeds, and one table of mean and deviation: baseline against student, and on
request the student's rivals and the student without one of its parts.

    python run_all.py --data-root data/FGSC-23 --output runs/fgsc --seeds 0 1 2 --jobs 2
    python run_all.py --data-root data/FGSC-23 --output runs/fgsc --seeds 0 1 2 --yardsticks --ablations --resume
    python run_all.py --data-root data/mine --output runs/mine --init none --epochs 20 --schedule one-cycle --lr 0.01

Every flag of the stage scripts is passed on to all of them; --init is the baseline's alone, the other stages start from
the baseline. DIR/seed0/t1 and so on are the stages' folders; DIR/comparison.{txt,json,png} compares them."""

import argparse
import dataclasses
import os
from pathlib import Path

import baseline_cl_s_weight
import baseline_cl_t1
import baseline_cl_t2
import baseline_cl_t3
import baseline_resnet50
from common.charts import optional_picture
from common.files import atomic_path, read_json, write_json
from common.flags import add_flags
from common.runtime import UserError, resolve_device, run_script, say
from common.training import is_finished
from recognition import report
from recognition.engine import check_run
from recognition.job_queue import Job, run_jobs, slots
from recognition.settings import Settings, parse_settings

# Flags of a single stage that make no sense for all of them, or that this script sets itself.
OWN_FLAGS = ("output", "seed", "init", "t1", "t2", "t3", "sampler", "train", "loss", "logit_adjustment", "distillation",
             "test_only", "weights", "expect_accuracy")

STAGES = ("baseline", "t1", "t2", "t3", "student")
# What baseline_resnet50.py is told to train from the finished baseline, for as many steps as the student.
RIVALS = {
    "class_aware": {"sampler": "class-aware"},
    "balanced_softmax": {"loss": "balanced-softmax"},
    "logit_adjustment": {"logit_adjustment": 1.0},
    "ldam_drw": {"loss": "ldam-drw"},
    "crt": {"train": "classifier", "sampler": "class-aware"},
}
ABLATIONS = ("student_no_hierarchy", "student_class_aware", "student_one_teacher", "student_balanced_softmax")
ALONE = ("t2_alone", "t3_alone")  # teachers that no teacher has taught
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


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, metavar="DIR", help="folder of all the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="one run of everything for each seed")
    parser.add_argument("--init", help="what the baseline starts from: none, imagenet or a file; else as its script")
    parser.add_argument("--yardsticks", action="store_true", help="also train the student's rivals, from the finished "
                        "baseline on and for as many steps as the student: class-aware sampling, balanced softmax, "
                        "logit adjustment, LDAM-DRW, classifier re-training")
    parser.add_argument("--ablations", action="store_true", help="also train the student with teachers that were not "
                        "taught, with class-aware sampling, with the baseline as its only teacher, and with balanced "
                        "softmax")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="train up to N stages at once that do not "
                        "wait for each other; each has an Nth of the CPU's threads (or OMP_NUM_THREADS of them), and "
                        "where there are several GPUs one of its own; output in DIR/seed*/*.log")
    add_flags(parser, [field for field in dataclasses.fields(Settings) if field.name not in OWN_FLAGS])
    return vars(parser.parse_args(argv))


def as_flags(values):
    """{"batch_size": 8, "resume": True} -> ["--batch-size", "8", "--resume"]."""
    flags = []
    for name, value in values.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(flag if value else flag.replace("--", "--no-", 1))
        else:
            flags += [flag, ",".join(map(str, value)) if isinstance(value, tuple) else str(value)]
    return flags


# ---- what is to run --------------------------------------------------------------------------------------------------


def jobs_of(seed, folder, init, given):
    """[Job] of everything that can be trained for one seed, what others wait for first.

    given: the settings that hold for all."""
    best = {name: folder / name / "best.pt" for name in ("baseline", *ALONE)}
    student = baseline_cl_s_weight.SETTINGS
    as_student = {name: given.get(name, getattr(student, name)) for name in ("epochs", "lr_steps")}
    teachers = ("baseline", "t1", "t2", "t3")

    def job(name, script, needs, **own):
        flags = as_flags({**given, **own, "seed": seed, "output": folder / name})
        return Job(folder / name, script, flags, tuple(folder / need for need in needs))

    return [
        job("baseline", baseline_resnet50, (), **({"init": init} if init else {})),
        job("t1", baseline_cl_t1, teachers[:1]),
        job("t2", baseline_cl_t2, teachers[:2]),
        job("t3", baseline_cl_t3, teachers[:3]),
        job("student", baseline_cl_s_weight, teachers),
        *(job(name, baseline_resnet50, ("baseline",), init=best["baseline"], **as_student, **own)
          for name, own in RIVALS.items()),
        job("t2_alone", baseline_cl_t2, ("baseline",), distillation=False),
        job("t3_alone", baseline_cl_t3, ("baseline",), distillation=False),
        job("student_no_hierarchy", baseline_cl_s_weight, ("baseline", "t1", *ALONE), t2=best["t2_alone"],
            t3=best["t3_alone"]),
        job("student_class_aware", baseline_cl_s_weight, teachers, sampler="class-aware"),
        job("student_one_teacher", baseline_cl_s_weight, ("baseline",),
            **dict.fromkeys(("t1", "t2", "t3"), best["baseline"])),
        job("student_balanced_softmax", baseline_cl_s_weight, teachers, loss="balanced-softmax"),
    ]


def wanted(output, seeds, yardsticks, ablations):
    """The names of the folders that a comparison needs: what is asked for, and every other row that an earlier run has
    finished for all seeds."""
    names = {*STAGES, *(RIVALS if yardsticks else ()), *((*ALONE, *ABLATIONS) if ablations else ())}
    for name in [name for name in ROWS if name not in names]:
        there = [(output / f"seed{seed}" / name / "results.json").exists() for seed in seeds]
        if all(there):
            names.add(name)
        elif any(there):
            say(f"note: {ROWS[name]} is not finished for every seed and will not be in the table; "
                f"{'--yardsticks' if name in RIVALS else '--ablations'} finishes it")
    return names


def finished_already(job):
    """Whether a job's folder holds its finished run. Raises UserError where the stage would refuse its settings or its
    folder: what the stage itself says, without the seconds that a program takes to start."""
    settings, _ = parse_settings(job.script.STAGE.name, job.script.SETTINGS, "", job.flags)
    if not any((job.folder / name).exists() for name in ("settings.json", "results.json")):
        return False
    check_run(job.script.STAGE, settings, resolve_device(settings.device))
    return is_finished(settings)


def main(argv=None):
    given = parse(argv)
    output, seeds, init, at_once = (given.pop(name) for name in ("output", "seeds", "init", "jobs"))
    yardsticks, ablations = given.pop("yardsticks"), given.pop("ablations")
    if len(set(seeds)) < len(seeds):
        raise UserError(f"--seeds {' '.join(map(str, seeds))}: expected different seeds")
    if at_once < 1:
        raise UserError(f"--jobs {at_once}: expected 1 or more")
    output = Path(output)
    if (output / "comparison.json").exists() and not given.get("resume"):
        raise UserError(f"{output}: holds a comparison already; go on with it by --resume, or give another --output")
    names = wanted(output, seeds, yardsticks, ablations)
    jobs = [job for seed in seeds for job in jobs_of(seed, output / f"seed{seed}", init, given)
            if job.folder.name in names]
    finished = {job.folder for job in jobs if finished_already(job)}
    environments = slots(at_once, given.get("device", "auto"))
    say(f"{len(jobs)} stages, {len(finished)} of them finished already; {len(environments)} at once")
    run_jobs(jobs, environments, finished)
    paths = {name: [output / f"seed{seed}" / name / "results.json" for seed in seeds] for name in ROWS if name in names}
    return compare(output, paths, seeds)


# ---- the comparison --------------------------------------------------------------------------------------------------


def read_results(path):
    """The results of a stage. Raises UserError for a file that is not its results."""
    results = read_json(path)
    for key in ("dataset", "images", "image_size", "selected_on", "device", "per_class", *report.SUMMARY):
        if not isinstance(results, dict) or key not in results:
            raise UserError(f"{path}: holds no results of a stage ({key!r} is missing); remove it to test again")
    return results


def read_comparable(paths):
    """{path: results} of tests on the same images. Raises UserError naming two files that are of different ones."""
    results = {path: read_results(path) for path in paths}
    first = paths[0]
    for path in paths[1:]:
        for key in ("dataset", "images", "image_size", "selected_on"):
            if results[path][key] != results[first][key]:
                raise UserError(f"{path}: {key} is {results[path][key]}, in {first} it is {results[first][key]}; "
                                "results of different tests cannot be compared")
    return results


def compare(output, paths, seeds):
    """Write and print the comparison of the finished runs.

    paths: {folder name: [results.json of each seed]}, in the order of the rows."""
    results = read_comparable([path for row in paths.values() for path in row])
    runs = {ROWS[name]: [results[path] for path in row] for name, row in paths.items()}
    table = report.comparison(runs)
    student, rivals = ROWS["student"], [ROWS[name] for name in RIVALS if name in paths]
    best_rival = max(rivals, key=lambda name: table[name]["mean_per_class"][0], default=None)
    paired = report.paired_differences(table[student], table[best_rival]) if rivals else {}
    first = runs["baseline"][0]
    lines = [
        f"{first['dataset']}: accuracy in per cent on {first['images']} test images, "
        f"{'seed' if len(seeds) == 1 else 'mean ± standard deviation over seeds'} {', '.join(map(str, seeds))}",
        f"{first['image_size']} x {first['image_size']} pixels; {report.how_chosen(first)}; "
        f"{first['device']}",
        report.comparison_table(table, len(seeds))]
    if rivals:
        lines += ["Rivals start from the baseline and train for as many steps as the student.",
                  f"{student} - {best_rival} (the best rival by class mean): {report.paired_line(paired, len(seeds))}"]
    text = "\n".join(lines)
    with atomic_path(output / "comparison.txt") as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
    write_json(output / "comparison.json", {
        "seeds": seeds, "rows": {name: as_json(row) for name, row in table.items()},
        **({"paired": {"rows": [student, best_rival], "differences": as_json(paired)}} if rivals else {})})
    drawn = runs if len(runs) <= 4 else {name: runs[name] for name in ("baseline", best_rival, student) if name}
    with optional_picture(output / "comparison.png") as path:
        report.draw_comparison(drawn, path)
    print(f"\n{text}\n\ntable: {output / 'comparison.txt'}   every class: {output / 'comparison.png'}")
    print(f"curves, confusion matrices and results.json of each stage: {output}{os.sep}seed*{os.sep}*", flush=True)


def as_json(row):
    """A row of `report.comparison` as it is written."""
    return {measure: {"mean": mean, "deviation": deviation, "values": values}
            for measure, (mean, deviation, values) in row.items()}


if __name__ == "__main__":
    run_script(main)
