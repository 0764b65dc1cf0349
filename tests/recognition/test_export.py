"""Exported and published files: what is in them, read with tools of others; that they agree; and files that lie."""

import hashlib
import importlib.util
import io
import json
import os
import re
import zipfile

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from PIL import Image
from torch import nn

import export
import predict
from common.files import sha256_of
from common.images import decode_squares, find_images
from dataset import network_input
from recognition.inference import batch_size, logits_function
from resnet50 import ResNet50, read_weights
from tests.support import PROJECT, TINY_GROUPS, authors_state, error_line, run_program
from tests.support import run_tool as run

SUFFIXES = {"onnx": ".onnx", "program": ".pt2"}


@pytest.fixture(scope="module")
def images(tiny):
    """(N, 1, 32, 32) uint8: the first of the tiny images, as predict.py reads them."""
    decoded = decode_squares((find_images([tiny / "images"])[:20], 32, None))
    return torch.stack([torch.from_numpy(image.copy()) for image, _ in decoded]).unsqueeze(1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, images):
    """(folder with best.pt and last.pt as the engine writes them, network): random weights, but with batch-norm
    statistics of the images and logits that tell them apart."""
    torch.manual_seed(0)
    network = ResNet50(6).train()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # a plain mean over what it sees
            nn.init.uniform_(module.weight, 0.5, 1.5)
    for block in (block for layer in (1, 2, 3, 4) for block in network.get_submodule(f"layer{layer}")):
        nn.init.constant_(block.bn3.weight, 0.2)  # else each block would multiply the rounding of those before
    nn.init.normal_(network.fc.weight, std=0.2)
    with torch.no_grad():
        network(network_input(images))
    network.eval().to(memory_format=torch.channels_last)
    description = {
        "stage": "student", "dataset": "tiny", "classes": ["a, b", "ä", "c", "d", "e", "f"], "groups": TINY_GROUPS,
        "preprocessing": {"channels": 1, "image_size": 32, "resize": "bicubic", "mean": 0.5, "std": 0.5,
                          "value_range": [0, 2040]},
        "selected_on": "val", "epoch": 2, "accuracy": 0.5,
        "settings": {"stage": "student", "init": "/home/someone/best.pt", "t1": "/home/someone/t1.pt", "lr": 0.1}}
    folder = tmp_path_factory.mktemp("trained")
    torch.save({"model": network.state_dict(), "description": description}, folder / "best.pt")
    torch.save({"model": network.state_dict(), "optimizer": {"state": {}}, "sampler": {}, "flips": torch.zeros(9),
                "epoch": 2, "description": description}, folder / "last.pt")
    return folder, network


@pytest.fixture(scope="module")
def files(trained, tiny, tmp_path_factory):
    """{"onnx": (path, finished process), "program": ...}, each in a folder of its own."""
    made = {}
    for form, suffix in SUFFIXES.items():
        folder = tmp_path_factory.mktemp(form)
        flags = ("--weights", trained[0] / "best.pt", "--output", folder)
        made[form] = folder / f"best{suffix}", run_program("export.py", form, *flags, tiny / "images")
    return made


# ---- what is exported ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", SUFFIXES)
def test_one_file_is_left_that_agrees(files, form):
    path, done = files[form]
    assert done.returncode == 0 and done.stderr == ""
    assert os.listdir(path.parent) == [path.name]
    said = re.fullmatch(rf"{path}: 9\d\.\d MB; agrees with the network on 64 images in batches of 1, 2, 13, 16: the "
                        r"largest difference is (\S+) of the largest logit \(limit 1e-04\), .*\n", done.stdout)
    assert said, done.stdout
    assert float(said[1]) < 1e-5


@pytest.mark.parametrize("form", SUFFIXES)
@pytest.mark.parametrize("count", [1, 3, 20])
def test_the_logits_are_those_of_the_network_for_any_batch(files, trained, images, form, count):
    """By the tools that a user would have: nothing of this project reads the file."""
    if form == "onnx":
        session = onnxruntime.InferenceSession(files[form][0], providers=["CPUExecutionProvider"])
        found = torch.from_numpy(session.run(["logits"], {"images": images[:count].numpy()})[0])
    else:
        with torch.no_grad():
            found = torch.export.load(files[form][0]).module()(images[:count])
    with torch.no_grad():
        expected, _ = trained[1](images[:count].float() / 127.5 - 1)
    assert found.dtype == torch.float32 and found.shape == (count, 6)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4)


