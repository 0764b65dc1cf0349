"""Reports for people: accuracies by class and group, `results.json`, the authors' text form, tables and pictures."""

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch

from common.charts import as_label, new_figure, save_figure
from common.files import atomic_path, read_json_lines, write_json
from common.runtime import say
from common.text import percent
from dataset import GROUPS, DatasetInfo
from recognition.settings import judged_on

# Okabe and Ito's colours, which colour-blind readers can tell apart.
GROUP_COLOURS = {"head": "#0072B2", "middle": "#E69F00", "tail": "#D55E00"}
ROW_COLOURS = ("#BBBBBB", "#56B4E9", "#009E73", "#333333")  # baseline, rivals, student
READABLE_CLASSES = 120  # at most for counts in a confusion matrix; with more classes it has colours alone
MOST_NAMES = 400  # along the side of a picture
Row = dict[str, tuple[float, float, list[float]]]  # {measure: (mean, deviation, values of the seeds)}
SUMMARY = ("overall", *GROUPS, *(f"{group}_class_mean" for group in GROUPS), "mean_per_class")


def accuracies(confusion: torch.Tensor, info: DatasetInfo, classes: list[int],
               train_counts: Sequence[int] | np.ndarray) -> dict[str, Any]:
    """Accuracies, as fractions, from a confusion matrix.

    confusion: (C, C) int, [true, predicted]. classes: the ids that were tested. train_counts: (C,) training images.
    `overall`, `head`, `middle` and `tail` weigh all images alike, `head_class_mean` and so on all classes; a group
    without a tested image is None. `mean_per_class` is over the classes that have a test image."""
    group_of_class = info.group_of_class().tolist()
    correct, images = confusion.diag().tolist(), confusion.sum(1).tolist()
    per_class = [{"id": c, "name": info.classes[c], "group": GROUPS[group_of_class[c]], "train": int(train_counts[c]),
                  "test": images[c], "accuracy": correct[c] / images[c] if images[c] else None} for c in classes]

    def by_image(ids: list[int]) -> float | None:
        total = sum(images[c] for c in ids)
        return sum(correct[c] for c in ids) / total if total else None

    def by_class(rows: list[dict[str, Any]]) -> float | None:
        values = [row["accuracy"] for row in rows if row["accuracy"] is not None]
        return mean(values) if values else None

    in_group = {group: [row for row in per_class if row["group"] == group] for group in GROUPS}
    return {
        "images": sum(images[c] for c in classes), "overall": by_image(classes),
        **{group: by_image([row["id"] for row in rows]) for group, rows in in_group.items()},
        **{f"{group}_class_mean": by_class(rows) for group, rows in in_group.items()},
        "mean_per_class": by_class(per_class), "per_class": per_class,
    }


def results_table(results: dict[str, Any]) -> str:
    """The table of one test as text: a line a class, then the summary."""
    width = max(len(row["name"]) for row in results["per_class"])
    lines = [f"{'id':>3} {'class':<{width}} {'group':<6} {'train':>6} {'test':>6} {'accuracy':>8}"]
    lines += [f"{row['id']:>3} {row['name']:<{width}} {row['group']:<6} {row['train']:>6} {row['test']:>6} "
              f"{percent(row['accuracy'], 2, 8)}" for row in results["per_class"]]
    lines.append("by image:   " + "   ".join(
        f"{name} {percent(results[name], 2)}" for name in ("overall", *GROUPS)))
    lines.append("class mean: " + "   ".join(
        f"{name} {percent(results[key], 2)}"
        for name, key in [("all", "mean_per_class"), *((group, f"{group}_class_mean") for group in GROUPS)]))
    lines.append(f"{results['images']} test images; {protocol(results)}; {results['parameters'] / 1e6:.2f} M "
                 f"parameters, {results['flops'] / 1e9:.2f} GFLOP and {results['ms_per_image']} ms an image at "
                 f"{results['image_size']}x{results['image_size']} ({results['precision']}, batches of "
                 f"{results['ms_per_image_batch']}, {results['device']})")
    return "\n".join(lines)


def protocol(results: dict[str, Any]) -> str:
    """The recipe of the tested network, if it had one, and how its epoch was chosen, human-readable."""
    recipe = f"recipe {results['recipe']}; " if results.get("recipe") else ""
    return recipe + {"val": "epoch chosen on the held-out part of train", "last": "the last epoch",
                     "test": "epoch chosen on the TEST part (the authors' protocol)"}.get(
        results["selected_on"], "how the epoch was chosen is unknown")


def authors_text(results: dict[str, Any]) -> str:
    """The result file as the authors' code writes it: `id:accuracy` lines, then the averages over images."""
    lines = [f"{row['id']}:{0.0 if row['accuracy'] is None else row['accuracy']}" for row in results["per_class"]]
    lines += [f"average_acc:{results['overall']}"]
    lines += [f"{group}_ave:{results[group]}" for group in GROUPS if results[group] is not None]
    return "\n".join([*lines, f"test_image_all:{results['images']}"]) + "\n"


