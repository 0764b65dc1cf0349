"""Which files are images, and images of more than 8 bits: their values against numpy, and the range they are scaled
by."""

import argparse
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.images import (
    FULL_RANGE,
    decode,
    decode_grey,
    find_images,
    image_size,
    images_below,
    is_value_range,
    low_and_high,
    open_image,
    range_to_predict_with,
    value_range_entry,
    value_range_of,
)

VALUES = np.random.default_rng(0).integers(3, 2048, (9, 7, 4), dtype=np.uint16)  # of 11 bits
VALUES[0, 0, :3], VALUES[8, 6, :3] = 0, 2047


def write_png(path, values):
    """A PNG of 16 bits, which Pillow writes of grey images alone. values: (H, W, 3 or 4) uint16."""
    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    height, width, channels = values.shape
    header = struct.pack(">IIBBBBB", width, height, 16, {3: 2, 4: 6}[channels], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows))
                     + chunk(b"IEND", b""))


def write_tiff(path, values, order, compressed=False):
    """A colour TIFF of 16 bits. values: (H, W, 3) uint16. order: < or >."""
    height, width, _ = values.shape
    data = values.astype(f"{order}u2").tobytes()
    data = zlib.compress(data) if compressed else data
    data += b"\0" * (len(data) % 2)
    end = 8 + len(data)
    longs = {256: width, 257: height, 273: 8, 278: height, 279: len(data)}
    shorts = {259: 8 if compressed else 1, 262: 2, 277: 3, 284: 1}
    entries = [(258, struct.pack(f"{order}HHII", 258, 3, 3, end + 2 + 12 * 10 + 4))]
    entries += [(tag, struct.pack(f"{order}HHII", tag, 4, 1, value)) for tag, value in longs.items()]
    entries += [(tag, struct.pack(f"{order}HHIHH", tag, 3, 1, value, 0)) for tag, value in shorts.items()]
    directory = struct.pack(f"{order}H", len(entries)) + b"".join(entry for _, entry in sorted(entries))
    path.write_bytes((b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", end) + data + directory
                     + struct.pack(f"{order}I", 0) + struct.pack(f"{order}HHH", 16, 16, 16))


WRITERS = {
    "grey.png": lambda path: Image.fromarray(VALUES[..., 0]).save(path),
    "grey.tif": lambda path: Image.fromarray(VALUES[..., 0]).save(path),
    "grey32.tif": lambda path: Image.fromarray(VALUES[..., 0].astype(np.int32)).save(path),
    "colour.png": lambda path: write_png(path, VALUES[..., :3]),
    "transparent.png": lambda path: write_png(path, VALUES),
    "little.tif": lambda path: write_tiff(path, VALUES[..., :3], "<"),
    "big.tif": lambda path: write_tiff(path, VALUES[..., :3], ">"),
    "compressed.tif": lambda path: write_tiff(path, VALUES[..., :3], "<", compressed=True),
}


def scaled(values, low, high):
    """Each value by itself, in float64."""
    return np.array([min(max(round((int(v) - low) / (high - low) * 255), 0), 255) for v in values.flat]).reshape(
        values.shape)


@pytest.mark.parametrize("name", WRITERS)
def test_eleven_bits_become_eight_by_their_range(tmp_path, name):
    WRITERS[name](tmp_path / name)
    values = VALUES[..., 0] if name.startswith("grey") else VALUES[..., :3]
    assert value_range_of([tmp_path / name]) == (0, 2047)
    for low, high in ((0, 2047), (500, 1500)):
        assert (np.asarray(decode(tmp_path / name, (low, high))) == scaled(values, low, high)).all()
    for full in (None, FULL_RANGE):  # as before there were value ranges
        found = np.asarray(decode(tmp_path / name, full))
        assert (found == np.rint(values / 257) if values.ndim == 2 else found[..., :3] == values >> 8).all()


def test_images_of_8_bits_do_not_depend_on_the_range(tmp_path):
    pixels = (VALUES[..., :3] >> 3).astype(np.uint8)
    for name, image in (("a.png", Image.fromarray(pixels)), ("a.jpg", Image.fromarray(pixels)),
                        ("g.tif", Image.fromarray(pixels[..., 0])), ("p.png", Image.fromarray(pixels).quantize(16))):
        image.save(tmp_path / name)
        assert value_range_of([tmp_path / name]) is None
        one, other = decode(tmp_path / name), decode(tmp_path / name, (0, 2047))
        assert one.mode == other.mode and one.tobytes() == other.tobytes()


def test_the_range_is_that_of_all_images_unless_it_is_given(tmp_path):
    files = [tmp_path / f"{number}.png" for number in range(70)]
    for number, file in enumerate(files):
        Image.fromarray(np.full((2, 2), 10 + 40 * number, np.uint16)).save(file)
    (tmp_path / "damaged.png").write_bytes(files[0].read_bytes()[:60])
    files.append(tmp_path / "damaged.png")
    assert value_range_of(files, processes=1) == value_range_of(files, processes=2) == (10, 10 + 40 * 69)
    assert value_range_of(files[:1]) == (10, 11)
    assert value_range_of(files, given=(5, 9)) == (5, 9) and value_range_of([]) is None
    Image.fromarray(np.array([[0, 65535]], np.uint16)).save(files[3])
    assert value_range_of(files) == FULL_RANGE
    assert value_range_entry(FULL_RANGE) == value_range_entry(None) == {}  # as before there were value ranges
    assert value_range_entry((5, 9)) == {"value_range": [5, 9]}


def test_a_prediction_takes_the_range_of_the_training_or_says_that_there_is_none(tmp_path, capsys):
    WRITERS["grey.png"](tmp_path / "a.png")
    assert range_to_predict_with([tmp_path / "a.png"], None, [0, 4095]) == [0, 4095]
    assert range_to_predict_with([tmp_path / "a.png"], (1, 2), [0, 4095]) == (1, 2)
    assert capsys.readouterr().err == ""
    assert range_to_predict_with([tmp_path / "a.png"], None, None) is None
    assert "note: there are images of more than 8 bits, with values 0 to 2047" in capsys.readouterr().err


def test_ranges_as_text_and_in_files():
    assert low_and_high("0,2047") == (0, 2047) and low_and_high("-5,5") == (-5, 5)
    for text in ("", "5", "5,5", "9,1", "0,1,2", "a,b", "0,99999999999"):
        with pytest.raises(argparse.ArgumentTypeError, match="expected two whole numbers"):
            low_and_high(text)
    assert is_value_range(None) and is_value_range([0, 1])
    for value in ((0, 1), [0], [1, 0], [0.0, 1.0], [False, True], ["0", "1"], {}, "0,1", [0, 10**12], 0):
        assert not is_value_range(value), value


def test_an_aerial_scene_above_pillows_own_limit_is_read(tmp_path):
    Image.new("L", (9500, 9500)).save(tmp_path / "scene.png", compress_level=1)
    assert image_size(tmp_path / "scene.png") == decode_grey(tmp_path / "scene.png").size == (9500, 9500)


def test_a_bomb_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    Image.new("L", (20, 10)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 150)
    with pytest.raises(Image.DecompressionBombWarning), open_image(tmp_path / "a.png"):
        pass


def test_images_are_found_in_subfolders_and_not_in_hidden_ones(tmp_path):
    for name in ("a.png", "b.JFIF", "deep/er/c.tiff", "notes.txt", "deep/scene.pdf", ".hidden.png", ".git/d.png",
                 "deep/.thumbs/e.png"):
        path = tmp_path / "source" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "f.jpg").touch()
    os.symlink(tmp_path / "linked", tmp_path / "source" / "link")
    os.symlink(tmp_path / "source", tmp_path / "linked" / "back")  # a loop
    images, others = ([str(path.relative_to(tmp_path / "source")) for path in paths]
                      for paths in images_below(tmp_path / "source"))
    assert images == ["a.png", "b.JFIF", "deep/er/c.tiff", "link/f.jpg"]
    assert others == ["deep/scene.pdf", "notes.txt"]
    assert find_images([tmp_path / "source", tmp_path / "source" / "a.png"]) == [
        *(Path(tmp_path / "source" / name) for name in images), tmp_path / "source" / "a.png"]
