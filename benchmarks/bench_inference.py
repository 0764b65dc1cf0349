"""What it costs to name an image, and whether the fast ways still name it alike.

    python -m benchmarks.bench_inference --weights runs/FGSC-23/student/best.pt my_images/
    python -m benchmarks.bench_inference --weights FILE my_images/ --batch-sizes 8 --skip compiled

Every way runs on the same images, the batch sizes one after the other, all ways of a batch size side by side: the plain
network in fp32 and bf16; with batch norm folded into the convolutions, which is what `--test-only` and predict.py run
(`inference.logits_function`); compiled with frozen weights; and exported to ONNX and run by ONNX Runtime, where that
is installed (requirements-export.txt). Beside the time stands how many images get the same class as from the plain fp32
network, and the largest difference of a logit in per cent of the largest logit."""

import importlib.util
import json
import tempfile
import time
from pathlib import Path

import torch

import export
from benchmarks.common import finish, interleaved, parser, set_up
from common.images import decode_square, find_images
from common.runtime import UserError, autocast, run_script
from common.weights import fold_batch_norm
from dataset import network_input
from recognition.exported import read_exported
from recognition.inference import load_classifier, logits_function


def plain(network, device, precision):
    """The network as it is, under autocast for bf16."""
    @torch.inference_mode()
    def logits_of(images):
        with autocast(device, precision):
            return network(network_input(images.to(device)))[0].float()

    return logits_of


def compiled(network, device, precision):
    """Compiled by torch, its weights frozen into the program."""
    folded = torch.compile(fold_batch_norm(network), options={"freezing": True} if device.type == "cpu" else None)
    return plain(folded, device, precision)


def onnx_runtime(network, description):
    """The network as export.py writes it to ONNX, run by ONNX Runtime in fp32 on the CPU."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.onnx"
        program = export.trace(network, description["preprocessing"]["image_size"])
        path.write_bytes(export.onnx_bytes(program, json.dumps(description)))
        return read_exported(path)[0]


def seconds_to_compile(logits_of, images):
    """The seconds of a first call."""
    started = time.perf_counter()
    logits_of(images)
    return time.perf_counter() - started


def compare(ways, images, exact):
    """{way: (share of images named alike, largest difference of a logit over the largest logit)}, both in per cent."""
    found = {}
    for name, logits_of in ways.items():
        logits = torch.cat([logits_of(part) for part in images.split(8)]).cpu()
        alike = (logits.argmax(1) == exact.argmax(1)).float().mean().item()
        found[name] = 100 * alike, 100 * ((logits - exact).abs().max() / exact.abs().max()).item()
    return found


def main():
    flags = parser(__doc__, "inference")
    flags.add_argument("images", nargs="+", help="image files, folders, or lists, as for predict.py")
    flags.add_argument("--weights", required=True, help="checkpoint of this project, or released weights")
    flags.add_argument("--data-root", help="data set whose class names to use, for weights that hold none")
    flags.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 64])
    flags.add_argument("--skip", nargs="*", default=[], choices=("compiled", "onnx"), help="ways to leave out")
    args = flags.parse_args()
    device = set_up(args)
    network, description = load_classifier(args.weights, args.data_root)
    size = description["preprocessing"]["image_size"]
    runs_onnx = "onnx" not in args.skip and importlib.util.find_spec("onnxruntime")
    ways = {"ONNX Runtime fp32": onnx_runtime(network, description)} if runs_onnx else {}
    network.to(device, memory_format=torch.channels_last)
    files = find_images(args.images)[:512]
    images = torch.stack([torch.from_numpy(decode_square(file, size).copy()) for file in files]).unsqueeze(1)
    if len(images) < max(args.batch_sizes):
        raise UserError(f"{len(images)} images; expected at least {max(args.batch_sizes)}, the largest batch")
    ways |= {f"plain {precision}": plain(network, device, precision) for precision in ("fp32", "bf16")}
    ways |= {f"folded {precision}": logits_function(network, device, precision) for precision in ("fp32", "bf16")}
    if "compiled" not in args.skip:
        ways |= {f"compiled {precision}": compiled(network, device, precision) for precision in ("fp32", "bf16")}
    first = {name: {batch: seconds_to_compile(logits_of, images[:batch]) for batch in args.batch_sizes}
             for name, logits_of in ways.items() if "compiled" in name}
    seconds = {batch: interleaved({name: (lambda f=logits_of, b=batch: f(images[:b]).cpu())
                                   for name, logits_of in ways.items()}, args.repeats, device)
               for batch in args.batch_sizes}
    agreement = compare(ways, images, torch.cat([ways["plain fp32"](part) for part in images.split(8)]).cpu())
    rows = []
    for name in ways:
        times = {f"ms an image, batch {batch}": round(1000 * seconds[batch][name] / batch, 1) for batch in seconds}
        rows.append({"way": name, **times, "seconds to compile": round(sum(first[name].values()), 1)
                     if name in first else None, "same class, %": round(agreement[name][0], 2),
                     "logits differ, %": round(agreement[name][1], 4)})
    finish(args, device, f"inference at {size}x{size}, agreement over {len(images)} images", rows)


if __name__ == "__main__":
    run_script(main)
