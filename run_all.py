"""The five stages in order, for one or several seeds, and one table: baseline against student, mean and deviation.

    python run_all.py --data-root data/FGSC-23 --output runs/fgsc --seeds 0 1 2
    python run_all.py --data-root data/mine --output runs/mine --init none --epochs 20 --schedule one-cycle --lr 0.01

Every flag of the stage scripts is passed on to all of them; --init is the baseline's alone, the other stages start from
the baseline. DIR/seed0/t1 and so on are the stages' folders; DIR/comparison.{txt,json,png} compares them."""

import argparse
import dataclasses
import os
import signal
import subprocess
import sys
from pathlib import Path

import baseline_cl_s_weight
import report
from files import atomic_path, read_json, write_json
from flags import add_flags
from runtime import Stopped, StopSignals, UserError, run_script
from settings import Settings
from stage import SCRIPTS

# Flags of a single stage that make no sense for all of them, or that this script sets itself.
OWN_FLAGS = ("output", "seed", "init", "sampler", "t1", "t2", "t3", "test_only", "weights", "expect_accuracy")


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, metavar="DIR", help="folder of all the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="one run of everything for each seed")
    parser.add_argument("--init", help="what the baseline starts from: none, imagenet or a file; else as its script")
    parser.add_argument("--yardsticks", action="store_true", help="also train the baseline with class-aware sampling, "
                        "from the start and, as long as the student is trained, from the finished baseline on")
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


def stages_of(folder, init, given, yardsticks):
    """[(folder name, stage, flags of its own)] of one seed, in the order in which they must run."""
    first = {"init": init} if init else {}
    stages = [("baseline", "baseline", first)]
    if yardsticks:
        as_long_as_student = {name: given.get(name, getattr(baseline_cl_s_weight.SETTINGS, name))
                              for name in ("epochs", "lr_steps")}
        stages += [("class_aware", "baseline", {"sampler": "class-aware", **first}),
                   ("baseline_class_aware", "baseline", {"sampler": "class-aware", **as_long_as_student,
                                                         "init": folder / "baseline" / "best.pt"})]
    return stages + [(name, name, {}) for name in ("t1", "t2", "t3", "student")]


def run(command, what):
    """Run one stage as a program. Raises UserError if it fails, Stopped when a signal has ended it."""
    print(f"\n== {what}", flush=True)
    # Ctrl-C reaches the stage too, SIGTERM this process alone; either way the stage writes its checkpoint first.
    with StopSignals() as signals, subprocess.Popen(command) as process:
        signals.tell = lambda number: process.terminate() if number == signal.SIGTERM else None
        if signals.received:  # while the stage was being started
            process.terminate()
        status = process.wait()
    if signals.received:
        raise Stopped("stopped; the same command with --resume goes on", signals.received)
    if status:
        raise UserError(f"{what} ended with status {status}; once that is mended, go on with --resume")


def main(argv=None):
    given = parse(argv)
    output, seeds, init, yardsticks = (given.pop(name) for name in ("output", "seeds", "init", "yardsticks"))
    if len(set(seeds)) < len(seeds):
        raise UserError(f"--seeds {' '.join(map(str, seeds))}: expected different seeds")
    output, here = Path(output), Path(__file__).resolve().parent
    if (output / "comparison.json").exists() and not given.get("resume"):
        raise UserError(f"{output}: holds a comparison already; go on with it by --resume, or give another --output")
    runs = {"baseline": [], "student": []}
    if yardsticks:
        runs = {"baseline": [], "class_aware": [], "baseline_class_aware": [], "student": []}
    for seed in seeds:
        folder = output / f"seed{seed}"
        for name, stage, own in stages_of(folder, init, given, yardsticks):
            flags = as_flags({**given, **own, "seed": seed, "output": folder / name})
            run([sys.executable, str(here / SCRIPTS[stage]), *flags], f"{name}, seed {seed}")
            if name in runs:
                runs[name].append(read_results(folder / name / "results.json"))
    return compare(output, runs, seeds)


def read_results(path):
    """The results of a stage. Raises UserError for a file that is not its results."""
    results = read_json(path)
    for key in ("dataset", "images", "image_size", "selected_on", "device", "overall", "per_class"):
        if not isinstance(results, dict) or key not in results:
            raise UserError(f"{path}: holds no results of a stage ({key!r} is missing); remove it to test again")
    return results


def compare(output, runs, seeds):
    """Write and print the comparison of the finished runs."""
    names = {"baseline": "baseline", "class_aware": "baseline, class-aware sampling",
             "baseline_class_aware": "baseline, then class-aware sampling", "student": "T2FTS student"}
    runs = {names[name]: results for name, results in runs.items()}
    table = report.comparison(runs)
    first = runs["baseline"][0]
    text = "\n".join([
        f"{first['dataset']}: accuracy in per cent on {first['images']} test images, "
        f"{'seed' if len(seeds) == 1 else 'mean ± standard deviation over seeds'} {', '.join(map(str, seeds))}",
        f"{first['image_size']} x {first['image_size']} pixels; epoch chosen on {first['selected_on']}; "
        f"{first['device']}",
        report.comparison_table(table, len(seeds))])
    report.draw_comparison(runs, output / "comparison.png")
    with atomic_path(output / "comparison.txt") as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
    write_json(output / "comparison.json", {"seeds": seeds, "rows": {
        name: {measure: {"mean": mean, "deviation": deviation, "values": values}
               for measure, (mean, deviation, values) in row.items()} for name, row in table.items()}})
    print(f"\n{text}\n\ntable: {output / 'comparison.txt'}   every class: {output / 'comparison.png'}")
    print(f"curves, confusion matrices and results.json of each stage: {output}{os.sep}seed*{os.sep}*", flush=True)


if __name__ == "__main__":
    run_script(main)
