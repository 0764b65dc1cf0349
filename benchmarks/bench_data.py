"""What the data cost: building the image cache, starting on as many images as DOTA has, and every batch after that.

    python -m benchmarks.bench_data                  # 98,906 drawn chips; 7 GB of disk, and minutes to draw them
    python -m benchmarks.bench_data --images 5000    # a quick look

The chips are drawn once, into --folder, and used again. Figures that have a goal are printed beside it. Memory is
that of the data alone, without network, gradients and activations, and is measured on Linux only.
"""

import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from baseline_resnet50 import SETTINGS, STAGE
from benchmarks.common import finish, interleaved, parser, print_table, set_up, wait_for
from ClassAwareSampler import SelfCalibratedBatchSampler
from common.files import read_json
from common.image_cache import ImageCache
from common.precision import resolve_precision
from common.runtime import UserError, autocast, run_script
from common.training import to_device
from common.workers import in_processes
from dataset import DatasetInfo, ImageDataset, fingerprint, network_input, write_dataset
from recognition.published import DOTA
from recognition.run import make_sampler
from recognition.stage import load_data, read_lists
from resnet50 import ResNet50

DRAWING = 1  # raise it when the drawing changes, so that chips of an older one are not used again
SIZES = (3_000, 10_000, 30_000)  # and --images
CORES = os.cpu_count() or 1
START = ("imports", "lists", "fingerprint", "image cache", "first batch")  # what comes before a stage's first step
FLAT = 1.25  # a batch of the largest data set may cost this many times one of the smallest


# ---- drawn chips ---------------------------------------------------------------------------------------------------


def draw_data(folder, count):
    """A data set of `count` drawn chips in `folder`, with DOTA's long tail, unless it is there. Every tenth chip also
    stands in val.txt and test.txt."""
    path, names, made_by = folder / "dataset.json", DOTA["classes"], {"images": count, "drawing": DRAWING}
    if path.exists() and read_json(path).get("made_by") == made_by:
        return
    if path.exists():
        raise UserError(f"{path}: is another data set's; remove its folder, or give another --folder")
    labels = np.repeat(np.arange(len(names)), DOTA["train"])
    labels = labels[np.linspace(0, len(labels) - 1, count).astype(int)].tolist()
    # One in four is like a chip of FGSC-23, the others are like those of DOTA.
    train = [(f"train/{names[label]}/P{number // 40:04d}_{number % 40}.{'png' if number % 4 else 'jpg'}", label)
             for number, label in enumerate(labels)]
    for name in names:
        (folder / "images" / "train" / name).mkdir(parents=True, exist_ok=True)
    jobs = [(folder / "images", first, train[first:first + 256]) for first in range(0, count, 256)]
    for _ in tqdm(in_processes(draw_chips, jobs), f"drawing {count:,} chips into {folder}", len(jobs), disable=None):
        pass
    info = DatasetInfo(folder, "drawn DOTA", names, DOTA["groups"], "published", folder / "images")
    write_dataset(info, {"train": train, "val": train[::10], "test": train[::10]}, made_by)


def draw_chips(job):
    """Draw and write some chips. job: (folder, seed, [(relative path, label)])."""
    folder, seed, chips = job
    rng = np.random.default_rng(seed)
    noise = rng.normal(0, 1, (1200, 1200)).astype(np.float32)
    for path, _ in chips:
        Image.fromarray(draw_chip(rng, noise, path.endswith(".jpg"))).save(folder / path)


