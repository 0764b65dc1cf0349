"""Files that are whole or absent: JSON, checkpoints, logs. Files to be read may be damaged or hostile; the disk to be
written to may be full."""

import contextlib
import functools
import hashlib
import io
import json
import os
import tempfile
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from common.runtime import UserError, rank

# The kinds of numbers in weights.
NUMBERS = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int32, torch.int64)


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is flushed to disk and renamed to `path`, else deleted.

    Readers of `path` see the old file or the new one, never a part. Raises UserError where the disk is full or the
    folder cannot be written."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "r+b") as file:  # Windows flushes only files that are open for writing
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, UnicodeEncodeError) as error:  # the latter: a file name that is not UTF-8, to be written as text
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: could not be written ({reason}); what was there before is untouched")
    finally:
        temporary.unlink(missing_ok=True)


def check_output_file(path: str | Path) -> None:
    """Raise UserError where a file could not be written: to be called before the work whose result it will hold."""
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path}: is a folder; expected the name of a file to write")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise UserError(f"{path}: could not be written ({error.strerror})") from None


def remove_partials(folder: str | Path, pattern: str = "*") -> None:
    """Remove the temporary files that killed processes have left of files of `folder` that match `pattern`. The caller
    must know that no other process is writing them."""
    for partial in Path(folder).glob(f".{pattern}.*.partial"):
        partial.unlink(missing_ok=True)


def write_json(path: str | Path, value: Any, indent: int | None = 1) -> None:
    """Write `value` as JSON, atomically. indent: None for one line."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=indent) + "\n", encoding="utf-8")


def read_json(path: str | Path) -> Any:
    """The JSON value in `path`. Raises UserError naming the file and line where it is absent or not JSON."""
    path = Path(path)
    if os.path.exists(path) and not os.path.isfile(path):  # a named pipe would be waited for
        raise UserError(f"{path}: could not be read (not a file)")
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not valid JSON ({error.msg})") from None
    # ValueError: text that is not UTF-8, or a number with more digits than Python converts.
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: could not be read ({getattr(error, 'strerror', None) or error})") from None


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on a file, which the system drops when the process dies; nothing where the system or the
    file system has no such locks. Raises UserError where another process holds it."""
    with open(path, "rb") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{path.parent}: another run is at work here; give another --output") from None
        except (ImportError, OSError):
            pass
        yield


