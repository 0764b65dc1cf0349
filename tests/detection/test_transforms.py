"""From an image file to the network's input: decoding, resize, flip, turn and padding against slow references."""

import math
import os

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors

from detection.data.transforms import MEAN, STD, decode_rgb, flip, normalise, pad_to_batch, resize, target_size, turn
from detection.geometry.oriented import corners


def noise(*shape, seed=0):
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


# ---- decoding --------------------------------------------------------------------------------------------------------


def decoded(path, image, **options):
    """What decode_rgb gives for a PIL image saved at `path`, as (H, W, 3)."""
    image.save(path, **options)
    found = decode_rgb(path)
    assert isinstance(found, tv_tensors.Image) and found.dtype == torch.uint8
    return found.permute(1, 2, 0).numpy()


def test_every_kind_of_image_becomes_rgb_of_8_bits(tmp_path):
    rgb = Image.fromarray(noise(5, 7, 3).numpy())
    pixels, grey = np.asarray(rgb), noise(5, 7, seed=1).numpy()
    path = tmp_path / "a.png"
    assert (decoded(path, rgb) == pixels).all()
    assert (decoded(path, Image.fromarray(np.dstack([pixels, grey]))) == pixels).all()  # RGBA
    assert (decoded(path, Image.fromarray(grey)) == grey[..., None]).all()
    assert (decoded(path, Image.fromarray(np.dstack([grey, grey]), "LA")) == grey[..., None]).all()
    assert (decoded(path, Image.fromarray(grey > 99)) == np.where(grey > 99, 255, 0)[..., None]).all()
    assert (decoded(path, Image.fromarray(grey.astype(np.uint16) * 257)) == grey[..., None]).all()
    palette = rgb.quantize(4)
    assert (decoded(path, palette, transparency=b"\0\x80") == np.asarray(palette.convert("RGB"))).all()
    cmyk = rgb.convert("CMYK")
    assert (decoded(tmp_path / "a.tif", cmyk) == np.asarray(cmyk.convert("RGB"))).all()


def test_an_exif_orientation_is_not_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    assert decoded(tmp_path / "a.jpg", Image.new("RGB", (20, 10)), exif=exif).shape == (10, 20, 3)


def test_what_is_no_image_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    with pytest.raises(OSError, match="not a file"):
        decode_rgb(tmp_path)
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    with pytest.raises(ValueError, match="PostScript is a program"):
        decode_rgb(path)
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match="floating-point"):
        decode_rgb(tmp_path / "a.tif")
    Image.fromarray(noise(40, 40, 3).numpy()).save(path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(OSError, match="truncated"):
        decode_rgb(path)
    Image.new("RGB", (20, 10)).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 150)
    with pytest.raises(Image.DecompressionBombWarning):
        decode_rgb(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_named_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(OSError, match="not a file"):
        decode_rgb(tmp_path / "a.png")


# ---- geometry --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("height, width, short, long, expected", [
    (480, 640, 800, 1333, (800, 1067)), (640, 480, 800, 1333, (1067, 800)), (375, 500, 800, 1333, (800, 1067)),
    (500, 500, 800, 1333, (800, 800)), (427, 640, 800, 1333, (800, 1199)), (300, 900, 800, 1333, (444, 1333)),
    (4000, 1, 800, 1333, (1333, 1)), (1, 1, 480, 1333, (480, 480)), (2000, 3000, 800, 1333, (800, 1200)),
    (10, 15, 5, 9, (5, 8)),  # 7.5 is rounded up
])
def test_target_sizes(height, width, short, long, expected):
    assert target_size(height, width, short, long) == expected


def test_target_size_is_the_largest_within_both_limits():
    for height in range(1, 60, 7):
        for width in range(1, 90, 4):
            found = target_size(height, width, 30, 50)
            assert min(found) <= 30 and max(found) <= 50 and (min(found) == 30 or max(found) == 50)
            scale = min(50 / max(height, width), 30 / min(height, width))
            assert all(abs(new - max(old * scale, 0.5)) <= 0.5
                       for new, old in zip(found, (height, width), strict=True))


def resized_slowly(image, size):
    """Bilinear interpolation between the four nearest pixel centres, pixel by pixel."""
    _, height, width = image.shape
    result = np.zeros((3, *size))
    for i in range(size[0]):
        for j in range(size[1]):
            y = min(max((i + 0.5) * height / size[0] - 0.5, 0), height - 1)
            x = min(max((j + 0.5) * width / size[1] - 0.5, 0), width - 1)
            top, left = int(y), int(x)
            for k in range(3):
                for row, of_row in ((top, 1 - y + top), (top + 1, y - top)):
                    for column, of_column in ((left, 1 - x + left), (left + 1, x - left)):
                        pixel = int(image[k, min(row, height - 1), min(column, width - 1)])
                        result[k, i, j] += of_row * of_column * pixel
    return result


@pytest.mark.parametrize("size", [(23, 31), (5, 7), (11, 40), (13, 17), (1, 2)])
def test_resize_is_bilinear_without_antialiasing_up_and_down(size):
    image = tv_tensors.Image(noise(3, 13, 17))
    found, _ = resize(image, torch.zeros(0, 4), size)
    assert found.shape == (3, *size) and found.dtype == torch.uint8
    assert np.abs(found.numpy() - resized_slowly(image, size)).max() <= 1.01


