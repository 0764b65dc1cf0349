"""Settings as fields of a dataclass, and flags of the same names."""

import argparse
import dataclasses
import functools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

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


def check_test_flags(settings: Any, names: Collection[str]) -> None:
    """Raise UserError for a flag of `names`, those of a test alone, that is given without --test-only."""
    for name in names:
        if not settings.test_only and getattr(settings, name) not in ("", None):
            raise UserError(f"--{name.replace('_', '-')} {getattr(settings, name)}: is for a test alone; give "
                            "--test-only too, or leave it out")
