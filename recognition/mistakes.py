"""A picture of the most confident mistakes of a network: confused classes, and labels that may be wrong."""

from pathlib import Path
from typing import Any

import torch

from common.charts import as_label, new_figure, save_figure
from dataset import GROUPS, DatasetInfo, ImageDataset
from recognition.inference import Predictions
from recognition.report import GROUP_COLOURS

COLUMNS = 10  # images of a group at most
CELL_WIDTH, CELL_HEIGHT = 1.2, 1.63  # inches of an image with its captions


def most_confident_mistakes(labels: torch.Tensor, predictions: Predictions, group_of_class: torch.Tensor,
                            count: int = COLUMNS) -> dict[str, list[int]]:
    """{group: indices of its misclassified images}, at most `count`, in descending order of the probability of the
    wrong class, equal ones in the order of the images. A group without mistakes is left out.

    labels: (N,) int64, the true classes, whose groups are the images'. predictions: the Predictions of the N images.
    group_of_class: (classes,) int64, of DatasetInfo."""
    wrong = (predictions.classes != labels).nonzero().flatten()
    wrong = wrong[predictions.probabilities[wrong].argsort(descending=True, stable=True)]
    groups = group_of_class[labels[wrong]]
    chosen = {group: wrong[groups == number][:count].tolist() for number, group in enumerate(GROUPS)}
    return {group: indices for group, indices in chosen.items() if indices}


def draw_mistakes(dataset: ImageDataset, predictions: Predictions, info: DatasetInfo, title: str, path: Path) -> None:
    """The most confident mistakes as a PNG, a row a group; without mistakes the picture says so.

    dataset: the ImageDataset of the Predictions, with the classes and groups of `info`, a DatasetInfo."""
    labels, group_of_class = torch.from_numpy(dataset.labels), info.group_of_class()
    chosen = most_confident_mistakes(labels, predictions, group_of_class)
    wrong = predictions.classes != labels
    figure = new_figure(COLUMNS * CELL_WIDTH + 1, len(chosen) * CELL_HEIGHT + 0.6)
    header = f"{as_label(title, 80)}: {int(wrong.sum())} of {len(labels)} test images misclassified"
    if chosen:
        header += "; those of the highest probability: true class above, predicted class and its probability below"
        rows = figure.subplots(len(chosen), COLUMNS, squeeze=False)
        for cells, (group, indices) in zip(rows, chosen.items(), strict=True):
            in_group = group_of_class[labels] == GROUPS.index(group)
            draw_row(cells, dataset, indices, predictions, info.classes, GROUP_COLOURS[group])
            cells[0].set_ylabel(f"{group}\n{int((wrong & in_group).sum())} of {int(in_group.sum())}", rotation=0,
                                ha="right", va="center", fontsize=10, color=GROUP_COLOURS[group])
    figure.suptitle(header, fontsize=9)
    save_figure(figure, path)


def draw_row(cells: Any, dataset: ImageDataset, indices: list[int], predictions: Predictions, classes: list[str],
             colour: str) -> None:
    """Draw images with captions into the first of the axes `cells`. classes: names in id order."""
    images, labels = dataset.__getitems__(indices)  # (n, 1, H, W) uint8, (n,)
    for cell in cells[len(indices):]:
        cell.axis("off")
    for cell, image, label, index in zip(cells, images, labels.tolist(), indices, strict=False):
        cell.imshow(image[0].numpy(), cmap="gray", vmin=0, vmax=255)
        cell.set(xticks=[], yticks=[])
        cell.set_title(as_label(classes[label], 18), fontsize=7, color=colour, pad=3)
        predicted = as_label(classes[predictions.classes[index]], 18)
        cell.set_xlabel(f"{predicted}\n{100 * predictions.probabilities[index]:.1f} %", fontsize=7, labelpad=3)
