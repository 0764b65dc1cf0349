"""Errors, files and devices."""

import os

import pytest
import torch

from common.files import atomic_path, save_checkpoint
from common.runtime import UserError, resolve_device, run_script
from tests.support import run_program


def test_a_user_error_is_one_line_and_status_2(capsys):
    def main():
        raise UserError("wrong:\n  two lines")

    with pytest.raises(SystemExit) as exit_:
        run_script(main)
    assert exit_.value.code == 2 and capsys.readouterr().err == "error: wrong: two lines\n"


@pytest.mark.parametrize("command", ["baseline_cl_t2.py", "run_all.py", "predict.py", "export.py",
                                     "-m detection.train_gfl"])
def test_an_interrupt_while_torch_is_imported_is_one_line(tmp_path, command):
    (tmp_path / "torch.py").write_text("import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(9)\n")
    done = run_program(*command.split(), env={"PYTHONPATH": str(tmp_path)})
    assert done.returncode in (130, -2) and (done.stdout, done.stderr) == ("", "interrupted\n")


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]


def test_a_full_disk_is_one_error_and_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"epoch": 1})

    def full(*arguments):
        raise RuntimeError("[enforce fail at inline_container.cc:603] . unexpected pos 64 vs 0")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match=r"last\.pt: could not be written"):
        save_checkpoint(path, {"epoch": 2})
    assert torch.load(path, weights_only=True) == {"epoch": 1} and os.listdir(tmp_path) == ["last.pt"]


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "meta", "cuda:99", ""])
def test_an_unknown_device_is_an_error(name):
    with pytest.raises(UserError, match="--device"):
        resolve_device(name)
