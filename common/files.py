"""Files that are whole or absent: JSON, checkpoints, logs. What is read may be damaged or hostile; what is written may
meet a full disk."""

import contextlib
import hashlib
import io
import json
import os
import warnings
import zipfile
from pathlib import Path

import torch

from common.runtime import UserError, rank

# The kinds of numbers that weights are made of.
NUMBERS = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int32, torch.int64)


@contextlib.contextmanager
def atomic_path(path):
    """Yield a temporary path beside `path`; on success it is flushed to disk and renamed to `path`, else deleted.

    Whoever reads `path` sees the old file or the new one, never a part. Raises UserError where the disk is full or the
    folder cannot be written."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "r+b") as file:  # Windows flushes only what is open for writing
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, UnicodeEncodeError) as error:  # the latter: a file name that is not UTF-8, to go into a text
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: could not be written ({reason}); what was there before is untouched")
    finally:
        temporary.unlink(missing_ok=True)


def remove_partials(folder, pattern="*"):
    """Remove the temporary files that killed processes have left of the files of `folder` that match `pattern`. Only
    for who knows that no other process writes them."""
    for left in Path(folder).glob(f".{pattern}.*.partial"):
        left.unlink(missing_ok=True)


def write_json(path, value):
    """Write `value` as indented JSON, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def read_json(path):
    """The JSON value in `path`. Raises UserError naming the file and line where it is absent or not JSON."""
    path = Path(path)
    if os.path.exists(path) and not os.path.isfile(path):  # a named pipe would be waited for
        raise UserError(f"{path}: could not be read (not a file)")
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not valid JSON ({error.msg})") from None
    # A ValueError: text that is not UTF-8, or a number of more digits than Python converts.
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: could not be read ({getattr(error, 'strerror', None) or error})") from None


def list_lines(path):
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


def sha256_of(path):
    """Hexadecimal SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


# ---- checkpoints and logs --------------------------------------------------------------------------------------------


def save_checkpoint(path, checkpoint):
    """Write a dict of tensors and plain Python types, atomically. Only the first process writes."""
    if rank() == 0:
        with atomic_path(path) as temporary:
            try:
                torch.save(checkpoint, temporary)
            except RuntimeError as error:  # torch reports a full disk as a RuntimeError of its zip writer
                with open(temporary, "ab") as file:
                    file.write(bytes(1 << 20))  # on a full disk this fails, and says why
                raise OSError(f"{str(error).splitlines()[0]}") from error


def load_checkpoint(path):
    """The object saved in `path`, on the CPU, read with `weights_only=True`: a pickle that would run code is refused.

    Raises UserError where the file is absent, truncated, or not a file of tensors and plain types, and for one that
    would grow when read: torch.save never compresses, a bomb does."""
    path = Path(path)
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such checkpoint")
    try:
        grows = unpacked_size(path) > path.stat().st_size
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about damaged bytes; the error line says enough
            checkpoint = None if grows else torch.load(path, map_location="cpu", weights_only=True)
    # A damaged pickle can fail in any way at all, so anything that reading it raises means "not a checkpoint".
    except Exception as error:
        hint = "truncated, damaged, or not a file that torch wrote"
        if isinstance(error, PermissionError):
            hint = "it may not be read"
        elif "Weights only load failed" in str(error) and "Unsupported operand" not in str(error):
            hint = "holds something other than tensors and plain types; refused, as loading it could run code"
        raise UserError(f"{path}: not a usable checkpoint ({hint})") from None
    if grows:
        raise UserError(f"{path}: not a usable checkpoint (refused: compressed, larger inside than outside)")
    return checkpoint


def unpacked_size(path):
    """Bytes of a zip archive's entries, 0 for a file that is none."""
    if not zipfile.is_zipfile(path):
        return 0
    with zipfile.ZipFile(path) as archive:
        return sum(entry.file_size for entry in archive.infolist())


def is_stored_whole(tensor):
    """Whether a tensor is dense numbers, each of them in the file: neither sparse, quantised or complex, nor a few
    numbers that claim to be many."""
    return (tensor.layout == torch.strided and not tensor.is_meta and tensor.dtype in NUMBERS
            and tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes())


def check_entries(path, state, expected, owner):
    """Raise UserError naming the first missing, unknown or misshapen entry of a state dict read from `path`.

    expected: {name: tensor}. owner: in words, whose entries these are."""
    for complaint, names in (("lacks", [name for name in expected if name not in state]),
                             ("holds the unknown", [name for name in state if name not in expected])):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UserError(f"{path}: {complaint} {str(names[0])[:80]}{more}; expected the {len(expected)} entries of "
                            f"{owner}")
    for name, value in expected.items():
        found = state[name]
        if not isinstance(found, torch.Tensor) or not is_stored_whole(found):
            raise UserError(f"{path}: {name} is no dense tensor of numbers")
        if found.shape != value.shape:
            raise UserError(f"{path}: {name} has shape {tuple(found.shape)}; expected {tuple(value.shape)}")


def is_metadata(value: object, kinds: dict[str, type]) -> bool:
    """Whether `value` is metadata of a checkpoint: a dict with an entry of each of the kinds, its class names strings.

    kinds: {name: type}, `classes` a list."""
    if not isinstance(value, dict) or not all(isinstance(value.get(name), kind) for name, kind in kinds.items()):
        return False
    return all(isinstance(name, str) for name in value["classes"])


def publish_checkpoint(network, description, folder, name):
    """Write a network's weights and description to FOLDER/NAME-12345678.pt, the start of the file's SHA-256. The same
    weights and description give the same bytes, and so the same name."""
    model = {name: value.contiguous() for name, value in network.state_dict().items()}
    content = io.BytesIO()  # a file's own name would become part of its bytes
    torch.save({"model": model, "description": without_paths(description)}, content)
    digest = hashlib.sha256(content.getvalue()).hexdigest()
    path = folder / f"{name}-{digest[:8]}.pt"
    with atomic_path(path) as temporary:
        temporary.write_bytes(content.getvalue())
    print(f"{path}: {len(content.getvalue()) / 1e6:.1f} MB; SHA-256 {digest}")


def without_paths(description):
    """A description without the settings that may name files of the machine that trained."""
    if "settings" not in description:
        return description
    settings = {name: value for name, value in description["settings"].items()
                if name not in ("t1", "t2", "t3", "init") or value in ("none", "imagenet", "baseline")}
    return {**description, "settings": settings}


def read_json_lines(path, count=None):
    """The objects in the first `count` lines (None: in all) of a file that `append_json_line` wrote; none of an absent
    one. Raises UserError naming file and line for anything else."""
    values = []
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


def append_json_line(path, record):
    """Append one JSON object as a line to a log, on the first process only."""
    if rank() == 0:
        try:
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise UserError(f"{path}: could not be written ({error.strerror})") from None
