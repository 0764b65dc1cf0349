"""What garbage does to the readers of lists, JSON and checkpoints: each gives a value of the kind it promises, or one
line that names the file. Nothing else is raised, printed, written, or waited for."""

import io
import json
import os
import pickle
import re
import unicodedata
import warnings
import zipfile
from datetime import timedelta

import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import settings as fuzz_settings
from hypothesis import strategies as st

import baseline_resnet50
from common.files import read_json
from common.run_folder import check_output
from common.runtime import UserError
from dataset import DatasetInfo, fingerprint, read_info, read_list
from recognition import evaluation
from recognition.settings import Settings
from resnet50 import ResNet50, initialise, load_state, read_weights
from tests.support import DESCRIPTION, FILES, SMALL, alarm, printed_line, saved


def fuzz(examples):
    """The same cases in every run, each of at most 10 seconds."""
    return fuzz_settings(max_examples=examples, derandomize=True, database=None, deadline=timedelta(seconds=10),
                         suppress_health_check=list(HealthCheck))


@pytest.fixture
def folder(tmp_path, capfd):
    """An empty folder; after the test nothing may have been printed."""
    (tmp_path / "garbage").mkdir()
    yield tmp_path / "garbage"
    assert capfd.readouterr() == ("", "")


def outcome(read, path, content, named=None):
    """What `read()` returns once `content` is in the file `path`, None where it raises a UserError, whose line must
    hold `named` (default: the path). Fails if anything else is raised, warned of, or changed in the file's folder."""
    path.write_bytes(content)
    value = None
    with warnings.catch_warnings(record=True) as warned, alarm():
        warnings.simplefilter("always")
        try:
            value = read()
        except UserError as error:
            line = printed_line(error)
            assert line.startswith("error: ") and str(named or path) in line and len(line) < 2100
            assert line[-1] == "\n" and line[:-1].isprintable()
    assert not [str(each.message) for each in warned if not issubclass(each.category, DeprecationWarning)]
    assert path.read_bytes() == content and os.listdir(path.parent) == [path.name]
    return value


# ---- lists -----------------------------------------------------------------------------------------------------------


anything = st.characters(exclude_categories=[])  # lone surrogates and NULs among it
parts = st.one_of(st.sampled_from(["..", ".", "", "a", "b.png", "C:", "船", " "]), st.text(anything, max_size=3))
paths = st.one_of(st.text(anything, max_size=20), st.builds(
    lambda separator, parts: separator.join(parts), st.sampled_from("/\\"), st.lists(parts, min_size=1, max_size=4)))
odd_labels = st.sampled_from(["", "9" * 5000, "0" * 20, "³", "１", "0x1", "1.0", "-0"])
labels = st.one_of(st.integers(-3, 9).map(str), odd_labels)
lines = st.one_of(st.tuples(paths, st.sampled_from([" ", "  ", "\t", "\u3000", ""]), labels).map("".join),
                  st.tuples(paths, st.integers(0, 4)).map("{0[0]} {0[1]}".format), st.just("a/" * 40_000 + "b.png 1"))
endings = st.sampled_from(["\n", "\r\n", "\r", "\n\n", "\u2028", "\x0c", "\x00"])
# An encoding, and what becomes of characters that it has no bytes for.
encodings = st.sampled_from([
    ("utf-8", "replace"), ("utf-8", "ignore"), ("utf-8-sig", "ignore"), ("latin-1", "ignore"),
    *((name, "surrogatepass") for name in ("utf-8", "utf-8-sig", "utf-16", "utf-32"))])


@st.composite
def near_lists(draw):
    text = "".join(line + draw(endings) for line in draw(st.lists(lines, max_size=6)))
    return text.encode(*draw(encodings))


@fuzz(500)
@given(content=st.one_of(st.binary(max_size=300), near_lists()))
def test_a_list_of_garbage_is_samples_or_one_line(folder, content):
    samples = outcome(lambda: read_list(folder / "train.txt", 5), folder / "train.txt", content)
    for sample in samples or ():
        assert sample.path.isprintable() and len(sample.path) <= 4096 and sample.label in range(5)
        inside = os.path.normpath(folder / sample.path)
        assert inside == str(folder) or inside.startswith(str(folder) + os.sep)
        assert ".." not in re.split(r"[/\\]", sample.path) and not re.match(r"[/\\]|[A-Za-z]:", sample.path)
        assert sample.where.startswith(f"{folder / 'train.txt'}:")


# ---- JSON ------------------------------------------------------------------------------------------------------------


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(anything, max_size=10)),
    lambda inner: st.one_of(st.lists(inner, max_size=5), st.dictionaries(st.text(anything, max_size=5), inner,
                                                                         max_size=5)), max_leaves=12)
