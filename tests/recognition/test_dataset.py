"""Lists, decoding, the cache and batches."""

import dataclasses
import json
import os
import time

import numpy as np
import pytest
import torch
from PIL import Image

import baseline_resnet50
from common import image_cache, workers
from common.image_cache import ImageCache
from common.images import decode_grey, decode_square
from common.runtime import UserError
from dataset import ImageDataset, network_input, parse_line, read_info, read_split
from recognition.settings import parse_settings
from recognition.stage import load_data, read_lists
from tests.support import draw_tiny


def cache_of(root, size=32, **options):
    info = read_info(root)
    samples = [sample for split in ("train", "val", "test") for sample in read_split(info, split)]
    return ImageCache(info.images, samples, size, root / "cache", **options), samples, info


# ---- lists -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("line, path, label", [
    ("a.jpg 3", "a.jpg", 3), ("a b/c d.jpg 0", "a b/c d.jpg", 0), ("a.jpg\t4", "a.jpg", 4), ("a.jpg   2", "a.jpg", 2),
    ("..hidden/a.jpg 1", "..hidden/a.jpg", 1), ("ä/船.png 1", "ä/船.png", 1),
])
def test_good_lines(line, path, label):
    assert parse_line(line, "list:1", 5) == (path, label, "list:1")


@pytest.mark.parametrize("line, complaint", [
    ("a.jpg", "expected 'relative/path label'"), ("a.jpg x", "class id"), ("a.jpg -1", "class id"),
    ("a.jpg 5", "out of range; expected 0..4"), ("a.jpg 99999999999999999999", "out of range"), ("a.jpg ³", "class id"),
    ("../a.jpg 1", "leaves"), ("x/../../a.jpg 1", "leaves"), ("/etc/a.jpg 1", "leaves"), ("C:\\a.jpg 1", "leaves"),
    ("x\\..\\..\\a.jpg 1", "leaves"), ("a\x00b.jpg 1", "unprintable"),
])
def test_bad_lines_name_file_and_line(line, complaint):
    with pytest.raises(UserError, match=complaint) as error:
        parse_line(line, "train.txt:7", 5)
    assert str(error.value).startswith("train.txt:7: ")


def test_the_last_line_needs_no_newline_and_blank_lines_do_not_count(own_tiny):
    path = own_tiny / "train.txt"
    path.write_bytes(b"\xef\xbb\xbf" + b"\r\n\n".join(path.read_bytes().split(b"\n")).strip())
    samples = read_split(read_info(own_tiny), "train")
    assert [sample.label for sample in samples] == [c for c, n in enumerate([14, 12, 9, 8, 5, 4]) for _ in range(n)]
    assert samples[1].where == f"{path}:3"


def test_info_round_trip_and_groups(tiny):
    info = read_info(tiny)
    assert info.name == "tiny" and info.classes == list("abcdef")
    assert info.images.resolve() == (tiny / "images").resolve()
    assert info.group_of_class().tolist() == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("change, complaint", [
    ({"classes": ["a", "a", "b", "c", "d", "e"]}, "different names"),
    ({"groups": {"head": []}}, "head, middle and tail"),
    ({"groups": {"head": [0, 1], "middle": [2], "tail": [4, 5]}}, "each class id 0..5 once"),
    ({"images": "elsewhere"}, "not a folder"), ({"name": 3}, "'name'"),
])
def test_a_wrong_dataset_json_is_one_error(own_tiny, change, complaint):
    path = own_tiny / "dataset.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UserError, match=complaint):
        read_info(own_tiny)


def test_broken_json_names_the_line(own_tiny):
    (own_tiny / "dataset.json").write_text('{"name": "x",\n oops}')
    with pytest.raises(UserError, match=r"dataset\.json:2: not valid JSON"):
        read_info(own_tiny)


# ---- decoding --------------------------------------------------------------------------------------------------------


RAMP = np.tile(np.linspace(0, 255, 64).astype(np.uint8), (8, 1))


