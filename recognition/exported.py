"""Reading the files of export.py: an ONNX file or a torch.export program as a function from images to logits, and its
description.

Reading a file must not run code, whoever sent it. An ONNX file holds no code. `torch.export.load` runs code of the
program (pickles, compiled libraries, evaluated expressions), so torch is given a copy that holds only the parts of a
program of this project, each of them checked."""

import io
import json
import logging
import re
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from common.exported import METADATA, read_onnx, require_torch
from common.files import unpacked_size
from common.runtime import UserError
from resnet50 import is_description

LogitsFunction = Callable[[torch.Tensor], torch.Tensor]  # images (B, 1, S, S) uint8 -> logits (B, classes) fp32
SUFFIXES = (".onnx", ".pt2")


def read_exported(path: str | Path, suffix: str | None = None) -> tuple[LogitsFunction, dict[str, Any]]:
    """(function from images (B, 1, S, S) uint8 to logits (B, classes) fp32, on the CPU; description) of a file.

    suffix: one of SUFFIXES, for a file whose name does not end in it. Raises UserError for a file that export.py does
    not write."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    read = {".onnx": _read_onnx, ".pt2": _read_program}[suffix or path.suffix.lower()]
    try:
        logits_of, description = read(path)
        _check_that_it_works(logits_of, description)
    except UserError:
        raise
    # A damaged file can raise any exception, here or in the libraries.
    except Exception as error:
        reason = str(error).split("\n")[0][:200] or type(error).__name__
        raise UserError(f"{path}: truncated, damaged, or not a file that export.py wrote ({reason})") from None
    return logits_of, description


def _check_that_it_works(logits_of: LogitsFunction, description: Any) -> None:
    """Raise an exception unless two grey squares give two rows of as many logits as there are class names."""
    if not is_description(description):
        raise ValueError("its description is not one of this project")
    size, classes = description["preprocessing"]["image_size"], description["classes"]
    if logits_of(torch.zeros(2, 1, size, size, dtype=torch.uint8)).shape != (2, len(classes)):
        raise ValueError("its logits do not fit its class names")


def _read_onnx(path: Path) -> tuple[LogitsFunction, Any]:
    run, description = read_onnx(path)
    return lambda images: run(images)[0], description


# ---- torch.export --------------------------------------------------------------------------------------------------

# The files of a program's archive: weights are plain bytes, the example inputs are a pickle, all others are JSON.
RECORDS = re.compile(r"archive/(archive_format|archive_version|byteorder|\.data/(version|serialization_id)|"
                     r"models/model\.json|data/weights/(model_weights_config\.json|weight_\d+)|"
                     r"data/constants/model_constants_config\.json|data/sample_inputs/model\.pt)")
# The operators of a ResNet-50. Any other name would be looked up in the whole of torch, and called.
OPERATORS = {f"torch.ops.aten.{name}" for name in (
    "_assert_tensor_metadata.default", "to.dtype", "div_.Tensor", "sub_.Tensor", "conv2d.default", "relu_.default",
    "max_pool2d.default", "add_.Tensor", "adaptive_avg_pool2d.default", "flatten.using_ints", "linear.default")}
# Some strings of a program are evaluated as Python. Those of this project are names and numbers, the symbol of the
# batch's size, or JSON with the nesting of the arguments; none can call anything.
STRINGS = re.compile(r"""[\w.+]*|Symbol\('s\d+'(, \w+=True)*\)|"""
                     r"""([][{}:, \d]|null|"(type|context|children_spec|null|\[]|builtins\.(tuple|dict))")+""")


def _read_program(path: Path) -> tuple[LogitsFunction, Any]:
    require_torch()
    if unpacked_size(path) > path.stat().st_size:
        raise ValueError("it is compressed, and larger inside than outside")
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    description = json.loads(records.pop(f"archive/extra/{METADATA}"))
    copy = io.BytesIO()
    with zipfile.ZipFile(copy, "w") as archive:
        for name, content in records.items():
            if not RECORDS.fullmatch(name):
                raise ValueError(f"it holds {name[:80]!r}")
            if name.endswith(".json"):
                _check_harmless(json.loads(content.decode()))
            archive.writestr(name, b"" if "/sample_inputs/" in name else content)  # the program runs without them
    copy.seek(0)
    logging.getLogger("torch.export").setLevel(logging.CRITICAL)  # it logs a traceback and then raises
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some releases warn about buffers that they read themselves
        program = torch.export.load(copy).module()

    @torch.inference_mode()
    def logits_of(images):
        return program(images.cpu())

    return logits_of, description


def _check_harmless(value: Any) -> None:
    """Raise ValueError for a part of a program's JSON that could make `torch.export.load`, or the program, run anything
    but the operators of a network."""
    if isinstance(value, dict):
        if value.get("use_pickle"):
            raise ValueError("it holds a pickle")
        if "target" in value and value["target"] not in OPERATORS:
            raise ValueError(f"it calls {str(value['target'])[:80]}")
        value = [*value, *value.values()]
    if isinstance(value, list):
        for part in value:
            _check_harmless(part)
    elif isinstance(value, str) and not STRINGS.fullmatch(value):
        raise ValueError(f"it holds {value[:80]!r}")