def list_lines(path: str | Path) -> list[tuple[int, str]]:
    """[(number, line)] of the lines of a list file that are not blank. Raises UserError for a file without any."""
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such list")
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: could not be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}:{error.object[:error.start].count(10) + 1}: not UTF-8 text") from None
    lines = [(number, line.strip()) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise UserError(f"{path}: the list is empty")
    return lines


def file_identity(path: str | Path) -> tuple[int, int]:
    """(device, inode) of a file, the same for every spelling of its path and every link to it."""
    status = os.stat(path)
    return status.st_dev, status.st_ino


def sha256_of(path: str | Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes; of a file that has not changed since, it is remembered."""
    status = os.stat(path)
    return _sha256(os.path.abspath(path), status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=1024)  # run_all asks for the same teachers for many stages
def _sha256(path: str, size: int, changed: int) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


# ---- checkpoints and logs --------------------------------------------------------------------------------------------


def save_checkpoint(path: str | Path, checkpoint: dict[str, Any]) -> None:
    """Write a dict of tensors and plain Python types, atomically, on the first process only."""
    if rank() == 0:
        with atomic_path(path) as temporary:
            try:
                torch.save(checkpoint, temporary)
            except RuntimeError as error:  # torch reports a full disk as a RuntimeError of its zip writer
                with open(temporary, "ab") as file:
                    file.write(bytes(1 << 20))  # on a full disk this fails, and says why
                raise OSError(f"{str(error).splitlines()[0]}") from error


def load_checkpoint(path: str | Path) -> Any:
    """The object saved in `path`, on the CPU, read with `weights_only=True`: a pickle that would run code is refused.

    Raises UserError where the file is absent, truncated, or holds anything but tensors and plain types, and where it
    would grow when read: torch.save never compresses, a decompression bomb does."""
    path = Path(path)
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such checkpoint")
    try:
        compressed = unpacked_size(path) > path.stat().st_size
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about damaged bytes; the error line says enough
            checkpoint = None if compressed else torch.load(path, map_location="cpu", weights_only=True)
    # A damaged pickle can raise any exception, and all of them mean "not a checkpoint".
    except Exception as error:
        hint = "truncated, damaged, or not a file that torch wrote"
        if isinstance(error, PermissionError):
            hint = "it may not be read"
        elif "Weights only load failed" in str(error) and "Unsupported operand" not in str(error):
            hint = "holds something other than tensors and plain types; refused, as loading it could run code"
        raise UserError(f"{path}: not a usable checkpoint ({hint})") from None
    if compressed:
        raise UserError(f"{path}: not a usable checkpoint (refused: compressed, larger inside than outside)")
    return checkpoint


def unpacked_size(path: str | Path) -> int:
    """Bytes of a zip archive's entries when unpacked, 0 for any other file."""
    if not zipfile.is_zipfile(path):
        return 0
    with zipfile.ZipFile(path) as archive:
        return sum(entry.file_size for entry in archive.infolist())


def is_stored_whole(tensor: torch.Tensor) -> bool:
    """Whether a tensor is dense and every number of it is stored: neither sparse, quantised or complex, nor a few
    numbers that claim to be many."""
    return (tensor.layout == torch.strided and not tensor.is_meta and tensor.dtype in NUMBERS
            and tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes())


def check_entries(path: str | Path, state: Mapping[str, Any], expected: Mapping[str, torch.Tensor], owner: str) -> None:
    """Raise UserError naming the first missing, unknown or misshapen entry of a state dict read from `path`.

    owner: human-readable name of the network that the entries belong to."""
    missing = [name for name in expected if name not in state]
    unknown = [name for name in state if name not in expected]
    for complaint, names in (("lacks", missing), ("holds the unknown", unknown)):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UserError(f"{path}: {complaint} {str(names[0])[:80]}{more}; expected the {len(expected)} entries of "
                            f"{owner}")
    for name, tensor in expected.items():
        entry = state[name]
        if not isinstance(entry, torch.Tensor) or not is_stored_whole(entry):
            raise UserError(f"{path}: {name} is no dense tensor of numbers")
        if entry.shape != tensor.shape:
            raise UserError(f"{path}: {name} has shape {tuple(entry.shape)}; expected {tuple(tensor.shape)}")


def is_metadata(value: object, kinds: dict[str, type]) -> bool:
    """Whether `value` is metadata of a checkpoint: a dict with an entry of each of the kinds, its class names strings.

    kinds: {name: type}, `classes` a list."""
    if not isinstance(value, dict) or not all(isinstance(value.get(name), kind) for name, kind in kinds.items()):
        return False
    return all(isinstance(name, str) for name in value["classes"])


def publish_checkpoint(network: torch.nn.Module, description: dict[str, Any], folder: Path, name: str) -> None:
    """Write a network's weights and description to FOLDER/NAME-12345678.pt, the start of the file's SHA-256. The same
    weights and description give the same bytes, and so the same name."""
    model = {name: value.contiguous() for name, value in network.state_dict().items()}
    content = io.BytesIO()  # torch.save would make the name of a file part of its bytes
    torch.save({"model": model, "description": without_paths(description)}, content)
    digest = hashlib.sha256(content.getvalue()).hexdigest()
    path = folder / f"{name}-{digest[:8]}.pt"
    with atomic_path(path) as temporary:
        temporary.write_bytes(content.getvalue())
    print(f"{path}: {len(content.getvalue()) / 1e6:.1f} MB; SHA-256 {digest}")


def without_paths(description: dict[str, Any]) -> dict[str, Any]:
    """A description without the settings that may name files of the training machine."""
    if "settings" not in description:
        return description
    settings = {name: value for name, value in description["settings"].items()
                if name not in ("t1", "t2", "t3", "init", "init_detector") or value in ("none", "imagenet", "baseline")}
    return {**description, "settings": settings}


def read_json_lines(path: str | Path, count: int | None = None) -> list[dict[str, Any]]:
    """The objects in the first `count` lines (None: all lines) of a log that `append_json_line` wrote; an absent log is
    empty. Raises UserError naming file and line for anything else."""
    values: list[dict[str, Any]] = []
    if not os.path.exists(path):
        return values
    for number, line in enumerate(Path(path).read_bytes().splitlines()[:count], 1):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            raise UserError(f"{path}:{number}: not a JSON object; remove the file to go on without the log so far")
        values.append(value)
    return values


def append_json_line(path: str | Path, record: dict[str, Any]) -> None:
    """Append one JSON object to a log as a line, on the first process only."""
    if rank() == 0:
        try:
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise UserError(f"{path}: could not be written ({error.strerror})") from None