def metadata(path):
    if path.suffix == ".onnx":
        return {entry.key: json.loads(entry.value) for entry in onnx.load(path).metadata_props}
    with zipfile.ZipFile(path) as archive:
        return {"description.json": json.loads(archive.read("archive/extra/description.json"))}


@pytest.mark.parametrize("form", SUFFIXES)
def test_the_file_says_what_it_is_but_no_path_of_this_machine(files, trained, form):
    path = files[form][0]
    description = metadata(path)["description.json"]
    original = torch.load(trained[0] / "best.pt", weights_only=True)["description"]
    for key in ("stage", "dataset", "classes", "groups", "preprocessing", "selected_on", "epoch", "accuracy"):
        assert description[key] == original[key]
    assert description["settings"] == {"stage": "student", "lr": 0.1}
    assert description["weights_sha256"] == sha256_of(trained[0] / "best.pt")
    assert "uint8 (batch, 1, 32, 32)" in description["input"]
    for place in (str(PROJECT), str(trained[0]), "/home/someone", "site-packages"):
        assert place.encode() not in path.read_bytes()


def test_the_onnx_file_is_whole_and_its_batch_has_a_name(files):
    model = onnx.load(files["onnx"][0], load_external_data=False)
    onnx.checker.check_model(model)
    assert not any(tensor.data_location == TensorProto.EXTERNAL for tensor in model.graph.initializer)
    (given,), (result,) = model.graph.input, model.graph.output
    assert given.name == "images" and given.type.tensor_type.elem_type == TensorProto.UINT8
    assert [dim.dim_param or dim.dim_value for dim in given.type.tensor_type.shape.dim] == ["batch", 1, 32, 32]
    assert result.name == "logits"
    assert [dim.dim_param or dim.dim_value for dim in result.type.tensor_type.shape.dim] == ["batch", 6]


def test_predictions_of_all_forms_are_the_same(files, trained, tiny, tmp_path, capfd):
    rows, output = {}, tmp_path / "predictions.json"
    flags = (*sorted((tiny / "images").glob("test_*")), "--top", 6, "--precision", "fp32", "--json", output)
    for weights in (trained[0] / "best.pt", files["program"][0], files["onnx"][0]):
        assert run(predict, "--weights", weights, *flags) == 0
        assert capfd.readouterr().err == ""
        rows[weights.suffix] = json.loads(output.read_text())
    assert len({row["predictions"][0]["class"] for row in rows[".pt"]}) > 2
    for suffix in (".onnx", ".pt2"):
        for ours, theirs in zip(rows[suffix], rows[".pt"], strict=True):
            assert ours["path"] == theirs["path"]
            for our, their in zip(ours["predictions"], theirs["predictions"], strict=True):
                assert our["class"] == their["class"]
                assert our["probability"] == pytest.approx(their["probability"], abs=1e-4)


@pytest.mark.parametrize("form", ["best.pt", *SUFFIXES])
def test_images_of_more_bits_are_scaled_as_in_training(files, trained, tiny, tmp_path, form):
    rows, output = {}, tmp_path / "predictions.json"
    with Image.open(tiny / "images" / "train_2_0.png") as image:
        Image.fromarray(np.asarray(image).astype(np.uint16) * 8).save(tmp_path / "11bits.png")  # 255 becomes 2040
    weights = trained[0] / form if form == "best.pt" else files[form][0]
    for path, flags in ((tiny / "images" / "train_2_0.png", ()), (tmp_path / "11bits.png", ()),
                        (tmp_path / "11bits.png", ("--value-range", "0,65535"))):
        assert run(predict, "--weights", weights, path, "--json", output, "--device", "cpu", "--precision", "fp32",
                   *flags) == 0
        rows[path.name, flags] = json.loads(output.read_text())[0]["predictions"]
    eight, eleven, dark = rows.values()
    assert eight == eleven != dark


def test_released_weights_are_exported_with_the_names_of_a_data_set(tiny, tmp_path):
    torch.save(authors_state(6), tmp_path / "stuweight_29")
    assert run(export, "program", "--weights", tmp_path / "stuweight_29", "--data-root", tiny, "--image-size", 32,
               tiny / "images" / "test_0_1.png") == 0
    description = metadata(tmp_path / "stuweight_29.pt2")["description.json"]
    assert description["dataset"] == "tiny" and description["classes"] == list("abcdef")
    assert description["groups"] == TINY_GROUPS and description["preprocessing"]["image_size"] == 32
    assert description["stage"] == description["selected_on"] == "unknown"


