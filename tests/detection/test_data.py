"""Images and boxes on their way into the network: decoding, resize, flip and padding against slow references; the
sampler; and batches that no number of loading processes changes."""

import math
import multiprocessing
import os
import signal
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors

from common.runtime import UserError
from detection.data import batches
from detection.data.batches import AspectRatioBatchSampler, DetectionDataset, Draw, collate, loader
from detection.data.records import Annotations, Record
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


# ---- data set and loader ---------------------------------------------------------------------------------------------


SHAPES = [(40, 60), (50, 35), (45, 45), (36, 70), (64, 33)]


@pytest.fixture
def annotations(tmp_path):
    """Dark images, each but the last with one bright object, whose box is known."""
    records = []
    for number, (height, width) in enumerate(SHAPES):
        pixels = np.full((height, width, 3), 10 * number, np.uint8)
        boxes = np.array([[4, 6, 20, 30]], np.float32)[:number < 4]
        for x1, y1, x2, y2 in boxes.astype(int):
            pixels[y1:y2, x1:x2] = 250
        path = tmp_path / f"{number}.png"
        Image.fromarray(pixels).save(path)
        count = len(boxes)
        records.append(Record(path, width, height, boxes, np.full(count, number), np.zeros(count, bool), number,
                              np.full(count, 384.0)))
    return Annotations(list("abcde"), records, Path("none"))


@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize("index, short, long, size", [(0, 80, 200, (80, 120)), (1, 70, 100, (100, 70)),
                                                      (3, 80, 100, (51, 100)), (2, 30, 50, (30, 30))])
def test_a_sample_has_its_box_around_the_object(annotations, index, short, long, size, flipped):
    sample = DetectionDataset(annotations)[Draw(index, short, long, flipped)]
    assert sample.image.shape == (3, *size) and sample.image.dtype == torch.uint8
    assert sample.boxes.shape == (1, 4) and sample.labels.tolist() == [index] and sample.index == index
    height, width = SHAPES[index]
    assert sample.scale == (size[1] / width, size[0] / height)
    x, y = sample.scale
    left, right = (size[1] - 20 * x, size[1] - 4 * x) if flipped else (4 * x, 20 * x)
    assert sample.boxes[0].tolist() == pytest.approx([left, 6 * y, right, 30 * y], rel=1e-5)
    rows, columns = torch.nonzero(sample.image[0] > 140).unbind(1)
    edges = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    assert max(abs(edge - side) for edge, side in zip(edges, sample.boxes[0], strict=True)) <= 1


def test_an_image_without_objects_is_a_sample(annotations):
    sample = DetectionDataset(annotations)[Draw(4, 66, 200, True)]
    assert sample.boxes.shape == (0, 4) and sample.boxes.dtype == torch.float32
    assert sample.labels.shape == (0,) and sample.labels.dtype == torch.int64


def test_a_sample_does_not_share_memory_with_the_record(annotations):
    sample = DetectionDataset(annotations)[Draw(0, 40, 60, False)]
    sample.boxes.zero_()
    sample.labels.zero_().sub_(1)
    record = annotations.records[0]
    assert record.boxes.tolist() == [[4, 6, 20, 30]] and record.labels.tolist() == [0]


def test_collate_keeps_what_belongs_together(annotations):
    samples = [DetectionDataset(annotations)[draw] for draw in (Draw(4, 66, 200, False), Draw(0, 80, 200, True))]
    batch = collate(samples)
    assert batch.images.shape == (2, 3, 128, 128) and batch.sizes == [(128, 66), (80, 120)]
    assert batch.indices == [4, 0] and batch.scales == [sample.scale for sample in samples]
    assert [len(boxes) for boxes in batch.boxes] == [0, 1] and batch.labels[1].tolist() == [0]
    assert torch.equal(batch.images[1, :, :80, :120], samples[1].image)


def test_test_draws_are_all_images_in_order_and_not_mirrored(annotations):
    assert batches.test_draws(annotations, 800, 1333) == [(index, 800, 1333, False, 0) for index in range(5)]


def batches_equal(first, second):
    lists = zip(first.boxes + first.labels, second.boxes + second.labels, strict=True)
    return (torch.equal(first.images, second.images) and all(torch.equal(a, b) for a, b in lists)
            and first[3:] == second[3:])


