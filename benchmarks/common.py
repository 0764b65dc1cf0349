"""What all benchmarks share: contestants timed side by side, a table on the screen and the same as JSON."""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from common.files import write_json
from common.runtime import device_name, library_versions, resolve_device


def parser(description, name):
    """An argument parser with the flags of every benchmark: --device, --threads, --repeats, --json."""
    flags = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    flags.add_argument("--threads", type=int, default=None, help="threads of torch (default: as torch chooses)")
    flags.add_argument("--repeats", type=int, default=7, help="timed rounds; medians are reported")
    flags.add_argument("--json", type=Path, default=Path("runs/benchmarks") / f"{name}.json", help="where to write")
    return flags


def set_up(args):
    """The torch device of parsed flags, with the number of threads set and a fixed seed."""
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    return resolve_device(args.device)


def seconds_of(function, device):
    """Seconds that one call takes, the device's queued work included."""
    wait_for(device)
    started = time.perf_counter()
    function()
    wait_for(device)
    return time.perf_counter() - started


def wait_for(device):
    """Return when the device has done all that was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def interleaved(contestants, repeats, device, warm_up=2):
    """Time functions side by side: each round calls every one once, so that a slow moment of the machine hits all.

    contestants: {name: function}. Returns {name: median seconds of `repeats` rounds after `warm_up` rounds}."""
    seconds = {name: [] for name in contestants}
    for number in range(warm_up + repeats):
        for name, function in contestants.items():
            taken = seconds_of(function, device)
            if number >= warm_up:
                seconds[name].append(taken)
    return {name: statistics.median(taken) for name, taken in seconds.items()}


def machine(device):
    """The conditions of the measurement, as plain values."""
    return {"device": device_name(device), "threads": torch.get_num_threads(), "versions": library_versions()}


def finish(args, device, title, rows, **more):
    """Print `rows` (dicts with the same keys) as a table under `title`, and write them as JSON with the machine.

    more: further plain values for the JSON alone."""
    facts = machine(device)
    print(f"\n{title}\n{facts['device']}; " + ", ".join(f"{name} {value}" for name, value in facts["versions"].items()))
    print_table(rows)
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    write_json(args.json, json.loads(json.dumps({"title": title, "machine": facts, "settings": settings, "rows": rows,
                                                 **more}, default=str)))
    print(f"written to {args.json}", flush=True)


def print_table(rows):
    """Dicts with the same keys as aligned columns; None is a dash."""
    cells = [list(rows[0])] + [["-" if value is None else str(value) for value in row.values()] for row in rows]
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    for line in cells:
        print("  ".join(cell.ljust(width) if column == 0 else cell.rjust(width)
                        for column, (cell, width) in enumerate(zip(line, widths, strict=True))), flush=True)