# ---- the check -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", SUFFIXES)
def test_a_file_that_disagrees_is_not_left(trained, tiny, tmp_path, capsys, monkeypatch, form):
    def fold_wrongly(network):
        folded = fold_batch_norm(network)
        folded.layer2[1].conv2.bias.data[3] += 1
        return folded

    fold_batch_norm = export.fold_batch_norm
    monkeypatch.setattr(export, "fold_batch_norm", fold_wrongly)
    assert run(export, form, "--weights", trained[0] / "best.pt", "--output", tmp_path / "out", tiny / "images") == 2
    error = error_line(capsys)
    assert re.search(rf"best{SUFFIXES[form]}: not written: it disagrees with the network on 64 images", error)
    assert os.listdir(tmp_path / "out") == []


def compare_rows(expected, found):
    """export.compare over made-up logits, one row an image."""
    expected, found = torch.tensor(expected), torch.tensor(found)
    row_of = torch.arange(len(expected), dtype=torch.uint8).view(-1, 1, 1, 1)
    return export.compare(lambda images: (expected[row_numbers(images)], None),
                          lambda images: found[row_numbers(images.float() / 127.5 - 1)], row_of, "best.onnx")


def row_numbers(images):
    return ((images.flatten() + 1) * 127.5).round().long()


def test_of_two_classes_as_good_as_equal_either_may_win():
    assert "agrees" in compare_rows([[9.0, 1.0], [5.0, 5.0001]], [[9.0, 1.0], [5.0001, 5.0]])
    with pytest.raises(export.UserError, match=r"difference is 3\.3e-05 .*; another class for 0"):
        monkey_limit(1e-5, compare_rows, [[9.0, 1.0]], [[9.0003, 1.0]])
    with pytest.raises(export.UserError, match="another class for 1"):
        compare_rows([[9.0, 1.0], [5.0, 6.0], [2.0, 0.0]], [[9.0, 1.0], [6.0, 5.0], [2.0, 0.0]])


def monkey_limit(limit, function, *arguments):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "LIMIT", limit)
        return function(*arguments)


def test_logits_that_are_no_numbers_do_not_agree():
    with pytest.raises(export.UserError, match="difference is nan"):
        compare_rows([[9.0, 1.0]], [[float("nan"), 1.0]])


@pytest.mark.parametrize("count, sizes", [(1, [1, 2]), (2, [1, 2, 3]), (3, [1, 2]), (20, [1, 2, 16, 1]),
                                          (64, [1, 2, 16, 16, 16, 13])])
def test_every_image_is_compared_in_batches_of_several_sizes(count, sizes):
    parts = export.batches(torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1))
    assert [len(part) for part in parts] == sizes
    assert set(torch.cat(parts).flatten().tolist()) == set(range(count))


def test_an_image_that_cannot_be_read_is_named(trained, tiny, tmp_path, capsys):
    (tmp_path / "broken.png").write_bytes(b"not an image")
    assert run(export, "program", "--weights", trained[0] / "best.pt", "--output", tmp_path / "out",
               tiny / "images" / "test_0_1.png", tmp_path / "broken.png") == 2
    assert re.search(r"broken\.png: not an image that Pillow can read; give readable images", error_line(capsys))
    assert not (tmp_path / "out").exists()


# ---- publishing ----------------------------------------------------------------------------------------------------


def test_a_published_checkpoint_is_named_after_its_bytes(trained, tmp_path, capsys):
    for folder, source in (("first", "best.pt"), ("second", "best.pt"), ("third", "last.pt")):
        assert run(export, "publish", "--weights", trained[0] / source, "--output", tmp_path / folder) == 0
    said = capsys.readouterr().out.splitlines()
    (best,), (again,), (last,) = ((tmp_path / folder).iterdir() for folder in ("first", "second", "third"))
    digest = hashlib.sha256(best.read_bytes()).hexdigest()
    assert best.name == again.name == f"best-{digest[:8]}.pt" and last.name == f"last-{digest[:8]}.pt"
    assert said[0].startswith(f"{best}: ") and said[0].endswith(f"SHA-256 {digest}")
    assert best.read_bytes() == last.read_bytes()

    content = torch.load(best, weights_only=True)
    assert set(content) == {"model", "description"} and b"/home/someone" not in best.read_bytes()
    assert all(torch.equal(value, content["model"][name]) for name, value in trained[1].state_dict().items())
    _, description = read_weights(best)
    assert description["classes"][1] == "ä" and description["settings"] == {"stage": "student", "lr": 0.1}


