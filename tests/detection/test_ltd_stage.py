"""LTD's script on tiny drawn scenes: every part trains, resumes and is left out of what is published; several
processes; data as the authors of the method had it."""

import json
import signal
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from PIL import Image

from common.files import save_checkpoint
from demo.draw_scenes import write_demo
from detection import engine, publish, train_gfl, train_ltd
from detection.checkpoint import describe_model, describe_preprocessing, load_detector
from detection.data import batches
from detection.data.annotations import read_annotations
from detection.engine import train_step
from detection.methods import gfl
from detection.methods.ltd import LTD, CCDSettings, calibrated
from detection.metrics.voc_ap import voc_ap
from detection.network.detector import Architecture, Detector
from detection.settings import parse_settings
from tests.support import (
    QUICK_DETECTOR,
    detector_run,
    error_line,
    log_of,
    run_detector,
    run_tool,
    run_two_processes,
    stop_at_step,
)

pytestmark = pytest.mark.usefixtures("without_pictures")  # of the tests: the fixtures' runs draw theirs
CLASSES = ["plane", "ship", "storage_tank"]
TERMS = {"qfl", "box", "dfl", "ccd_fused", "ccd_pooled", "ccd_attention", "tasd_ld_main", "tasd_ld_vlr", "tasd_kd_main",
         "tasd_kd_vlr"}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """A folder with train.json (6 scenes), test.json (2 scenes) and their images."""
    folder = tmp_path_factory.mktemp("scenes") / "tiny"
    write_demo(folder, seed=0, train=6, test=2, size=64)
    return folder


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """The checkpoint of a detector that has learned nothing."""
    torch.manual_seed(1)
    network = Detector(3, Architecture(18, 64, 1))
    path = tmp_path_factory.mktemp("teacher") / "final.pt"
    save_checkpoint(path, {"model": network.state_dict(), "description": {
        "stage": "gfl", "classes": CLASSES, "model": describe_model(network.architecture),
        "preprocessing": describe_preprocessing(64, 64), "epoch": 1}})
    return path


@pytest.fixture(scope="module")
def flags(scenes, teacher):
    return ("--train", scenes / "train.json", "--test", scenes / "test.json", "--teacher", teacher, *QUICK_DETECTOR)


@pytest.fixture(scope="module")
def run(flags, tmp_path_factory):
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("runs") / "ltd"
    assert run_detector(train_ltd, *flags, "--output", folder) == 0
    return folder


def last(folder):
    return torch.load(folder / "last.pt", weights_only=True)


def test_the_log_has_every_term_and_the_published_detector_no_calibration(run, tmp_path):
    assert set(log_of(run)[0]) - {"epoch", "lr", "loss"} == TERMS
    assert all(record[name] > 0 for record in log_of(run) for name in TERMS)
    assert {name.split(".")[1] for name in last(run)["companions"]} == {"lateral", "gates", "output", "project"}
    assert run_tool(publish, "--weights", run / "last.pt", "--output", tmp_path) == 0
    plain = Detector(3, Architecture(18, 64, 1))
    for path in (run / "final.pt", *tmp_path.glob("*.pt")):
        network, description = load_detector(path)
        assert set(network.state_dict()) == set(plain.state_dict()) and description["stage"] == "ltd"
    results = json.loads((run / "results.json").read_text())
    assert results["parameters"] == sum(weight.numel() for weight in plain.parameters())


def test_a_resumed_run_ends_with_the_weights_of_one_never_stopped(run, flags, tmp_path, monkeypatch):
    stop_at_step(monkeypatch, engine, 3)  # of 4
    assert run_detector(train_ltd, *flags, "--output", tmp_path / "parts") == 128 + signal.SIGTERM
    monkeypatch.undo()
    assert last(tmp_path / "parts")["step"] == 1
    assert run_detector(train_ltd, *flags, "--output", tmp_path / "parts", "--resume") == 0
    whole, parts = last(run), last(tmp_path / "parts")
    for part in ("model", "companions"):
        assert whole[part].keys() == parts[part].keys()
        assert all(torch.equal(value, parts[part][name]) for name, value in whole[part].items())
    assert log_of(run) == log_of(tmp_path / "parts")


def one_step(scenes, teacher, **changes):
    """A Run of LTD after one step, the names of its terms, and how often the teacher was asked."""
    settings = replace(train_ltd.SETTINGS, batch_size=4, warmup_steps=0, **changes)
    torch.manual_seed(0)
    network, _ = load_detector(teacher)
    student, asked = Detector(3, Architecture(18, 64, 1)), []
    network.requires_grad_(False).register_forward_pre_hook(lambda *_: asked.append(torch.is_grad_enabled()))
    companions = LTD.companions(3, replace(settings, channels=64))
    run = detector_run(LTD, student, settings, teacher=network, companions=companions)
    dataset = batches.DetectionDataset(read_annotations(scenes / "train.json"))
    batch = batches.collate(dataset.__getitems__([batches.Draw(i, 64, 64, False) for i in range(4)]))
    names, terms = train_step(run, run.trainee.train(), batch)
    assert terms.isfinite().all()
    return run, set(names), asked


