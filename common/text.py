"""Numbers and findings as text."""


def percent(fraction: float | None, decimals: int, width: int = 0) -> str:
    """0.8873 -> "88.73" with two decimals, right-aligned in `width` columns; None -> "-"."""
    text = "-" if fraction is None else f"{100 * fraction:.{decimals}f}"
    return text.rjust(width)


def counted(number: int, noun: str) -> str:
    """"1 error", "2 errors", "0 errors"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def print_findings(errors: list[str], notes: list[str], verdict: str = "") -> int:
    """Print every finding on a line of its own, then how many there are, then `verdict`. Returns the exit status: 1
    where there are errors, else 0."""
    for error in errors:
        print(f"error: {error}")
    for note in notes:
        print(f"note: {note}")
    print(f"{counted(len(errors), 'error')}, {counted(len(notes), 'note')}{verdict}")
    return 1 if errors else 0
