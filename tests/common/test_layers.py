"""The architecture: which module may import which."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("common", "recognition", "preparation", "demo", "detection", "benchmarks")
# Commands that run other commands: the stages in turn, and each stage again for another data set.
RUNNERS = {"run_all", *(path.stem for path in ROOT.glob("dota_*.py"))}


def modules():
    """{dotted name: path} of every module but the tests."""
    files = [*ROOT.glob("*.py"), *(file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py"))]
    names = {}
    for file in files:
        parts = file.relative_to(ROOT).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return names


MODULES = modules()


def imported_by(path):
    """The modules of this repository that a file imports, at its top or in a function."""
    imported = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            imported.add(node.module)
            imported |= {f"{node.module}.{alias.name}" for alias in node.names}
    return imported & MODULES.keys()


IMPORTS = {name: imported_by(path) for name, path in MODULES.items()}


def layer(name):
    """The folder of a module, or the module itself where it is at the root."""
    return name.partition(".")[0]


def is_command(name):
    return 'if __name__ == "__main__"' in MODULES[name].read_text(encoding="utf-8")


def violations(importers, forbidden):
    """["a imports b"] of the modules in `importers` that import one in `forbidden`; both are conditions on names."""
    return [f"{name} imports {other}" for name in sorted(IMPORTS) if importers(name)
            for other in sorted(IMPORTS[name]) if forbidden(other)]


def test_the_modules_are_found():
    assert {"resnet50", "common.files", "detection.engine", "benchmarks.common", "common"} <= MODULES.keys()
    assert {"common.runtime", "dataset", "recognition.stage", "resnet50"} <= IMPORTS["recognition.evaluation"]
    assert is_command("run_all") and is_command("demo.draw_ships") and not is_command("recognition.engine")


def test_common_imports_only_common():
    assert not violations(lambda name: layer(name) == "common", lambda name: layer(name) != "common")


def test_nothing_but_detection_and_benchmarks_imports_detection():
    assert not violations(lambda name: layer(name) not in ("detection", "benchmarks"),
                          lambda name: layer(name) == "detection")


def test_of_recognition_detection_imports_the_reader_of_its_checkpoints_alone():
    """Which --init of a detector takes."""
    found = violations(lambda name: layer(name) == "detection", lambda name: layer(name) not in ("detection", "common"))
    assert found == ["detection.network.backbone imports resnet50"]


def test_nothing_outside_benchmarks_imports_benchmarks():
    assert not violations(lambda name: layer(name) != "benchmarks", lambda name: layer(name) == "benchmarks")


def test_commands_are_not_imported():
    assert not violations(lambda name: name not in RUNNERS and layer(name) != "benchmarks", is_command)


def circle_of(imports):
    """A circle of names in {name: imported names}, [] where there is none."""
    done = set()

    def visit(name, path):
        if name in path:
            return path[path.index(name):] + [name]
        if name in done:
            return []
        for other in sorted(imports[name]):
            circle = visit(other, [*path, name])
            if circle:
                return circle
        done.add(name)
        return []

    return next((circle for circle in (visit(name, []) for name in sorted(imports)) if circle), [])


def test_circles_are_found():
    assert circle_of({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle_of({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_no_import_runs_in_a_circle():
    assert circle_of(IMPORTS) == []


def test_folders_import_in_one_direction():
    layers = {layer(name): set() for name in IMPORTS}
    for name, imported in IMPORTS.items():
        layers[layer(name)] |= {layer(other) for other in imported} - {layer(name)}
    assert circle_of(layers) == []
    assert "recognition" in layers["preparation"] and "recognition" in layers["demo"]