def draw_chip(rng, noise, like_fgsc):
    """A uint8 picture: a slope of light, bands, a bar for the object, noise. Like a chip of FGSC-23: colour, most 50
    to 400 pixels wide. Like one of DOTA: grey, most 15 to 120."""
    median, low, high = (150, 40, 800) if like_fgsc else (42, 10, 400)
    width, height = np.clip(median * np.exp(0.6 * rng.normal() + 0.15 * rng.normal(size=2)), low, high).astype(int)
    down, right = np.ogrid[-1:1:height * 1j, -1:1:width * 1j]
    across = right * rng.normal() + down * rng.normal()
    light = rng.uniform(60, 160) + 25 * across + rng.uniform(0, 20) * np.sin(across * rng.uniform(3, 20))
    light[(abs(down) < rng.uniform(0.2, 0.8)) & (abs(right) < rng.uniform(0.2, 0.8))] += rng.uniform(-60, 80)
    top, left = rng.integers(1200 - height), rng.integers(1200 - width)
    light += rng.uniform(2, 10) * noise[top:top + height, left:left + width]
    if like_fgsc:
        light = light[:, :, None] * rng.uniform(0.85, 1.1, 3)
    return np.clip(light, 0, 255).astype(np.uint8)


# ---- the cache, and a stage's start --------------------------------------------------------------------------------


def build_rows(args, device, info, samples):
    """Rows: images a second of a fresh cache, by kind of chip and number of processes."""
    both = [samples[i] for i in np.random.default_rng(0).permutation(len(samples))[:4_000]]
    cases = {"like FGSC-23, one process": ([sample for sample in both if sample.path.endswith("jpg")], 1),
             "like DOTA, one process": ([sample for sample in both if sample.path.endswith("png")], 1),
             "both, one process": (both, 1), f"both, one process a core ({CORES})": (both, CORES)}

    def build(chosen, processes):
        with tempfile.TemporaryDirectory(dir=info.root) as folder:
            ImageCache(info.images, chosen, SETTINGS.image_size, folder, processes=processes)

    contestants = {name: lambda case=case: build(*case) for name, case in cases.items()}
    seconds = interleaved(contestants, args.repeats, device, warm_up=1)
    rates = {name: len(cases[name][0]) / taken for name, taken in seconds.items()}
    return [*(row(f"cache build: {name}", rate, "images/s") for name, rate in rates.items()),
            row("cache build: each of these cores", list(rates.values())[-1] / CORES, "images/s")]


def start_and_report(args):
    """What a stage does with its data from its start to its first batch, then 500 batches. Prints the seconds of each
    part as JSON."""
    moments, settings = [args.since, time.time()], replace(SETTINGS, data_root=args.folder)
    lists = read_lists(STAGE, settings)
    moments.append(time.time())
    fingerprint(lists.info, lists.by_split())
    moments.append(time.time())
    dataset = load_data(lists, settings).train
    moments.append(time.time())
    feed = batches(dataset, "shuffled", settings.batch_size)
    next(feed)
    moments.append(time.time())
    for images, _ in itertools.islice(feed, 500):
        network_input(images)
    moments.append(time.time())
    parts = zip((*START, "500 batches"), itertools.pairwise(moments), strict=True)
    print(json.dumps({part: after - before for part, (before, after) in parts}))


def in_child(args):
    """Run `start_and_report` in a process of its own. Returns its seconds by part, and as "peak" the most anonymous
    memory in GB that it and its workers held together, None where the system does not tell."""
    command = [sys.executable, "-m", "benchmarks.bench_data", "--folder", args.folder, "--since", str(time.time())]
    child, peak = subprocess.Popen(command, stdout=subprocess.PIPE, text=True), 0
    while child.poll() is None:
        started = time.perf_counter()
        peak = max(peak, anonymous_memory(child.pid))
        time.sleep(max(0.03, 10 * (time.perf_counter() - started)))  # to look must not slow what is looked at
    if child.returncode:
        raise UserError(f"the process that was to start on {args.folder} failed; its message stands above")
    return {**json.loads(child.stdout.read()), "peak": peak / 1e9 or None}


