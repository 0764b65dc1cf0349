"""What tests share: data sets and weights drawn for them, and ways to run the scripts as a user does."""

import contextlib
import io
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import baseline_cl_s_weight
import prepare_dataset
from common.files import save_checkpoint
from common.runtime import run_script
from dataset import DatasetInfo, class_counts, read_info, read_split, write_dataset
from detection import engine
from detection.checkpoint import describe_model, describe_preprocessing
from detection.network.detector import Detector
from recognition.engine import run_stage
from recognition.run import start_run
from recognition.settings import parse_settings
from recognition.stage import read_lists
from resnet50 import ResNet50

PROJECT = Path(__file__).resolve().parent.parent
TINY_GROUPS = {"head": [0, 1], "middle": [2, 3], "tail": [4, 5]}
TINY_TRAIN = [14, 12, 9, 8, 5, 4]
QUICK = ("--image-size", "32", "--batch-size", "8", "--epochs", "2", "--device", "cpu", "--precision", "fp32",
         "--schedule", "one-cycle", "--lr", "0.01")
# torchrun on a free port, whatever the machine's name, without a folder of logs in /tmp.
TWO_PROCESSES = ("-m", "torch.distributed.run", "--standalone", "--local_addr", "127.0.0.1", "--nproc_per_node", "2",
                 "--log_dir", os.devnull)
DATA = Path(os.environ.get("AERIAL_DATA") or PROJECT.parent / "shared" / "data")
ODD_NAMES = [["$a$ \\frac{", "_b_", r"\$c$", "d^{"], ["帆船", "корабль", "πλοίο", "e\u0301$$"],
             ["x" * 500, "$" * 500, "船" * 500, "d"]]
QUICK_DETECTOR = ("--init", "none", "--depth", "18", "--channels", "64", "--tower-convs", "1", "--batch-size", "4",
                  "--epochs", "2", "--short", "64", "--long", "64", "--lr", "0.04", "--warmup-steps", "3", "--workers",
                  "0", "--device", "cpu", "--precision", "fp32")
DESCRIPTION = {"stage": "t1", "classes": ["a", "b"], "groups": {"head": [0], "middle": [1], "tail": []}, "epoch": 3,
               "preprocessing": {"image_size": 32}, "selected_on": "val"}
SMALL = [{"model": {"a.weight": torch.ones(7, 3), "b": torch.arange(5), "c": torch.ones(3).half()}, "epoch": 1,
          "description": DESCRIPTION},
         {"weight": torch.nn.Parameter(torch.ones(3, 4)), "view": torch.ones(4, 4).t()[1:]}]


# ---- programs --------------------------------------------------------------------------------------------------------


def run_program(*command, **options):
    """Run a script of the project, with Python's own flags before it if need be, in a process of its own, from the
    project's folder. Returns the finished process, output as text."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", **options.pop("env", {})}
    return subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, cwd=PROJECT,
                          env=environment, timeout=900, **options)


def run_two_processes(*command, **environment):
    """`run_program`, in two processes of one thread each."""
    return run_program(*TWO_PROCESSES, *command, env={"OMP_NUM_THREADS": "1", **environment})


def run_tool(script, *arguments):
    """The main program of a script in this process. Returns its exit status."""
    with pytest.raises(SystemExit) as exit_:
        run_script(lambda: script.main([str(argument) for argument in arguments]))
    return exit_.value.code or 0


def run_main(module, *arguments):
    """Run a stage script's program in this process. Returns its exit status."""
    with pytest.raises(SystemExit) as exit_:
        run_stage(module.STAGE, module.SETTINGS, "", [str(argument) for argument in arguments])
    return exit_.value.code or 0


def run_detector(module, *arguments):
    """Run the program of a detector's training script in this process. Returns its exit status."""
    with pytest.raises(SystemExit) as exit_:
        engine.run_stage(module.METHOD, module.SETTINGS, "", [str(argument) for argument in arguments])
    return exit_.value.code or 0


def prepare(*arguments):
    """prepare_dataset.py in this process. Returns its exit status; errors are raised."""
    return prepare_dataset.main([str(argument) for argument in (*arguments, "--processes", 1)])


def error_line(capsys):
    """What stderr holds, which must be one line of an error."""
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1, error
    return error


def printed_line(error):
    """What a program prints of an error."""
    printed = io.StringIO()

    def fail():
        raise error

    with contextlib.redirect_stderr(printed), pytest.raises(SystemExit):
        run_script(fail)
    return printed.getvalue()


def stop_at_step(monkeypatch, engine, number, signal_number=signal.SIGTERM):
    """Send this process a signal in the step of that number, counted from 1, of a run by recognition's or detection's
    engine."""
    train_step, steps = engine.train_step, []

    def signal_and_step(*arguments):
        steps.append(1)
        if len(steps) == number:
            os.kill(os.getpid(), signal_number)
        return train_step(*arguments)

    monkeypatch.setattr(engine, "train_step", signal_and_step)


