"""Large images cut into windows, and the detections in windows put together again."""

import json

import numpy as np
import pytest
import shapely
import torch
from PIL import Image

from benchmarks import bench_oriented
from common.dota import read_label_file
from common.runtime import UserError
from detection import split_dota
from detection.data.annotations import read_annotations
from detection.data.dota_windows import merge_windows, place_of, plan_windows
from detection.geometry.oriented import corners, rotated_iou
from tests.support import error_line, real, run_program, write_dota
from tests.support import run_tool as run

SHIP = "10 10 30 10 30 20 10 20 ship 0"
SMALL = ("--size", 128, "--gap", 32, "--processes", 1)


def scene(root, size=(300, 200), count=40, seed=0, name="P"):
    """A folder of DOTA with an image of noise and turned ships, planes among them, that do not touch each other."""
    generator, lines, boxes = np.random.default_rng(seed), [], torch.zeros(0, 5)
    while len(lines) < count:
        box = torch.tensor([[*generator.uniform(15, np.array(size) - 15), *generator.uniform(6, 20, 2),
                             generator.uniform(0.01, 1.57)]], dtype=torch.float32)
        if len(boxes) == 0 or (rotated_iou(box, boxes * torch.tensor([1, 1, 1.3, 1.3, 1])) == 0).all():
            boxes = torch.cat([boxes, box])
            points = " ".join(f"{value:.2f}" for value in corners(box).flatten().tolist())
            lines.append(f"{points} {('ship', 'plane')[len(lines) % 2]} {int(len(lines) % 5 == 0)}")
    return write_dota(root, {name: (size, lines)})


def test_an_object_belongs_to_each_window_that_holds_seven_tenths_of_it(tmp_path):
    folder = scene(tmp_path)
    items = read_label_file(folder / "labelTxt" / "P.txt")
    planned = plan_windows("P", items, (300, 200), 128, 32, [1.0, 0.5])
    assert [window.name for window in planned] == [
        *(f"P__1__{x}___{y}" for y in (0, 72) for x in (0, 96, 172)), "P__0.5__0___0", "P__0.5__22___0"]
    parts = set()
    for window in planned:
        frame = shapely.box(*(value / window.scale for value in window.box))
        polygons = shapely.minimum_rotated_rectangle(shapely.polygons([item.points for item in items]))
        inside = shapely.area(shapely.intersection(polygons, frame)) / shapely.area(polygons)
        assert window.objects == np.flatnonzero(inside >= 0.7).tolist()
        parts |= set(np.digitize(inside, [0.01, 0.69, 0.99]).tolist())
    assert parts == {0, 1, 2, 3}  # outside, too little, cut and kept, whole


def test_windows_hold_their_pixels_and_objects(tmp_path):
    folder = scene(tmp_path / "P")
    whole, items = Image.open(folder / "images" / "P.png"), read_label_file(folder / "labelTxt" / "P.txt")
    assert run(split_dota, folder, tmp_path / "cut", *SMALL, "--scales", "0.5,1") == 0
    records = read_annotations(tmp_path / "cut", oriented=True).records
    assert len(records) == 8
    for record in records:
        _, scale, x, y = place_of(record.path.stem)
        region = (x, y, x + record.width, y + record.height)
        pixels = np.asarray(Image.open(record.path))
        if scale == 1:
            assert np.array_equal(pixels, np.asarray(whole.crop(region)))
        else:
            scaled = np.asarray(whole.resize((150, 100), Image.Resampling.BILINEAR).crop(region))
            assert np.abs(pixels.astype(int) - scaled)[2:-2, 2:-2].max() <= 2
        own = read_label_file(tmp_path / "cut" / "labelTxt" / f"{record.path.stem}.txt")
        for item in own:
            points = (np.array(item.points) + (x, y)) / scale
            origin = min(items, key=lambda other: np.abs(np.array(other.points) - points).max())  # noqa: B023
            np.testing.assert_allclose(points, origin.points, atol=0.01)
            assert (item.name, item.difficult) == (origin.name, origin.difficult)
    assert json.loads((tmp_path / "cut" / "split.json").read_text()) == {
        "size": 128, "gap": 32, "scales": [0.5, 1.0], "keep_empty": False, "value_range": None,
        "finished": True}


@pytest.mark.parametrize("scales", ["1", "1,2"])
def test_merging_is_the_inverse_of_splitting(tmp_path, scales):
    folder = scene(tmp_path / "P", count=30)
    run(split_dota, folder, tmp_path / "cut", *SMALL, "--scales", scales)
    windows = read_annotations(tmp_path / "cut", oriented=True)
    found = [{"boxes": torch.tensor(record.boxes), "labels": torch.tensor(record.labels),
              "scores": torch.rand(len(record.labels))} for record in windows.records]
    assert sum(len(own["scores"]) for own in found) > 35  # some are in several windows
    merged = merge_windows([record.path.stem for record in windows.records], found)
    (whole,) = read_annotations(folder, oriented=True).records
    assert list(merged) == ["P"] and len(merged["P"]["boxes"]) == 30
    overlaps = rotated_iou(torch.tensor(whole.boxes)[:, None], merged["P"]["boxes"])
    assert (overlaps.amax(dim=1) > 0.99).all()
    assert torch.equal(merged["P"]["labels"][overlaps.argmax(dim=1)], torch.tensor(whole.labels))
    assert (merged["P"]["scores"].diff() <= 0).all()