odd_json = ["1" * 5000, "-" + "9" * 4301, "1e999", "NaN", "-Infinity", "0." + "1" * 5000, "[" * 100_000,
            "[" * 5000 + "]" * 5000, '{"a":' * 900 + "1" + "}" * 900, '"' + "x" * 5000 + '"', '"\\u0000"',
            '"\\ud800\\n"', '{"a": 1, "a": 2}', "[1,]", "'a'", "", "{", "\ufeff1", "nul", '["a"]' * 2]
names = st.one_of(st.text(anything, max_size=3), st.sampled_from(["..", "/", "a" * 300, "\x1b[2J", "\ud800"]))
raw_json = st.one_of(json_values.map(json.dumps), st.sampled_from(odd_json), names.map(json.dumps),
                     st.lists(names, min_size=3, max_size=3).map(json.dumps))


@st.composite
def near_json(draw, good):
    """The bytes of a JSON object like `good`, whose values are JSON texts, but for some keys; perhaps cut short."""
    changed = draw(st.dictionaries(st.sampled_from([*good, "other"]), raw_json, max_size=2))
    pairs = list({**good, **changed}.items())
    pairs += draw(st.sampled_from([[], pairs[:2]]))  # a key may be there twice
    text = "{" + ", ".join(f'"{key}": {value}' for key, value in pairs) + "}"
    content = text.encode(*draw(encodings))
    return content[:draw(st.integers(0, len(content)))] if draw(st.sampled_from("nnny")) == "y" else content


@fuzz(150)
@given(content=st.one_of(st.binary(max_size=100), raw_json.map(lambda text: text.encode(errors="replace"))))
def test_json_of_garbage_is_a_value_or_one_line(folder, content):
    outcome(lambda: read_json(folder / "any.json"), folder / "any.json", content)


INFO = {"name": '"x"', "classes": '["a", "b", "c"]', "groups": '{"head": [0], "middle": [1], "tail": [2]}',
        "group_rule": '"by hand"', "images": '"."'}


@fuzz(500)
@given(content=st.one_of(st.binary(max_size=100), near_json(INFO)))
def test_a_dataset_json_of_garbage_is_a_data_set_or_one_line(folder, content):
    info = outcome(lambda: read_info(folder), folder / "dataset.json", content)
    if info:
        assert isinstance(info, DatasetInfo) and len(info.group_of_class()) == len(info.classes)
        texts = "".join([info.name, info.group_rule, *info.classes])
        assert fingerprint(info, {}) and not {"Cc", "Cs"} & set(map(unicodedata.category, texts))


MINE = {"stage": "t1", "epochs": 3, "lr": 0.1, "lr_steps": [1, 2], "data": "0123"}


@fuzz(300)
@given(content=st.one_of(st.binary(max_size=100), near_json({key: json.dumps(MINE[key]) for key in MINE})))
def test_a_settings_json_of_garbage_is_another_run_or_one_line(folder, content):
    resumed = Settings(output=str(folder), resume=True)
    outcome(lambda: check_output(resumed, MINE, "data"), folder / "settings.json", content, named=folder)


