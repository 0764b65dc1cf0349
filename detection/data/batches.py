"""Batches of images with their boxes. All that is random in a batch is drawn by the sampler, from the seed and the
epoch alone: the batches of a run depend neither on its loading processes nor on where it was interrupted."""

import signal
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from common.images import ValueRange, image_size, unreadable
from common.runtime import UserError
from detection.data.records import Annotations, Record
from detection.data.transforms import decode_rgb, flip, pad_to_batch, resize, target_size, turn


class Draw(NamedTuple):
    """An image to load. index: of its record. short, long: the limits of its sides in pixels, see
    `transforms.target_size`. flip: whether to mirror it. quarters: turns that follow, see `transforms.turn`."""

    index: int
    short: int
    long: int
    flip: bool
    quarters: int = 0


class Sample(NamedTuple):
    """An image as the network sees it. image: (3, h, w) uint8. boxes: (G, 4) float32, x1 y1 x2 y2 in its pixels.
    labels: (G,) int64. index: of its record. scale: (w / width, h / height), its size, before it was turned, to that of
    the file."""

    image: torch.Tensor
    boxes: torch.Tensor
    labels: torch.Tensor
    index: int
    scale: tuple[float, float]


class Batch(NamedTuple):
    """images: (N, 3, H, W) uint8, padded. boxes: [(G, 4) float32]. labels: [(G,) int64]. sizes: [(h, w)] of the images
    without padding. indices, scales: as in Sample."""

    images: torch.Tensor
    boxes: list[torch.Tensor]
    labels: list[torch.Tensor]
    sizes: list[tuple[int, int]]
    indices: list[int]
    scales: list[tuple[float, float]]


# ---- images ----------------------------------------------------------------------------------------------------------


class DetectionDataset(Dataset):
    """The images of some `annotations.Annotations`, each as a Draw asks for it. value_range: as of
    `common.images.decode`."""

    def __init__(self, annotations: Annotations, value_range: ValueRange | None = None):
        self.annotations, self.value_range = annotations, value_range

    def __len__(self) -> int:
        return len(self.annotations.records)

    def __getitem__(self, draw: Draw) -> Sample:
        """The Sample of a Draw. Raises UserError for an image that cannot be read or has another size than its
        annotation says."""
        record = self.annotations.records[draw.index]
        size = target_size(record.height, record.width, draw.short, draw.long)
        image, boxes = resize(read_image(record, self.value_range), torch.tensor(record.boxes), size)
        if draw.flip:
            image, boxes = flip(image, boxes)
        image, boxes = turn(image, boxes, draw.quarters)
        return Sample(image, boxes, torch.tensor(record.labels), draw.index,
                      (size[1] / record.width, size[0] / record.height))

    def __getitems__(self, draws: Sequence[Draw]) -> list[Sample] | UserError:
        """The Samples of a batch, or the UserError as a value: raised in a loading process, it would reach the user
        wrapped in that process's traceback."""
        try:
            return [self[draw] for draw in draws]
        except UserError as error:
            return error


def read_image(record: Record, value_range: ValueRange | None = None) -> torch.Tensor:
    """The image of an `annotations.Record`, (3, height, width) uint8. Raises UserError as DetectionDataset does."""
    try:
        image = decode_rgb(record.path, value_range)
    # A damaged file can make a decoder raise anything; whatever it is, this image is the one to name.
    except Exception as error:
        raise UserError(f"{record.path}: {unreadable(error)}") from None
    _check_size(record, image.shape[2], image.shape[1])
    return image


def check_sizes(annotations: Annotations) -> None:
    """Raise UserError for an image whose header cannot be read or states another size than its annotation. Some 0.1 ms
    an image."""
    for record in annotations.records:
        _check_size(record, *image_size(record.path))


def _check_size(record: Record, width: int, height: int) -> None:
    if (width, height) != (record.width, record.height):
        raise UserError(f"{record.path}: is {width} x {height} pixels; expected {record.width} x {record.height}, as "
                        "its annotation says: its boxes belong to another version of the image")


def collate(samples: Sequence[Sample]) -> Batch:
    """[Sample] -> Batch."""
    images, sizes = pad_to_batch([sample.image for sample in samples])
    return Batch(images, [sample.boxes for sample in samples], [sample.labels for sample in samples], sizes,
                 [sample.index for sample in samples], [sample.scale for sample in samples])


# ---- which images ----------------------------------------------------------------------------------------------------


