"""run_all.py: what it runs in which order, what it passes on, and several seeds with --resume."""

import json
from pathlib import Path

import pytest

import baseline_cl_s_weight
import run_all
from runtime import UserError

PERFECT = {"dataset": "d", "images": 4, "image_size": 32, "selected_on": "val", "device": "cpu",
           "per_class": [{"id": 0, "name": "a", "group": "head", "train": 9, "test": 4, "accuracy": 1.0}]}


@pytest.fixture
def calls(monkeypatch):
    """Stages are not run but written down; each leaves results whose accuracy is its place in the order."""
    commands = []

    def note(command, what):
        commands.append((Path(command[1]).name, what, command[2:]))
        folder = Path(value_of(command, "--output"))
        folder.mkdir(parents=True, exist_ok=True)
        accuracies = dict.fromkeys(run_all.report.SUMMARY, len(commands) / 100)
        (folder / "results.json").write_text(json.dumps({**PERFECT, **accuracies}))

    monkeypatch.setattr(run_all, "run", note)
    return commands


def value_of(flags, name):
    return str(flags[flags.index(name) + 1])


def test_five_stages_in_order_for_every_seed(calls, tmp_path, capsys):
    run_all.main(["--data-root", "data/x", "--output", str(tmp_path), "--seeds", "3", "5", "--epochs", "2",
                  "--init", "none"])
    assert [what for _, what, _ in calls] == [f"{name}, seed {seed}" for seed in (3, 5)
                                              for name in ("baseline", "t1", "t2", "t3", "student")]
    for _, what, flags in calls:
        name, seed = what.split(", seed ")
        assert value_of(flags, "--output") == str(tmp_path / f"seed{seed}" / name)
        assert value_of(flags, "--seed") == seed and value_of(flags, "--epochs") == "2"
        assert ("--init" in flags) == (name == "baseline")
    rows = json.loads((tmp_path / "comparison.json").read_text())["rows"]
    assert rows["baseline"]["overall"]["values"] == [0.01, 0.06]
    assert rows["T2FTS student"]["tail"]["mean"] == pytest.approx(0.075)
    assert "3.5 ± 3.5" in (tmp_path / "comparison.txt").read_text() and "seeds 3, 5" in capsys.readouterr().out


def test_yardsticks_train_as_long_as_the_student(calls, tmp_path):
    run_all.main(["--data-root", "data/x", "--output", str(tmp_path), "--yardsticks"])
    flags = {what.split(",")[0]: flags for _, what, flags in calls}
    assert list(flags) == ["baseline", "class_aware", "baseline_class_aware", "t1", "t2", "t3", "student"]
    assert value_of(flags["class_aware"], "--sampler") == "class-aware"
    longer = flags["baseline_class_aware"]
    assert value_of(longer, "--init") == str(tmp_path / "seed0" / "baseline" / "best.pt")
    assert value_of(longer, "--epochs") == str(baseline_cl_s_weight.SETTINGS.epochs)
    assert value_of(longer, "--lr-steps") == "52"


def test_a_finished_comparison_is_not_overwritten(calls, tmp_path):
    run_all.main(["--data-root", "data/x", "--output", str(tmp_path)])
    with pytest.raises(UserError, match="holds a comparison already; go on with it by --resume"):
        run_all.main(["--data-root", "data/x", "--output", str(tmp_path)])
    run_all.main(["--data-root", "data/x", "--output", str(tmp_path), "--resume"])
    assert "--resume" in calls[-1][2]


def test_equal_seeds_are_refused(tmp_path):
    with pytest.raises(UserError, match="expected different seeds"):
        run_all.main(["--output", str(tmp_path), "--seeds", "1", "1"])


def test_a_stage_that_fails_stops_everything(tmp_path):
    with pytest.raises(UserError, match="t1, seed 0 ended with status 3; once that is mended, go on with --resume"):
        run_all.run([run_all.sys.executable, "-c", "raise SystemExit(3)"], "t1, seed 0")