def test_every_parameter_of_the_calibration_network_learns_and_the_teacher_is_asked_once(scenes, teacher):
    run, names, asked = one_step(scenes, teacher)
    assert names == TERMS and asked == [False]
    idle = [name for name, weight in run.trainee.companions.named_parameters() if not weight.grad.abs().max() > 0]
    assert idle == []


@pytest.mark.parametrize(("changes", "left", "added"), [
    ({"ccd": False}, "ccd", set()), ({"tasd": False}, "tasd", set()), ({"lic": False}, "none", set()),
    ({"ccd": False, "tasd": False}, ("ccd", "tasd"), set()),
    ({"lambda_ld_main": 0.25, "lambda_kd_main": "auto"}, "none", {"ld_main", "kd_main"})])
def test_each_part_can_be_left_out_and_lds_taken_in(scenes, teacher, changes, left, added):
    run, names, _ = one_step(scenes, teacher, **changes)
    assert names == {name for name in TERMS if not name.startswith(left)} | added
    offsets = [name for name, _ in run.trainee.companions.named_parameters() if "offsets" in name]
    assert len(offsets) == (5 if changes.get("lic", True) and changes.get("ccd", True) else 0)


@dataclass
class Maps:
    """The outputs of a detector that is not GFL, as far as CCD knows it."""

    features: list[torch.Tensor]


@dataclass(frozen=True)
class OtherSettings(gfl.GFLSettings, CCDSettings):
    """The settings of a detector that is not GFL."""


def test_ccd_teaches_any_detector_with_a_pyramid(scenes, teacher):
    """One that assigns by its outputs, too, which must be its own."""
    def forward(student, companions, images, teacher):
        return Maps(student(images).features)

    def assign(step):
        assert type(step.outputs) is Maps
        return gfl.assign(step)

    method = calibrated(replace(
        gfl.GFL, forward=forward, assign=assign, assigns_by_outputs=True,
        losses=lambda step, settings: {"mean": step.outputs.features[0].float().mean().square()},
        weights=lambda settings, classes: {"mean": 1.0}))
    settings, student = OtherSettings(channels=64), Detector(3, Architecture(18, 64, 1))
    run = detector_run(method, student, settings, precision="bf16", companions=method.companions(3, settings),
                       teacher=load_detector(teacher)[0].requires_grad_(False))
    dataset = batches.DetectionDataset(read_annotations(scenes / "train.json"))
    batch = batches.collate(dataset.__getitems__([batches.Draw(i, 96, 96, False) for i in range(2)]))
    names, terms = train_step(run, run.trainee.train(), batch)
    assert names == ("mean", "ccd_fused", "ccd_pooled", "ccd_attention") and terms.isfinite().all()
    assert student.neck.extra[1].weight.grad.abs().max() > 0 and student.head.classify.weight.grad is None


# ---- several processes -----------------------------------------------------------------------------------------------


def write_mirrored(scenes, folder):
    """COCO data of four copies of a scene beside its mirror image: however they are mirrored and divided among the
    processes, each of these sees the same."""
    content = json.loads((scenes / "train.json").read_text())
    image = next(image for image in content["images"]
                 if sum(entry["image_id"] == image["id"] for entry in content["annotations"]) > 2)
    pixels = np.asarray(Image.open(scenes / "images" / image["file_name"]))
    annotations = []
    for number in range(4):
        for entry in content["annotations"]:
            if entry["image_id"] == image["id"]:
                x, y, width, height = entry["bbox"]
                annotations += [{**entry, "image_id": number, "bbox": [left, y, width, height]}
                                for left in (x, 128 - x - width)]
    (folder / "images").mkdir()
    for number in range(4):
        Image.fromarray(np.concatenate([pixels, pixels[:, ::-1]], axis=1)).save(folder / "images" / f"{number}.png")
    content["images"] = [{**image, "id": number, "file_name": f"{number}.png", "width": 128} for number in range(4)]
    content["annotations"] = [{**entry, "id": number} for number, entry in enumerate(annotations)]
    (folder / "train.json").write_text(json.dumps(content))
    return folder / "train.json"


