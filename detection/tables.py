"""The table of a detector's test as text."""

COLUMNS = {"AP": "AP", "AP50": "AP50", "AP75": "AP75", "AP_small": "small", "AP_medium": "medium", "AP_large": "large"}
RECALLS = {"AR_1": "1", "AR_10": "10", "AR_100": "100", "AR_small": "small", "AR_medium": "medium", "AR_large": "large"}


def percent(fraction, width=6):
    """0.3652 -> '  36.5', the one decimal of detection tables; None -> '     -'."""
    return f"{'-' if fraction is None else format(100 * fraction, '.1f'):>{width}}"


def results_table(results):
    """The table of one test as text, in per cent: a line a class, then all of them, whose AP and recall are means over
    the classes.

    results: what voc_ap or coco_ap returned. Pascal VOC has no AP by size and no recalls; their columns are left
    out."""
    rows = [*results["per_class"],
            {**results, "name": "all", "objects": sum(row["objects"] for row in results["per_class"])}]
    columns = {key: title for key, title in COLUMNS.items() if key in results}
    width = max(len(row["name"]) for row in [*rows, {"name": "class"}])
    lines = [f"{'class':<{width}} {'objects':>8} " + " ".join(f"{title:>6}" for title in columns.values())]
    lines += [f"{row['name']:<{width}} {row['objects']:>8} " + " ".join(percent(row[key]) for key in columns)
              for row in rows]
    if "AR_1" in results:
        lines.append("average recall: " + "   ".join(
            f"{title} {percent(results[key]).strip()}" for key, title in RECALLS.items()))
    lines.append(f"{results['images']} test images; {results['metric']}")
    return "\n".join(lines)
