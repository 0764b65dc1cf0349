"""The tools around a trained detector: prediction on images of one's own, publishing, the benchmark."""

import hashlib
import json
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as tvF

from benchmarks import bench_detection_inference as bench
from detection import predict, publish
from detection.checkpoint import describe_preprocessing, load_detector
from detection.inference import detect, inference_network
from detection.network.detector import Architecture
from detection.pictures import class_colour
from tests.support import draw_blocks as draw
from tests.support import error_line, save_eager_detector
from tests.support import run_tool as run

CLASSES = ["ship", "storage tank", "harbor"]
CPU = ("--device", "cpu")
SHORT, LONG = 64, 96


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return save_eager_detector(tmp_path_factory.mktemp("weights") / "final.pt", CLASSES, Architecture(18, 64, 1),
                               (SHORT, LONG))


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


# ---- prediction ------------------------------------------------------------------------------------------------------


def test_boxes_are_those_of_the_detector_in_pixels_of_the_file(weights, tmp_path):
    path = draw(tmp_path / "a.png", 80, 100)  # 80 x 100, in the limits 64 and 96 it becomes 64 x 80
    assert run(predict, "--weights", weights, path, "--output", tmp_path / "out", "--json", tmp_path / "a.json",
               *CPU, "--precision", "fp32") == 0
    (row,) = json.loads((tmp_path / "a.json").read_text())
    assert (row["path"], row["width"], row["height"]) == (str(path), 80, 100)
    padded = torch.zeros(1, 3, 96, 64, dtype=torch.uint8)
    padded[0, :, :80] = tvF.resize(torch.tensor(pixels(path)).permute(2, 0, 1), [80, 64], antialias=False)
    device = torch.device("cpu")
    network = inference_network(load_detector(weights)[0], device)
    (found,) = detect(network, padded, [(80, 64)], [(1.0, 1.0)], device, "fp32")
    assert len(row["detections"]) == len(found["scores"]) > 3
    for number, given in enumerate(row["detections"]):
        label = int(found["labels"][number])
        assert (given["id"], given["class"]) == (label, CLASSES[label])
        assert given["score"] == pytest.approx(found["scores"][number].item(), abs=1e-4)
        assert given["box"] == pytest.approx((found["boxes"][number] * 100 / 80).tolist(), abs=0.02)
    boxes = np.array([given["box"] for given in row["detections"]])
    assert boxes.min() >= 0 and boxes[:, 2].max() <= 80 and 80 < boxes[:, 3].max() <= 100


def test_images_of_more_bits_are_scaled_as_in_training(weights, tmp_path, capsys):
    content = torch.load(weights, weights_only=True)
    content["description"]["preprocessing"] = describe_preprocessing(SHORT, LONG, (0, 2040))
    torch.save(content, tmp_path / "deep.pt")
    with Image.open(draw(tmp_path / "8bits.png")) as image:
        grey = image.convert("L")
    grey.save(tmp_path / "8bits.png")
    Image.fromarray(np.asarray(grey).astype(np.uint16) * 8).save(tmp_path / "11bits.png")  # 255 becomes 2040
    found = {}
    for checkpoint, name in ((weights, "8bits.png"), (tmp_path / "deep.pt", "11bits.png"), (weights, "11bits.png")):
        capsys.readouterr()
        assert run(predict, "--weights", checkpoint, tmp_path / name, "--json", tmp_path / "a.json", "--output",
                   tmp_path / "out", *CPU, "--precision", "fp32") == 0
        found[checkpoint, name] = json.loads((tmp_path / "a.json").read_text())[0]["detections"]
    eight, eleven, dark = found.values()
    assert eight == eleven != dark and len(eight) > 3
    assert "and the weights name no range" in capsys.readouterr().err


def test_the_picture_has_the_boxes_and_the_line_the_numbers(weights, tmp_path, capsys):
    path = draw(tmp_path / "a.png")
    flags = ("--weights", weights, path, "--json", tmp_path / "a.json", *CPU)
    assert run(predict, *flags, "--output", tmp_path / "all") == 0
    (row,) = json.loads((tmp_path / "a.json").read_text())
    sure, least = row["detections"][:3], sum(found["score"] for found in row["detections"][2:4]) / 2
    capsys.readouterr()
    assert run(predict, *flags, "--output", tmp_path / "out", "--least-score", str(least)) == 0
    assert json.loads((tmp_path / "a.json").read_text()) == [row]
    picture = pixels(tmp_path / "out" / "a.png")
    assert picture.shape == (100, 80, 3)
    best = sure[0]
    left, top, right, bottom = best["box"]
    middle = picture[round((top + bottom) / 2), int(left)], picture[int(np.ceil(bottom)) - 1, round((left + right) / 2)]
    assert any((pixel == class_colour(best["id"])).all() for pixel in middle)  # a plate may hide one of them
    inside = (slice(int(top), int(bottom)), slice(int(left), int(right)))
    assert (picture[inside] != pixels(path)[inside]).any()
    said = capsys.readouterr().out.splitlines()
    counts = {name: sum(found["class"] == name for found in sure) for name in CLASSES}
    parts = [f"{count} {name}" for name, count in sorted(counts.items(), key=lambda item: -item[1]) if count]
    assert said[0] == f"{path}: {len(sure)} object{'s' * (len(sure) > 1)}: {', '.join(parts)}"


