"""From an image file to the network's input: decoding, the resize, flips, rotation, padding, normalisation.

Boxes are (G, 4), x1 y1 x2 y2, or oriented (G, 5), see detection.geometry.oriented. Coordinates are continuous, so that
mirroring takes x to W - x (of pixels counted by their centres, as some recipes have them, it would be W - 1 - x)."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torchvision import tv_tensors
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tvF

from common.images import ValueRange, decode
from detection.geometry.oriented import regularise

MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # ImageNet's, of R, G, B in 0..255
PAD_MULTIPLE = 32  # sides of a batch are multiples of it, so that the strides to 32 divide them


def decode_rgb(path: str | Path, value_range: ValueRange | None = None) -> tv_tensors.Image:
    """Read an image file as a (3, H, W) uint8 tv_tensors.Image, as `common.images.decode` does; transparency is
    dropped.

    An EXIF orientation is NOT applied: annotations count the pixels as they are stored."""
    return tvF.to_image(decode(path, value_range).convert("RGB"))


def target_size(height: int, width: int, short: int, long: int) -> tuple[int, int]:
    """(height, width) of an image resized with its ratio kept to the largest size whose short side is at most `short`
    and whose long side is at most `long`; rounded half up, as in the published recipes, and at least 1. In pixels."""
    scale = min(long / max(height, width), short / min(height, width))
    return tuple(max(int(side * scale + 0.5), 1) for side in (height, width))


def resize(image: torch.Tensor, boxes: torch.Tensor, size: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Resize bilinearly without antialiasing, as the published recipes do, also when it shrinks.

    image: (3, H, W) uint8. boxes: (G, 4) or (G, 5) float32, in its pixels. size: (h, w). Returns (3, h, w) uint8, and
    the boxes scaled by the true ratio of each axis, w / W and h / H, and clipped to the new image. An oriented box is
    not clipped: its centre is scaled so, both its sides by the root of the product of the two ratios."""
    if boxes.shape[-1] == 5:
        x, y = size[1] / image.shape[-1], size[0] / image.shape[-2]
        side = math.sqrt(x * y)
        return tvF.resize(image, list(size), antialias=False), boxes * boxes.new_tensor([x, y, side, side, 1])
    boxes = tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=image.shape[-2:])
    boxes = tvF.clamp_bounding_boxes(tvF.resize(boxes, list(size)))
    return tvF.resize(image, list(size), antialias=False), boxes.as_subclass(torch.Tensor)


def flip(image: torch.Tensor, boxes: torch.Tensor, direction: str = "horizontal") -> tuple[torch.Tensor, torch.Tensor]:
    """Mirror an image (3, H, W) and its boxes (G, 4) or (G, 5). direction: `horizontal`, left to right; `vertical`;
    `diagonal`, both, half a turn."""
    if direction == "diagonal":
        return flip(*flip(image, boxes, "horizontal"), "vertical")
    axis = ("horizontal", "vertical").index(direction)
    length = image.shape[-1 - axis]
    mirrored = boxes.clone()
    if boxes.shape[-1] == 5:
        mirrored[:, axis] = length - boxes[:, axis]
        mirrored[:, 4] = -boxes[:, 4]
        mirrored = regularise(mirrored)
    else:
        mirrored[:, [axis, axis + 2]] = length - boxes[:, [axis + 2, axis]]
    return image.flip(-1 - axis), mirrored


def rotate(image: torch.Tensor, boxes: torch.Tensor, angle: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Turn an image (3, H, W) uint8 and its oriented boxes (G, 5) about its centre, by `angle` in radians, clockwise as
    theta. The image keeps its size; what comes into it has the mean colour. Returns image, boxes, and which boxes still
    have their centre in the image, (G,) bool."""
    height, width = image.shape[-2:]
    middle = boxes.new_tensor([width / 2, height / 2])
    x, y = (boxes[:, :2] - middle).unbind(1)
    c, s = math.cos(angle), math.sin(angle)
    centres = middle + torch.stack([c * x - s * y, s * x + c * y], dim=1)
    turned = regularise(torch.cat([centres, boxes[:, 2:4], boxes[:, 4:] + angle], dim=1))
    image = tvF.rotate(image, -math.degrees(angle), InterpolationMode.BILINEAR, fill=[round(mean) for mean in MEAN])
    return image, turned, ((centres > 0) & (centres < 2 * middle)).all(dim=1)


def turn(image: torch.Tensor, boxes: torch.Tensor, quarters: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn an image (3, H, W) and its boxes (G, 4) or (G, 5) counter-clockwise by 0 to 3 quarters, by each of which
    (x, y) becomes (y, W - x), and an oriented box exchanges width and height."""
    for _ in range(quarters):
        width = image.shape[2]
        if boxes.shape[-1] == 5:
            x, y, w, h, theta = boxes.unbind(1)
            boxes = torch.stack([y, width - x, h, w, theta], dim=1)
        else:
            x1, y1, x2, y2 = boxes.unbind(1)
            boxes = torch.stack([y1, width - x2, y2, width - x1], dim=1)
        image = image.rot90(dims=(1, 2))
    return image, boxes


def pad_to_batch(images: Sequence[torch.Tensor]) -> tuple[torch.Tensor, list[tuple[int, int]]]:
    """Images of different sizes as one batch, padded at the right and at the bottom.

    images: [(3, h, w) uint8]. Returns ((N, 3, H, W) uint8, [(h, w)]); H and W are the smallest multiples of 32 that
    hold every image."""
    sizes = [tuple(image.shape[-2:]) for image in images]
    height, width = (math.ceil(max(sides) / PAD_MULTIPLE) * PAD_MULTIPLE for sides in zip(*sizes, strict=True))
    batch = torch.zeros((len(images), 3, height, width), dtype=torch.uint8)
    for padded, image, (h, w) in zip(batch, images, sizes, strict=True):
        padded[:, :h, :w] = image
    return batch, sizes


def normalise_colours(images: torch.Tensor) -> torch.Tensor:
    """(N, 3, H, W) uint8 -> float32 on the images' device: (value - mean) / std of each channel."""
    batch = images.float()
    for channel, channel_mean, channel_std in zip(batch.unbind(1), MEAN, STD, strict=True):
        channel.sub_(channel_mean).div_(channel_std)
    return batch


def normalise(images: torch.Tensor, image_sizes: Sequence[tuple[int, int]]) -> torch.Tensor:
    """`normalise_colours`, and 0 in the padding. image_sizes: [(h, w)] of the images without their padding."""
    batch = normalise_colours(images)
    for image, (h, w) in zip(batch, image_sizes, strict=True):
        image[:, h:].zero_()
        image[:, :, w:].zero_()
    return batch


def resize_for_test(image: torch.Tensor, preprocessing: dict[str, Any]) -> tuple[torch.Tensor, tuple[float, float]]:
    """An image as a detector sees it, (3, h, w) uint8, and its size relative to the original, (x, y).

    image: (3, H, W) uint8. preprocessing: of the detector's description."""
    height, width = image.shape[-2:]
    size = target_size(height, width, preprocessing["short"], preprocessing["long"])
    return resize(image, torch.zeros(0, 4), size)[0], (size[1] / width, size[0] / height)