class AspectRatioBatchSampler(Sampler):
    """Every image once an epoch (`repeat` times) in random order, in batches of wide images (w >= h) and of tall ones,
    which need little padding. A group's last batch is filled up from the start of the group's order.

    shapes: [(height, width)] of the images. batch_size: images of the global batch, a multiple of world_size; process
    `rank` takes every world_size-th of them. shorts: (lo, hi); each image's short side is drawn evenly from lo..hi,
    both included. long: limit of the long side. flip: probability of mirroring an image. turns: whether images are
    turned, too, by any number of quarters: all images of a batch by 0 or 2, or all by 1 or 3, so that they remain all
    wide or all tall.

    Iterating yields the batches of `epoch` that are left after its first `step`, as lists of Draw, and changes neither:
    a loader draws ahead of the training, which alone knows how many batches it has consumed. It calls `set_position`
    before each epoch."""

    def __init__(self, shapes: Sequence[tuple[int, int]], batch_size: int, seed: int, rank: int, world_size: int,
                 shorts: tuple[int, int], long: int, flip: float, repeat: int = 1, turns: bool = False):
        heights, widths = np.array(shapes, dtype=np.int64).reshape(-1, 2).T
        self.wide = np.tile(widths >= heights, repeat)  # (N * repeat,)
        self.count = len(heights)
        self.batch_size, self.seed = batch_size, seed
        self.slice = slice(rank, None, world_size)
        self.shorts, self.long, self.flip, self.turns = shorts, long, flip, turns
        self.epoch, self.step = 0, 0

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        return sum(-(-int(size) // self.batch_size) for size in (self.wide.sum(), (~self.wide).sum()))

    def __iter__(self) -> Iterator[list[Draw]]:
        return self._draws(self.epoch, self.step)

    def _draws(self, epoch: int, step: int) -> Iterator[list[Draw]]:
        generator = np.random.default_rng((self.seed, epoch))
        order = generator.permutation(len(self.wide))
        batches = np.concatenate([self._fill(order[self.wide[order] == wide]) for wide in (True, False)])
        batches = batches[generator.permutation(len(batches))] % self.count  # (batches, batch_size)
        shorts = generator.integers(self.shorts[0], self.shorts[1] + 1, batches.shape)
        flips = generator.random(batches.shape) < self.flip
        quarters = np.zeros(batches.shape, dtype=np.int64)
        if self.turns:
            quarters = generator.integers(0, 2, (len(batches), 1)) + 2 * generator.integers(0, 2, batches.shape)
        for drawn in list(zip(batches, shorts, flips, quarters, strict=True))[step:]:
            own = (values[self.slice].tolist() for values in drawn)
            yield [Draw(image, limit, self.long, mirrored, turned)
                   for image, limit, mirrored, turned in zip(*own, strict=True)]

    def _fill(self, group: np.ndarray) -> np.ndarray:
        """(n,) -> (ceil(n / batch_size), batch_size), what is missing taken from the start again."""
        whole = -(-len(group) // self.batch_size) * self.batch_size
        return np.resize(group, whole).reshape(-1, self.batch_size)

    def set_position(self, epoch: int, step: int) -> None:
        """Go on with batch `step` of `epoch`, both counted from 0."""
        self.epoch, self.step = epoch, step


def test_draws(annotations: Annotations, short: int, long: int) -> list[Draw]:
    """[Draw] of every image in order, none mirrored."""
    return [Draw(index, short, long, False) for index in range(len(annotations.records))]


# ---- loading ---------------------------------------------------------------------------------------------------------


def loader(dataset: DetectionDataset, batch_sampler: Iterable[list[Draw]], workers: int,
           device: torch.device | str) -> DataLoader:
    """A DataLoader of Batches. batch_sampler: an iterable of lists of Draw. workers: processes that load, 0 for this
    one. device: where the batches will go. Iterating raises UserError for an image that cannot be read."""
    return _Loader(dataset, batch_sampler=batch_sampler, num_workers=workers, collate_fn=_collate_or_error,
                   worker_init_fn=_begin_worker, pin_memory=torch.device(device).type == "cuda")


def _collate_or_error(samples: Sequence[Sample] | UserError) -> Batch | UserError:
    return samples if isinstance(samples, UserError) else collate(samples)


def _begin_worker(_: int) -> None:
    """Leave signals to the main process, which finishes its step with the batches of this one, and then ends it."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


class _Loader(DataLoader):
    """Raises here the error that a loading process has returned."""

    def __iter__(self) -> Iterator[Batch]:
        try:
            for batch in super().__iter__():
                if isinstance(batch, UserError):
                    raise batch
                yield batch
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise UserError("a loading process was killed, probably for lack of memory; give fewer workers") from None