def test_no_number_of_loading_processes_changes_a_batch(annotations):
    dataset = DetectionDataset(annotations)
    sampler = AspectRatioBatchSampler(SHAPES, 2, 0, 0, 1, (33, 50), 80, 0.5, repeat=2)
    here = list(loader(dataset, sampler, 0, "cpu"))
    assert len(here) == len(sampler) == 5
    for workers in (1, 2):
        there = list(loader(dataset, sampler, workers, "cpu"))
        assert all(batches_equal(a, b) for a, b in zip(here, there, strict=True))
    sampler.set_position(0, 3)
    assert all(batches_equal(a, b) for a, b in zip(here[3:], loader(dataset, sampler, 1, "cpu"), strict=True))


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_is_one_line_from_any_process(annotations, workers):
    path = annotations.records[1].path
    path.write_bytes(b"nothing")
    with pytest.raises(UserError) as error:
        list(loader(DetectionDataset(annotations), [[Draw(0, 40, 60, False), Draw(1, 40, 60, False)]], workers, "cpu"))
    assert str(error.value) == f"{path}: not an image that Pillow can read"


def test_an_image_of_another_size_than_annotated_is_named(annotations):
    path = annotations.records[0].path
    Image.new("RGB", (40, 60)).save(path)
    with pytest.raises(UserError, match=r"0\.png: is 40 x 60 pixels; expected 60 x 40, as its annotation says"):
        DetectionDataset(annotations)[Draw(0, 40, 60, False)]


class Killed(DetectionDataset):
    """Ends the process that loads from it."""

    def __getitem__(self, draw):
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="without fork there is no SIGKILL")
def test_a_killed_loading_process_is_one_line(annotations):
    with pytest.raises(UserError, match="a loading process was killed, probably for lack of memory; give fewer"):
        list(loader(Killed(annotations), [[Draw(0, 40, 60, False)]], 1, "cpu"))


# ---- sampler ---------------------------------------------------------------------------------------------------------


GENERATOR = np.random.default_rng(0)
MANY = [(int(h), int(w)) for h, w in GENERATOR.integers(30, 90, (53, 2))] + [(50, 50)]
WIDE = {index for index, (h, w) in enumerate(MANY) if w / h >= 1}


def sampler_of(shapes=MANY, batch_size=8, seed=3, rank=0, world_size=1, shorts=(480, 800), flip=0.5, repeat=1,
               turns=False):
    return AspectRatioBatchSampler(shapes, batch_size, seed, rank, world_size, shorts, 1333, flip, repeat, turns)


