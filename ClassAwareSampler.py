"""The batch samplers of T2FTS.

On every process they draw the same GLOBAL batch, from generators with the same seed, and each process takes its slice;
an epoch is ceil(N / batch) full batches, or several passes of so many; the `state_dict` after any batch is all that a
resumed run needs."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Sampler


class GlobalBatchSampler(Sampler, ABC):
    """The steps of an epoch, and this process's share of each global batch; kinds of samplers differ in `draw`.

    labels: (N,) class ids of the images. batch_size: images of the global batch, a multiple of world_size."""

    def __init__(self, labels: Sequence[int] | np.ndarray, batch_size: int, seed: int, rank: int = 0,
                 world_size: int = 1):
        self.labels = torch.as_tensor(labels, dtype=torch.int64)
        self.batch_size = batch_size
        self.slice = slice(rank, None, world_size)
        self.generator = torch.Generator().manual_seed(seed)
        self.steps_per_pass = self.steps = -(-len(self.labels) // batch_size)
        self.step = 0  # batches drawn in this epoch

    def __len__(self) -> int:
        return self.steps

    def train_at_least(self, steps: int, epochs: int) -> None:
        """Make an epoch as many passes over the images as it takes for `epochs` of them to have so many steps."""
        self.steps = self.steps_per_pass * max(1, -(-steps // (epochs * self.steps_per_pass)))

    def __iter__(self) -> Iterator[list[int]]:
        """Yield this process's share of each remaining batch of the epoch, as a list of image indices."""
        while self.step < self.steps:
            batch = self.draw()
            self.step += 1
            yield batch[self.slice].tolist()
        self.step = 0

    @abstractmethod
    def draw(self) -> torch.Tensor:
        """The next global batch, (batch_size,) int64 image indices."""

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors and numbers, from which `load_state_dict` goes on with the batch after the last one drawn."""
        return {"step": self.step, "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        self.generator.set_state(state["generator"])


class ShuffledBatchSampler(GlobalBatchSampler):
    """Every image once a pass, in random order; the last batch is filled up from the start of the same order."""

    def __init__(self, labels: Sequence[int] | np.ndarray, batch_size: int, seed: int, rank: int = 0,
                 world_size: int = 1):
        super().__init__(labels, batch_size, seed, rank, world_size)
        self.order = torch.empty(0, dtype=torch.int64)  # of the images in this pass

    def draw(self) -> torch.Tensor:
        step = self.step % self.steps_per_pass
        if step == 0:
            self.order = torch.randperm(len(self.labels), generator=self.generator)
        positions = torch.arange(step * self.batch_size, (step + 1) * self.batch_size)
        return self.order[positions % len(self.labels)]

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "order": self.order}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.order = state["order"]


class ClassAwareBatchSampler(GlobalBatchSampler):
    """Classes in a shuffled cycle, and the images of each class in a shuffled cycle of their own: every class is drawn
    equally often, however few images it has."""

    def __init__(self, labels: Sequence[int] | np.ndarray, batch_size: int, seed: int, rank: int = 0,
                 world_size: int = 1):
        super().__init__(labels, batch_size, seed, rank, world_size)
        self.classes, counts = self.labels.unique(return_counts=True)  # classes that have an image; (K,), (K,)
        self.counts = counts
        self.ends = counts.cumsum(0)
        # Image indices, class by class: those of classes[k] at ends[k] - counts[k] .. ends[k].
        self.images_by_class = self.labels.argsort(stable=True)
        # A cycle at its end is shuffled before the next draw from it.
        self.image_positions = counts.clone()
        self.class_cycle = torch.arange(len(self.classes))
        self.class_position = len(self.classes)

    def draw(self) -> torch.Tensor:
        return torch.tensor([self._next_image(self._next_class()) for _ in range(self.batch_size)])

    def _next_class(self) -> int:
        if self.class_position == len(self.class_cycle):
            self.class_cycle = self._shuffled(self.class_cycle)
            self.class_position = 0
        self.class_position += 1
        return int(self.class_cycle[self.class_position - 1])

    def _next_image(self, k: int) -> int:
        end, count = int(self.ends[k]), int(self.counts[k])
        if self.image_positions[k] == count:
            self.images_by_class[end - count:end] = self._shuffled(self.images_by_class[end - count:end])
            self.image_positions[k] = 0
        self.image_positions[k] += 1
        return int(self.images_by_class[end - count + self.image_positions[k] - 1])

    def _shuffled(self, values: torch.Tensor) -> torch.Tensor:
        return values[torch.randperm(len(values), generator=self.generator)]

    def state_dict(self) -> dict[str, Any]:
        # "order" is the key of the images by class in the checkpoints of all versions.
        return {**super().state_dict(), "order": self.images_by_class, "image_positions": self.image_positions,
                "class_cycle": self.class_cycle, "class_position": self.class_position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.images_by_class = state["order"]
        self.image_positions, self.class_cycle = state["image_positions"], state["class_cycle"]
        self.class_position = state["class_position"]


class SelfCalibratedBatchSampler(ClassAwareBatchSampler):
    """Self-calibrated sampling learning: the student practises the classes that it has distilled worst.

    The first batch of an epoch is class-aware. After each step `update` takes the step's distillation loss by class,
    and the next batch is drawn with replacement, an image of class c with probability w_c / n_c (T2FTS, stage 4).

    num_classes: of the data set. momentum: 0 <= m < 1; with 0 only the last batch counts, as in the paper; above 0
    every class keeps a running L_c <- m L_c + (1 - m) L_c(batch)."""

    def __init__(self, labels: Sequence[int] | np.ndarray, batch_size: int, seed: int, rank: int = 0,
                 world_size: int = 1, *, num_classes: int, momentum: float = 0.0):
        super().__init__(labels, batch_size, seed, rank, world_size)
        self.momentum = momentum
        self.class_loss = torch.zeros(num_classes)  # L_c
        self.known = torch.zeros(num_classes, dtype=torch.bool)  # classes whose L_c enters the weights

    def update(self, loss_sums: torch.Tensor, image_counts: torch.Tensor) -> None:
        """Take the losses of the global batch of one step.

        loss_sums: (classes,) sums of MSE(f_t(c)(x), f(x)) over the images of each class. image_counts: (classes,) the
        number of images of each class in the batch."""
        present = image_counts > 0
        batch_loss = loss_sums / image_counts.clamp(min=1)
        if self.momentum:
            running = self.momentum * self.class_loss + (1 - self.momentum) * batch_loss
            self.class_loss[present] = torch.where(self.known, running, batch_loss)[present]
            self.known |= present
        else:
            self.class_loss, self.known = batch_loss, present

    def class_weights(self) -> torch.Tensor:
        """(classes,) w_c, summing to 1 over the classes that have images."""
        weights = calibration_weights(self.class_loss, self.known)
        has_images = torch.zeros_like(weights)
        has_images[self.classes] = 1
        weights = weights * has_images
        return weights / weights.sum()

    def draw(self) -> torch.Tensor:
        if self.step == 0:
            return super().draw()
        # Class c with probability w_c, then one of its n_c images: an image with probability w_c / n_c.
        weights = self.class_weights()[self.classes]
        k = torch.multinomial(weights, self.batch_size, replacement=True, generator=self.generator)
        within = torch.rand(self.batch_size, generator=self.generator, dtype=torch.float64) * self.counts[k]
        return self.images_by_class[self.ends[k] - self.counts[k] + within.long()]

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "class_loss": self.class_loss, "known": self.known}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.class_loss, self.known = state["class_loss"], state["known"]


def calibration_weights(class_loss: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
    """w_c = log(1 + L_c); classes not known get the mean of the known w_c; normalised to sum 1 (T2FTS, stage 4).

    class_loss: (classes,) L_c >= 0. known: (classes,) bool. Where no class is known, or every known class is distilled
    perfectly, all weights are equal."""
    weights = torch.log1p(class_loss)
    mean = weights[known].mean() if known.any() else weights.new_tensor(0.0)
    weights = torch.where(known, weights, mean)
    if weights.sum() <= 0:
        weights = torch.ones_like(weights)
    return weights / weights.sum()