class Waited(BaseException):
    """Not an Exception, so that no reader takes it for damage."""


@contextlib.contextmanager
def alarm(seconds=30):
    """Raise Waited in what takes longer; where the system has no such alarm, wait."""
    def late(*_):
        raise Waited

    if not hasattr(signal, "SIGALRM"):
        yield
        return
    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


# ---- what they leave -------------------------------------------------------------------------------------------------


def log_of(folder):
    """The log without its times, which differ from run to run."""
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if key not in ("seconds", "images_per_second")}
            for record in records]


def weights_of(folder):
    """The weights that a detector's run ended with."""
    return torch.load(folder / "final.pt", weights_only=True)["model"]


def student_flags(seed_folder):
    """The flags of a student elsewhere that has its start and its teachers from a finished run."""
    origins = {"--init": "baseline", "--t1": "t1", "--t2": "t2", "--t3": "t3"}
    return [part for flag, name in origins.items() for part in (flag, seed_folder / name / "best.pt")]


def counts_of(root, *splits):
    """The images of each class in some splits of a data set."""
    info = read_info(root)
    return class_counts([sample.label for split in splits for sample in read_split(info, split)],
                        len(info.classes)).tolist()


def contents(folder):
    """{path below a folder: content} of all its files."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- data ------------------------------------------------------------------------------------------------------------


def real(name):
    """The folder of a real data set; the test is skipped where it is absent."""
    if not (DATA / name).is_dir():
        pytest.skip(f"no real images at {DATA / name}; set AERIAL_DATA to the folder that holds {name}")
    return DATA / name


def draw_noise(path, size=(60, 40), seed=0):
    """Write an image of noise, another one for each file name and seed. Returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng([seed, *path.name.encode()])
    Image.fromarray(generator.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(path)
    return path


def draw_blocks(path, width=80, height=100, seed=0):
    """Write an image of coloured blocks. Returns its path."""
    blocks = np.random.default_rng(seed).integers(0, 256, (height // 10 + 1, width // 10 + 1, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(blocks.repeat(10, 0).repeat(10, 1)[:height, :width]).save(path)
    return path


def draw_folders(root, counts, start=0):
    """Class folders of small images of noise. counts: {folder: number of images}. Returns their folder."""
    for folder, count in counts.items():
        (root / folder).mkdir(parents=True, exist_ok=True)
        for _ in range(count):
            start += 1
            draw_noise(root / folder / f"{start}.png", (12, 10))
    return root


def draw_tiny(root, train=TINY_TRAIN, val=2, test=4, groups=TINY_GROUPS, seed=0):
    """A prepared data set of grey 40 x 40 noise with a bright band whose height tells the class. Returns its folder."""
    generator = np.random.default_rng(seed)
    images, lists = root / "images", {}
    images.mkdir(parents=True)
    for split, counts in (("train", train), ("val", [val] * len(train)), ("test", [test] * len(train))):
        lists[split] = []
        for label, count in enumerate(counts):
            for number in range(count):
                pixels = generator.integers(0, 60, (40, 40), dtype=np.uint8)
                pixels[label * 6:label * 6 + 6] += 150
                Image.fromarray(pixels).save(images / f"{split}_{label}_{number}.png")
                lists[split].append((f"{split}_{label}_{number}.png", label))
    write_dataset(DatasetInfo(root, "tiny", list("abcdef")[:len(train)], groups, "by hand", images), lists)
    return root


def write_dota(root, images, header=True):
    """A folder of DOTA, returned. images: {name: ((width, height) or an array of pixels, lines of its label file)}."""
    for folder in ("images", "labelTxt"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for name, (pixels, lines) in images.items():
        if isinstance(pixels, tuple):
            seed = [*name.encode()]
            pixels = np.random.default_rng(seed).integers(0, 256, (*pixels[::-1], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "images" / f"{name}.png")
        lines = ["imagesource:drawn", "gsd:null"] * header + list(lines)
        (root / "labelTxt" / f"{name}.txt").write_text("".join(line + "\n" for line in lines))
    return root


def write_coco(root, annotations, images=((7, "a.png"), (3, "b.png")), categories=((9, "ship"), (2, "plane")),
               changes=()):
    """Write a COCO file with images of 60 x 40. annotations: dicts; what they lack is filled in. changes: to the whole
    content. Returns its path."""
    for number, file in images:
        draw_noise(root / "images" / file, seed=number)
    entries = [{"id": 100 + k, "image_id": 7, "category_id": 2, "iscrowd": 0, **entry}
               for k, entry in enumerate(annotations)]
    content = {"images": [{"id": number, "file_name": file, "width": 60, "height": 40} for number, file in images],
               "categories": [{"id": number, "name": category} for number, category in categories],
               "annotations": entries, **dict(changes)}
    (root / "train.json").write_text(json.dumps(content))
    return root / "train.json"


VOC_OBJECT = ("<object><name>{}</name><bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox>{}"
              "</object>")


def write_voc(root, objects, size=(60, 40), split="trainval"):
    """Write a VOC folder. objects: {image id: [(name, xmin, ymin, xmax, ymax, further elements)]}. Returns the set."""
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for image_id, entries in objects.items():
        draw_noise(root / "JPEGImages" / f"{image_id}.jpg", size)
        (root / "Annotations" / f"{image_id}.xml").write_text(
            f"<annotation><filename>{image_id}.jpg</filename><size><width>{size[0]}</width><height>{size[1]}</height>"
            f"<depth>3</depth></size>\n{''.join(VOC_OBJECT.format(*entry) for entry in entries)}</annotation>")
    path = root / "ImageSets" / "Main" / f"{split}.txt"
    path.write_text("".join(f"{image_id}\n" for image_id in objects))
    return path


# ---- networks and their files ----------------------------------------------------------------------------------------


def student_run(data, teachers, precision, *flags):
    """A student's Run as its script would start it."""
    stage, flags = baseline_cl_s_weight.STAGE, ["--data-root", data, "--output", teachers / "student", *QUICK, *flags]
    settings, _ = parse_settings(stage, baseline_cl_s_weight.SETTINGS, "", [str(flag) for flag in flags])
    return start_run(stage, settings, read_lists(stage, settings), torch.device("cpu"), precision)


def detector_run(method, network, settings, **more):
    """A detector's Run of one step an epoch, without data. more: other fields, such as its teacher."""
    optimizer = torch.optim.SGD(network.parameters(), lr=0.0, momentum=0.9, weight_decay=1e-4)
    return engine.Run(**{"name": "test", "method": method, "settings": settings, "device": torch.device("cpu"),
                         "precision": "fp32", "network": network, "optimizer": optimizer, "sampler": [0],
                         "train_annotations": None, "test_annotations": None, "teacher": None, **more})


def save_eager_detector(path, classes, architecture, sides):
    """Save a checkpoint with all that last.pt holds, of a GFL detector of three classes that finds something in any
    image. sides: short and long, of the images. Returns its path."""
    torch.manual_seed(0)
    network = Detector(len(classes), architecture)
    with torch.no_grad():
        network.head.classify.weight.normal_(std=0.03)
        network.head.classify.bias.copy_(torch.tensor([-1.5, -2.0, -6.0]))
        network.head.regress.weight.normal_(std=0.05)
        network.head.regress.bias.copy_(-torch.arange(17).repeat(4) / 2)  # boxes of a few strides
    save_checkpoint(path, {
        "model": network.state_dict(), "optimizer": {"param_groups": [{"lr": 0.01}]}, "description": {
            "stage": "gfl", "classes": classes, "model": describe_model(architecture),
            "preprocessing": describe_preprocessing(*sides), "epoch": 3,
            "settings": {"lr": 0.01, "init": "/home/someone/resnet.pt", "init_detector": "/home/someone/final.pt"}}})
    return path


def authors_state(classes=23, prefix=""):
    """A state dict in the layout of the released weights, of random numbers: 321 entries."""
    torch.manual_seed(classes)
    state = {}
    for name, value in ResNet50(classes).state_dict().items():
        name = {"conv1.weight": "conv2.weight", "fc.weight": "fclass.weight", "fc.bias": "fclass.bias"}.get(name, name)
        if name.endswith("running_var"):
            value = torch.rand_like(value) + 0.5
        elif value.is_floating_point():
            value = torch.randn_like(value) * (value.std() if value.numel() > 1 and value.std() > 0 else 0.1)
        state[prefix + name] = value
    state[f"{prefix}conv1.weight"] = torch.randn(64, 3, 7, 7)
    return state


def norm_entries(name, channels):
    """(name, shape) of every entry of a batch norm."""
    yield from ((f"{name}.{part}", (channels,)) for part in ("weight", "bias", "running_mean", "running_var"))
    yield f"{name}.num_batches_tracked", ()


def random_entries(entries):
    """A state dict of these (name, shape) whose numbers neither grow nor vanish from layer to layer."""
    generator, state = torch.Generator().manual_seed(3), {}
    for name, shape in entries:
        values = torch.randn(shape, generator=generator)
        if name.endswith("num_batches_tracked"):
            values = torch.tensor(7)
        elif name.endswith("running_var") or shape == ():
            values = 0.5 + values.abs()
        elif len(shape) == 4:
            values /= math.sqrt(math.prod(shape[1:]))
        state[name] = values
    return state


def saved(content, **options):
    """What torch.save makes of it, as bytes."""
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


FILES = [saved(content, _use_new_zipfile_serialization=new) for content in SMALL for new in (True, False)]
