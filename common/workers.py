"""Work on images in several processes."""

import multiprocessing
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from common.runtime import UserError

Job = TypeVar("Job")
Result = TypeVar("Result")


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent:
        parent.join()
    os._exit(1)


def _begin_process() -> None:
    """Make a process of `in_processes` exit silently at Ctrl-C and when its parent is killed. Otherwise it would wait
    for work for ever, and hold the locks of the parent that it was forked from."""
    signal.signal(signal.SIGINT, lambda *_: os._exit(1))
    threading.Thread(target=_end_with_parent, daemon=True).start()


def in_processes(function: Callable[[Job], Result], jobs: Sequence[Job],
                 processes: int | None = None) -> Iterator[Result]:
    """Yield `function(job)` for every job, in order, computed by several processes.

    processes: their number, None for one a core; with 1, or a single job, everything runs in this process. Raises
    UserError if a process is killed."""
    processes = min(processes or os.cpu_count() or 1, len(jobs), 60)  # Windows cannot wait for more than 61
    if processes <= 1:
        yield from map(function, jobs)
        return
    # Forked workers start in milliseconds; a spawned one would import torch first.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    with warnings.catch_warnings():
        # Python 3.12 warns that a forked child of a threaded parent may hang on a lock; these children only decode.
        warnings.simplefilter("ignore", DeprecationWarning)
        pool = ProcessPoolExecutor(processes, mp_context=context, initializer=_begin_process)
        try:
            yield from pool.map(function, jobs)
        except BrokenProcessPool:
            time.sleep(0.5)  # Ctrl-C may have reached the children first: its KeyboardInterrupt says what happened
            raise UserError("a decoding process was killed, probably for lack of memory") from None
        finally:
            pool.shutdown(cancel_futures=True)
