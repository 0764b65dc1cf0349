"""The documents name what exists: functions, files, flags, commands, links.

Names are looked up in the parsed sources, flags in the parsers of all commands: each command is run in this process as
far as the point where it would parse its arguments."""

import argparse
import ast
import contextlib
import functools
import io
import pkgutil
import re
import runpy
import shlex
import sys
import warnings
from pathlib import Path
from unittest import mock

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted([*(ROOT / name for name in ("README.md", "RESULTS.md", "CONTRIBUTING.md")), *ROOT.glob("docs/*.md")])
FOLDERS = ("common", "recognition", "preparation", "demo", "detection", "benchmarks")

REPOSITORY_FILES = (".py", ".md", ".bib", ".cff", ".toml", ".yaml", ".yml")
WRITTEN_FILES = (".json", ".jsonl", ".png", ".txt", ".pt")  # by the programs, or asked of the user
EXTERNAL = ("torch", "torchvision")  # packages whose functions a document may name
FOREIGN_MODULES = ("pip", "pytest", "venv")  # python -m
FLAG = re.compile(r"(?<![\w-])--[a-z][\w-]*")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


# ---- what exists -----------------------------------------------------------------------------------------------------


@functools.cache
def module_paths():
    """{dotted name: path} of every module but the tests."""
    paths = [*ROOT.glob("*.py"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}


@functools.cache
def sources():
    """The text of every module, of what tests share, and of the Makefile: in it are the names of settings, loss terms
    and files."""
    paths = [*module_paths().values(), ROOT / "tests" / "support.py", ROOT / "Makefile"]
    return "\n".join(path.read_text(encoding="utf-8") for path in paths)


@functools.cache
def syntax(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def attribute(body, name):
    """The statement in the body of a module or class that defines `name`; None where there is none."""
    for statement in body:
        targets = getattr(statement, "targets", [getattr(statement, "target", None)])
        names = [getattr(statement, "name", None), *(getattr(target, "id", None) for target in targets)]
        if name in names:
            return statement
    return None


def has_attributes(body, names):
    """Whether a module or class of this body has the attribute names[0], and that names[1], and so on."""
    for name in names:
        statement = attribute(body, name)
        if statement is None:
            return False
        body = getattr(statement, "body", [])
    return True


def is_defined(dotted):
    """Whether a dotted name exists: `package.module.function` or `module.function` of this repository, `Class.method`,
    a function of an external package, or, of a variable as in `step.outputs`, an attribute of that name."""
    parts = dotted.split(".")
    is_ours = False
    for count in range(len(parts), 0, -1):
        ending = "." + ".".join(parts[:count])
        paths = [path for name, path in module_paths().items() if f".{name}".endswith(ending)]
        is_ours = is_ours or bool(paths)
        if any(has_attributes(syntax(path).body, parts[count:]) for path in paths):
            return True
    if is_ours:
        return False
    if parts[0] in EXTERNAL:
        with contextlib.suppress(ImportError, AttributeError):
            return pkgutil.resolve_name(dotted) is not None
        return False
    if parts[0][0].isupper():
        return any(has_attributes(syntax(path).body, parts) for path in module_paths().values())
    return all(re.search(rf"\.{name}\b", sources()) for name in parts[1:])


class Parser(BaseException):
    """Raised in place of parsing: the parser of a command, and the name of the method that it was to parse with."""


@functools.cache
def commands():
    """{"predict.py" or "detection.predict": (its parser, the name of its parsing method)}."""
    methods = ("parse_args", "parse_intermixed_args")

    def stop(method):
        def parse(parser, *_):
            raise Parser(parser, method)
        return parse

    found = {}
    for name, path in module_paths().items():
        if '__name__ == "__main__"' not in path.read_text(encoding="utf-8"):
            continue
        at_root = path.parent == ROOT
        with (contextlib.ExitStack() as stack, warnings.catch_warnings()):
            warnings.simplefilter("ignore")  # of a module that has been imported already
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
            stack.enter_context(mock.patch.object(sys, "argv", [str(path)]))
            for method in methods:
                stack.enter_context(mock.patch.object(argparse.ArgumentParser, method, stop(method)))
            try:
                if at_root:
                    runpy.run_path(str(path), run_name="__main__")
                else:
                    runpy.run_module(name, run_name="__main__")
            except Parser as caught:
                found[path.name if at_root else name] = caught.args
    return found


def all_parsers(parser):
    """A parser and its sub-parsers, which are told not to complete shortened flags."""
    parser.allow_abbrev = False
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for sub in action.choices.values():
                yield from all_parsers(sub)


@functools.cache
def flags_of(command):
    """The flags of a command."""
    return {flag for parser in all_parsers(commands()[command][0]) for action in parser._actions
            for flag in action.option_strings}


@functools.cache
def torchrun():
    """The parser of torchrun."""
    from torch.distributed.run import get_args_parser
    return get_args_parser()


# ---- what documents say ----------------------------------------------------------------------------------------------


def without_fences(text):
    return FENCE.sub("", text)


def code_spans(text):
    """What stands in backticks outside the fenced blocks; a span may go on in the next line."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", without_fences(text))]


def command_lines(text):
    """[[word]] of the lines of all ```bash blocks; NAME="..." in a block is put in where $NAME stands."""
    lines = []
    for language, block in FENCE.findall(text):
        if language != "bash":
            continue
        variables = {}
        for line in re.split(r"\n(?!\s*\Z)|\n\Z", block.replace("\\\n", " ")):
            for name, value in variables.items():
                line = line.replace(f"${name}", value)
            words = shlex.split(line, comments=True)
            assigned = re.fullmatch(r"([A-Z]+)=(.*)", words[0]) if len(words) == 1 else None
            if assigned:
                variables[assigned[1]] = assigned[2]
            elif words:
                lines.append(words)
    return lines


def complaint_of_parsing(parser, method, words):
    """What a parser says of the words after a command, "" for nothing."""
    list(all_parsers(parser))
    with contextlib.redirect_stderr(io.StringIO()) as errors, contextlib.redirect_stdout(io.StringIO()):
        try:
            getattr(parser, method)(words)
        except SystemExit as ended:
            return errors.getvalue().strip().rpartition("\n")[2] if ended.code else ""
    return ""


def command_findings(words):
    """What is wrong with a command line."""
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        return [f"make {word}: no such target" for word in words[1:] if "=" not in word and word not in targets]
    if words[0] == "torchrun":
        complaint = complaint_of_parsing(torchrun(), "parse_args", words[1:])
        if complaint:
            return [complaint]
        args = torchrun().parse_args(words[1:])
        words = ["python", *["-m"] * args.module, args.training_script, *args.training_script_args]
    if words[0] != "python":
        return []
    name, rest = (words[2], words[3:]) if words[1] == "-m" else (words[1], words[2:])
    if words[1] == "-m" and name.split(".")[0] in FOREIGN_MODULES:
        return []
    if name not in commands():
        return [f"{name}: no such command"]
    complaint = complaint_of_parsing(*commands()[name], rest)
    return [complaint] if complaint else []


def span_findings(span, sketches=""):
    """What is wrong with a piece of text in backticks: a file, a dotted or plain name, flags.

    sketches: the Python blocks of the document, whose names need not exist yet."""
    words = span.removeprefix("python ").removeprefix("-m ").split()
    if words[0] == "torchrun" or words[0] == "pip":
        return []
    known = flags_of(words[0]) if words[0] in commands() else set().union(*map(flags_of, commands()))
    wrong = [f"{flag}: no such flag" for flag in FLAG.findall(span) if flag not in known]
    if words[0] == "make":
        wrong += command_findings(words)
    if not re.fullmatch(r"[\w./*-]+(\(\))?", span):
        return wrong
    if span.endswith(REPOSITORY_FILES) or span == "Makefile" or span.split("/")[0] in (*FOLDERS, "tests", "docs"):
        exists = any(ROOT.glob(span.rstrip("/").replace("NAME", "*")))
    elif span.endswith(WRITTEN_FILES):
        exists = (ROOT / span).exists() or span.rpartition("/")[2] in sources()
    elif re.fullmatch(r"[A-Za-z]\w*(\.[A-Za-z]\w*)+(\(\))?", span):
        exists = is_defined(span.removesuffix("()"))
    elif re.fullmatch(r"[A-Za-z]+(_[A-Za-z0-9]+)+(\(\))?|[A-Z][a-z]+[A-Z]\w+", span):
        exists = re.search(rf"\b{span.removesuffix('()')}\b", sources() + sketches)
    else:
        exists = True
    return wrong if exists else [*wrong, f"{span}: not in the repository"]


def anchors(text):
    """The anchors of a document's headings, as GitHub makes them."""
    made = []
    for heading in re.findall(r"^#+ (.+)$", without_fences(text), re.MULTILINE):
        anchor = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        made.append(f"{anchor}-{made.count(anchor)}" if anchor in made else anchor)
    return made


def link_findings(text, path):
    """Relative links that lead nowhere."""
    wrong = []
    for target in re.findall(r"\]\(([^)\s]+)\)", without_fences(text)):
        file, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        place = path.parent / file if file else path
        if not place.exists():
            wrong.append(f"{target}: no such file")
        elif anchor and anchor not in anchors(place.read_text(encoding="utf-8") if file else text):
            wrong.append(f"{target}: no such heading")
    return wrong


def findings(text, path):
    """Everything that is wrong with a document."""
    wrong = [f"a command outside of a bash block: {line.strip()}" for line in
             re.findall(r"^(?: {4}|\t)(?:python|torchrun|make) .*$", without_fences(text), re.MULTILINE)]
    for words in command_lines(text):
        wrong += [f"{' '.join(words)}: {finding}" for finding in command_findings(words)]
    sketches = "".join(block for language, block in FENCE.findall(text) if language == "python")
    for span in code_spans(text):
        wrong += span_findings(span, sketches)
    return wrong + link_findings(text, path)


# ---- the tests -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_what_a_document_names_exists(path):
    assert findings(path.read_text(encoding="utf-8"), path) == []


def test_links_of_the_changelog_lead_somewhere():
    path = ROOT / "CHANGELOG.md"
    assert link_findings(path.read_text(encoding="utf-8"), path) == []


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 200


def test_the_map_names_every_module():
    spans = code_spans((ROOT / "docs" / "code.md").read_text(encoding="utf-8"))
    named = {path for span in spans if span.endswith(".py") for path in ROOT.glob(span)}
    modules = {path for path in module_paths().values() if path.name != "__init__.py"}
    assert sorted(path.relative_to(ROOT).as_posix() for path in modules - named) == []


def test_the_linter_of_a_commit_is_that_of_make_test():
    pins = [re.findall(r"ruff==([\d.]+)", (ROOT / name).read_text(encoding="utf-8"))
            for name in ("requirements-dev.txt", ".pre-commit-config.yaml")]
    assert len(pins[0]) == 1 and pins[0] == pins[1]


def test_every_command_is_known():
    assert {"prepare_dataset.py", "baseline_resnet50.py", "dota_baseline_cl_t1.py", "run_all.py", "export.py",
            "detection.train_ld", "detection.predict", "demo.draw_ships", "benchmarks.bench_data"} <= set(commands())


RIGHT = """# A heading: of `two` parts
See `common.files.save_checkpoint`, `losses.balanced_softmax`, `Stage.teachers`, `step.outputs`, `sketched_name`,
`ClassAwareSampler.SelfCalibratedBatchSampler.update()`, `detection.data`,
`torch.export`, `dota_baseline_*.py`, `detection/`, `results.json`, `batch_size`, `--no-distillation`,
`baseline_resnet50.py --lr 0.1`, [here](#a-heading-of-two-parts) and [there](docs/data.md#check).
```bash
FLAGS="--depth 18 \\
  --seed 1"
torchrun --nproc_per_node 2 -m detection.train_ld $FLAGS   # two processes
make test
```
```python
sketched_name = 1
```
"""


def test_a_right_document_has_no_findings():
    assert findings(RIGHT, ROOT / "README.md") == []


@pytest.mark.parametrize("text", [
    "`common.files.no_such_function`", "`distillation.no_such_function`", "`Stage.no_field`", "`step.no_such_field`",
    "`recognition.no_such_module.function`", "`recognition.stage.Stage.no_field`",
    "`torch.no_such_thing`", "`no_such_script.py`", "`detection/no_such_folder/`", "`no_such_result.json`",
    "`no_such_setting`", "`NoSuchClass`", "`--no-such-flag`", "`--lr 0.1 --no-such-flag`", "`predict.py --lr 0.1`",
    "`make no-such-target`", "[link](docs/no_such_page.md)", "[link](docs/data.md#no-such-heading)", "[link](#nowhere)",
    "    python predict.py --weights FILE images/",
    "```bash\npython no_such_script.py\n```", "```bash\npython -m detection.no_such_command\n```",
    "```bash\npython predict.py --weights FILE images/ --no-such-flag\n```", "```bash\npython predict.py images/\n```",
    "```bash\npython baseline_resnet50.py --epo 3\n```", "```bash\npython baseline_resnet50.py --schedule none\n```",
    "```bash\ntorchrun --nproc_per_node 2 baseline_resnet50.py \\\n  --no-such-flag\n```",
    "```bash\ntorchrun --no_such_flag 2 baseline_resnet50.py\n```", "```bash\nmake no-such-target\n```",
])
def test_a_wrong_document_has_a_finding(text):
    assert len(findings(text + "\n", ROOT / "README.md")) == 1
