"""The ground of every script: errors for the user, signals, devices, seeds, processes of torchrun. Independent of the
network and data that are trained."""

import contextlib
import io
import os
import platform
import random
import signal
import sys
from collections.abc import Callable
from datetime import timedelta
from types import FrameType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist


class UserError(Exception):
    """An error that the user can fix. The message is one line: what is wrong, where, and what was expected."""


class Stopped(Exception):
    """A signal stopped the work, and the work done so far is kept. The message says where, and how to go on."""

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.status = 128 + signal_number


def run_script(main: Callable[[], int | None]) -> None:
    """Call `main()` as a program and exit with the status that it returns (None is 0). A `UserError`, or an unforeseen
    OSError (a file name too long, say), becomes one line on stderr and exit status 2; a signal becomes status 128 plus
    its number (Ctrl-C: 130)."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # characters that the encoding lacks are printed escaped
    try:
        status = main()
    except (UserError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr, flush=True)
        status = 2
    except Stopped as stopped:
        say(f"\n{stopped}")
        status = stopped.status
    except torch.OutOfMemoryError as error:
        print(f"error: the GPU's memory is not enough ({one_line(error)[:120]}); give a smaller --batch-size, or "
              "smaller images", file=sys.stderr, flush=True)
        status = 2
    except RuntimeError as error:
        # How a rank notices that another has ended: gloo by the message, NCCL by an exception class.
        if not (world_size() > 1 and (isinstance(error, dist.DistError) or "gloo" in str(error))):
            raise
        print("error: another process of this job has ended or cannot be reached; see its own message; once that is "
              "fixed, the same command with --resume goes on", file=sys.stderr, flush=True)
        status = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        status = 130
    # A failed rank must not wait at exit for the others, which may be waiting for it in a collective.
    if status and dist.is_available() and dist.is_initialized():
        sys.stdout.flush()
        os._exit(status)
    stop_processes()
    sys.exit(status)


def one_line(error: BaseException) -> str:
    """An error as one printable line of bounded length, whatever a hostile file has put into it."""
    message = str(error)
    if isinstance(error, OSError):
        message = f"{error.filename}: {error.strerror}" if error.filename else error.strerror or message
    message = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(message.split()))
    return message if len(message) < 2000 else f"{message[:1000]} ... {message[-500:]}"


class StopSignals:
    """While entered, Ctrl-C (SIGINT), SIGTERM, with which clusters end a job, and SIGHUP, the end of a connection, are
    only recorded in `received` (0 for none), so that the work can stop at a point where its files are complete. A
    second Ctrl-C raises KeyboardInterrupt. Under nohup, which ignores SIGHUP, the work outlives the connection.

    tell: called with the number of each signal."""

    def __init__(self, tell: Callable[[int], object] = lambda number: None):
        self.received = 0
        self.tell = tell

    def __enter__(self) -> "StopSignals":
        numbers = [signal.SIGINT, signal.SIGTERM]
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # Windows has none
            numbers.append(signal.SIGHUP)
        self.before = {number: signal.signal(number, self._record) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _record(self, number: int, frame: FrameType | None) -> None:
        if self.received == number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
        self.tell(number)


# ---- device, seeds ---------------------------------------------------------------------------------------------------


def resolve_device(name: str) -> torch.device:
    """`auto`, `cpu`, `cuda`, `cuda:1`, `mps` -> torch.device. `auto` is CUDA where there is one, else the CPU.

    Under torchrun `auto` and `cuda` mean the GPU of this process's local rank. Raises UserError for anything else."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name}: unknown device; expected auto, cpu, cuda, cuda:N or mps") from None
    if device.type == "cuda":
        index = int(os.environ.get("LOCAL_RANK", 0)) if device.index is None else device.index
        if not torch.cuda.is_available() or index >= torch.cuda.device_count():
            count = torch.cuda.device_count() if torch.cuda.is_available() else 0
            raise UserError(f"--device {name}: torch {torch.__version__} sees {count} CUDA device(s); try --device cpu")
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
    elif device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device mps: torch sees no MPS device here; try --device cpu")
    elif device.type not in ("cpu", "mps"):
        raise UserError(f"--device {name}: unknown device; expected auto, cpu, cuda, cuda:N or mps")
    return device


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Context manager under which a forward pass runs in `precision`. Parameters and losses stay fp32."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch (every device). Raises UserError unless 0 <= seed < 2**32."""
    if not 0 <= seed < 2**32:
        raise UserError(f"--seed {seed}: expected 0 to {2**32 - 1}")
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def library_versions() -> dict[str, str]:
    """Versions of the libraries that results depend on."""
    import torchvision

    return {"python": platform.python_version(), "torch": str(torch.__version__),
            "torchvision": str(torchvision.__version__), "numpy": np.__version__}


def device_name(device: torch.device) -> str:
    """Human-readable name of a device: the GPU's name, or the CPU's model with the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}: {processor_name()}, {torch.get_num_threads()} threads"


def processor_name() -> str:
    """The CPU's model where the system reports it, else the name of its architecture."""
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration), open("/proc/cpuinfo", encoding="utf-8") as file:
        model = next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    return model


# ---- processes (torchrun) --------------------------------------------------------------------------------------------


def start_processes(device: torch.device) -> None:
    """Join the process group that torchrun describes in the environment; without torchrun do nothing."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=30))


def stop_processes() -> None:
    """Leave the process group, if there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """This process's number, 0 without torchrun."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """The number of processes that train together, 1 without torchrun."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_over_processes(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` summed over all processes, in place; returns it."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def max_over_processes(number: int, device: torch.device) -> int:
    """The largest `number` of all processes; numbers are not negative."""
    if world_size() == 1:
        return number
    largest = torch.tensor(number, device=device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)


def of_first_process(value: Any) -> Any:
    """The first process's `value`, a plain one, on every process."""
    values = [value]
    if world_size() > 1:
        dist.broadcast_object_list(values)
    return values[0]


def wait_for_all() -> None:
    """Return when every process has made this call."""
    if world_size() > 1:
        dist.barrier()


def say(*words: object) -> None:
    """Print on the first process only."""
    if rank() == 0:
        print(*words, flush=True)