def test_large_images_are_predicted_in_tiles(weights, tmp_path, capsys):
    path = draw(tmp_path / "a.png", 200, 150)
    files, found = ("--output", tmp_path / "out", "--json", tmp_path / "a.json"), []
    for flags in ((), ("--tile", 201), ("--tile", 80, "--overlap", 30)):
        assert run(predict, "--weights", weights, path, *files, *CPU, *flags) == 0
        found.append(json.loads((tmp_path / "a.json").read_text())[0]["detections"])
    assert found[0] == found[1] and len(found[2]) > len(found[0])
    boxes = np.array([given["box"] for given in found[2]])
    assert boxes.min() >= 0 and 180 < boxes[:, 2].max() <= 200 and 130 < boxes[:, 3].max() <= 150
    capsys.readouterr()
    for flags, words in ((("--tile", "31"), "--tile 31: expected 32 to 100000 pixels"),
                         (("--tile", "100", "--overlap", "100"), "--overlap 100: expected 0 to 99, less than --tile")):
        assert run(predict, "--weights", weights, path, *flags) == 2
        assert words in error_line(capsys)


def test_what_is_too_unsure_is_neither_drawn_nor_counted(weights, tmp_path, capsys):
    path = draw(tmp_path / "a.png")
    flags = ("--weights", weights, path, "--json", tmp_path / "a.json", *CPU)
    assert run(predict, *flags, "--output", tmp_path / "out", "--least-score", "1") == 0
    assert capsys.readouterr().out.startswith(f"{path}: 0 objects\n")
    assert (pixels(tmp_path / "out" / "a.png") == pixels(path)).all()
    assert json.loads((tmp_path / "a.json").read_text())[0]["detections"]


def test_counts_in_words():
    assert predict.summary([], CLASSES) == "0 objects"
    assert predict.summary([2], CLASSES) == "1 object: 1 harbor"
    assert predict.summary([0, 1, 1], CLASSES) == "3 objects: 2 storage tank, 1 ship"


def test_an_unreadable_image_is_reported_and_the_others_go_on(weights, tmp_path, capsys):
    draw(tmp_path / "in" / "a.png")
    (tmp_path / "in" / "b.jpg").write_bytes(b"not an image")
    draw(tmp_path / "in" / "c.png", 300, 3)
    status = run(predict, "--weights", weights, tmp_path / "in", "--output", tmp_path / "out", "--json",
                 tmp_path / "a.json", *CPU)
    said = capsys.readouterr()
    assert status == 1 and said.err == f"{tmp_path / 'in' / 'b.jpg'}: not an image that Pillow can read\n"
    rows = json.loads((tmp_path / "a.json").read_text())
    assert [row.get("error") for row in rows] == [None, "not an image that Pillow can read", None]
    assert (rows[2]["width"], rows[2]["height"]) == (300, 3)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.png", "c.png"]


def test_images_of_one_name_in_several_folders_all_have_a_picture(weights, tmp_path):
    images = [draw(tmp_path / name, seed=seed) for seed, name in enumerate(
        ["x/ship.png", "x/y/ship.png", "z/ship.png", "z/ship.jpg", "z/ship.tif", "z/ship.tif.png"])]
    assert run(predict, "--weights", weights, tmp_path / "x", *images[2:], images[2], "--output", tmp_path / "out",
               "--least-score", "1", *CPU) == 0
    written = {path.relative_to(tmp_path / "out").as_posix(): path for path in (tmp_path / "out").rglob("*.*")}
    assert set(written) == {"x/ship.png", "x/y/ship.png", "z/ship.png", "z/ship.jpg", "z/ship.tif.png",
                            "z/ship.tif_.png"}
    for name, path in written.items():
        if name.endswith(".jpg"):
            with Image.open(path) as picture:
                assert picture.format == "JPEG"
        else:
            of = {"z/ship.tif.png": "z/ship.tif", "z/ship.tif_.png": "z/ship.tif.png"}.get(name, name)
            assert (pixels(path) == pixels(tmp_path / of)).all()


@pytest.mark.parametrize("output, images", [("in", ["in"]), ("in", ["in/a.png"]), ("in/x", ["in"]), (".", ["in", "b"])])
def test_an_image_is_never_overwritten(weights, tmp_path, capsys, output, images):
    for name in ("in/a.png", "in/x/a.png", "b/a.png"):
        draw(tmp_path / name)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.png")}
    assert run(predict, "--weights", weights, *(tmp_path / name for name in images), "--output", tmp_path / output,
               *CPU) == 2
    assert "is one of the images; give a folder of its own" in error_line(capsys)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.png")} == before