def test_released_weights_are_published_in_the_names_of_this_project(tmp_path, capsys):
    torch.save(authors_state(23, "module."), tmp_path / "baselinestuweight_alpha_29")
    assert run(export, "publish", "--weights", tmp_path / "baselinestuweight_alpha_29") == 0
    assert "taken for FGSC-23, as it has 23 classes" in capsys.readouterr().err
    (published,) = tmp_path.glob("baselinestuweight_alpha_29-????????.pt")
    state, description = read_weights(published)
    assert set(state) == set(ResNet50(23).state_dict())
    assert torch.equal(state["conv1.weight"], authors_state(23)["conv2.weight"])
    assert description["dataset"] == "FGSC-23" and description["classes"][11] == "medical ship"
    assert description["preprocessing"]["image_size"] == 224 and description["groups"]["head"] == [0, 2, 4, 6, 17]


def test_weights_of_unknown_classes_are_published_with_a_data_set_only(tmp_path, tiny, capsys):
    torch.save(authors_state(6), tmp_path / "w.pt")
    assert run(export, "publish", "--weights", tmp_path / "w.pt") == 2
    assert "holds no class names; give the data set it was trained on with --data-root" in error_line(capsys)
    assert run(export, "publish", "--weights", tmp_path / "w.pt", "--data-root", tiny) == 0
    (published,) = tmp_path.glob("w-????????.pt")
    assert read_weights(published)[1]["classes"] == list("abcdef")


# ---- files that are damaged or lie ---------------------------------------------------------------------------------


@pytest.mark.parametrize("form", SUFFIXES)
@pytest.mark.parametrize("damage", [
    lambda content: b"", lambda content: os.urandom(5000), lambda content: content[:2000],
    lambda content: content[:len(content) // 2], lambda content: content[5000:]])
def test_a_damaged_file_is_one_error(files, tiny, tmp_path, capfd, form, damage):
    path = tmp_path / f"damaged{SUFFIXES[form]}"
    path.write_bytes(damage(files[form][0].read_bytes()))
    assert run(predict, "--weights", path, tiny / "images") == 2
    assert f"{path}: truncated, damaged, or not a file that export.py wrote" in error_line(capfd)


def test_a_flipped_bit_in_a_program_is_noticed(files, tiny, tmp_path, capsys):
    content = bytearray(files["program"][0].read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "best.pt2").write_bytes(content)
    assert run(predict, "--weights", tmp_path / "best.pt2", tiny / "images") == 2
    assert "Bad CRC-32" in error_line(capsys)


def test_an_onnx_file_of_others_is_refused(tiny, tmp_path, capsys):
    shape = ["batch", 1, 32, 32]
    model = helper.make_model(helper.make_graph(
        [helper.make_node("Identity", ["images"], ["logits"])], "other",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, shape)],
        [helper.make_tensor_value_info("logits", TensorProto.UINT8, shape)]), ir_version=8,
        opset_imports=[helper.make_opsetid("", 18)])
    path = tmp_path / "other.onnx"
    onnx.save(model, path)
    assert run(predict, "--weights", path, tiny / "images") == 2
    assert "not a file that export.py wrote" in error_line(capsys)
    helper.set_model_props(model, {"description.json": json.dumps({"classes": list("abcdef")})})
    onnx.save(model, path)
    assert run(predict, "--weights", path, tiny / "images") == 2
    assert "its description is not one of this project" in error_line(capsys)
    description = {"stage": "t1", "classes": list("abcdef"), "groups": {}, "preprocessing": {"image_size": 32},
                   "epoch": 1, "selected_on": "val"}
    helper.set_model_props(model, {"description.json": json.dumps(description)})
    onnx.save(model, path)
    assert run(predict, "--weights", path, tiny / "images") == 2
    assert "its logits do not fit its class names" in error_line(capsys)


class Exploit:
    def __reduce__(self):
        return (open, ("exploited", "w"))


CODE = "open('exploited', 'w')"
CONFIG = "archive/data/weights/model_weights_config.json"


def pickled():
    content = io.BytesIO()
    torch.save(Exploit(), content)
    return content.getvalue()


def change_program(records, change):
    """A copy of a program's records with its graph changed by a function."""
    program = json.loads(records["archive/models/model.json"])
    change(program)
    return {**records, "archive/models/model.json": json.dumps(program).encode()}


def evaluated_symbol(program):
    program["graph_module"]["graph"]["tensor_values"]["images"]["sizes"][0]["as_expr"]["expr_str"] = CODE


def evaluated_guard(program):
    program["guards_code"] = [CODE]


def called_function(program):
    program["graph_module"]["graph"]["nodes"][0] |= {"target": "torch.os.mkdir", "inputs": [
        {"name": "", "arg": {"as_string": "exploited"}, "kind": 1}]}


def pickled_weight(records):
    config = json.loads(records[CONFIG])
    first = config["config"]["network.conv1.weight"]
    first["use_pickle"] = True
    return {**records, CONFIG: json.dumps(config).encode(), f"archive/data/weights/{first['path_name']}": pickled()}


@pytest.mark.parametrize("change, complaint", [
    (lambda records: change_program(records, evaluated_symbol), "it holds .open"),
    (lambda records: change_program(records, evaluated_guard), "it holds .open"),
    (lambda records: change_program(records, called_function), r"it calls torch\.os\.mkdir"),
    (pickled_weight, "it holds a pickle"),
    (lambda records: {**records, "archive/data/aotinductor/model/a.so": b"\x7fELF"}, r"it holds .*a\.so"),
    (lambda records: {**records, "archive/models/other.json": b"{}"}, r"it holds .*other\.json"),
])
def test_a_program_that_would_run_code_is_refused_unrun(files, tiny, tmp_path, capfd, monkeypatch, change, complaint):
    with zipfile.ZipFile(files["program"][0]) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    path = tmp_path / "hostile.pt2"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in change(records).items():
            archive.writestr(name, content)
    monkeypatch.chdir(tmp_path)
    assert run(predict, "--weights", path, tiny / "images") == 2
    assert re.search(complaint, error_line(capfd))
    assert not (tmp_path / "exploited").exists()


def test_pickled_example_inputs_are_left_alone(files, tiny, tmp_path, capsys, monkeypatch):
    path = tmp_path / "hostile.pt2"
    with zipfile.ZipFile(files["program"][0]) as good, zipfile.ZipFile(path, "w") as archive:
        for name in good.namelist():
            archive.writestr(name, pickled() if "sample_inputs" in name else good.read(name))
    monkeypatch.chdir(tmp_path)
    assert run(predict, "--weights", path, tiny / "images" / "test_0_1.png") == 0
    assert not (tmp_path / "exploited").exists()


# ---- flags and packages --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("package, script, arguments", [
    ("onnxscript", export, ("onnx",)), ("onnxruntime", export, ("onnx",)), ("onnxruntime", predict, ())])