def test_two_processes_that_see_the_same_train_as_one_does(scenes, flags, tmp_path):
    """The sums of LTD and its batch norms are those of each process: two with two images each are not one with four,
    but they are one with two. This is also the script as a user runs it."""
    more = [str(flag) for flag in (*flags, "--train", write_mirrored(scenes, tmp_path), "--long", "128", "--lr-steps",
                                   "9", "--lambda-ld-main", "0.25", "--lambda-attention", "0")]
    alone = ("--batch-size", "2", "--lr", "0.08", "--epochs", "1", "--output", tmp_path / "one")  # of 2 steps
    assert run_detector(train_ltd, *more, *alone) == 0
    done = run_two_processes("-m", "detection.train_ltd", *more, "--batch-size", "4", "--lr", "0.04", "--epochs", "2",
                             "--output", tmp_path / "two")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("calibration network: 0.28 M parameters, in training alone") == 1
    one, two = last(tmp_path / "one"), last(tmp_path / "two")
    for part in ("model", "companions"):
        for name, value in one[part].items():
            torch.testing.assert_close(two[part][name], value, rtol=1e-3, atol=1e-4)
    steps = log_of(tmp_path / "two")
    assert sum(record["ccd_fused"] for record in steps) / 2 == pytest.approx(log_of(tmp_path / "one")[0]["ccd_fused"],
                                                                             rel=1e-3)


# ---- faults ----------------------------------------------------------------------------------------------------------


def test_a_teacher_of_other_channels_teaches_tasd_and_not_ccd(flags, tmp_path, capsys):
    assert run_detector(train_ltd, *flags, "--channels", "96", "--output", tmp_path / "run") == 2
    assert "teacher and student differ in channels: 64 in the teacher, 96 in the student" in error_line(capsys)
    settings = parse_settings("ltd", train_ltd.SETTINGS, "", [str(flag) for flag in (*flags, "--no-ccd")])
    student = {"classes": CLASSES, "model": describe_model(Architecture(18, 96, 1))}
    assert LTD.load_teacher(settings, student, torch.device("cpu"), "fp32").architecture.channels == 64


def test_a_single_pixel_for_ccds_batch_norms_is_one_line(flags, tmp_path, capsys):
    assert run_detector(train_ltd, *flags, "--batch-size", "1", "--output", tmp_path / "run") == 2
    assert "nothing for CCD's batch norms to average" in error_line(capsys)
    assert not (tmp_path / "run" / "settings.json").exists()


def test_a_run_that_diverges_ends_by_its_loss(flags, tmp_path, capsys):
    assert run_detector(train_ltd, *flags, "--lr", "1000", "--warmup-steps", "0", "--clip", "0", "--output",
                        tmp_path / "run") == 2
    message = capsys.readouterr().err
    assert "error: stage ltd, epoch" in message and message.count("\n") == 1


# ---- NWPU VHR-10 as the authors had it -------------------------------------------------------------------------------

XML = """<annotation><filename>{name}</filename><size><width>{width}</width><height>{height}</height></size>{objects}
</annotation>"""
OBJECT = """<object><name>{name}</name><bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox>
</object>"""


def test_xml_lists_and_a_coco_file_of_the_same_objects_have_the_same_ap50(scenes, tmp_path):
    """By the area rule, which the released log was made with."""
    coco = read_annotations(scenes / "train.json")
    for folder in ("Annotations", "ImageSets/Main"):
        (tmp_path / folder).mkdir(parents=True)
    for record in coco.records:
        objects = "".join(OBJECT.format(*(box + 1), name=coco.classes[label])
                          for box, label in zip(record.boxes, record.labels, strict=True))
        (tmp_path / "Annotations" / f"{record.path.stem}.xml").write_text(XML.format(
            name=record.path.name, width=record.width, height=record.height, objects=objects))
    (tmp_path / "ImageSets" / "Main" / "train.txt").write_text("\n".join(record.path.stem for record in coco.records))
    voc = read_annotations(tmp_path / "ImageSets" / "Main" / "train.txt", scenes / "images")
    assert voc.classes == coco.classes
    found, generator = [], torch.Generator().manual_seed(0)
    for record in coco.records:  # each object, some of them moved too far
        moved = torch.tensor(record.boxes) + 6 * torch.randn(len(record.boxes), 4, generator=generator)
        found.append({"boxes": moved, "scores": torch.rand(len(moved), generator=generator),
                      "labels": torch.tensor(record.labels)})
    of_coco, of_voc = (voc_ap(found, annotations, "area") for annotations in (coco, voc))
    assert 0 < of_coco["AP50"] < 1
    assert of_voc["per_class"] == of_coco["per_class"] and of_voc["AP50"] == of_coco["AP50"]


def test_the_recipe_of_nwpu_is_that_of_the_released_configuration():
    for module, stage in ((train_ltd, "ltd"), (train_gfl, "gfl")):
        settings = parse_settings(stage, module.SETTINGS, "", ["--recipe", "nwpu", "--train", "nwpu/train.json"])
        assert settings.lr * settings.batch_size / 16 == 0.001 and settings.lr_steps == (41,)
        assert (settings.epochs, settings.clip, settings.metric) == (50, 35, "voc")
        assert (settings.short, settings.long) == ((600, 600), 1000)
