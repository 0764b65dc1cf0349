"""Batches: a sample has its boxes around the objects, the sampler, and that no number of loading processes changes a
batch."""

import multiprocessing
import os
import signal
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common.runtime import UserError
from detection.data import batches
from detection.data.annotations import read_annotations
from detection.data.batches import AspectRatioBatchSampler, DetectionDataset, Draw, check_sizes, collate, loader
from detection.data.records import Annotations, Record
from detection.data.transforms import turn
from tests.support import draw_noise, write_coco

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


def test_sizes_are_read_from_headers(tmp_path):
    annotations = read_annotations(write_coco(tmp_path, [{"bbox": [1, 2, 3, 4]}]))
    content = (tmp_path / "images" / "b.png").read_bytes()
    (tmp_path / "images" / "b.png").write_bytes(content[:100])  # the header is enough
    check_sizes(annotations)
    draw_noise(tmp_path / "images" / "b.png", size=(40, 60))
    with pytest.raises(UserError, match=r"b\.png: is 40 x 60 pixels; expected 60 x 40"):
        check_sizes(annotations)


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
