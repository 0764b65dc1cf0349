"""The test of a detector: detections of the test images, their average precision, the cost of an image, pictures."""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode

from common.charts import optional_picture
from common.files import read_json, sha256_of, write_json
from common.images import ValueRange
from common.precision import precision_of_test
from common.run_folder import check_test_output
from common.runtime import (
    UserError,
    autocast,
    device_name,
    library_versions,
    rank,
    say,
    world_size,
)
from detection import pictures
from detection.checkpoint import load_detector
from detection.data.annotations import fingerprint, read_annotations
from detection.data.batches import DetectionDataset, check_sizes, loader, read_image, test_draws
from detection.data.dota_windows import NAME, merge_windows
from detection.data.records import Annotations
from detection.data.submissions import write_submission
from detection.geometry.oriented import from_horizontal
from detection.inference import detect, inference_network
from detection.metrics.coco_ap import coco_ap, coco_results
from detection.metrics.dota_ap import dota_ap
from detection.metrics.voc_ap import voc_ap
from detection.network.detector import Detector, HeadKind
from detection.settings import Settings, data_name
from detection.tables import results_table, with_suppression


def detect_all(network: Detector, annotations: Annotations, preprocessing: dict[str, Any], settings: Settings,
               device: torch.device, precision: str) -> list[dict[str, torch.Tensor]]:
    """The detections of every image of `annotations`, in their order; with several processes each takes a share, and
    all of them return the whole.

    One image at a time, as published detectors are tested: a batch's padding would be part of its group norms."""
    network = inference_network(network, device)
    draws = test_draws(annotations, preprocessing["short"], preprocessing["long"])[rank()::world_size()]
    batches = loader(DetectionDataset(annotations, preprocessing.get("value_range")), [[draw] for draw in draws],
                     settings.workers, device)
    detections = {batch.indices[0]: detect(network, batch.images, batch.sizes, batch.scales, device, precision,
                                           settings.suppression)[0] for batch in batches}
    if world_size() > 1:
        shares = [None] * world_size()
        dist.all_gather_object(shares, detections)
        detections = {index: of_image for share in shares for index, of_image in share.items()}
    return [detections[index] for index in range(len(annotations.records))]


def average_precisions(detections: Sequence[dict[str, torch.Tensor]], annotations: Annotations,
                       metric: str) -> dict[str, Any]:
    """AP by the metric that settings name, as `coco_ap`, `voc_ap` and `dota_ap` return it."""
    if metric == "coco":
        return coco_ap(detections, annotations)
    if metric == "dota":
        return dota_ap(detections, annotations)
    return voc_ap(detections, annotations, "11-point" if metric == "voc07" else "area")


def settings_of_test(settings: Settings, kind: HeadKind) -> Settings:
    """The settings as they are for a detector with such a head: a metric in place of `auto`. Raises UserError for a
    metric or suppression that is not for its boxes."""
    metric = settings.metric if settings.metric != "auto" else "dota" if kind.oriented else "coco"
    if kind.oriented and metric != "dota":
        raise UserError(f"--metric {metric}: is of horizontal boxes, and this detector's are oriented; expected dota")
    kind.selection.named(settings.suppression)
    return dataclasses.replace(settings, metric=metric)


def ap_of_run(run: Any) -> dict[str, float | None]:
    """AP, AP50 and AP75 of the network that a run trains, for its log; nothing on any process but the first."""
    found = detect_all(run.network, run.test_annotations, run.description["preprocessing"], run.settings, run.device,
                       run.precision)
    if rank() != 0:
        return {}
    results = average_precisions(found, run.test_annotations, run.settings.metric)
    return {name: results[name] for name in ("AP", "AP50", "AP75")}


def read_test_annotations(settings: Settings, classes: Sequence[str]) -> Annotations:
    """The Annotations to test on, oriented boxes for DOTA's metric, whose images have the sizes that these state: else
    it would be found after hours of training. classes: the names that they are to have, in id order."""
    annotations = read_annotations(settings.test, settings.test_images or settings.images or None, classes,
                                   oriented=settings.metric == "dota")
    if not annotations.records:
        raise UserError(f"{settings.test}: holds no image to test on")
    check_sizes(annotations)
    return annotations


