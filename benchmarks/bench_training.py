"""What a training step costs: the plain step of the baseline, T2, T3, and the student with its teachers running, in
each mode of --teacher-batch-norm, and with their features kept on disk; and the student step of the paper's released
code.

    python -m benchmarks.bench_training
    python -m benchmarks.bench_training --batch-sizes 8 --precisions bf16 --compile

Every step is that of the stage script (`engine.train_step`) on drawn noise, with FGSC-23's classes and groups; weights
are random, which changes no time."""

import contextlib
import copy
import dataclasses
import io
import tempfile
from itertools import cycle
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

import baseline_cl_s_weight
import baseline_cl_t2
import baseline_cl_t3
import baseline_resnet50
from benchmarks import reference
from benchmarks.common import finish, interleaved, parser, print_table, set_up
from common.files import save_checkpoint
from common.precision import resolve_precision
from common.runtime import autocast, run_script
from common.training import trained_form
from dataset import DatasetInfo, describe, read_split, write_dataset
from recognition.engine import train_step
from recognition.published import FGSC23
from recognition.run import start_run
from recognition.settings import TEACHER_BATCH_NORM
from recognition.stage import read_lists
from resnet50 import ResNet50

# A step's script and settings of its own.
STEPS = {
    "plain": (baseline_resnet50, {}), "t2": (baseline_cl_t2, {}), "t3": (baseline_cl_t3, {}),
    "student": (baseline_cl_s_weight, {}),
    **{f"student, {mode}": (baseline_cl_s_weight, {"teacher_batch_norm": mode})
       for mode in TEACHER_BATCH_NORM[1:]},
    "student, features kept": (baseline_cl_s_weight, {"teacher_batch_norm": "recalibrated", "feature_cache": 100.0}),
}
GOALS = {"t2": 1.3, "t3": 1.5, "student": 1.45}  # times the plain step, at batch 8 on a CPU


def draw_data(root, images_per_class=12, size=224):
    """Grey noise with the classes and groups of FGSC-23, as a prepared data set. Returns its DatasetInfo."""
    generator, lists = np.random.default_rng(0), {"train": [], "val": [], "test": []}
    (root / "images").mkdir(parents=True)
    for label in range(len(FGSC23["classes"])):
        for number in range(images_per_class):
            name = f"{label}_{number}.png"
            Image.fromarray(generator.integers(0, 256, (size, size), dtype=np.uint8)).save(root / "images" / name)
            for split in lists if number == 0 else ["train"]:
                lists[split].append((name, label))
    info = DatasetInfo(root, "noise", FGSC23["classes"], FGSC23["groups"], "published", root / "images")
    write_dataset(info, lists)
    return info


def save_teachers(root, info, size):
    """Checkpoints of random weights where the stages look for them: ROOT/baseline/best.pt, ..."""
    for name in ("baseline", "t1", "t2", "t3"):
        description = {"stage": name, **describe(info), "preprocessing": {"image_size": size}, "epoch": 0,
                       "selected_on": "val", "settings": {}, "accuracy": 0.0}
        network = ResNet50(len(info.classes))
        for module in network.modules():  # small features, as after training: noise through random weights grows
            if isinstance(module, nn.BatchNorm2d):
                nn.init.constant_(module.weight, 0.3)
        save_checkpoint(root / name / "best.pt", {"model": network.state_dict(), "description": description})


def stage_run(module, folder, info, size, batch_size, precision, device, **more):
    """The Run that a stage script starts, with its start and its teachers from FOLDER/runs. more: other settings."""
    settings = dataclasses.replace(
        module.SETTINGS, data_root=str(info.root), output=str(folder / "runs" / module.STAGE.name), image_size=size,
        batch_size=batch_size, init="baseline" if module.STAGE.teachers else "none", **more)
    with contextlib.redirect_stdout(io.StringIO()):
        return start_run(module.STAGE, settings, read_lists(module.STAGE, settings), device, precision)


def stage_step(name, folder, info, size, batch_size, precision, device, compiled=False):
    """A function that does the next training step of a stage, as its script would."""
    script, own = STEPS[name]
    run = stage_run(script, folder, info, size, batch_size, precision, device, compile=compiled, **own)
    trained = trained_form(run, run.settings.compile).train()
    batches = (batch for _ in cycle([0]) for batch in run.sampler)
    return lambda: train_step(run, trained, next(batches))


