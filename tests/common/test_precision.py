"""Which precision `auto` is: by what the processor has, by a measurement, by what a run was begun in."""

import json
import os
import signal
import types
from pathlib import Path

import pytest
import torch

import baseline_resnet50
from common import precision, run_folder
from common.precision import known_precision, measure, resolve_precision
from common.runtime import UserError
from demo.draw_scenes import write_demo
from detection import train_gfl
from recognition import engine
from recognition.settings import Settings
from tests.support import PROJECT, QUICK, QUICK_DETECTOR, run_detector, run_main, run_two_processes, stop_at_step

CPU = torch.device("cpu")
AMX = {"avx2", "avx512_bf16", "amx_tile", "amx_bf16"}


@pytest.fixture
def unknown(monkeypatch, tmp_path):
    """A processor of which nothing is known, and an empty cache folder. Returns the path of the store."""
    monkeypatch.setattr(precision, "known_precision", lambda device: None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "t2fts" / "precision.json"


def takes(monkeypatch, fp32, bf16):
    """Let the small training step take so many seconds. Returns a list that grows by one with each measurement."""
    measured = []
    monkeypatch.setattr(precision, "measure", lambda step: measured.append(1) or (fp32, bf16))
    return measured


# ---- by what the processor has ---------------------------------------------------------------------------------------


def processor(monkeypatch, kernel, of_torch, machine="x86_64", mkldnn=True):
    """A processor with these extensions: what Linux and what torch say, None for nothing."""
    monkeypatch.setattr(precision, "kernel_extensions", lambda: kernel)
    monkeypatch.setattr(precision, "torch_extensions", lambda: of_torch)
    monkeypatch.setattr(precision.platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: mkldnn)
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("kernel, of_torch, expected", [
    (AMX, AMX, "bf16"),
    (AMX, None, "bf16"),
    (None, AMX, "bf16"),
    (AMX - {"amx_tile", "amx_bf16"}, AMX, None),  # a kernel that does not let programs use the tiles
    ({"avx512f", "avx512_bf16"}, {"avx512_bf16"}, None),
    ({"avx2"}, {"avx512_bf16"}, None),  # a kernel older than the processor
    ({"avx2", "avx_ne_convert"}, {"avx2"}, None),
    ({"avx512f", "avx512_vnni"}, {"avx512_f"}, "fp32"),
    ({"avx2"}, None, "fp32"),
    (None, set(), "fp32"),
    (None, None, None),
])
def test_the_rule_for_x86(monkeypatch, kernel, of_torch, expected):
    processor(monkeypatch, kernel, of_torch)
    assert known_precision(CPU) == expected


def test_another_processor_or_a_torch_without_onednn_is_not_known(monkeypatch):
    processor(monkeypatch, {"asimd", "bf16"}, {"neon", "bf16"}, machine="aarch64")
    assert known_precision(CPU) is None
    processor(monkeypatch, {"avx2"}, {"avx2"}, mkldnn=False)
    assert known_precision(CPU) is None


def test_a_limit_on_onednns_instructions_makes_it_unknown(monkeypatch):
    processor(monkeypatch, AMX, AMX)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert known_precision(CPU) is None


@pytest.mark.parametrize("units, expected", [(True, "bf16"), (False, "fp32")])
def test_the_rule_for_gpus(monkeypatch, units, expected):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: units or including_emulation)
    assert known_precision(torch.device("cuda")) == expected
    assert known_precision(torch.device("mps")) == "fp32"


@pytest.mark.parametrize("queries, expected", [
    ({"get_capabilities": lambda: {"avx512_bf16": True, "amx_tile": False, "l2_cache_size": 1}}, {"avx512_bf16"}),
    ({"_is_amx_tile_supported": lambda: True, "_is_avx512_bf16_supported": lambda: True}, {"amx_tile", "avx512_bf16"}),
    ({"_is_amx_tile_supported": lambda: False, "_is_avx512_bf16_supported": lambda: False}, set()),
    ({"_is_amx_tile_supported": lambda: True}, None),
    ({}, None),
])
def test_what_every_release_of_torch_can_be_asked(monkeypatch, queries, expected):
    monkeypatch.setattr(torch, "cpu", types.SimpleNamespace(**queries))
    assert precision.torch_extensions() == expected