def write_results(folder: Path, results: dict[str, Any]) -> None:
    """Print the table and write results.json and results.txt (the authors' form) into `folder`."""
    print(results_table(results), flush=True)
    with atomic_path(folder / "results.txt") as temporary:
        temporary.write_text(authors_text(results), encoding="utf-8")
    write_json(folder / "results.json", results)
    print(f"written: {folder / 'results.json'}, results.txt", flush=True)


def log_epoch(record: dict[str, Any], run: Any) -> None:
    """Print the one line of an epoch."""
    settings = run.settings
    split = judged_on(settings)
    chosen_on = f"{split}_accuracy"
    fixed = ("epoch", "lr", "loss", "seconds", "images_per_second", chosen_on)
    terms = "".join(f"  {name} {value:.4f}" for name, value in record.items() if name not in fixed)
    say(f"epoch {record['epoch']:>3}/{settings.epochs}  lr {record['lr']:.1e}  loss {record['loss']:.4f}{terms}  "
        f"{split} {record[chosen_on]:.4f} (kept {run.best_accuracy:.4f} at {run.best_epoch})  "
        f"{record['images_per_second']:.0f} images/s")


# ---- several runs ----------------------------------------------------------------------------------------------------


def comparison(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Row]:
    """Mean and standard deviation of the summary accuracies.

    runs: {row name: [results of one seed, ...]}. Returns {row name: Row}."""
    table: dict[str, Row] = {}
    for name, seeds in runs.items():
        table[name] = {}
        for measure in SUMMARY:
            values = [results[measure] for results in seeds]
            if None not in values:
                table[name][measure] = (mean(values), deviation(values), values)
    return table


def deviation(values: list[float]) -> float:
    """The standard deviation of a sample (n - 1), 0 of a single value."""
    return stdev(values) if len(values) > 1 else 0.0


def paired_differences(row: Row, other: Row) -> Row:
    """`row` minus `other` of a `comparison`, seed by seed. Effects common to both in a seed, such as the baseline that
    they start from, drop out of the deviation."""
    differences = {}
    for measure in row:
        if measure in other:
            values = [a - b for a, b in zip(row[measure][2], other[measure][2], strict=True)]
            differences[measure] = (mean(values), deviation(values), values)
    return differences


def paired_line(differences: Row, seeds: int) -> str:
    """The differences by class mean, overall and tail as text, in per cent: "class mean +1.3 ± 0.4, ..."."""
    parts = []
    for title, measure in (("class mean", "mean_per_class"), ("overall", "overall"), ("tail", "tail")):
        if measure in differences:
            difference, spread, _ = differences[measure]
            text = f"{title} {100 * difference:+.1f}"
            parts.append(f"{text} ± {100 * spread:.1f}" if seeds > 1 else text)
    return ", ".join(parts)


def comparison_table(table: dict[str, Row]) -> str:
    """The comparison as text, in per cent; of several seeds mean ± standard deviation.

    overall, head, middle and tail are averages over images, as in the paper; the last two columns, over classes."""
    columns = [(name, name) for name in ("overall", *GROUPS)]
    columns += [("class mean", "mean_per_class"), ("tail cl. mean", "tail_class_mean")]
    width = max(len(name) for name in table)
    cell = 15
    lines = [" " * width + "".join(f"{title:>{cell}}" for title, _ in columns)]
    for name, row in table.items():
        cells = []
        for _, measure in columns:
            if measure not in row:
                cells.append("-")
            elif len(row[measure][2]) == 1:
                cells.append(f"{100 * row[measure][0]:.1f}")
            else:
                cells.append(f"{100 * row[measure][0]:.1f} ± {100 * row[measure][1]:.1f}")
        lines.append(f"{name:<{width}}" + "".join(f"{text:>{cell}}" for text in cells))
    return "\n".join(lines)


# ---- pictures --------------------------------------------------------------------------------------------------------