def released_step(folder, info, size, batch_size, precision, device):
    """A function that does a student step as the released code does, with a new loader of 8 workers."""
    data = reference.DecodedAgain(info, read_split(info, "train"), size)
    student = ResNet50(len(info.classes)).to(device)
    teachers = [copy.deepcopy(student).train() for _ in range(3)]
    optimizer = torch.optim.SGD(student.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4)
    group_of_class, generator = info.group_of_class(), torch.Generator().manual_seed(0)

    def step():
        batch = reference.load_batch(data, torch.randint(0, len(data), (batch_size,), generator=generator).tolist())
        with autocast(device, precision):
            reference.student_step(student, teachers, optimizer, [part.to(device) for part in batch], group_of_class)

    return step


def measure(folder, info, size, batch_size, precision, device, repeats, compiled):
    """Rows of the table: all steps of one batch size and precision, timed side by side."""
    steps = {name: stage_step(name, folder, info, size, batch_size, precision, device) for name in STEPS}
    if compiled:
        for name in ("plain", "student"):
            steps[f"{name}, compiled"] = stage_step(name, folder, info, size, batch_size, precision, device, True)
    seconds = interleaved(steps, repeats, device)
    rows = []
    for name, taken in seconds.items():
        ratio = taken / seconds["plain"]
        goal = GOALS.get(name) if device.type == "cpu" and batch_size == 8 else None
        rows.append({"step": name, "batch": batch_size, "precision": precision, "ms": round(1000 * taken, 1),
                     "images/s": round(batch_size / taken, 1), "times plain": round(ratio, 3), "goal": goal})
    return rows


def profile(step, device, top=8):
    """Rows: the operators that take most of one step's own time, on the CPU or the GPU, in per cent."""
    for _ in range(3):
        step()
    kind = "device" if device.type == "cuda" else "cpu"
    with torch.profiler.profile() as profiler:
        step()
    times = {event.key: getattr(event, f"self_{kind}_time_total") for event in profiler.key_averages()}
    whole = sum(times.values())
    return [{"operator": name, "% of a step": round(100 * taken / whole, 1)}
            for name, taken in sorted(times.items(), key=lambda item: -item[1])[:top]]


def compare_with_released(folder, info, size, precisions, device, repeats):
    """Rows for a student step of 8 images by the released code and by ours, in each precision, all side by side."""
    steps = {}
    for precision in precisions:
        steps["released code", precision] = released_step(folder, info, size, 8, precision, device)
        for name in ("student", "student, own", "student, features kept"):
            steps[name, precision] = stage_step(name, folder, info, size, 8, precision, device)
    seconds = interleaved(steps, repeats, device, warm_up=1)
    return [{"step of 8 images": name, "precision": precision, "ms": round(1000 * taken, 1),
             **{f"faster than released {other}": round(seconds["released code", other] / taken, 1)
                for other in precisions}} for (name, precision), taken in seconds.items()]


def main():
    flags = parser(__doc__, "training")
    flags.add_argument("--batch-sizes", type=int, nargs="*", default=[8, 32], help="none: the released code alone")
    flags.add_argument("--precisions", nargs="+", default=["fp32", "bf16"], choices=("fp32", "bf16"))
    flags.add_argument("--image-size", type=int, default=224)
    flags.add_argument("--compile", action="store_true", help="also compile the plain and the student's network")
    flags.add_argument("--profile", action="store_true", help="say where the time of a plain step goes, and end")
    args = flags.parse_args()
    device = set_up(args)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        info = draw_data(folder / "data")
        save_teachers(folder / "runs", info, args.image_size)
        if args.profile:
            step = stage_step("plain", folder, info, args.image_size, 8, resolve_precision("auto", device), device)
            return finish(args, device, "a plain step of 8 images", profile(step, device))
        for precision in args.precisions:
            for batch_size in args.batch_sizes:
                rows += measure(folder, info, args.image_size, batch_size, resolve_precision(precision, device), device,
                                args.repeats, args.compile)
        released = compare_with_released(folder, info, args.image_size, args.precisions, device, min(args.repeats, 3))
    if rows:
        print(f"\none training step, {args.image_size}x{args.image_size}")
        print_table(rows)
    finish(args, device, "the student step against that of the released code", released, steps=rows)


if __name__ == "__main__":
    run_script(main)