def test_predict_refuses_what_it_cannot_use(weights, tmp_path, capsys):
    image = draw(tmp_path / "a.png")
    torch.save({"model": {}}, tmp_path / "other.pt")
    for flags, complaint in (
            (("--weights", weights, image, "--least-score", "1.5"), "--least-score 1.5: expected 0 to 1"),
            (("--weights", weights, tmp_path / "absent"), "absent: no such file or folder"),
            (("--weights", weights, image, "--json", tmp_path), f"{tmp_path}: is a folder; expected the name of a fil"),
            (("--weights", tmp_path / "other.pt", image), "other.pt: not a detector of this project")):
        assert run(predict, *flags, *CPU) == 2
        assert complaint in error_line(capsys)


# ---- publishing ------------------------------------------------------------------------------------------------------


def test_a_published_detector_is_named_after_its_bytes_and_holds_no_more_than_it_must(weights, tmp_path, capsys):
    for _ in range(2):
        assert run(publish, "--weights", weights, "--output", tmp_path / "published") == 0
    (path,) = (tmp_path / "published").iterdir()
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert path.name == f"final-{digest[:8]}.pt" and digest in capsys.readouterr().out
    content = torch.load(path, weights_only=True)
    assert set(content) == {"model", "description"} and b"/home/someone" not in path.read_bytes()
    network, description = load_detector(path)
    original, before = load_detector(weights)
    assert description == {**before, "settings": {"lr": 0.01}}
    state = network.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in original.state_dict().items())


# ---- the benchmark ---------------------------------------------------------------------------------------------------


def test_the_benchmark_prints_a_table_and_writes_it(weights, tmp_path, capsys):
    assert run(bench, "--weights", weights, "--height", "64", "--width", "90", "--batch-sizes", "1", "2",
               "--repeats", "1", "--json", tmp_path / "b.json", "--suppression", "cluster-diou-voting", *CPU) == 0
    written = json.loads((tmp_path / "b.json").read_text())
    assert "noise of 64x90" in written["title"] and "cluster-diou-voting" in written["title"]
    rows = written["rows"]
    assert [(row["batch"], row["precision"]) for row in rows] == [(1, "fp32"), (1, "bf16"), (2, "fp32"), (2, "bf16")]
    for row in rows:
        assert row["images"] == row["batch"]
        assert row["network, ms"] > 0 and row["boxes, ms"] > 0
        assert row["images/s"] == pytest.approx(1000 / row["ms an image"], rel=0.05)
    assert "images/s" in capsys.readouterr().out


def test_the_benchmark_runs_on_images(weights, tmp_path, capsys):
    for number, (width, height) in enumerate([(80, 100), (100, 80), (50, 50)]):
        draw(tmp_path / "in" / f"{number}.png", width, height)
    flags = ("--weights", weights, tmp_path / "in", "--json", tmp_path / "b.json", "--repeats", "1", *CPU)
    assert run(bench, *flags, "--batch-sizes", "2", "--precision", "fp32") == 0
    written = json.loads((tmp_path / "b.json").read_text())
    assert "on 3 images" in written["title"] and written["rows"][0]["images"] == 2
    assert run(bench, *flags, "--batch-sizes", "1", "4") == 2
    assert "3 images (of at most 32); expected at least 4" in error_line(capsys)
    (tmp_path / "in" / "3.png").write_bytes(b"")
    assert run(bench, *flags) == 2
    assert "3.png: not an image that Pillow can read" in error_line(capsys)
    assert run(bench, *flags, "--repeats", "0") == 2
    assert "must be at least 1" in error_line(capsys)


def test_batches_are_whole_and_padded():
    images = [(torch.full((3, height, width), 7, dtype=torch.uint8), (0.5, 0.25)) for height, width in
              ((64, 80), (80, 64), (60, 60), (64, 64), (32, 32))]
    (first, sizes, scales), (second, _, _) = bench.in_batches(images, 2)
    assert first.shape == (2, 3, 96, 96) and second.shape == (2, 3, 64, 64)
    assert sizes == [(64, 80), (80, 64)] and scales == ((0.5, 0.25), (0.5, 0.25))
    assert first[0].sum() == 7 * 3 * 64 * 80


def test_the_parts_of_the_benchmark_together_find_what_the_whole_finds(weights, monkeypatch):
    def noting(call, results, *arguments):
        results += call(*arguments)

    device, found = torch.device("cpu"), {"detect": [], "detections": []}
    network = inference_network(load_detector(weights)[0], device)
    for name, results in found.items():
        monkeypatch.setattr(bench, name, partial(noting, getattr(bench, name), results))
    batches = bench.in_batches(bench.draw_images(4, 64, 64), 2)
    with torch.inference_mode():
        parts = bench.parts(network, batches, device, "fp32", "nms")
        for part in parts.values():
            part()
    assert len(found["detect"]) == len(found["detections"]) == 4
    for whole, rest in zip(found["detect"], found["detections"], strict=True):
        assert len(whole["scores"]) > 0 and torch.equal(whole["boxes"], rest["boxes"])
