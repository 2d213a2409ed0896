"""Each process says in one line why it ends, also while it waits for another one."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

from samlight_hf.utils.termination import Terminated, explained_end, sigterm_interrupts
from tests.launcher import ROOT, launch, output_of


_ENDED = "samlight: error: ended by SIGTERM: "

_ALONE = """
import os, signal, sys, time, torch
from samlight_hf.utils.termination import explained_end

class Slow(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return index

with explained_end(lambda: "Start it again."):
    # Workers that are ended do not end this process.
    assert len(list(torch.utils.data.DataLoader(Slow(), num_workers=2))) == 4
    child = os.fork()
    if child == 0:
        time.sleep(60)
        os._exit(0)
    os.kill(child, signal.SIGTERM)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
    time.sleep(0.2)
    print("working", flush=True)
    if sys.argv[1] == "inside":
        time.sleep(60)
print("left", flush=True)
time.sleep(60)
"""


@pytest.mark.slow
@pytest.mark.parametrize("where", ["inside", "behind"])
def test_a_process_alone_that_is_stopped_says_what_to_do(where):
    command = [sys.executable, "-c", _ALONE, where]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    while process.stdout.readline() != ("working\n" if where == "inside" else "left\n"):
        assert process.poll() is None, process.stderr.read()
    process.send_signal(signal.SIGTERM)
    _, complaints = process.communicate(timeout=60)
    if where == "inside":
        assert complaints.endswith(f"{_ENDED}the run was stopped. Start it again.\n")
        assert process.returncode == 128 + signal.SIGTERM
    else:
        assert _ENDED not in complaints and process.returncode == -signal.SIGTERM


_WAITING = """
import os, time, torch
from samlight_hf.utils.processes import process_index
from samlight_hf.utils.termination import explained_end

torch.distributed.init_process_group("gloo")
with explained_end(lambda: "Start it again."):
    torch.distributed.barrier()
    os.write(1, b"working\\n")  # at once: print writes the end of the line by itself
    if process_index() == 0:
        torch.distributed.barrier()  # until the end
    time.sleep(60)
"""


@pytest.mark.slow
def test_a_process_that_waits_for_another_one_says_what_to_do(tmp_path):
    """No handler of Python runs within a collective call."""
    (tmp_path / "waiting.py").write_text(_WAITING)
    process = launch(tmp_path / "waiting.py", 2)
    for _ in range(2):
        assert process.stdout.readline() == "working\n"
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)  # the launcher passes it on
    _, complaints = output_of(process)
    line = f"{_ENDED}another process has failed, or the run was stopped. Start it again."
    lines = [line for line in complaints.splitlines() if "samlight" in line]
    assert sorted(lines) == [f"process 1: {line}", line]


_SLOW_END = """
import os, signal, sys, time
from samlight_hf.utils import termination
from samlight_hf.utils.processes import tell_error

termination._OWN_END = 0.3
try:
    with termination.explained_end(lambda: "Start it again."):
        raise ValueError("its own error")
except ValueError as error:
    if sys.argv[1] == "told":
        tell_error(f"samlight: error: {error}")
    os.kill(os.getpid(), signal.SIGTERM)  # as the launcher does at once
    time.sleep(60)  # until its workers have ended
"""


@pytest.mark.parametrize("how", ["told", "silent"])
def test_one_of_several_processes_that_takes_long_to_end_prints_one_line(how):
    process = subprocess.run(
        [sys.executable, "-c", _SLOW_END, how], capture_output=True, text=True, cwd=ROOT, timeout=60,
        env={**os.environ, "WORLD_SIZE": "2"},
    )  # fmt: skip
    own, ended = (
        "its own error",
        "ended by SIGTERM: another process has failed, or the run was stopped. Start it again.",
    )
    assert process.stderr == f"samlight: error: {own if how == 'told' else ended}\n"
    assert process.returncode == 128 + signal.SIGTERM


_NCCL = (
    "NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:93, {0} (run with NCCL_DEBUG=WARN for details), "
    "NCCL version 2.28.9\n{1}\nLast error:\n{2}"
)


def test_the_reason_that_nccl_gives_is_told():
    """Of another process's end without the text before it; a process's own errors pass as they are."""
    remote = "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely."
    reason = "socketPollConnect: connect to 10.0.0.2<41937> returned Connection refused"
    for detail, told in ((reason, reason), ("", "NCCL error in: /pytorch/")):
        with pytest.raises(RuntimeError, match=rf"cannot be reached \({told}.*\)\. Start it again\.$"):
            with explained_end(lambda: "Start it again."):
                raise torch.distributed.DistBackendError(_NCCL.format("remote process exited", remote, detail))
    for what, kind, detail in (
        ("invalid usage", "ncclInvalidUsage: This usually reflects invalid usage of NCCL library.", "Duplicate GPU"),
        ("unhandled cuda error", "ncclUnhandledCudaError: Call to CUDA function failed.", "Cuda failure 'ECC'"),
    ):
        own = torch.distributed.DistBackendError(_NCCL.format(what, kind, detail))
        with pytest.raises(torch.distributed.DistBackendError) as caught, explained_end(lambda: "Start it again."):
            raise own
        assert caught.value is own and str(own).endswith(detail)


def test_errors_pass_and_those_of_a_lost_process_are_explained(monkeypatch):
    gloo = RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:561] Connection closed by peer")
    nccl = torch.distributed.DistBackendError("NCCL error: remote process exited or there was a network error")
    for error in (gloo, nccl):
        outer = RuntimeError("the checkpoint could not be saved")
        outer.__cause__ = error
        for raised in (error, outer):
            with pytest.raises(RuntimeError, match=r"^another process of this run has .*\)\. Start it again\.$"):
                with explained_end(lambda: "Start it again."):
                    raise raised
    for error in (RuntimeError("CUDA out of memory"), ValueError("no"), KeyError("bug"), SystemExit(3)):
        with pytest.raises(type(error)) as caught, explained_end(lambda: "Start it again."):
            raise error
        assert caught.value is error
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert signal.set_wakeup_fd(-1) == -1
    assert not [thread for thread in threading.enumerate() if thread.name == "termination"]


def test_sigterm_interrupts_and_a_run_that_explains_its_end_gives_it_back():
    with pytest.raises(Terminated) as caught, sigterm_interrupts():
        with explained_end(lambda: "Start it again."):
            pass
        child = os.fork()
        if child == 0:
            time.sleep(10)
            os._exit(0)
        os.kill(child, signal.SIGTERM)  # at once: it would be lost before the child has its own handler
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
    assert caught.value.status == 143
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_handler_of_others_is_left_alone():
    def handler(number, frame):
        received.append(number)

    received, before = [], signal.signal(signal.SIGTERM, handler)
    try:
        with explained_end(lambda: "Start it again."):
            os.kill(os.getpid(), signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) is handler and received == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)
