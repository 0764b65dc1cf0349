"""How many images a second a detector answers, from bytes on the CPU to boxes on the CPU.

    python -m benchmarks.bench_detection_inference --weights runs/mine/ld/final.pt my_images/
    python -m benchmarks.bench_detection_inference --weights FILE --height 800 --width 1344 --batch-sizes 1 8

Your images are resized as in the detector's tests, those of a batch padded to one size; reading and resizing are not
timed. Without images noise of --height x --width is used, which holds no objects, so that there is little to suppress.
A round goes once over all images; the first rounds, of at least 5 images, are not counted. Columns: the whole
(milliseconds an image, images a second), and by themselves the network with the normalisation of its input, and what
follows it: boxes, scores and suppression."""

import dataclasses

import torch

from benchmarks.common import finish, interleaved, parser, set_up
from common.images import find_images, unreadable
from common.precision import resolve_precision
from common.runtime import UserError, autocast, run_script
from detection.checkpoint import load_detector
from detection.data.transforms import decode_rgb, normalise, pad_to_batch, resize_for_test
from detection.geometry.suppression import SUPPRESSIONS
from detection.inference import detect, detections, inference_network

WARM_UP = 5  # images, at least
MOST_IMAGES = 32  # of the user's, which are held in memory


def read_images(paths, preprocessing):
    """[((3, h, w) uint8, (x, y) scale)] of the first images. Raises UserError for one that cannot be read."""
    images = []
    for file in find_images(paths)[:MOST_IMAGES]:
        try:
            images.append(resize_for_test(decode_rgb(file, preprocessing.get("value_range")), preprocessing))
        except Exception as error:  # a damaged file can make a decoder raise anything
            raise UserError(f"{file}: {unreadable(error)}") from None
    return images


def draw_images(count, height, width):
    """The same of noise."""
    return [(image, (1.0, 1.0)) for image in torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8)]


def in_batches(images, batch_size):
    """[(images (N, 3, H, W) uint8, sizes, scales)] as `detect` takes them; what is left for no whole batch is out."""
    batches = []
    for start in range(0, len(images) - batch_size + 1, batch_size):
        seen, scales = zip(*images[start:start + batch_size], strict=True)
        batches.append((*pad_to_batch(seen), scales))
    return batches


def parts(network, batches, device, precision, suppression):
    """{part: function that does this part of the work for every batch}."""
    def answer(images, sizes):
        images = normalise(images.to(device), sizes).contiguous(memory_format=torch.channels_last)
        with autocast(device, precision):
            return network(images)

    def whole():
        for batch in batches:
            detect(network, *batch, device, precision, suppression)

    def forward():
        for images, sizes, _ in batches:
            answer(images, sizes)

    def boxes():
        for outputs, (_, sizes, scales) in zip(answers, batches, strict=True):
            detections(outputs, network.anchors(outputs.sizes, device), sizes, scales,
                       network.architecture.kind.selection, suppression)

    answers = []
    for images, sizes, _ in batches:
        outputs = answer(images, sizes)
        bare = [feature[:, :0].clone() for feature in outputs.features]  # only their sizes are needed
        answers.append(dataclasses.replace(outputs, features=bare))
    return {"whole": whole, "network": forward, "boxes": boxes}


@torch.inference_mode()
def measure(network, images, args, device):
    """The rows of the table."""
    rows = []
    for batch_size in args.batch_sizes:
        batches = in_batches(images or draw_images(batch_size, args.height, args.width), batch_size)
        count = batch_size * len(batches)
        for precision in args.precision:
            seconds = interleaved(parts(network, batches, device, precision, args.suppression), args.repeats, device,
                                  warm_up=-(-WARM_UP // count))
            whole, forward, boxes = (1000 * seconds[part] / count for part in ("whole", "network", "boxes"))
            rows.append({"precision": precision, "batch": batch_size, "images": count, "ms an image": round(whole, 2),
                         "images/s": round(1000 / whole, 1), "network, ms": round(forward, 2),
                         "boxes, ms": round(boxes, 2)})
    return rows


def parse(argv):
    flags = parser(__doc__, "detection_inference")
    flags.add_argument("images", nargs="*", help=f"image files, folders, or lists, of which the first {MOST_IMAGES} "
                       "images are used (default: noise)")
    flags.add_argument("--weights", required=True, help="checkpoint of a detector")
    flags.add_argument("--height", type=int, default=800, help="of the noise, in pixels")
    flags.add_argument("--width", type=int, default=1344)
    flags.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    flags.add_argument("--suppression", default="auto", choices=("auto", *SUPPRESSIONS))
    flags.add_argument("--precision", nargs="+", default=["fp32", "bf16"], choices=("auto", "fp32", "bf16"))
    args = flags.parse_args(argv)
    if min(args.height, args.width, args.repeats, *args.batch_sizes) < 1:
        raise UserError("--height, --width, --repeats and --batch-sizes must be at least 1")
    return args


def main(argv=None):
    args = parse(argv)
    device = set_up(args)
    args.precision = [resolve_precision(precision, device) for precision in args.precision]
    network, description = load_detector(args.weights)
    args.suppression = network.suppression(args.suppression)
    images = read_images(args.images, description["preprocessing"]) if args.images else []
    if images and len(images) < max(args.batch_sizes):
        raise UserError(f"{len(images)} images (of at most {MOST_IMAGES}); expected at least {max(args.batch_sizes)}, "
                        "the largest of --batch-sizes")
    rows = measure(inference_network(network, device), images, args, device)
    kind = f"{len(images)} images" if images else f"noise of {args.height}x{args.width}"
    finish(args, device, f"detection on {kind}, {network.backbone.name}, "
           f"{len(description['classes'])} classes, {args.suppression}", rows)


if __name__ == "__main__":
    run_script(main)