@fuzz(50)
@given(content=st.one_of(st.binary(max_size=100), near_json({"weights_sha256": '"0123"', "overall": "0.5"})))
def test_a_results_json_of_garbage_is_of_other_weights(folder, tiny, content):
    (folder.parent / "weights.pt").write_bytes(b"")
    settings = Settings(output=str(folder), data_root=str(tiny), weights=str(folder.parent / "weights.pt"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "load_network", lambda weights, num_classes: (None, None))
        assert outcome(lambda: evaluation.test_only(baseline_resnet50.STAGE, settings, {}, torch.device("cpu")),
                       folder / "results.json", content) is None


# ---- checkpoints -----------------------------------------------------------------------------------------------------


kinds_of_damage = st.sampled_from(["flip", "set", "cut", "insert", "copy"])
damage = st.lists(st.tuples(kinds_of_damage, st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=5)


def damaged(content, damage):
    """Bytes with some of them flipped, set, cut out, inserted, or copied from elsewhere."""
    content = bytearray(content)
    for kind, place, value in damage:
        at = int(place * len(content))
        if kind == "flip":
            content[at:at + 1] = bytes(byte ^ (1 << value % 8) for byte in content[at:at + 1])
        elif kind == "set":
            content[at:at + 1] = bytes([value])
        elif kind == "cut":
            del content[at:at + 1 + value % 8]
        elif kind == "insert":
            content[at:at] = bytes([value]) * (1 + value % 4)
        else:
            content[at:at + 4] = content[value:value + 4]
    return bytes(content)


def with_damaged_pickle(content, damage):
    """A checkpoint of sound form, checksums among it, whose pickle is damaged: this reaches the unpickler."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(file, "w") as new:
        for name in old.namelist():
            new.writestr(name, damaged(old.read(name), damage if name.endswith("data.pkl") else []))
    return file.getvalue()


broken_files = st.one_of(
    st.binary(max_size=300),
    st.builds(damaged, st.sampled_from(FILES), damage),
    st.builds(with_damaged_pickle, st.sampled_from(FILES[::2]), damage),
    st.builds(lambda content, share: content[:int(share * len(content))], st.sampled_from(FILES), st.floats(0, 1)),
    st.builds(lambda one, other, first, second: one[:int(first * len(one))] + other[int(second * len(other)):],
              st.sampled_from(FILES), st.sampled_from(FILES), st.floats(0, 1), st.floats(0, 1)),
    st.builds(lambda value, protocol: pickle.dumps(value, protocol), json_values, st.integers(0, 5)))


def check_weights(path, content):
    """Read `content` as weights from `path`."""
    weights = outcome(lambda: read_weights(path), path, content)
    if weights:
        state, description = weights
        assert state and set(map(type, state)) == {str} and all(value.isfinite().shape for value in state.values())
        assert description is None or check_description(description)


def check_description(description):
    """Use a description as the programs do: the size as a number, the rest in texts and results.json."""
    keys = ("stage", "classes", "groups", "epoch", "selected_on")
    return (32 <= description["preprocessing"]["image_size"] <= 4096 and "".join(description["classes"]) is not None
            and json.dumps([description[key] for key in keys]))


@fuzz(1500)
@given(content=broken_files)
def test_a_checkpoint_of_garbage_is_weights_or_one_line(folder, content):
    check_weights(folder / "weights.pt", content)


tensors = st.sampled_from([torch.zeros(()), torch.ones(3), torch.zeros(2, 0), torch.ones(2, 2).to(torch.complex64),
                           torch.ones(3).bool(), torch.ones(1).expand(10**6), torch.zeros(3, device="meta")])
leaves = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(anything, max_size=5),
                   st.binary(max_size=5), st.sets(st.integers()), tensors)
keys = st.one_of(st.text(max_size=8), st.integers(), st.sampled_from(
    ["model", "description", "module.a", "fc.weight", "fclass.weight", "conv2.weight"]))
plain_objects = st.recursive(leaves, lambda inner: st.one_of(
    st.lists(inner, max_size=4), st.lists(inner, max_size=3).map(tuple), st.dictionaries(keys, inner, max_size=5),
), max_leaves=10)


@fuzz(150)
@given(content=plain_objects)
def test_a_checkpoint_of_any_plain_object_is_weights_or_one_line(folder, content):
    check_weights(folder / "weights.pt", saved(content))


@fuzz(150)
@given(key=st.sampled_from([*DESCRIPTION, "settings"]), value=plain_objects, inner=st.booleans())
def test_a_checkpoint_with_any_description_is_weights_or_one_line(folder, key, value, inner):
    value = {"image_size": value, "head": value} if inner else value
    check_weights(folder / "weights.pt", saved({**SMALL[0], "description": {**DESCRIPTION, key: value}}))


@pytest.fixture(scope="module")
def network():
    return ResNet50(4)


NAMES = ["conv1.weight", "bn1.running_var", "bn1.num_batches_tracked", "fc.weight", "fc.bias", "layer1.0.conv3.weight"]


@fuzz(60)
@given(name=st.sampled_from(NAMES), shape=st.lists(st.integers(0, 3), max_size=5), kind=st.sampled_from(
    [torch.float32, torch.float16, torch.float64, torch.int64]))
def test_weights_of_any_shape_are_loaded_or_one_line(folder, network, name, shape, kind):
    state = {**network.state_dict(), name: torch.zeros(shape, dtype=kind)}
    outcome(lambda: load_state(network, state, folder / "weights.pt"), folder / "weights.pt", b"")


def test_weights_that_are_no_dense_numbers_are_one_line(folder):
    path = folder / "weights.pt"
    ones = torch.ones(64)
    for value in (ones.to(torch.complex64), ones.bool(), ones.to_sparse(), ones.to("meta"),
                  ones.to(torch.float8_e5m2), torch.ones(1).expand(10**9)):
        for state in ({"bn1.weight": value}, {"conv1.weight": value, "fc.bias": torch.zeros(4)}):
            assert outcome(lambda: read_weights(path), path, saved(state)) is None  # noqa: B023 called at once
    state = {**ResNet50(4).state_dict(), "conv1.weight": torch.zeros(1).expand(64, 3, 10**5, 10**5)}
    assert outcome(lambda: initialise(ResNet50(4), path), path, saved(state)) is None