@torch.inference_mode()
def cost(network: Detector, preprocessing: dict[str, Any], device: torch.device, precision: str,
         repeats: int = 5) -> dict[str, Any]:
    """Parameters, and FLOPs (2 a multiply-add) and milliseconds of a 4:3 image of the size of tests, suppression not
    included (median of 5 after one to warm up)."""
    short, long = preprocessing["short"], preprocessing["long"]
    height, width = (32 * -(-side // 32) for side in (min(short, long), min(long, round(short * 4 / 3))))
    images = torch.zeros(1, 3, height, width, device=device)
    with FlopCounterMode(display=False) as counter:
        network.eval()(images)
    answer, seconds = inference_network(network, device), []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        with autocast(device, precision):
            answer(images).logits.cpu()  # the copy waits for the device
        seconds.append(time.perf_counter() - started)
    return {"parameters": sum(parameter.numel() for parameter in network.parameters()),
            "flops": counter.get_total_flops(), "ms_per_image": round(1000 * sorted(seconds[1:])[repeats // 2], 3),
            "cost_image_size": [height, width]}


def test(settings: Settings, weights: str | Path, network: Detector, description: dict[str, Any],
         annotations: Annotations, device: torch.device) -> dict[str, Any] | None:
    """Test a checkpoint: print the table, and write results.json, precision_recall.png, detections.png, of a COCO file
    detections.json (COCO's results format), and by DOTA's metric submission.zip into `settings.output`. Returns the
    results on the first process, None on the others.

    settings: those of `settings_of_test`. network, description: of the checkpoint `weights`. annotations: those of
    `read_test_annotations`."""
    folder = Path(settings.output)
    precision = precision_of_test(settings.precision, device)
    say(f"testing {weights} on {settings.test}: {len(annotations.records)} images")
    network.to(device, memory_format=torch.channels_last)
    preprocessing = description["preprocessing"]
    found = detect_all(network, annotations, preprocessing, settings, device, precision)
    if rank() != 0:
        return None
    results = average_precisions(found, annotations, settings.metric)
    curves = results.pop("curves")
    results = {
        "dataset": data_name(settings.test), "stage": description["stage"], "epoch": description["epoch"],
        "test_images": fingerprint(annotations), "weights": str(weights), "weights_sha256": sha256_of(weights),
        **results,
        "settings": test_settings(settings), "suppression": network.suppression(settings.suppression),
        "short": preprocessing["short"], "long": preprocessing["long"],
        **cost(network, preprocessing, device, precision), "device": device_name(device), "precision": precision,
        "versions": library_versions(),
    }
    print(results_table(results), flush=True)
    print(f"{results['parameters'] / 1e6:.2f} M parameters, {results['flops'] / 1e9:.1f} GFLOP and "
          f"{results['ms_per_image']} ms an image of {'x'.join(map(str, results['cost_image_size']))} ({precision}, "
          f"{results['device']})", flush=True)
    if settings.metric == "dota":
        write_submission(folder / "submission.zip", by_image(annotations, found), annotations.classes)
    elif annotations.category_ids:
        write_json(folder / "detections.json", coco_results(found, annotations), indent=None)
    write_json(folder / "results.json", results)  # after the detections: it says that the run is finished
    with optional_picture(folder / "precision_recall.png") as path:
        pictures.draw_precision_recall(curves, path)
    with optional_picture(folder / "detections.png") as path:
        draw_sheet(annotations, found, path, preprocessing.get("value_range"))
    others = ("precision_recall.png", "detections.png", "detections.json", "submission.zip")
    written = [name for name in others if (folder / name).is_file()]
    print(f"written: {', '.join([str(folder / 'results.json'), *written])}", flush=True)
    return results


def by_image(annotations: Annotations, found: Sequence[dict[str, torch.Tensor]]) -> dict[str, dict[str, torch.Tensor]]:
    """{name of an image: its detections as oriented boxes}; those in windows of detection.split_dota put together."""
    names = [record.path.stem for record in annotations.records]
    found = [{**each, "boxes": each["boxes"] if each["boxes"].shape[1] == 5 else from_horizontal(each["boxes"])}
             for each in found]
    if all(NAME.fullmatch(name) for name in names):
        return merge_windows(names, found)
    return dict(zip(names, found, strict=True))


def draw_sheet(annotations: Annotations, found: Sequence[dict[str, torch.Tensor]], path: Path,
               value_range: ValueRange | None) -> None:
    """A dozen test images, evenly over the list, with their detections against the ground truth. value_range: as of
    `common.images.decode`."""
    count, shown = len(annotations.records), pictures.SHEET_IMAGES
    chosen = sorted({round(k * (count - 1) / (shown - 1)) for k in range(shown)})
    records = annotations.records
    rows = [(read_image(records[index], value_range), records[index], found[index]) for index in chosen]
    pictures.draw_sheet(rows, annotations.classes, path)


def test_settings(settings: Settings) -> dict[str, Any]:
    """The settings that the results of a test depend on."""
    return {name: getattr(settings, name) for name in ("test", "metric", "suppression")}


def test_only(settings: Settings, device: torch.device) -> None:
    """`--test-only` and `python -m detection.test`: test --weights, or final.pt of --output."""
    folder = Path(settings.output)
    weights = Path(settings.weights or folder / "final.pt")
    check_test_output(settings, weights)
    network, description = load_detector(weights)
    settings = settings_of_test(settings, network.architecture.kind)
    earlier = folder / "results.json"
    if earlier.exists():
        tested = with_suppression(read_json(earlier))
        identity = {"weights_sha256": sha256_of(weights), "settings": test_settings(settings)}
        if not isinstance(tested, dict) or any(tested.get(name) != value for name, value in identity.items()):
            raise UserError(f"{earlier}: is of other weights than {weights}, or of other images, metric or "
                            "suppression; give another --output")
    annotations = read_test_annotations(settings, description["classes"])
    test(settings, weights, network, description, annotations, device)
