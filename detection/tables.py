"""The tables of detectors as text."""

from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import Any

from common.text import percent

COLUMNS = {"AP": "AP", "AP50": "AP50", "AP75": "AP75", "AP_small": "small", "AP_medium": "medium", "AP_large": "large"}
RECALLS = {"AR_1": "1", "AR_10": "10", "AR_100": "100", "AR_small": "small", "AR_medium": "medium", "AR_large": "large"}


def results_table(results: dict[str, Any]) -> str:
    """The table of one test as text, in per cent: a line a class, then all of them, whose AP and recall are means over
    the classes.

    results: what voc_ap or coco_ap returned. Pascal VOC has no AP by size and no recalls; their columns are left
    out."""
    rows = [*results["per_class"],
            {**results, "name": "all", "objects": sum(row["objects"] for row in results["per_class"])}]
    columns = {key: title for key, title in COLUMNS.items() if key in results}
    width = max(len(row["name"]) for row in [*rows, {"name": "class"}])
    lines = [f"{'class':<{width}} {'objects':>8} " + " ".join(f"{title:>6}" for title in columns.values())]
    lines += [f"{row['name']:<{width}} {row['objects']:>8} " + " ".join(percent(row[key], 1, 6) for key in columns)
              for row in rows]
    if "AR_1" in results:
        lines.append("average recall: " + "   ".join(
            f"{title} {percent(results[key], 1)}" for key, title in RECALLS.items()))
    lines.append(f"{results['images']} test images; {results['metric']}")
    return "\n".join(lines)


def with_suppression(results: Any) -> Any:
    """The content of a results.json with the suppression that the test was asked for: those written before there was
    auto have nms, which every detector had then. What is no such content is returned as it is."""
    if not isinstance(results, dict) or "suppression" in results:
        return results
    settings = {"suppression": "nms", **results.get("settings", {})}
    suppression = "auto" if settings["suppression"] == "nms" else settings["suppression"]
    return {**results, "settings": {**settings, "suppression": suppression}}


def comparison_table(rows: Mapping[str, Sequence[dict[str, Any]]]) -> str:
    """Mean and standard deviation (of a sample) over the runs of each row, as text, in per cent.

    rows: {name: [results of a run]}."""
    width = max(map(len, rows))
    everything = [results for runs in rows.values() for results in runs]
    shown = [name for name in (*COLUMNS, "AR_100") if all(name in results for results in everything)]
    lines = [f"{'':<{width}} {'runs':>4} " + " ".join(f"{COLUMNS.get(name, name):>12}" for name in shown)]
    for row, runs in rows.items():
        values = [[results[name] for results in runs] for name in shown]
        lines.append(f"{row:<{width}} {len(runs):>4} " + " ".join(f"{mean_and_spread(each):>12}" for each in values))
    return "\n".join(lines)


def mean_and_spread(values: Sequence[float | None]) -> str:
    """[0.365, 0.371] -> '36.8 ± 0.4'; a single value has no spread; '-' where a run has none."""
    if None in values:
        return "-"
    spread = f" ± {100 * stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * mean(values):.1f}{spread}"
