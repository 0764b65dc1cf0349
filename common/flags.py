"""Settings that are fields of a dataclass, flags of the same names, and the rule that an output folder holds one run of
one group of settings."""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from common.files import read_json
from common.runtime import UserError


def setting(default, text, **flag):
    """A field of a dataclass of settings: its default, its help text, and what argparse is told besides (choices,
    type)."""
    return dataclasses.field(default=default, metadata={"help": text, "flag": flag})


def epochs_list(text):
    """"32,62,92" -> (32, 62, 92), the type of --lr-steps."""
    return tuple(int(number) for number in text.split(",") if number.strip())


def add_flags(parser, fields):
    """Give `parser` a flag for each of the dataclass fields; those that are not given stay out of the parsed
    namespace."""
    for field in fields:
        options = dict(field.metadata["flag"], help=field.metadata["help"], default=argparse.SUPPRESS)
        if field.type is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options.setdefault("type", field.type)
        if "choices" not in options and field.type is not bool:
            options.setdefault("metavar", field.name.upper())
        parser.add_argument("--" + field.name.replace("_", "-"), **options)


def parse_flags(fields, description, argv=None):
    """{name: value} of the flags that were given. description: a script's docstring."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     epilog="Settings that are not given have the values at the top of the script.")
    add_flags(parser, fields)
    return vars(parser.parse_args(argv))


def check_range(settings, name, low, high):
    """Raise UserError for the setting `name` if it is not in low..high."""
    value = getattr(settings, name)
    if not low <= value <= high:
        raise UserError(f"--{name.replace('_', '-')} {value}: expected {low:g} to {high:g}")


def run_identity(name, settings, not_part, **more):
    """The plain values that make a run what it is: two runs with equal ones compute the same on the same device.

    name: of the stage. not_part: names of settings whose change does not make it another run. more: in place of
    settings (what `auto` came to), or besides them (a fingerprint of the data, under `data`)."""
    values = {key: list(value) if isinstance(value, tuple) else value
              for key, value in dataclasses.asdict(settings).items() if key not in not_part}
    return {"stage": name, **values, **more}


def check_output(settings, mine, data):
    """Raise UserError if `settings.output` holds another run than the one that is `mine` (its `run_identity`), or this
    one and --resume is not given, or the results of a test. data: what is told apart by mine["data"], in words."""
    folder = Path(settings.output)
    path = folder / "settings.json"
    if not path.exists():
        if (folder / "results.json").exists():
            raise UserError(f"{folder}: holds the results of a test; give another --output")
        return
    if not settings.resume:
        raise UserError(f"{folder}: holds a run already; go on with it by --resume, or give another --output")
    theirs = read_json(path)
    theirs = theirs if isinstance(theirs, dict) else {}
    if theirs.get("data") != mine["data"]:
        raise UserError(f"{folder}: holds a run on other {data} now; give another --output")
    defaults = {field.name: field.default for field in dataclasses.fields(settings)}  # of settings younger than the run
    for name, value in mine.items():
        before = theirs.get(name, defaults.get(name))
        if before != value:
            raise UserError(f"{folder}: holds a run with {name.replace('_', '-')} {before}, not {value}; "
                            "give the settings it was started with, or another --output")


def check_test_output(settings: Any, weights: Path) -> None:
    """Raise UserError if `settings.output` holds another run than that of the weights to be tested."""
    folder = Path(settings.output)
    if weights.resolve().parent != folder.resolve() and (folder / "settings.json").exists():
        raise UserError(f"{folder}: holds a run of its own; give another --output for the test of {weights}")