def test_merging_keeps_images_and_classes_apart():
    boxes, scores = torch.tensor([[20.0, 20, 8, 4, 1]]), torch.tensor([0.5])
    names = ["a__1__0___0", "b__1__0___0", "a__1__10___0", "a_1__0.5__0___0"]
    moved = [boxes, boxes, boxes - torch.tensor([10.0, 0, 0, 0, 0]), boxes]
    found = [{"boxes": own, "scores": scores * (k + 1) / 4, "labels": torch.tensor([label])}
             for k, (own, label) in enumerate(zip(moved, [0, 0, 0, 1], strict=True))]
    merged = merge_windows(names, found)
    assert {image: len(own["boxes"]) for image, own in merged.items()} == {"a": 1, "b": 1, "a_1": 1}
    assert merged["a"]["scores"].tolist() == [0.375]
    torch.testing.assert_close(merged["a_1"]["boxes"], torch.tensor([[40.0, 40, 16, 8, 1]]))
    found[2]["labels"] += 1
    assert len(merge_windows(names, found)["a"]["boxes"]) == 2
    with pytest.raises(UserError, match="not the name of a window"):
        merge_windows(["P0001"], found[:1])


def test_windows_without_objects_are_kept_for_tests_alone(tmp_path):
    write_dota(tmp_path / "P", {"P": ((300, 100), [SHIP]), "Q": ((300, 100), [])})
    assert run(split_dota, tmp_path / "P", tmp_path / "cut", *SMALL) == 0
    assert [path.stem for path in sorted((tmp_path / "cut" / "images").iterdir())] == ["P__1__0___0"]
    assert run(split_dota, tmp_path / "P", tmp_path / "all", *SMALL, "--keep-empty") == 0
    assert len(read_annotations(tmp_path / "all", oriented=True).records) == 6


def test_images_of_more_than_8_bits_are_cut_by_one_range_of_values(tmp_path, capsys):
    values = np.linspace(0, 3000, 60 * 50).reshape(50, 60).astype(np.uint16)
    write_dota(tmp_path / "P", {"P": (values, [SHIP]), "Q": (np.minimum(values, 1000), [SHIP])})
    assert run(split_dota, tmp_path / "P", tmp_path / "cut", *SMALL) == 0
    assert "the values 0 to 3000 become 0 to 255" in capsys.readouterr().out
    assert [np.asarray(Image.open(tmp_path / "cut" / "images" / f"{name}__1__0___0.png")).max() for name in "PQ"] == [
        255, 85]
    assert run(split_dota, tmp_path / "P", tmp_path / "given", *SMALL, "--value-range", "0,1000") == 0
    assert np.asarray(Image.open(tmp_path / "given" / "images" / "Q__1__0___0.png")).max() == 255


def test_an_image_smaller_than_a_window_stays_as_it_is(tmp_path):
    write_dota(tmp_path / "P", {"P": ((50, 40), [SHIP])})
    run(split_dota, tmp_path / "P", tmp_path / "cut", *SMALL)
    (record,) = read_annotations(tmp_path / "cut").records
    assert (record.width, record.height) == (50, 40)


def test_what_is_there_is_not_cut_again(tmp_path, monkeypatch):
    scene(tmp_path / "P", name="P")
    scene(tmp_path / "Q", name="Q", seed=1)
    arguments = (tmp_path / "P", tmp_path / "Q", tmp_path / "cut", *SMALL)
    run(split_dota, *arguments)
    files = {path: path.read_bytes() for path in (tmp_path / "cut").rglob("*.*")}
    assert len(files) == 25
    decoded, decode = [], split_dota.decode
    monkeypatch.setattr(split_dota, "decode", lambda path, *more: decoded.append(path.name) or decode(path, *more))
    (tmp_path / "cut" / "labelTxt" / "Q__1__96___0.txt").unlink()
    partial = tmp_path / "cut" / "images" / ".Q__1__0___0.png.123.partial"
    partial.write_bytes(b"of a killed process")
    assert run(split_dota, *arguments) == 0
    assert decoded == ["Q.png"] and not partial.exists()
    assert {path: path.read_bytes() for path in (tmp_path / "cut").rglob("*.*")} == files


def test_a_killed_split_is_finished_by_the_same_command(tmp_path, monkeypatch, capsys):
    folder = scene(tmp_path / "P")
    run(split_dota, folder, tmp_path / "once", *SMALL)
    labels, written = split_dota.window_labels, []

    def fail(*arguments):
        written.append(1)
        if len(written) == 3:
            raise OSError(28, "No space left on device")
        return labels(*arguments)

    monkeypatch.setattr(split_dota, "window_labels", fail)
    assert run(split_dota, folder, tmp_path / "cut", *SMALL) == 2
    assert "No space left" in capsys.readouterr().err
    assert len(list((tmp_path / "cut" / "labelTxt").iterdir())) == 2
    with pytest.raises(UserError, match="has not cut all windows; give its command again"):
        read_annotations(tmp_path / "cut")
    assert run(split_dota, folder, tmp_path / "cut", *SMALL) == 0
    for path in (tmp_path / "once").rglob("*.*"):
        assert (tmp_path / "cut" / path.relative_to(tmp_path / "once")).read_bytes() == path.read_bytes()


