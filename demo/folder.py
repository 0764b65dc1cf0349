"""The folder of a demo set: complete or absent."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common.files import read_json
from common.runtime import UserError


def is_complete(destination: Path, settings: dict[str, Any]) -> bool:
    """Whether `destination` holds the demo set of these settings. Raises UserError where it holds anything else."""
    if not destination.exists():
        return False
    if not destination.is_dir():
        raise UserError(f"{destination} is a file, not a folder")
    if not any(destination.iterdir()):
        return False
    if not (destination / "demo.json").is_file():
        raise UserError(f"{destination} is not empty and holds no demo set; name a new folder")
    if read_json(destination / "demo.json") != settings:
        raise UserError(f"{destination} holds a demo set of other settings (see its demo.json); name a new folder")
    return True


def write_whole(destination: str | Path, settings: dict[str, Any],
                write: Callable[[Path, dict[str, Any]], None]) -> bool:
    """Let write(folder, settings) fill a folder beside `destination`, and rename it at the end, so that the set is
    complete or absent. Returns False, writing nothing, if it is complete already."""
    destination = Path(destination).resolve()
    if is_complete(destination, settings):
        return False
    partial = destination.with_name(f".{destination.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
        write(partial, settings)
        if destination.is_dir():
            destination.rmdir()
        partial.rename(destination)
    except OSError as error:
        raise UserError(f"{destination} could not be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return True
