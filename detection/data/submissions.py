"""Detections as DOTA's server takes them: a file Task1_<class>.txt a class, in a folder or a .zip, with lines

    image score x1 y1 x2 y2 x3 y3 x4 y4

of the image's name without suffix, a score, and four points in pixels of the whole image."""

import math
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from common.dota import corner_points
from common.files import atomic_path
from common.runtime import UserError
from detection.geometry.oriented import corners

PREFIX, SUFFIX = "Task1_", ".txt"


class Detection(NamedTuple):
    """image: its name. score: any finite number. points: ((x, y), ...), four. where: "file:line"."""

    image: str
    score: float
    points: tuple[tuple[float, float], ...]
    where: str


def write_submission(path: Path, detections: Mapping[str, Mapping[str, Any]], classes: Sequence[str]) -> None:
    """Write a .zip with a file of each of `classes`, empty ones included.

    detections: {image name: {"boxes": (M, 5), "scores": (M,), "labels": (M,)}}, oriented boxes in pixels of the whole
    image. Raises UserError where the disk is full."""
    lines: list[list[str]] = [[] for _ in classes]
    for image, found in detections.items():
        points = corners(torch.as_tensor(found["boxes"]).double()).flatten(-2).tolist()  # (M, 8)
        for label, score, own in zip(found["labels"].tolist(), found["scores"].tolist(), points, strict=True):
            lines[label].append(f"{image} {score:.7g} " + " ".join(f"{value:.2f}" for value in own))
    with atomic_path(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, own in zip(classes, lines, strict=True):
            archive.writestr(f"{PREFIX}{name}{SUFFIX}", "".join(line + "\n" for line in own))


def read_submission(path: Path) -> dict[str, list[Detection]]:
    """{class: [Detection]} of a folder or a .zip. Raises UserError naming file and line."""
    found: dict[str, list[Detection]] = {}
    for name, where, content in _files(path):
        if name in found:
            raise UserError(f"{where}: another file is of this class, too; expected one")
        found[name] = _parse(content, where)
    if not found:
        raise UserError(f"{path}: no file {PREFIX}<class>{SUFFIX}; expected a folder or a .zip with one a class")
    return found


def _files(path: Path) -> Iterator[tuple[str, str, bytes]]:
    """(class, human-readable place, content) of each file of a submission, by name."""
    try:
        if path.is_dir():
            for file in sorted(path.glob(f"{PREFIX}*{SUFFIX}")):
                yield file.name[len(PREFIX):-len(SUFFIX)], str(file), file.read_bytes()
            return
        with zipfile.ZipFile(path) as archive:
            for name in sorted(archive.namelist()):
                file = name.rpartition("/")[2]
                if file.startswith(PREFIX) and file.endswith(SUFFIX):
                    yield file[len(PREFIX):-len(SUFFIX)], f"{path}/{name}", archive.read(name)
    except Exception as error:  # encrypted, compressed otherwise, damaged: zipfile and its decompressors raise anything
        raise UserError(f"{path}: could not be read ({getattr(error, 'strerror', None) or error}); expected a folder "
                        "or a .zip of detections") from None


def _parse(content: bytes, where: str) -> list[Detection]:
    """The detections in the content of one file."""
    found = []
    for number, raw in enumerate(content.splitlines(), 1):
        line = raw.decode("utf-8-sig" if number == 1 else "utf-8", errors="replace")
        fields = line.split()
        if not fields:
            continue
        points, score = corner_points(fields[2:]), _finite(fields[1:2])
        if points is None or score is None:
            raise UserError(f"{where}:{number}: expected 'image score x1 y1 x2 y2 x3 y3 x4 y4', found {line[:80]!r}")
        found.append(Detection(fields[0], score, points, f"{where}:{number}"))
    return found


def _finite(fields: Sequence[str]) -> float | None:
    """The finite number in one field, else None."""
    try:
        value = float(*fields)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
