"""Detectors as ONNX files: they agree with the network whatever the size of the images, and predict the same."""

import importlib.util
import json

import onnxruntime
import pytest
import torch

from common.exported import METADATA
from detection import export, predict
from detection.checkpoint import load_detector
from detection.data.transforms import normalise, pad_to_batch
from detection.network.detector import Architecture
from tests.support import draw_blocks, error_line, run_program, run_tool, save_eager_detector

CLASSES = ["ship", "storage tank", "harbor"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return save_eager_detector(tmp_path_factory.mktemp("weights") / "final.pt", CLASSES,
                               Architecture(18, 64, 0), (64, 96))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    draw_blocks(folder / "wide.png", 300, 200, seed=1)
    draw_blocks(folder / "tall.png", 80, 100)
    return folder


@pytest.fixture(scope="module")
def exported(weights, images, tmp_path_factory):
    """(the file, what the program has printed)."""
    folder = tmp_path_factory.mktemp("exported")
    done = run_program("-m", "detection.export", "--weights", weights, images, "--output", folder)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in folder.iterdir()] == ["final.onnx"]
    return folder / "final.onnx", done.stdout


def test_the_file_describes_itself_without_paths(exported):
    path, printed = exported
    assert printed.startswith(f"{path}: ") and "agrees with the network on 2 images: the largest difference" in printed
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    assert (given.name, given.type, given.shape) == ("images", "tensor(uint8)", ["batch", 3, "height", "width"])
    assert [output.name for output in session.get_outputs()] == ["boxes", "scores"]
    description = json.loads(session.get_modelmeta().custom_metadata_map[METADATA])
    assert description["classes"] == CLASSES and description["settings"] == {"lr": 0.01}
    assert b"/home/someone" not in path.read_bytes() and b"detection/network" not in path.read_bytes()


@pytest.mark.parametrize("shape", [(1, 64, 96), (3, 70, 41), (2, 33, 300), (1, 129, 257)])
def test_boxes_and_scores_are_those_of_the_network_for_any_size(exported, weights, shape):
    batch = torch.randint(0, 256, (shape[0], 3, *shape[1:]), dtype=torch.uint8,
                          generator=torch.Generator().manual_seed(0))
    session = onnxruntime.InferenceSession(str(exported[0]), providers=["CPUExecutionProvider"])
    boxes, scores = map(torch.from_numpy, session.run(["boxes", "scores"], {"images": batch.numpy()}))
    padded, sizes = pad_to_batch(list(batch))
    network = load_detector(weights)[0]
    with torch.inference_mode():
        outputs = network(normalise(padded, sizes))
        expected = outputs.boxes(network.anchors(outputs.sizes, torch.device("cpu")))
    torch.testing.assert_close(scores, outputs.scores, rtol=0, atol=1e-5)
    torch.testing.assert_close(boxes, expected, rtol=0, atol=0.01)


def test_predictions_are_those_of_the_checkpoint(exported, weights, images, tmp_path):
    found = []
    for file in (weights, exported[0]):
        more = ("--device", "cpu", "--precision", "fp32", "--output", tmp_path / file.name)
        assert run_tool(predict, "--weights", file, images, "--json", tmp_path / "a.json", *more) == 0
        found.append(json.loads((tmp_path / "a.json").read_text()))
        assert len(list((tmp_path / file.name).iterdir())) == 2
    for expected, row in zip(*found, strict=True):
        assert [one["class"] for one in row["detections"]] == [one["class"] for one in expected["detections"]] != []
        for name, tolerance in (("score", 1e-4), ("box", 0.1)):
            theirs, ours = (torch.tensor([one[name] for one in each["detections"]]) for each in (expected, row))
            torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)


def test_a_file_that_disagrees_is_not_left(exported, weights, images, tmp_path, capsys, monkeypatch):
    content = torch.load(weights, weights_only=True)
    content["model"]["head.classify.bias"] += 0.1
    torch.save(content, tmp_path / "other.pt")
    monkeypatch.setattr(export, "to_onnx", lambda *_: exported[0].read_bytes())
    assert run_tool(export, "--weights", tmp_path / "other.pt", images) == 2
    assert "other.onnx: not written: it disagrees with the network on 2 images" in error_line(capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["other.pt"]


def test_what_cannot_be_exported_or_read_is_one_line(exported, weights, tmp_path, capsys, monkeypatch):
    (tmp_path / "a.png").write_bytes(b"no image")
    assert run_tool(export, "--weights", weights, tmp_path / "a.png") == 2
    assert "a.png: not an image that Pillow can read; give readable images" in error_line(capsys)
    broken = tmp_path / "broken.onnx"
    for content in (exported[0].read_bytes()[:5000], b"", exported[0].read_bytes().replace(b'"gfl"', b'"xyz"')):
        broken.write_bytes(content)
        assert run_tool(predict, "--weights", broken, tmp_path) == 2
        assert "broken.onnx: truncated, damaged, or not a file that detection.export wrote" in error_line(capsys)
    assert run_tool(predict, "--weights", exported[0], tmp_path, "--precision", "bf16") == 2
    assert "an exported file runs on the CPU in fp32 here" in error_line(capsys)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else find_spec(name))
    for script in (export, predict):
        assert run_tool(script, "--weights", exported[0] if script is predict else weights, tmp_path) == 2
        assert "onnxruntime is not installed; pip install -r requirements-export.txt" in error_line(capsys)
