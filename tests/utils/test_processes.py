import sys

import pytest

from samlight_hf.commands.cli import main
from samlight_hf.utils.processes import is_main_process, one_voice, process_index, tell, tell_error
from tests.launcher import torchrun


@pytest.fixture
def second(monkeypatch):
    """Set the environment variables of the second of two processes, before there is a group."""
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)


def test_a_process_alone_speaks(capsys, monkeypatch):
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert (process_index(), is_main_process()) == (0, True)
    with one_voice():
        print("of another's code")
    tell("done", 3, end="!\n")
    tell_error("error: no")
    assert capsys.readouterr() == ("of another's code\ndone 3!\n", "error: no\n")
    monkeypatch.setenv("RANK", "1")  # set by a cluster for jobs of one process: only LOCAL_RANK means a group
    assert is_main_process()


def test_the_second_process_is_silent_but_for_errors(second, capsys):
    assert (process_index(), is_main_process()) == (1, False)
    with one_voice():
        print("of another's code")
        print("its complaint", file=sys.stderr)
    tell("done")
    tell("warning", file=sys.stderr)
    assert capsys.readouterr() == ("", "")
    tell_error("error: no")
    assert capsys.readouterr() == ("", "process 1: error: no\n")
    with pytest.raises(KeyError), one_voice():
        raise KeyError
    print("heard again")
    assert capsys.readouterr().out == "heard again\n"


@pytest.mark.slow
def test_the_command_line_of_the_second_process(second, capsys):
    assert main(["evaluate", "--help"]) == 0
    assert main(["evaluate"]) == 2
    assert capsys.readouterr() == ("", "")
    assert main(["evaluate", "--model", "a", "--model", "a"]) == 2
    assert capsys.readouterr().err.startswith("process 1: samlight: error: --model names a model twice")


_GROUP = """
import torch
from samlight_hf.utils.processes import is_main_process, leave_process_group, process_group, process_index, tell

with process_group(cpu=True) as state:
    assert torch.distributed.is_initialized() and process_index() == state.process_index
    assert is_main_process() == state.is_main_process
    tell("in", state.num_processes)
    with process_group(cpu=True):
        pass
    assert torch.distributed.is_initialized(), "left by another than its maker"
assert not torch.distributed.is_initialized()
tell("out")
leave_process_group()
"""


def test_a_group_is_left_by_its_maker(tmp_path):
    (tmp_path / "group.py").write_text(_GROUP)
    assert torchrun(tmp_path / "group.py", 2) == "in 2\nout\n"
