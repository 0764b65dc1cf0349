"""The precision that is fast on this device, for `--precision auto`: known from the processor's features or, where they
do not tell, from a short measurement, which is stored for later starts."""

import os
import platform
import statistics
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from common.files import read_json, write_json
from common.runtime import UserError, autocast, max_over_processes, processor_name, rank

PRECISIONS = ("fp32", "bf16")
MARGIN = 1.2  # the least speed-up for which bf16 is chosen: below it, coarser sums are not worth it
ROUNDS = 9  # timed steps in each precision
ENOUGH = 1.0  # seconds after which no further round begins

# The processor's own time, which other programs do not lengthen; that of Windows is too coarse.
CLOCK = time.perf_counter if sys.platform == "win32" else time.process_time
CPUINFO = "/proc/cpuinfo"  # Linux's description of the processor
# Extensions of x86 that work on bf16, by their names in both Linux and torch.
BF16_EXTENSIONS = {"amx_tile", "amx_bf16", "avx512_bf16", "avx_ne_convert"}


def resolve_precision(name: str, device: torch.device) -> str:
    """`fp32`, `bf16` or `auto` -> `fp32` or `bf16`, the first process's choice on every process. `auto` is bf16 where
    that is fast: see `known_precision` and `measured_precision`. With fp32, TF32 convolutions are switched off."""
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


def computes_in(precision: str, device: torch.device) -> bool:
    """Whether a device supports a precision, fast or not."""
    return precision == "fp32" or device.type == "cpu" or (device.type == "cuda" and torch.cuda.is_bf16_supported())


# ---- by the processor's features -------------------------------------------------------------------------------------


def known_precision(device: torch.device) -> str | None:
    """The fast precision where the hardware's features determine it, else None.

    CUDA: bf16 on devices with bf16 units (`torch.cuda.is_bf16_supported`), else fp32. MPS: fp32. A CPU, when torch has
    oneDNN and no environment variable restricts oneDNN's instructions:

    - x86 with AMX tiles: bf16. Both Linux and torch must report them: the tiles need the kernel's permission too.
    - x86 without any bf16 instruction: fp32. Emulated bf16 takes several times as long.
    - all others: None. AVX512-BF16 without AMX makes a training step far faster on some processors, and no faster on
      an Intel Xeon whose AMX is disabled. AVX-NE-CONVERT and ARM's extensions have not been measured.

    Reads the flags in /proc/cpuinfo and torch's queries of the processor (CPUID)."""
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


def kernel_extensions() -> set[str] | None:
    """Names of the processor's extensions that Linux reports to programs; None where it reports none."""
    try:
        with open(CPUINFO, encoding="utf-8") as file:
            line = next(line for line in file if line.startswith(("flags", "Features")))  # x86, ARM
    except (OSError, ValueError, StopIteration):
        return None
    return set(line.partition(":")[2].split())


def torch_extensions() -> set[str] | None:
    """Names of the processor's extensions that torch reports; None for a release of torch without the query."""
    if hasattr(torch.cpu, "get_capabilities"):
        return {name for name, value in torch.cpu.get_capabilities().items() if value is True}
    # Older releases have private queries, some of them not both.
    queries: dict[str, Callable[[], bool] | None] = {
        "amx_tile": getattr(torch.cpu, "_is_amx_tile_supported", None),
        "avx512_bf16": getattr(torch.cpu, "_is_avx512_bf16_supported", None)}
    if any(query is None for query in queries.values()):
        return None
    return {name for name, query in queries.items() if query and query()}


# ---- by measurement --------------------------------------------------------------------------------------------------


def measured_precision(device: torch.device) -> str:
    """The precision in which a small training step is fast on this CPU: the stored result of an earlier start, else
    measured now, stored, and reported in one line on stderr. Where the store cannot be read or written, every start
    measures."""
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


def training_step(device: torch.device) -> Callable[[str], None]:
    """A function that does a small training step in a given precision: forward and backward through three convolutions
    as in a ResNet's bottleneck, with their batch norms. torch's random state is left unchanged."""
    with torch.random.fork_rng(devices=()):
        layers: list[nn.Module] = []
        for channels, size, inputs in ((64, 1, 256), (64, 3, 64), (256, 1, 64)):
            layers += [nn.Conv2d(inputs, channels, size, padding=size // 2, bias=False), nn.BatchNorm2d(channels),
                       nn.ReLU()]
        network = nn.Sequential(*layers).to(device).to(memory_format=torch.channels_last)
        images = torch.rand(2, 256, 28, 28).to(device, memory_format=torch.channels_last).requires_grad_()

    def step(precision: str) -> None:
        with autocast(device, precision):
            outputs = network(images)  # (2, 256, 28, 28)
        outputs.float().mean().backward()

    return step


def measure(step: Callable[[str], None], clock: Callable[[], float] = CLOCK) -> tuple[float, float]:
    """The seconds that step("fp32") and step("bf16") take on one core: medians of ROUNDS rounds after one to warm up,
    or of as many as begin within ENOUGH seconds."""
    taken: dict[str, list[float]] = {name: [] for name in PRECISIONS}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several threads wait for one another, which on a busy machine hides the rest
    try:
        while len(taken["bf16"]) <= ROUNDS and sum(map(sum, taken.values())) < ENOUGH:
            for name, seconds in taken.items():
                started = clock()
                step(name)
                seconds.append(clock() - started)
    finally:
        torch.set_num_threads(threads)
    fp32, bf16 = (statistics.median(seconds[1:] or seconds) for seconds in taken.values())
    return fp32, bf16


# ---- stored measurements ---------------------------------------------------------------------------------------------


def store_path() -> Path:
    """The file of measurements in the user's cache folder: {`store_key`: precision and times}."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "t2fts" / "precision.json"


def store_key() -> str:
    """Human-readable key of a measurement: the processor, torch, and oneDNN's variables."""
    extensions = sorted(set().union(kernel_extensions() or (), torch_extensions() or ()))
    variables = sorted(f"{name}={value}" for name, value in os.environ.items() if name.startswith(("ONEDNN_", "DNNL_")))
    # A name like "aarch64" stands for many processors; their extensions help to tell them apart.
    digest = f"{zlib.crc32(' '.join(extensions).encode()):08x}"
    return "; ".join([processor_name(), f"extensions {digest}", f"torch {torch.__version__}", *variables])


def read_store() -> dict[str, Any]:
    """The stored table; empty where there is none, or none that can be read."""
    try:
        table = read_json(store_path())
    except (UserError, OSError, RuntimeError):  # RuntimeError: the home folder is unknown
        return {}
    return table if isinstance(table, dict) else {}


def write_store(table: dict[str, Any]) -> str:
    """Store the table. Returns "", or the reason why it was not possible, to end a line with."""
    try:
        write_json(store_path(), table)
    except (UserError, OSError, RuntimeError) as error:
        return f"; not stored ({error})"
    return ""