def test_boxes_follow_the_true_ratio_of_each_axis_and_are_clipped():
    boxes = torch.tensor([[0.0, 0, 640, 480], [64, 48, 128.5, 96], [-9, 470, 10, 500]])
    _, found = resize(tv_tensors.Image(torch.zeros(3, 480, 640, dtype=torch.uint8)), boxes, (800, 1067))
    x, y = 1067 / 640, 800 / 480
    expected = [[0, 0, 1067, 800], [64 * x, 48 * y, 128.5 * x, 96 * y], [0, 470 * y, 10 * x, 800]]
    assert torch.allclose(found, torch.tensor(expected), rtol=1e-6)
    assert type(found) is torch.Tensor and found.dtype == torch.float32


def test_resize_to_the_same_size_changes_nothing_and_gives_a_copy():
    image, boxes = tv_tensors.Image(noise(3, 8, 9)), torch.tensor([[1.0, 2, 3, 4]])
    same, found = resize(image, boxes, (8, 9))
    assert torch.equal(same, image) and torch.equal(found, boxes) and found.data_ptr() != boxes.data_ptr()


def test_flip_mirrors_pixels_and_boxes_and_is_an_involution():
    image = tv_tensors.Image(noise(3, 6, 10))
    boxes = torch.tensor([[1.0, 2, 4, 5], [0, 0, 10, 6]])
    mirrored, found = flip(image, boxes)
    assert found.tolist() == [[6, 2, 9, 5], [0, 0, 10, 6]]
    assert all(torch.equal(mirrored[:, :, j], image[:, :, 9 - j]) for j in range(10))
    back, again = flip(mirrored, found)
    assert torch.equal(back, image) and torch.equal(again, boxes) and type(found) is torch.Tensor
    assert flip(image, torch.zeros(0, 4))[1].shape == (0, 4)


@pytest.mark.parametrize("quarters", range(4))
def test_a_turn_moves_pixels_and_boxes_alike(quarters):
    image, boxes = torch.zeros(3, 6, 10, dtype=torch.uint8), torch.tensor([[1.0, 2, 4, 5], [0, 0, 10, 6]])
    image[:, 2:5, 1:4] = noise(3, 3, 3) // 2 + 1
    turned, found = turn(image, boxes, quarters)
    assert (turned.numpy() == np.rot90(image.numpy(), quarters, (1, 2))).all()
    x1, y1, x2, y2 = found[0].int().tolist()
    assert (turned[:, y1:y2, x1:x2] > 0).all() and (turned > 0).sum() == 27
    assert found[1].tolist() == [0, 0, *((6, 10) if quarters % 2 else (10, 6))]
    back, again = turn(turned, found, -quarters % 4)
    assert torch.equal(back, image) and torch.equal(again, boxes)
    assert turn(image, torch.zeros(0, 4), quarters)[1].shape == (0, 4)


def test_oriented_boxes_are_turned_with_their_corners():
    boxes = torch.tensor([[3.0, 2, 4, 2, 0.3], [7, 3, 1, 5, 1.2], [5, 3, 2, 1, math.pi / 2]])
    points = corners(boxes)  # (3, 4, 2)
    for quarters in range(1, 4):
        width = 10 if quarters % 2 else 6
        points = torch.stack([points[..., 1], width - points[..., 0]], dim=-1)
        found = corners(turn(noise(3, 6, 10), boxes, quarters)[1])
        apart = (found[:, :, None] - points[:, None]).norm(dim=-1)  # (3, 4, 4)
        assert (apart.amin(dim=2) < 1e-5).all() and (apart.amin(dim=1) < 1e-5).all()


def test_batches_are_padded_to_multiples_of_32():
    batch, sizes = pad_to_batch([noise(3, 800, 1067)])
    assert batch.shape == (1, 3, 800, 1088) and sizes == [(800, 1067)]
    images = [noise(3, 33, 20), noise(3, 10, 64, seed=1)]
    batch, sizes = pad_to_batch(images)
    assert batch.shape == (2, 3, 64, 64) and batch.dtype == torch.uint8 and sizes == [(33, 20), (10, 64)]
    for padded, image, (h, w) in zip(batch, images, sizes, strict=True):
        assert torch.equal(padded[:, :h, :w], image) and padded.int().sum() == image.int().sum()


def test_normalise_against_the_formula_and_zero_in_the_padding():
    batch, sizes = pad_to_batch([noise(3, 7, 9), noise(3, 32, 5, seed=1)])
    before, found = batch.clone(), normalise(batch, sizes)
    assert found.dtype == torch.float32 and found.shape == (2, 3, 32, 32) and torch.equal(batch, before)
    expected = torch.zeros(2, 3, 32, 32)
    for n, (h, w) in enumerate(sizes):
        for c in range(3):
            expected[n, c, :h, :w] = (batch[n, c, :h, :w].float() - MEAN[c]) / STD[c]
    assert torch.allclose(found, expected, atol=1e-6)