@pytest.mark.parametrize("repeat", [1, 3])
def test_an_epoch_holds_every_image_in_full_batches_of_one_group(repeat):
    sampler = sampler_of(repeat=repeat)
    batches = list(sampler)
    sizes = {True: len(WIDE) * repeat, False: (len(MANY) - len(WIDE)) * repeat}
    assert len(batches) == len(sampler) == sum(-(-size // 8) for size in sizes.values())
    for wide, size in sizes.items():
        own = [batch for batch in batches if (batch[0].index in WIDE) == wide]
        assert all(len(batch) == 8 and {draw.index in WIDE for draw in batch} == {wide} for batch in own)
        seen = Counter(draw.index for batch in own for draw in batch)
        assert set(seen) == {index for index in range(len(MANY)) if (index in WIDE) == wide}
        assert min(seen.values()) == repeat and sum(seen.values()) - size == -size % 8


def test_groups_come_mixed_and_each_epoch_in_another_order():
    sampler = sampler_of(repeat=3)
    first = list(sampler)
    kinds = [batch[0].index in WIDE for batch in first]
    assert sum(a != b for a, b in zip(kinds, kinds[1:], strict=False)) > 3
    sampler.set_position(1, 0)
    second = list(sampler)
    assert [draw.index for batch in first for draw in batch] != [draw.index for batch in second for draw in batch]
    assert list(sampler_of(repeat=3, seed=4)) != first and list(sampler_of(repeat=3)) == first


def test_a_last_batch_is_filled_from_the_start_of_its_group_and_a_small_group_wraps_around():
    batch, = sampler_of([(10, 20)] * 3)
    indices = [draw.index for draw in batch]
    assert sorted(indices[:3]) == [0, 1, 2] and indices == (indices[:3] * 3)[:8]
    drawn = [[draw.index for draw in batch] for batch in sampler_of([(10, 20)] * 11)]
    # Which of the two batches comes first is chance; the last 5 images of the one are the first 5 of the other.
    assert len(drawn) == 2 and (drawn[0][3:] == drawn[1][:5] or drawn[1][3:] == drawn[0][:5])
    assert {*drawn[0], *drawn[1]} == set(range(11))
    assert list(sampler_of([])) == [] and len(sampler_of([])) == 0
    assert len(sampler_of([(20, 10)], 1)) == 1 and [d.index for d in next(iter(sampler_of([(20, 10)], 1)))] == [0]


def test_processes_share_out_each_batch():
    whole = list(sampler_of())
    shares = [list(sampler_of(rank=rank, world_size=4)) for rank in range(4)]
    for number, batch in enumerate(whole):
        assert all(len(share[number]) == 2 for share in shares)
        assert [shares[k % 4][number][k // 4] for k in range(8)] == batch


def test_short_sides_are_drawn_evenly_image_by_image_and_half_are_mirrored():
    draws = [draw for batch in sampler_of(shorts=(480, 489), repeat=60) for draw in batch]
    assert {draw.long for draw in draws} == {1333} and all(type(draw.short) is int for draw in draws)
    counts = Counter(draw.short for draw in draws)
    assert set(counts) == set(range(480, 490)) and min(counts.values()) > 0.8 * len(draws) / 10
    assert 0.46 < sum(draw.flip for draw in draws) / len(draws) < 0.54 and type(draws[0].flip) is bool
    assert all(len({draw.short for draw in batch}) > 1 for batch in sampler_of(shorts=(1, 1000)))
    assert {draw.short for batch in sampler_of(shorts=(800, 800)) for draw in batch} == {800}
    assert not any(draw.flip for batch in sampler_of(flip=0) for draw in batch)
    assert all(draw.flip for batch in sampler_of(flip=1) for draw in batch)


def test_turned_images_are_drawn_as_the_others_and_stay_in_batches_of_one_group():
    sampler, plain = sampler_of(repeat=60, turns=True), sampler_of(repeat=60)
    drawn = list(sampler)
    assert [[draw[:4] for draw in batch] for batch in drawn] == [[draw[:4] for draw in batch] for batch in plain]
    assert all(len({draw.quarters % 2 for draw in batch}) == 1 for batch in drawn)
    counts = Counter((draw.flip, draw.quarters) for batch in drawn for draw in batch)
    assert len(counts) == 8 and min(counts.values()) > 0.75 * sum(counts.values()) / 8
    assert {draw.quarters for batch in plain for draw in batch} == {0}
    published = sampler_of([(20, 30)] * 3 + [(30, 20)], 2)
    published.set_position(1, 0)
    assert [draw[:4] for batch in published for draw in batch] == [
        (2, 528, 1333, True), (0, 617, 1333, False), (3, 751, 1333, False), (3, 652, 1333, False),
        (0, 660, 1333, False), (1, 770, 1333, True)]
    resumed = sampler_of(repeat=60, turns=True)
    resumed.set_position(0, 5)
    assert list(resumed) == drawn[5:]


def test_a_turned_batch_has_the_padding_of_one_that_is_not(annotations):
    dataset, wide = DetectionDataset(annotations), (0, 2)
    for quarters in range(4):
        batch = collate([dataset[Draw(index, 80, 120, True, quarters)] for index in wide])
        assert batch.images.shape[2:] == ((96, 128) if quarters % 2 == 0 else (128, 96))
        for number, index in enumerate(wide):
            plain = dataset[Draw(index, 80, 120, True)]
            image, boxes = turn(plain.image, plain.boxes, quarters)
            height, width = batch.sizes[number]
            assert torch.equal(batch.images[number, :, :height, :width], image)
            assert torch.equal(batch.boxes[number], boxes) and batch.scales[number] == plain.scale


def test_a_resumed_epoch_goes_on_with_the_batch_after_the_last_one_consumed():
    sampler = sampler_of()
    sampler.set_position(2, 0)
    epoch = list(sampler)
    for step in range(len(epoch) + 1):
        resumed = sampler_of()
        resumed.set_position(2, step)
        assert list(resumed) == epoch[step:]


def test_drawing_ahead_does_not_move_the_position_and_moving_it_does_not_disturb_what_is_drawn():
    sampler = sampler_of()
    epoch, drawn = list(sampler), iter(sampler)
    taken = [next(drawn), next(drawn)]
    assert (sampler.epoch, sampler.step) == (0, 0)
    sampler.set_position(5, 1)
    assert taken + list(drawn) == epoch