def named_classes(count: int) -> tuple[range, float]:
    """The positions 0..count-1 that are named along the side of a picture, of very many every second, third, ...; and
    the size of the names in points."""
    positions = range(0, count, -(-count // MOST_NAMES))
    return positions, min(7, 2000 / len(positions))


def draw_class_counts(info: DatasetInfo, counts: dict[str, np.ndarray], path: Path) -> None:
    """Bars of the training images of each class, the largest first, in the colours of head, middle and tail.

    counts: {"train": (C,), "val": (C,)}, which are added up."""
    totals = [int(train + val) for train, val in zip(counts["train"], counts["val"], strict=True)]
    order = sorted(range(len(totals)), key=lambda c: -totals[c])
    group_of_class = info.group_of_class().tolist()
    figure = new_figure(max(6.0, 0.36 * len(order) + 2), 4)
    axes = figure.add_subplot()
    for number, group in enumerate(GROUPS):
        at = [x for x, c in enumerate(order) if group_of_class[c] == number]
        heights = [totals[order[x]] for x in at]
        axes.bar(at, heights, color=GROUP_COLOURS[group], label=f"{group}: {len(at)} classes, {sum(heights)} images")
    named, size = named_classes(len(order))
    axes.set_xticks(named, [as_label(info.classes[order[x]]) for x in named], rotation=60, ha="right", fontsize=size)
    if max(totals) > 100 * max(min(totals), 1):
        axes.set_yscale("log")
    axes.set_ylabel("training images")
    axes.set_title(as_label(info.name), fontsize=9)
    axes.legend(fontsize=8)
    save_figure(figure, path)


def draw_confusion(results: dict[str, Any], path: Path) -> None:
    """Draw the confusion matrix: rows are true classes, scaled to sum 1, their names in the colour of their group."""
    ids = [row["id"] for row in results["per_class"]]
    side = max(5.0, 0.32 * len(ids) + 2.5)
    figure = new_figure(side, side)
    axes = figure.add_subplot()
    rows = [[results["confusion"][true][predicted] for predicted in ids] for true in ids]
    totals = [max(row["test"], 1) for row in results["per_class"]]
    shares = [[count / total for count in row] for row, total in zip(rows, totals, strict=True)]
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for y, row in enumerate(rows if len(rows) <= READABLE_CLASSES else []):
        for x, count in enumerate(row):
            if count:
                axes.text(x, y, str(count), ha="center", va="center", fontsize=6,
                          color="white" if shares[y][x] > 0.5 else "black")
    named, size = named_classes(len(ids))
    of_names = [results["per_class"][position] for position in named]
    axes.set_xticks(named, [as_label(row["name"]) for row in of_names], rotation=90, fontsize=size)
    axes.set_yticks(named, [f"{as_label(row['name'])} ({row['train']})" for row in of_names], fontsize=size)
    for label, row in zip(axes.get_yticklabels(), of_names, strict=True):
        label.set_color(GROUP_COLOURS[row["group"]])
    axes.set_xlabel("predicted")
    axes.set_ylabel("true class (training images)")
    overall = percent(results["overall"], 2)
    axes.set_title(f"{as_label(results['dataset'])}, {results['stage']}: overall {overall} %", fontsize=9)
    save_figure(figure, path)


def draw_curves(folder: Path) -> None:
    """Draw curves.png from log.jsonl, if there is one: loss terms, and the accuracy for choosing the best epoch."""
    records = read_json_lines(Path(folder) / "log.jsonl")
    if not records:
        return
    epochs = [record.get("epoch", math.nan) for record in records]
    figure = new_figure(9, 3.6)
    losses, accuracy = figure.subplots(1, 2)
    for name in records[0]:
        if name in ("loss", "cross_entropy", "balanced_softmax", "ldam_drw") or name.startswith("mse_"):
            losses.plot(epochs, [record.get(name, math.nan) for record in records], label=name)
        elif name.endswith("_accuracy"):
            accuracy.plot(epochs, [100 * record.get(name, math.nan) for record in records], label=name)
    losses.set_yscale("log")
    losses.set_ylabel("mean over the epoch")
    accuracy.set_ylabel("per cent")
    for axes in (losses, accuracy):
        axes.set_xlabel("epoch")
        axes.legend(fontsize=8)
    save_figure(figure, Path(folder) / "curves.png")


def draw_comparison(runs: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Accuracy of every class in every row of `runs`, the classes with most training images first.

    runs: {row name: [results of one seed, ...]}, at most as many as ROW_COLOURS; the bars are means over seeds."""
    rows = sorted(next(iter(runs.values()))[0]["per_class"], key=lambda row: -row["train"])
    figure = new_figure(max(7.0, 0.42 * len(rows) + 2), 5.5)
    axes = figure.add_subplot()
    width = 0.8 / len(runs)
    colours = (*ROW_COLOURS[:len(runs) - 1], ROW_COLOURS[-1])
    for number, (name, seeds) in enumerate(runs.items()):
        values = []
        for row in rows:
            of_class = [other["accuracy"] for results in seeds for other in results["per_class"]
                        if other["id"] == row["id"] and other["accuracy"] is not None]
            values.append(100 * mean(of_class) if of_class else math.nan)
        axes.bar([x - 0.4 + width * (number + 0.5) for x in range(len(rows))], values, width, label=name,
                 color=colours[number])
    named, size = named_classes(len(rows))
    of_names = [rows[position] for position in named]
    axes.set_xticks(named, [f"{as_label(row['name'])} ({row['train']})" for row in of_names], rotation=60, ha="right",
                    fontsize=size)
    for label, row in zip(axes.get_xticklabels(), of_names, strict=True):
        label.set_color(GROUP_COLOURS[row["group"]])
    axes.set_ylim(0, 100)
    axes.set_ylabel("accuracy, per cent")
    axes.set_xlabel("class (training images): " + ", ".join(GROUPS))
    figure.legend(loc="outside upper center", ncols=2, fontsize=8)
    save_figure(figure, path)