def anonymous_memory(pid):
    """Bytes of anonymous memory of a process and its children, pages that they share counted once; 0 if unknown."""
    try:
        tasks = Path(f"/proc/{pid}/task").iterdir()
        children = [child for task in tasks for child in (task / "children").read_text(encoding="utf-8").split()]
        # The shares take the kernel a walk through all pages, so they are asked for only where something is shared.
        file, key = ("smaps_rollup", "Pss_Anon:") if children else ("status", "RssAnon:")
        text = "\n".join(Path(f"/proc/{each}/{file}").read_text(encoding="utf-8") for each in (pid, *children))
        return sum(1024 * int(line.split()[1]) for line in text.splitlines() if line.startswith(key))
    except OSError:  # not Linux, or one of the processes has just ended
        return 0


def start_rows(args):
    """Rows: the first start on the data set, which builds the cache, and later ones, medians of --repeats."""
    for old in Path(args.folder, "cache").glob("*.npy"):
        old.unlink()
    first, later = in_child(args), [in_child(args) for _ in range(args.repeats)]
    for start in later:
        start["all"] = sum(start[part] for part in START)
        start["all but imports"] = start["all"] - start["imports"]
    rows = [row(f"first start: cache of {args.images:,} images built in", first["image cache"], "s"),
            row("first start: images cached by each core", args.images / first["image cache"] / CORES, "images/s"),
            row("first start: peak memory, workers included", first["peak"], "GB", 1.5)]
    for part in (*START, "all", "all but imports", "500 batches"):
        goal = 3 if part.startswith("all") else None
        rows.append(row(f"warm start: {part}", statistics.median(start[part] for start in later), "s", goal))
    peak = max(start["peak"] or 0 for start in later) or None
    return [*rows, row("warm start and 500 batches: peak memory", peak, "GB", 1.5)]


# ---- batches -------------------------------------------------------------------------------------------------------


def batches(dataset, sampler, batch_size):
    """Training batches without end, each drawn when it is asked for, as `training.train_one_epoch` does; a
    self-calibrated sampler gets made-up losses after each. sampler: its name in the settings."""
    settings = replace(SETTINGS, sampler=sampler, batch_size=batch_size)
    sampler, losses = make_sampler(STAGE, settings, dataset, len(DOTA["classes"])), torch.rand(len(DOTA["classes"]))
    while True:
        for indices in sampler:
            images, labels = dataset.__getitems__(indices)  # (B, 1, H, W) uint8, (B,)
            yield images, labels
            if isinstance(sampler, SelfCalibratedBatchSampler):
                counts = torch.bincount(labels, minlength=len(losses))
                sampler.update(losses * counts, counts)