@pytest.mark.parametrize("name, make, tolerance", [
    ("L.png", lambda: Image.fromarray(RAMP), 0),
    ("16bit.png", lambda: Image.fromarray(RAMP.astype(np.uint16) * 257), 0),
    ("16bit.tif", lambda: Image.fromarray(RAMP.astype(np.uint16) * 257), 0),
    ("dark16bit.png", lambda: Image.fromarray(RAMP.astype(np.uint16)), None),
    ("rgba.png", lambda: Image.fromarray(RAMP).convert("RGBA"), 1),
    ("palette.gif", lambda: Image.fromarray(RAMP), 1),
    ("cmyk.jpg", lambda: Image.fromarray(RAMP).convert("RGB").convert("CMYK"), 6),
])
def test_formats_are_converted(tmp_path, name, make, tolerance):
    make().save(tmp_path / name)
    grey = np.asarray(decode_grey(tmp_path / name)).astype(int)
    expected = RAMP if tolerance is not None else np.rint(RAMP / 257)  # 16 bits are 16 bits, however dark
    assert grey.shape == RAMP.shape and np.abs(grey - expected).max() <= (tolerance or 0)


def test_floating_point_pixels_are_refused(tmp_path):
    Image.fromarray(RAMP.astype(np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(ValueError, match="floating-point pixels, of no known range"):
        decode_grey(tmp_path / "float.tif")


def test_an_animation_gives_its_first_frame(tmp_path):
    frames = [Image.fromarray(np.full((8, 8), value, np.uint8)) for value in (40, 200)]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert np.asarray(decode_grey(tmp_path / "moving.gif")).mean() == pytest.approx(40, abs=1)


def test_bicubic_resize_does_not_keep_the_aspect(tmp_path):
    Image.fromarray(RAMP).save(tmp_path / "a.png")
    square = decode_square(tmp_path / "a.png", 32)
    expected = np.asarray(Image.fromarray(RAMP).resize((32, 32), Image.Resampling.BICUBIC))
    assert square.shape == (32, 32) and (square == expected).all()


# ---- cache -----------------------------------------------------------------------------------------------------------


def test_cache_holds_every_image_at_its_row(tiny, tmp_path):
    info = read_info(tiny)
    samples = read_split(info, "train") + read_split(info, "test")
    cache = ImageCache(info.images, samples, 48, tmp_path / "cache", processes=2)
    assert cache.array.shape == (len(samples), 48, 48) and cache.array.dtype == np.uint8
    for sample in samples[::7]:
        assert (cache.array[cache.row_of[sample.path]] == decode_square(info.images / sample.path, 48)).all()


def test_cache_is_built_once_and_again_when_an_image_changes(own_tiny, monkeypatch):
    first, samples, info = cache_of(own_tiny)
    built = []
    build = image_cache._build_cache
    monkeypatch.setattr(image_cache, "_build_cache", lambda *arguments: (built.append(1), build(*arguments)))
    assert cache_of(own_tiny)[0].key == first.key and not built
    changed = info.images / samples[3].path
    Image.fromarray(np.full((40, 40), 9, np.uint8)).save(changed)
    os.utime(changed, ns=(time.time_ns(), time.time_ns() + 5_000_000_000))
    again = cache_of(own_tiny)[0]
    assert again.key != first.key and built == [1]
    assert (again.array[again.row_of[samples[3].path]] == 9).all()
    assert len(list((own_tiny / "cache").glob("*.npy"))) == 1


def test_a_built_cache_needs_no_right_to_write(own_tiny, monkeypatch):
    key = cache_of(own_tiny)[0].key
    monkeypatch.setattr(image_cache, "_locked", None)
    assert cache_of(own_tiny)[0].key == key


def test_a_cache_of_another_name_replaces_none(own_tiny):
    cache_of(own_tiny)
    cache_of(own_tiny, name="test")
    assert sorted(file.name.split("_")[0] for file in (own_tiny / "cache").glob("*.npy")) == ["images", "test"]


def test_a_killed_decoder_is_one_error(tmp_path):
    with pytest.raises(UserError, match="was killed, probably for lack of memory"):
        list(workers.in_processes(os._exit, [9, 9, 9], 2))


def test_a_bad_image_stops_the_cache_and_leaves_none(own_tiny):
    info = read_info(own_tiny)
    path = info.images / read_split(info, "train")[20].path
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UserError, match=r"train\.txt:21: .*train_1_6\.png: not readable as an image"):
        cache_of(own_tiny, processes=1)
    assert [file.name for file in (own_tiny / "cache").iterdir()] == [".lock"]


@pytest.mark.parametrize("content, complaint", [(b"", "not an image"), (os.urandom(3000), "not an image")])
def test_an_empty_or_random_file_is_named(own_tiny, content, complaint):
    (own_tiny / "images" / "test_0_0.png").write_bytes(content)
    with pytest.raises(UserError, match=rf"test\.txt:1: .*test_0_0\.png: {complaint}"):
        cache_of(own_tiny, processes=2)


def test_an_absent_image_and_a_link_that_leaves_are_refused(own_tiny, tmp_path):
    image = own_tiny / "images" / "val_0_1.png"
    image.rename(tmp_path / "outside.png")
    with pytest.raises(UserError, match=r"val\.txt:2: no such image: .*val_0_1\.png"):
        cache_of(own_tiny)
    image.symlink_to(tmp_path / "outside.png")
    with pytest.raises(UserError, match=r"val\.txt:2: val_0_1\.png is a link out of the image folder"):
        cache_of(own_tiny)


def test_an_image_bomb_is_refused(own_tiny, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(UserError, match="refused: more than 1,000 pixels"):
        cache_of(own_tiny, processes=1)


def test_a_folder_that_cannot_be_written_has_its_cache_elsewhere(own_tiny, tmp_path, monkeypatch):
    flags = ["--data-root", str(own_tiny), "--image-size", "32", "--cache-dir", str(tmp_path / "caches")]
    settings, _ = parse_settings(baseline_resnet50.STAGE, baseline_resnet50.SETTINGS, "", flags)
    (own_tiny / "cache").write_text("a file in the place of the folder")
    data = load_data(read_lists(baseline_resnet50.STAGE, settings), settings)
    assert len(data.train.cache.array) == 88 and len(list((tmp_path / "caches" / "tiny").glob("*.npy"))) == 1
    settings = dataclasses.replace(settings, cache_dir="")
    with pytest.raises(UserError, match="cache cannot be written here .*; give another folder with --cache-dir"):
        load_data(read_lists(baseline_resnet50.STAGE, settings), settings)


# ---- batches ---------------------------------------------------------------------------------------------------------


def test_items_and_batches_agree(tiny):
    cache, _, info = cache_of(tiny)
    images = ImageDataset(cache, read_split(info, "train"))
    batch, labels = images.__getitems__([5, 0, 30, 5])
    assert batch.shape == (4, 1, 32, 32) and batch.dtype == torch.uint8 and labels.tolist() == [0, 0, 2, 0]
    for position, index in enumerate([5, 0, 30, 5]):
        image, label = images[index]
        assert torch.equal(image, batch[position]) and label == labels[position]


def test_network_input_scales_and_flips_each_image_by_itself():
    images = torch.arange(256, dtype=torch.uint8).view(4, 1, 8, 8)
    flip = torch.tensor([True, False, False, True])
    scaled = network_input(images, flip)
    for number in range(4):
        for y in range(8):
            for x in range(8):
                value = images[number, 0, y, 7 - x if flip[number] else x].item()
                assert scaled[number, 0, y, x].item() == pytest.approx((value / 255 - 0.5) / 0.5, abs=1e-6)


def test_flips_and_turns_are_the_eight_symmetries():
    image = torch.arange(64, dtype=torch.uint8).view(1, 1, 8, 8)
    flip, turns = torch.tensor([False, True] * 4), torch.arange(8) // 2
    scaled = network_input(image.repeat(8, 1, 1, 1), flip, turns)
    pixels = (127.5 * (scaled + 1)).round().byte()
    for number in range(8):
        expected = np.rot90(np.fliplr(image[0, 0]) if flip[number] else image[0, 0], turns[number])
        assert np.array_equal(pixels[number, 0], expected)
    assert len({bytes(symmetry.flatten().tolist()) for symmetry in pixels}) == 8
    assert torch.equal(scaled[:2], network_input(image.repeat(2, 1, 1, 1), flip[:2]))


def test_a_larger_set_costs_no_copy(tmp_path):
    root = draw_tiny(tmp_path / "t", train=[40, 30, 20, 10, 5, 5])
    cache = cache_of(root)[0]
    assert isinstance(cache.array, np.memmap) and not cache.array.flags.writeable
