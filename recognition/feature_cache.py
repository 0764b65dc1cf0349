"""The teachers' features of every training image, kept on disk: teachers are frozen and an image is augmented by a flip
alone, or by the 8 symmetries of a square, so it has 2 or 8 feature maps for each of its teachers, which are computed
once and not in every epoch."""

import hashlib
import math
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from common.files import atomic_path, sha256_of
from common.image_cache import build_once
from common.runtime import UserError, autocast, max_over_processes, rank, say
from dataset import network_input
from recognition.stage import cache_folder

FORMAT = 1  # part of the cache's key: raise it when teachers or the layout of the file change
CHUNK = 16  # images of a forward pass through the teachers


class FeatureCache:
    """Layer3 features of all training images in their `symmetries`, as one memory-mapped array of 16-bit numbers.

    array: (images, 2 or 8, teachers, H/16, W/16, 1024). names: of the targets, as returned by `Stage.targets`.
    dtype: bfloat16 for training in bf16, which loses nothing; float16 for fp32, which keeps 11 bits."""

    def __init__(self, file: Path, names: tuple[str, ...], dtype: torch.dtype):
        self.array = np.load(file, mmap_mode="r")
        self.names = names
        self.dtype = dtype

    def read(self, indices: list[int], flip: torch.Tensor, turns: torch.Tensor) -> dict[str, torch.Tensor]:
        """{name: (B, 1024, H/16, W/16)} on the CPU, of images given by their indices in the training data.

        indices: list of B. flip, turns: (B,) bool and int64 on the CPU, as `network_input` takes them."""
        features = torch.from_numpy(self.array[indices, (2 * turns + flip).numpy()]).view(self.dtype)
        return {name: features[:, number].contiguous().permute(0, 3, 1, 2) for number, name in enumerate(self.names)}


def open_feature_cache(stage, settings, data, teachers, weights, device, precision):
    """The FeatureCache of a stage, built if it does not exist; None where `settings.feature_cache` (GB) is 0 or too
    small.

    teachers: {name: frozen network}. weights: {name: file}. Raises UserError for features beyond the range of 16 bits,
    or a full disk."""
    if not settings.feature_cache or not teachers:
        return None
    dtype = torch.bfloat16 if precision == "bf16" else torch.float16
    compute = partial(features_of, stage, data, teachers, settings.augment, device, precision)
    names, first = compute([0])
    shape = (len(data.train), *first.shape[1:])
    needed = dtype.itemsize * math.prod(shape)
    folder = cache_folder(data.info, settings)
    file = folder / f"features_{stage.name}_{cache_key(data, weights, dtype, settings)}.npy"
    older = sum(other.stat().st_size for other in folder.glob(f"features_{stage.name}_*.npy"))  # to be replaced
    room = min(settings.feature_cache * 1e9, shutil.disk_usage(folder).free + older)
    # All processes make the same decision, before one of them begins to fill the disk.
    if max_over_processes(int(needed > room and not file.exists()), device):
        say(f"note: the teachers' features of {len(data.train)} images need {needed / 1e9:.3g} GB; --feature-cache and "
            f"the disk leave {room / 1e9:.3g}; the teachers run at every step instead")
        return None
    build_once(file, f"features_{stage.name}_*.npy", lambda: build(file, shape, compute, dtype))
    say(f"teachers' features: {file}, {needed / 1e9:.3g} GB")
    return FeatureCache(file, names, dtype)


def cache_key(data, weights, dtype, settings):
    """16 hexadecimal digits that change with the teachers and their batch norm, the images, their order and classes,
    and the precision."""
    digest = hashlib.sha256(f"{FORMAT} {dtype} {data.train.cache.key} {settings.teacher_batch_norm}".encode())
    if settings.augment == "dihedral":
        digest.update(b"dihedral")
    if settings.teacher_batch_norm == "recalibrated":  # on images that the seed chooses
        digest.update(str(settings.seed).encode())
    for path in weights.values():
        digest.update(sha256_of(path).encode())
    digest.update(data.train.rows.tobytes() + data.train.labels.tobytes())
    digest.update(data.info.group_of_class().numpy().tobytes())
    return digest.hexdigest()[:16]


def symmetries(augment: str) -> list[tuple[bool, int]]:
    """[(mirrored, quarter turns)] that --augment draws from; (flip, turns) is at 2 * turns + flip."""
    return [(flip, turns) for turns in range(4 if augment == "dihedral" else 1) for flip in (False, True)]


@torch.inference_mode()
def features_of(stage, data, teachers, augment, device, precision, indices):
    """The features of training images in all `symmetries`: the names of the targets, and
    (B, 2 or 8, teachers, H/16, W/16, 1024)."""
    images, labels = data.train.__getitems__(indices)
    images, groups, features = images.to(device), data.info.group_of_class()[labels], []
    each = torch.ones(len(labels), dtype=torch.int64, device=device)
    for flip, turns in symmetries(augment):
        with autocast(device, precision):
            pixels = network_input(images, each.bool() & flip, each * turns)
            targets = stage.targets(teachers, pixels, groups, whole_batch=False)
        features.append(torch.stack([target.permute(0, 2, 3, 1) for target in targets.values()], dim=1))
    return tuple(targets), torch.stack(features, dim=1)


def build(file: Path, shape: tuple[int, ...], compute: Callable[[list[int]], tuple[tuple[str, ...], torch.Tensor]],
          dtype: torch.dtype) -> None:
    """Write the array of FeatureCache, atomically. compute: `features_of` a list of indices."""
    chunks = [range(start, min(start + CHUNK, shape[0])) for start in range(0, shape[0], CHUNK)]
    with atomic_path(file) as temporary, open(temporary, "wb") as whole:
        np.lib.format.write_array_header_1_0(whole, {"descr": "<i2", "fortran_order": False, "shape": shape})
        for chunk in tqdm(chunks, desc="teachers' features", unit="batch", disable=rank() > 0 or None):
            features = compute(list(chunk))[1].to(dtype)
            if not features.isfinite().all():
                raise UserError(f"{file}: a teacher's features do not fit into {dtype}; train without --feature-cache")
            whole.write(features.cpu().view(torch.int16).numpy().tobytes())