def share_rows(args, device, dataset):
    """Rows: what part of the baseline's training steps is spent on the data, for two samplers in turn."""
    precision = resolve_precision("auto", device)
    network = ResNet50(len(DOTA["classes"])).to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4,
                                fused=device.type in ("cpu", "cuda"))
    feeds = {name: batches(dataset, name, SETTINGS.batch_size) for name in ("shuffled", "self-calibrated")}
    taken = {name: [] for name in feeds}  # [(seconds on the data, seconds of the whole step)]
    for _ in tqdm(range(3 + 5 * args.repeats), desc="training steps", leave=False, disable=None):
        for name, feed in feeds.items():
            started = time.perf_counter()
            images, labels, flip = to_device((*next(feed), torch.rand(SETTINGS.batch_size) < 0.5), device)
            images = network_input(images, flip)  # (B, 1, H, W) float
            wait_for(device)
            fetched = time.perf_counter()
            with autocast(device, precision):
                loss = F.cross_entropy(network(images)[0].float(), labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            wait_for(device)
            taken[name].append((fetched - started, time.perf_counter() - started))
    rows = []
    for name, steps in taken.items():
        data, whole = np.array(steps[3:]).T  # seconds of each step; the first three warm up
        rows += [row(f"step of {SETTINGS.batch_size} images in {precision}, {name}", 1e3 * np.median(whole), "ms"),
                 row(f"... of it on the data, {name}", 1e3 * np.median(data), "ms"),
                 row(f"... share of the data, {name}", 100 * np.median(data / whole), "%", 2)]
    return rows


def batch_costs(args, dataset):
    """What a batch costs as the data set grows, in rounds of one batch of each case: a line of a table for each."""
    order = np.random.default_rng(0).permutation(len(dataset))
    grown = {size: ImageDataset(dataset.cache, [dataset.samples[i] for i in order[:size]])
             for size in (*(size for size in SIZES if size < args.images), args.images)}
    feeds = {(sampler, batch, size): batches(grown[size], sampler, batch)
             for sampler in ("shuffled", "class-aware", "self-calibrated") for batch in (8, 32) for size in grown}
    cases, seconds = list(feeds), {case: [] for case in feeds}
    for _ in tqdm(range(100 + 50 * args.repeats), desc="rounds of batches", leave=False, disable=None):
        for case in random.sample(cases, len(cases)):  # in any order: what comes before a batch changes its cost
            started = time.perf_counter()
            network_input(next(feeds[case])[0])
            seconds[case].append(time.perf_counter() - started)
    seconds = {case: taken[100:] for case, taken in seconds.items()}  # the first rounds warm up
    medians = {case: 1e3 * np.median(taken) for case, taken in seconds.items()}
    return [{"sampler": sampler, "batch": batch, "images": size, "median, ms": round(median, 3),
             "95th percentile, ms": round(1e3 * np.percentile(seconds[sampler, batch, size], 95), 3),
             "times the smallest": round(median / medians[sampler, batch, min(grown)], 2)}
            for (sampler, batch, size), median in medians.items()]


# ---- the program ---------------------------------------------------------------------------------------------------


def row(figure, value, unit, limit=None):
    """A line of the table; with a limit, whether the value is under it."""
    met = None if limit is None or value is None else "yes" if value < limit else "NO"
    return {"figure": figure, "value": None if value is None else float(f"{value:.4g}"), "unit": unit,
            "goal": None if limit is None else f"under {limit:g}", "met": met}


def page_cache(array):
    """In words, whether the memory-mapped array fits into what the system has left for its page cache."""
    lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines() if sys.platform == "linux" else []
    free = sum(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    fits = "not known here" if not free else "yes" if array.nbytes < free else "NO"
    return f"image cache {array.nbytes / 1e9:.2f} GB, memory available {free / 1e9:.1f} GB; it fits: {fits}"


def main():
    """Draw what is missing, measure, print and write."""
    flags = parser(__doc__, "data")
    flags.add_argument("--images", type=int, default=sum(DOTA["train"]), help="chips to draw (default %(default)s)")
    flags.add_argument("--folder", default="data/bench", help="where they go, in a folder of their number")
    flags.add_argument("--since", type=float, help="for the processes that this program starts")
    args = flags.parse_args()
    if args.since:
        return start_and_report(args)
    if args.images < 1_000:
        raise UserError(f"--images {args.images}: expected 1000 or more")
    device, args.folder = set_up(args), os.path.join(args.folder, str(args.images))
    draw_data(Path(args.folder), args.images)
    settings = replace(SETTINGS, data_root=args.folder)
    lists = read_lists(STAGE, settings)
    rows = build_rows(args, device, lists.info, lists.train) + start_rows(args)
    dataset = load_data(lists, settings).train
    for first in range(0, len(dataset), 1_000):  # as after a first epoch: read, and mapped
        dataset.cache.array[first:first + 1_000].max()
    costs = batch_costs(args, dataset)
    worst = max(line["times the smallest"] for line in costs)
    rows += [*share_rows(args, device, dataset), row("a batch as the data grow, worst case", worst, "times", FLAT)]
    fits = page_cache(dataset.cache.array)
    print(f"\n{fits}\n\nto draw a batch, fetch it and make it float, all images read before")
    print_table(costs)
    finish(args, device, "The cost of the data", rows, costs=costs, page_cache=fits, cores=CORES)


if __name__ == "__main__":
    run_script(main)
