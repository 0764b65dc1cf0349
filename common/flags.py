"""Settings as fields of a dataclass, flags of the same names, and the rule that an output folder holds one run."""

import argparse
import dataclasses
import functools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from common.files import read_json
from common.runtime import UserError


def setting(default: Any, text: str, **flag: Any) -> Any:
    """A field of a dataclass of settings: its default, its help text, and further arguments for argparse (choices,
    type)."""
    return dataclasses.field(default=default, metadata={"help": text, "flag": flag})


def expects(form: str) -> Callable[[Callable[[str], Any]], Callable[[str], Any]]:
    """Decorator of a flag's type: where that raises ValueError, argparse says that it expected `form`."""
    def decorate(parse: Callable[[str], Any]) -> Callable[[str], Any]:
        @functools.wraps(parse)
        def parse_or_say(text: str) -> Any:
            try:
                return parse(text)
            except ValueError:
                raise argparse.ArgumentTypeError(f"{text!r}: expected {form}") from None
        return parse_or_say
    return decorate


NUMBERS: dict[Any, Callable[[str], Any]] = {int: expects("a whole number")(int), float: expects("a number")(float)}


@expects("epochs joined by commas, such as 33,63,93")
def epochs_list(text: str) -> tuple[int, ...]:
    """"33,63,93" -> (33, 63, 93), the type of --lr-steps."""
    return tuple(int(number) for number in text.split(",") if number.strip())


def flag_text(value: Any) -> str:
    """The value of a setting as it is given after its flag; of one that is on or off, one of these words."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def add_flags(parser: argparse.ArgumentParser, fields: Iterable[dataclasses.Field[Any]], defaults: Any = None) -> None:
    """Add a flag to `parser` for each of the dataclass fields; the parsed namespace holds only the flags that were
    given. defaults: the settings without flags, to be shown in the help; None where they differ from stage to stage."""
    for field in fields:
        options = dict(field.metadata["flag"], help=field.metadata["help"], default=argparse.SUPPRESS)
        default = getattr(defaults, field.name, None)
        if default not in (None, "") and "(default" not in options["help"]:
            options["help"] += f" (default: {flag_text(default)})"
        if field.type is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            kind = options.get("type", field.type)
            options["type"] = NUMBERS.get(kind, kind)
        if "choices" not in options and field.type is not bool:
            options.setdefault("metavar", field.name.upper())
        parser.add_argument("--" + field.name.replace("_", "-"), **options)


def parse_flags(settings: Any, description: str | None, argv: Sequence[str] | None = None,
                unused: Collection[str] = ()) -> dict[str, Any]:
    """{name: value} of the flags that were given.

    settings: the block at the top of a script. description: the script's docstring. unused: names of settings that are
    no flags of the script."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     epilog="The defaults are the values at the top of the script.")
    add_flags(parser, [field for field in dataclasses.fields(settings) if field.name not in unused], settings)
    return vars(parser.parse_args(argv))


def with_flags(settings: Any, given: Mapping[str, Any], recipes: Mapping[str, Mapping[str, Any]]) -> Any:
    """`settings` as changed by the recipe that --recipe, or else `settings.recipe`, names, and then by the flags that
    were given. recipes: {name: {setting: value}}."""
    recipe = recipes.get(given.get("recipe", settings.recipe), {})
    return dataclasses.replace(settings, **{**recipe, **given})


def check_range(settings: Any, name: str, low: float, high: float) -> None:
    """Raise UserError unless the setting `name` is in low..high."""
    value = getattr(settings, name)
    if not low <= value <= high:
        raise UserError(f"--{name.replace('_', '-')} {value}: expected {low:g} to {high:g}")


def run_identity(stage: str, settings: Any, not_part: Collection[str], **more: Any) -> dict[str, Any]:
    """The plain values that identify a run: two runs with equal ones compute the same on the same device.

    not_part: names of settings that may differ within a run. more: values in place of settings (the precision that
    `auto` has become), or besides them (a fingerprint of the data, as `data`)."""
    values = {key: list(value) if isinstance(value, tuple) else value
              for key, value in dataclasses.asdict(settings).items() if key not in not_part}
    return {"stage": stage, **values, **more}


def was_trained(folder: Path) -> bool:
    """Whether the run in a folder has written anything but its settings: one that was killed before its first
    checkpoint has not."""
    return any((folder / name).exists() for name in ("last.pt", "log.jsonl", "results.json"))


def check_output(settings: Any, identity: dict[str, Any], data: str, unused: Collection[str] = (),
                 fixed_epochs: str = "") -> None:
    """Raise UserError if `settings.output` holds another run than that of `identity` (a `run_identity`), or this run
    and --resume is not given, or the results of a test.

    A folder with settings.json alone, of a run that was killed before it had trained, is free. A setting that
    settings.json lacks, being younger than the run, counts as its default. data: human-readable name of what
    identity["data"] tells apart. unused: names of settings that the stage does not use. fixed_epochs: why the run
    cannot go on for more --epochs than it was started with, "" where it can."""
    folder = Path(settings.output)
    path = folder / "settings.json"
    if not path.exists() and (folder / "results.json").exists():
        raise UserError(f"{folder}: holds the results of a test; give another --output")
    if not path.exists() or not was_trained(folder):
        return
    if not settings.resume:
        raise UserError(f"{folder}: holds a run already; go on with it by --resume, or give another --output")
    recorded = read_json(path)
    recorded = recorded if isinstance(recorded, dict) else {}
    if recorded.get("data") != identity["data"]:
        raise UserError(f"{folder}: holds a run on other {data} now; give another --output")
    defaults = {field.name: field.default for field in dataclasses.fields(settings)}
    for name, value in identity.items():
        if name in unused or name not in recorded and name not in defaults:  # the latter: not recorded at that time
            continue
        before = recorded.get(name, defaults.get(name))
        longer = name == "epochs" and isinstance(before, int) and value > before
        if before != value and not (longer and not fixed_epochs):
            reason = f" and cannot be extended, as {fixed_epochs}" if longer else ""
            raise UserError(f"{folder}: holds a run with {name.replace('_', '-')} {before}, not {value}{reason}; "
                            "give the settings it was started with, or another --output")


def check_test_flags(settings: Any, names: Collection[str]) -> None:
    """Raise UserError for a flag of `names`, those of a test alone, that is given without --test-only."""
    for name in names:
        if not settings.test_only and getattr(settings, name) not in ("", None):
            raise UserError(f"--{name.replace('_', '-')} {getattr(settings, name)}: is for a test alone; give "
                            "--test-only too, or leave it out")


def check_test_output(settings: Any, weights: Path) -> None:
    """Raise UserError if `settings.output` holds another run than that of the weights to be tested."""
    folder = Path(settings.output)
    if weights.resolve().parent != folder.resolve() and (folder / "settings.json").exists():
        raise UserError(f"{folder}: holds a run of its own; give another --output for the test of {weights}")