def test_several_processes_cut_the_same(tmp_path):
    scene(tmp_path / "P", name="P")
    scene(tmp_path / "Q", name="Q", seed=1)
    run(split_dota, tmp_path / "P", tmp_path / "Q", tmp_path / "one", *SMALL)
    done = run_program("-m", "detection.split_dota", tmp_path / "P", tmp_path / "Q", tmp_path / "two", "--size", 128,
                       "--gap", 32, "--processes", 2)
    assert done.returncode == 0 and "12 windows of 2 images" in done.stdout
    for path in (tmp_path / "one").rglob("*.*"):
        assert (tmp_path / "two" / path.relative_to(tmp_path / "one")).read_bytes() == path.read_bytes()


def test_what_no_window_holds_is_said(tmp_path, capsys):
    write_dota(tmp_path / "P", {"P": ((300, 100), ["20 10 290 10 290 20 20 20 harbor 0", SHIP])})
    run(split_dota, tmp_path / "P", tmp_path / "cut", *SMALL)
    out = capsys.readouterr().out
    assert "1 window of 1 image with 1 object\n" in out
    assert "note: objects that lie in no window to 70 per cent: 1, the first: " in out and "P.txt:3" in out


def test_bad_input_is_one_line(tmp_path, capsys):
    write_dota(tmp_path / "P", {"P": ((60, 50), [SHIP])})
    write_dota(tmp_path / "Q", {"P": ((60, 50), [SHIP])})

    def refused(*arguments):
        assert run(split_dota, *arguments, "--processes", 1) == 2
        return error_line(capsys)

    assert "no such folder" in refused(tmp_path / "none", tmp_path / "cut")
    assert "--size 100 --gap 100" in refused(tmp_path / "P", tmp_path / "cut", "--size", 100, "--gap", 100)
    assert "has the same name" in refused(tmp_path / "P", tmp_path / "Q", tmp_path / "cut")
    assert "holds other data" in refused(tmp_path / "P", tmp_path / "Q")
    assert not (tmp_path / "cut").exists()
    run(split_dota, tmp_path / "P", tmp_path / "cut", *SMALL)
    assert "other settings" in refused(tmp_path / "P", tmp_path / "cut", "--size", 64, "--gap", 32)
    (tmp_path / "P" / "images" / "P.png").write_bytes((tmp_path / "P" / "images" / "P.png").read_bytes()[:3000])
    assert "P.png: not readable as an image" in refused(tmp_path / "P", tmp_path / "new")
    for scales in ("0", "a", "1,-1"):
        assert run(split_dota, tmp_path / "P", tmp_path / "new", "--scales", scales) == 2


def test_the_benchmark_prints_a_table_and_writes_it(tmp_path, capsys):
    write_dota(tmp_path / "P", {"P": ((60, 50), [SHIP])})
    flags = ("--device", "cpu", "--repeats", 1, "--dota", tmp_path / "P", "--json", tmp_path / "bench.json")
    assert run(bench_oriented, *flags, "--boxes", 40, 60) == 0
    rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert [row[""].split(",")[0] for row in rows] == ["rotated IoU of 40 x 100", "rotated NMS of 60",
                                                       "windows of P.png"]
    assert all(row["ratio"] > 0 for row in rows) and "rotated NMS of 60" in capsys.readouterr().out
    assert run(bench_oriented, *flags, "--boxes", 0) == 2


@pytest.mark.real_data
def test_the_windows_of_real_images(tmp_path):
    folder = real("dota_examples")
    write = {name: folder / "images" / f"{name}.png" for name in ("P0075", "P1888")}
    for name, image in write.items():
        write_dota(tmp_path / "some", {name: (np.asarray(Image.open(image).convert("RGB")),
                                              (folder / "labelTxt" / f"{name}.txt").read_text().splitlines()[2:])})
    assert run(split_dota, tmp_path / "some", tmp_path / "cut", "--processes", 1, "--size", 600) == 0
    windows, whole = (read_annotations(place, oriented=True) for place in (tmp_path / "cut", tmp_path / "some"))
    assert windows.classes == whole.classes
    found = [{"boxes": torch.tensor(record.boxes), "labels": torch.tensor(record.labels),
              "scores": torch.ones(len(record.labels))} for record in windows.records]
    merged = merge_windows([record.path.stem for record in windows.records], found, threshold=0.5)
    for record in whole.records:
        overlaps = rotated_iou(torch.tensor(record.boxes)[:, None], merged[record.path.stem]["boxes"])
        assert (overlaps.amax(dim=1) > 0.5).all() and len(record.boxes) <= overlaps.shape[1] + 2
