"""Which precision is fast on this device, for `--precision auto`: by what the processor has and, where that does not
tell, by a short measurement, which is kept for the next start."""

import os
import platform
import statistics
import sys
import time
import zlib
from pathlib import Path

import torch
from torch import nn

from common.files import read_json, write_json
from common.runtime import UserError, autocast, max_over_processes, processor_name, rank

PRECISIONS = ("fp32", "bf16")
MARGIN = 1.2  # times as fast bf16 has to be: below that its coarser sums buy nothing
ROUNDS = 9  # timed steps in each precision
ENOUGH = 1.0  # seconds after which no further round is begun

# The processor's own time, which other programs do not lengthen; that of Windows is too coarse.
CLOCK = time.perf_counter if sys.platform == "win32" else time.process_time
CPUINFO = "/proc/cpuinfo"  # where Linux describes the processor
# Extensions of x86 that work on bf16, by the names that Linux and torch both give them.
BF16_EXTENSIONS = {"amx_tile", "amx_bf16", "avx512_bf16", "avx_ne_convert"}


def resolve_precision(name, device):
    """`fp32`, `bf16` or `auto` -> `fp32` or `bf16`, on every process what the first comes to. `auto` is bf16 only where
    it is fast: see `known_precision` and `measured_precision`. fp32 means it: TF32 convolutions are switched off."""
    if name not in (*PRECISIONS, "auto"):
        raise UserError(f"--precision {name}: expected fp32, bf16 or auto")
    if name == "auto":
        fast = (known_precision(device) or measured_precision(device)) if rank() == 0 else "fp32"
        name = PRECISIONS[max_over_processes(PRECISIONS.index(fast), device)]
    if name == "fp32":
        torch.backends.cudnn.allow_tf32 = False
    return name


def precision_of_test(name: str, device: torch.device) -> str:
    """As `resolve_precision`, but `auto` is fp32: a number that is compared with a published one should not depend on
    the machine."""
    return resolve_precision("fp32" if name == "auto" else name, device)


def computes_in(precision, device):
    """Whether a device computes in a precision at all, fast or not."""
    return precision == "fp32" or device.type == "cpu" or (device.type == "cuda" and torch.cuda.is_bf16_supported())


# ---- by what the processor has ---------------------------------------------------------------------------------------


def known_precision(device):
    """The fast precision where the hardware's own description tells it, else None.

    CUDA: bf16 on devices with bf16 units, as torch says (`torch.cuda.is_bf16_supported`). MPS: fp32. A CPU, when torch
    has oneDNN and no variable of the environment keeps oneDNN from instructions:

    - x86 with AMX tiles: bf16. Linux and torch must both say so: the tiles need the kernel's leave too.
    - x86 without any bf16 instruction: fp32. Emulated bf16 takes several times as long.
    - all else: None. AVX512-BF16 without AMX makes a training step far faster on some processors, and no faster on
      an Intel Xeon that is kept from its AMX. Of AVX-NE-CONVERT and of ARM's extensions nothing is known here.

    Rests on the flags of /proc/cpuinfo and on torch's queries of the processor (CPUID)."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    if device.type != "cpu":
        return "fp32"
    limited = any(name in os.environ for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"))
    known = [extensions for extensions in (kernel_extensions(), torch_extensions()) if extensions is not None]
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    if not known or not x86 or limited or not torch.backends.mkldnn.is_available():
        return None
    if all("amx_tile" in extensions for extensions in known):
        return "bf16"
    return None if any(extensions & BF16_EXTENSIONS for extensions in known) else "fp32"


def kernel_extensions():
    """The processor's extensions of which Linux lets programs know, a set of names; None where it does not tell."""
    try:
        with open(CPUINFO, encoding="utf-8") as file:
            line = next(line for line in file if line.startswith(("flags", "Features")))  # x86, ARM
    except (OSError, ValueError, StopIteration):
        return None
    return set(line.partition(":")[2].split())


def torch_extensions():
    """The processor's extensions of which torch knows, a set of names; None where this release cannot be asked."""
    if hasattr(torch.cpu, "get_capabilities"):
        return {name for name, value in torch.cpu.get_capabilities().items() if value is True}
    # Releases before have private queries, not all of them each.
    queries = {"amx_tile": getattr(torch.cpu, "_is_amx_tile_supported", None),
               "avx512_bf16": getattr(torch.cpu, "_is_avx512_bf16_supported", None)}
    return {name for name, query in queries.items() if query()} if all(queries.values()) else None