@pytest.mark.parametrize("text, expected", [
    ("processor\t: 0\nflags\t\t: fpu avx2\nflags\t\t: other\n", {"fpu", "avx2"}),
    ("processor\t: 0\nFeatures\t: asimd bf16\n", {"asimd", "bf16"}),
    ("processor\t: 0\n", None),
    (None, None),
])
def test_the_flags_of_the_kernel(monkeypatch, tmp_path, text, expected):
    if text is not None:
        (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(precision, "CPUINFO", tmp_path / "cpuinfo")
    assert precision.kernel_extensions() == expected


def test_precisions_by_name():
    assert resolve_precision("fp32", CPU) == "fp32" and resolve_precision("bf16", CPU) == "bf16"
    with pytest.raises(UserError, match="expected fp32, bf16 or auto"):
        resolve_precision("fp8", CPU)


# ---- by measurement --------------------------------------------------------------------------------------------------


class FakeClock:
    """A clock of which a step in a precision takes the seconds given."""

    def __init__(self, **seconds):
        self.now, self.seconds, self.steps = 0.0, {name: list(values) for name, values in seconds.items()}, []

    def __call__(self):
        return self.now

    def step(self, name):
        self.steps.append(name)
        self.now += self.seconds[name].pop(0)


def test_a_measurement_is_the_median_of_rounds_in_turns_after_a_warm_up():
    rounds = [0.03, 0.01, 0.02, 0.05, 0.04, 0.01, 0.02, 0.05, 0.04]  # median 0.03
    clock = FakeClock(fp32=[0.2, *rounds], bf16=[0.3, *(value / 10 for value in rounds)])
    assert measure(clock.step, clock) == pytest.approx((0.03, 0.003))
    assert clock.steps == ["fp32", "bf16"] * (1 + precision.ROUNDS)


@pytest.mark.parametrize("fp32, bf16, expected", [
    ([0.1, 0.1, 9], [0.7, 0.3, 9], (0.1, 0.3)),  # 1.2 seconds after two rounds
    ([0.1, 9], [3.0, 9], (0.1, 3.0)),  # the warm-up alone says enough
])
def test_a_slow_machine_is_not_measured_for_long(fp32, bf16, expected):
    clock = FakeClock(fp32=fp32, bf16=bf16)
    assert measure(clock.step, clock) == pytest.approx(expected)


@pytest.mark.parametrize("fp32, bf16, expected", [(0.024, 0.02, "bf16"), (0.0239, 0.02, "fp32"), (0.01, 0.03, "fp32")])
def test_bf16_has_to_be_faster_by_the_margin(monkeypatch, unknown, fp32, bf16, expected):
    takes(monkeypatch, fp32, bf16)
    assert resolve_precision("auto", CPU) == expected


def test_a_measurement_is_said_in_one_line_stored_and_not_repeated(monkeypatch, unknown, capsys):
    measured = takes(monkeypatch, 0.04, 0.015)
    assert resolve_precision("auto", CPU) == "bf16" and len(measured) == 1
    assert capsys.readouterr() == ("", "note: --precision auto is bf16: a small training step took 40 ms in fp32 and "
                                       "15 ms in bf16 on this processor\n")
    (key, stored), = json.loads(unknown.read_text()).items()
    assert stored == {"precision": "bf16", "fp32_ms": 40, "bf16_ms": 15} and f"torch {torch.__version__}" in key
    assert resolve_precision("auto", CPU) == "bf16" and len(measured) == 1
    assert capsys.readouterr() == ("", "")


def test_another_torch_or_limit_is_measured_again_beside_the_first(monkeypatch, unknown):
    measured = takes(monkeypatch, 0.04, 0.015)
    resolve_precision("auto", CPU)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    resolve_precision("auto", CPU)
    monkeypatch.setattr(torch, "__version__", "99.0")
    resolve_precision("auto", CPU)
    assert len(measured) == 3 and len(json.loads(unknown.read_text())) == 3


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b"null", b"{KEY: 3}", b"{KEY: {}}",
                                     b'{KEY: {"precision": "fp8"}}', b'{KEY: {"precision": ["bf16"]}}'])
def test_a_corrupt_store_is_measured_over(monkeypatch, unknown, capsys, content):
    unknown.parent.mkdir(parents=True)
    unknown.write_bytes(content.replace(b"KEY", json.dumps(precision.store_key()).encode()))
    measured = takes(monkeypatch, 0.04, 0.015)
    assert [resolve_precision("auto", CPU) for _ in range(2)] == ["bf16", "bf16"] and len(measured) == 1
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("obstacle", ["cache", "cache/t2fts"])
def test_an_unwritable_store_is_said_in_the_same_line(monkeypatch, unknown, capsys, obstacle):
    path = unknown.parent.parent.parent / obstacle
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("a file where a folder is to be")
    measured = takes(monkeypatch, 0.04, 0.015)
    assert [resolve_precision("auto", CPU) for _ in range(2)] == ["bf16", "bf16"] and len(measured) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and all("; not stored (" in line for line in lines)


def test_a_user_without_a_home_is_measured_for(monkeypatch, unknown, capsys):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(precision.Path, "home", homeless)
    takes(monkeypatch, 0.01, 0.015)
    assert resolve_precision("auto", CPU) == "fp32"
    assert "not stored (Could not determine home directory.)" in capsys.readouterr().err


def test_where_bf16_does_not_run_it_is_fp32(monkeypatch, unknown, capsys):
    def fails(step):
        raise RuntimeError("not implemented for 'BFloat16'")

    monkeypatch.setattr(precision, "measure", fails)
    assert resolve_precision("auto", CPU) == "fp32"
    error = capsys.readouterr().err
    assert error.startswith("note: --precision auto is fp32: bf16 could not be timed") and error.count("\n") == 1


