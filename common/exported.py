"""Networks as files that other programs run: a torch.export program, and ONNX with a description in its metadata."""

import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from common.runtime import UserError

METADATA = "description.json"  # a file in a program; a key of an ONNX file's metadata
RunFunction = Callable[[torch.Tensor], list[torch.Tensor]]  # images -> the outputs of the file


def require_packages(*names: str) -> None:
    """Raise UserError for the first package that is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"the package {name} is not installed; pip install -r requirements-export.txt")


def require_torch() -> None:
    """Raise UserError for a torch that cannot write a program without pickles in it."""
    if torch.__version__ < (2, 9):  # type: ignore[operator]  # a version compares itself with tuples
        raise UserError(f"this is torch {torch.__version__}, and exported programs need torch 2.9 or later; "
                        "pip install --upgrade torch torchvision")


def trace(module: torch.nn.Module, images: torch.Tensor, dynamic: Mapping[int, Any],
          **options: Any) -> torch.export.ExportedProgram:
    """The torch.export program of a module in eval mode whose one input is `images`, without references to the source.

    images: an example. dynamic: {dimension: torch.export.Dim} of those that may differ from the example's; a length of
    1 there could be taken for a constant. options: for torch.export.export."""
    program = torch.export.export(module, (images,), dynamic_shapes={"images": dict(dynamic)}, **options)
    for node in program.graph.nodes:  # the rest refers to the source, with paths of this machine
        node.meta = {key: value for key, value in node.meta.items() if key == "val"}
    return program


def onnx_bytes(program: torch.export.ExportedProgram, dynamic: Mapping[int, Any], outputs: Sequence[str],
               description: str) -> bytes:
    """The content of an ONNX file. dynamic: as of `trace`. outputs: their names. description: kept as METADATA."""
    names = {"images": {number: dimension.__name__ for number, dimension in dynamic.items()}}
    exported = torch.onnx.export(program, dynamo=True, verbose=False, input_names=["images"],
                                 output_names=list(outputs), dynamic_shapes=names)
    assert exported is not None
    for node in exported.model.graph:
        node.metadata_props.clear()  # as in `trace`
    exported.model.metadata_props[METADATA] = description
    return exported.model_proto.SerializeToString()


def read_onnx(path: str | Path) -> tuple[RunFunction, Any]:
    """(function from images to the outputs, on the CPU; description) of an ONNX file. Raises exceptions of any kind for
    what is none."""
    require_packages("onnxruntime")
    import onnxruntime  # type: ignore[import-untyped]  # an optional package

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4  # else it prints its own report of a damaged file
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    description = json.loads(session.get_modelmeta().custom_metadata_map[METADATA])

    def run(images: torch.Tensor) -> list[torch.Tensor]:
        return [torch.from_numpy(output) for output in session.run(None, {"images": images.cpu().numpy()})]

    return run, description