# ---- by measurement --------------------------------------------------------------------------------------------------


def measured_precision(device):
    """The precision in which a small training step is fast on this CPU: as stored by an earlier start, else measured
    now, stored, and said in one line on stderr. A store that cannot be read or written costs a measurement, no more."""
    table, key = read_store(), store_key()
    stored = table.get(key)
    if isinstance(stored, dict) and stored.get("precision") in PRECISIONS:
        return stored["precision"]
    try:
        fp32, bf16 = (round(1000 * seconds, 2) for seconds in measure(training_step(device)))
    except RuntimeError as error:  # a torch built without these convolutions
        print(f"note: --precision auto is fp32: bf16 could not be timed ({str(error)[:120]!r})", file=sys.stderr)
        return "fp32"
    chosen = "bf16" if fp32 >= MARGIN * bf16 else "fp32"
    trouble = write_store({**table, key: {"precision": chosen, "fp32_ms": fp32, "bf16_ms": bf16}})
    print(f"note: --precision auto is {chosen}: a small training step took {fp32:g} ms in fp32 and {bf16:g} ms in bf16 "
          f"on this processor{trouble}", file=sys.stderr, flush=True)
    return chosen


def training_step(device):
    """A function that does a small training step in the precision that it is given: forward and backward through three
    convolutions as in a ResNet's bottleneck, with their batch norms. It leaves torch's random numbers as they were."""
    with torch.random.fork_rng(devices=()):
        layers = []
        for channels, size, inputs in ((64, 1, 256), (64, 3, 64), (256, 1, 64)):
            layers += [nn.Conv2d(inputs, channels, size, padding=size // 2, bias=False), nn.BatchNorm2d(channels),
                       nn.ReLU()]
        network = nn.Sequential(*layers).to(device, memory_format=torch.channels_last)
        images = torch.rand(2, 256, 28, 28).to(device, memory_format=torch.channels_last).requires_grad_()

    def step(precision):
        with autocast(device, precision):
            outputs = network(images)  # (2, 256, 28, 28)
        outputs.float().mean().backward()

    return step


def measure(step, clock=CLOCK):
    """The seconds that step("fp32") and step("bf16") take one core: medians of ROUNDS rounds after one to warm up, or
    of as many as are begun within ENOUGH seconds."""
    taken, threads = {name: [] for name in PRECISIONS}, torch.get_num_threads()
    torch.set_num_threads(1)  # several would wait for one another, and on a busy machine that is all one would measure
    try:
        while len(taken["bf16"]) <= ROUNDS and sum(map(sum, taken.values())) < ENOUGH:
            for name, seconds in taken.items():
                started = clock()
                step(name)
                seconds.append(clock() - started)
    finally:
        torch.set_num_threads(threads)
    return tuple(statistics.median(seconds[1:] or seconds) for seconds in taken.values())


# ---- what was measured before ----------------------------------------------------------------------------------------


def store_path():
    """The file of the user's cache folder that holds what was measured: {`store_key`: precision and times}."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "t2fts" / "precision.json"


def store_key():
    """What a measurement depends on, human-readable: the processor, torch, and oneDNN's variables."""
    extensions = sorted(set().union(kernel_extensions() or (), torch_extensions() or ()))
    variables = sorted(f"{name}={value}" for name, value in os.environ.items() if name.startswith(("ONEDNN_", "DNNL_")))
    # A name like "aarch64" stands for many processors; their extensions tell more of them apart.
    digest = f"{zlib.crc32(' '.join(extensions).encode()):08x}"
    return "; ".join([processor_name(), f"extensions {digest}", f"torch {torch.__version__}", *variables])


def read_store():
    """The stored table, empty where there is none that can be read."""
    try:
        table = read_json(store_path())
    except (UserError, OSError, RuntimeError):  # the last: no home folder is known
        return {}
    return table if isinstance(table, dict) else {}


def write_store(table):
    """Store the table. Returns "" or, for the end of a line, why it was not possible."""
    try:
        write_json(store_path(), table)
    except (UserError, OSError, RuntimeError) as error:
        return f"; not stored ({error})"
    return ""