def test_a_missing_package_is_named(files, trained, tiny, tmp_path, capsys, monkeypatch, package, script, arguments):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find_spec(name))
    weights = trained[0] / "best.pt" if script is export else files["onnx"][0]
    where = ("--output", tmp_path / "out") if script is export else ()
    assert run(script, *arguments, "--weights", weights, *where, tiny / "images") == 2
    assert f"{package} is not installed; pip install -r requirements-export.txt" in error_line(capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flags, complaint", [
    (("--device", "cuda"), "runs on the CPU in fp32 here; for --device cuda"),
    (("--precision", "bf16"), "runs on the CPU in fp32 here; .* give the checkpoint"),
    (("--image-size", "64"), "was exported for images of 32 pixels, not 64"),
])
def test_an_exported_file_is_used_as_it_is(files, tiny, capsys, flags, complaint):
    assert run(predict, "--weights", files["program"][0], *flags, tiny / "images") == 2
    assert re.search(complaint, error_line(capsys))


def test_names_of_another_data_set_are_refused(files, tiny, capsys):
    assert run(predict, "--weights", files["program"][0], "--data-root", tiny, tiny / "images") == 2
    assert "was trained for other classes than those of" in error_line(capsys)


# ---- speed without loss --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision, tolerance", [("fp32", 1e-5), ("bf16", 0.1)])
def test_the_fast_path_gives_the_logits_of_the_network(trained, images, precision, tolerance):
    network, device = trained[1], torch.device("cpu")
    before = {name: value.clone() for name, value in network.state_dict().items()}
    found = logits_function(network, device, precision)(images)
    with torch.no_grad():
        expected, _ = network(network_input(images))
    assert found.dtype == torch.float32
    assert (found - expected).abs().max() < tolerance * expected.abs().max()
    assert all(torch.equal(value, network.state_dict()[name]) for name, value in before.items())


def test_a_cpu_gets_small_batches():
    assert batch_size(torch.device("cpu")) == 16 and batch_size(torch.device("cuda", 0)) == 64