def test_the_real_step_is_measured_and_leaves_the_process_as_it_was(unknown):
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    assert resolve_precision("auto", CPU) in ("fp32", "bf16")
    assert torch.equal(torch.get_rng_state(), before) and torch.get_num_threads() == threads
    stored, = json.loads(unknown.read_text()).values()
    assert stored["fp32_ms"] > 0 and stored["bf16_ms"] > 0


def test_every_process_takes_what_the_first_has_measured(tmp_path):
    (tmp_path / "worker.py").write_text(f"""
import os, sys, torch
sys.path.insert(0, {str(PROJECT)!r})
from common import precision, runtime
cpu = torch.device("cpu")
runtime.start_processes(cpu)
precision.known_precision = lambda device: None
precision.measure = lambda step: (0.04, 0.015) if runtime.rank() == 0 else sys.exit("measured twice")
line = f"process {{runtime.rank()}}: {{precision.resolve_precision('auto', cpu)}}\\n"
os.write(1, line.encode())  # in one piece: both processes write at the same time
runtime.stop_processes()
""")
    done = run_two_processes(tmp_path / "worker.py", XDG_CACHE_HOME=str(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == ["process 0: bf16", "process 1: bf16"]
    assert done.stderr.count("note: --precision auto is bf16") == 1


# ---- by what a run was begun in --------------------------------------------------------------------------------------


def without_precision(flags):
    """The flags less --precision and its value."""
    flags = list(flags)
    place = flags.index("--precision")
    return flags[:place] + flags[place + 2:]


def is_fast(monkeypatch, name):
    """Let the rule say that a precision is the fast one."""
    for module in (precision, run_folder):
        monkeypatch.setattr(module, "known_precision", lambda device: name)


@pytest.fixture
def resumed(tmp_path):
    """Settings of a run in fp32 that is to be resumed."""
    (tmp_path / "settings.json").write_text(json.dumps({"precision": "fp32"}))
    return Settings(output=str(tmp_path), resume=True)


def test_a_resumed_run_keeps_its_precision_and_says_so(monkeypatch, resumed, capsys):
    is_fast(monkeypatch, "bf16")
    assert run_folder.run_precision(resumed, CPU) == "fp32"
    assert capsys.readouterr().out == "precision fp32, in which this run was begun: --precision auto keeps it\n"
    is_fast(monkeypatch, "fp32")
    assert run_folder.run_precision(resumed, CPU) == "fp32" and capsys.readouterr().out == ""


@pytest.mark.parametrize("record", [None, {}, [], {"precision": "fp8"}, {"precision": ["fp32"]}])
def test_without_a_recorded_precision_the_rule_decides(monkeypatch, resumed, record):
    is_fast(monkeypatch, "bf16")
    path = Path(resumed.output) / "settings.json"
    path.unlink() if record is None else path.write_text(json.dumps(record))
    assert run_folder.run_precision(resumed, CPU) == "bf16"


def test_a_device_without_bf16_at_all_does_not_keep_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    assert precision.computes_in("bf16", CPU) and precision.computes_in("fp32", torch.device("mps"))
    assert not precision.computes_in("bf16", torch.device("cuda"))


def test_resuming_a_stage_with_auto_goes_on_in_its_precision(without_pictures, monkeypatch, tiny, tmp_path, capsys):
    flags = ("--data-root", tiny, "--init", "none", *without_precision(QUICK), "--output", tmp_path / "run")
    is_fast(monkeypatch, "fp32")
    with monkeypatch.context() as stopping:
        stop_at_step(stopping, engine, 2)
        assert run_main(baseline_resnet50, *flags) == 128 + signal.SIGTERM
    is_fast(monkeypatch, "bf16")
    assert run_main(baseline_resnet50, *flags, "--resume", "--precision", "bf16") == 2
    assert "holds a run with precision fp32, not bf16" in capsys.readouterr().err
    assert run_main(baseline_resnet50, *flags, "--resume") == 0
    output = capsys.readouterr().out
    assert "precision fp32, in which this run was begun" in output and "; precision fp32; seed 0" in output


def test_resuming_a_detector_with_auto_goes_on_in_its_precision(without_pictures, monkeypatch, tmp_path, capsys):
    write_demo(tmp_path / "scenes", seed=0, train=4, test=2, size=64)
    flags = ("--train", tmp_path / "scenes" / "train.json", "--test", tmp_path / "scenes" / "test.json",
             *without_precision(QUICK_DETECTOR), "--epochs", "1", "--output", tmp_path / "run")
    is_fast(monkeypatch, "bf16")
    assert run_detector(train_gfl, *flags) == 0
    os.remove(tmp_path / "run" / "results.json")  # as if it had been killed before its test
    is_fast(monkeypatch, "fp32")
    capsys.readouterr()
    assert run_detector(train_gfl, *flags, "--resume") == 0
    output = capsys.readouterr().out
    assert "precision bf16, in which this run was begun" in output and "; precision bf16; seed 0" in output
