"""`samlight app`: what goes wrong before it serves. tests/app has the rest."""

import argparse
import signal
import socket
import sys
from contextlib import nullcontext

import pytest
from PIL import Image

from samlight_hf.app import server
from samlight_hf.app.limits import Limits
from samlight_hf.commands import cli
from samlight_hf.commands.app import find_examples
from samlight_hf.commands.options import EXAMPLE_IMAGES


def test_a_port_in_use_is_told_before_the_model_is_loaded(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        status = cli.main(["app", "--port", str(port), "--model", "nowhere"])
    error = capsys.readouterr().err
    assert status == 2 and f"127.0.0.1:{port}" in error and "--port" in error and error.count("\n") == 1


def test_a_port_of_ipv6_in_use_is_told():
    try:
        taken = socket.create_server(("::1", 0), family=socket.AF_INET6)
    except OSError as error:
        pytest.skip(f"this machine has no IPv6 ({error})")
    with taken:
        port = taken.getsockname()[1]
        for host in ("::1", "[::1]"):
            server.check_port(host, 0)
            with pytest.raises(ValueError, match=rf"cannot listen on \[::1\]:{port} .*another --port"):
                server.check_port(host, port)


def test_a_missing_gradio_is_told(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert cli.main(["app", "--port", "0"]) == 2
    assert 'pip install "samlight-hf[app]"' in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["--port", "70000"], 2, "70000"),
        (["--port", "x"], 2, "--port"),
        (["--host", "no.such.host.invalid", "--port", "0"], 2, "--host"),
        (["--max-sessions", "0"], 2, "positive"),
        (["--pred-iou-thresh", "3"], 2, "from 0 to 1"),
    ],
)
def test_wrong_options_are_told(capsys, arguments, status, words):
    assert cli.main(["app", *arguments]) == status
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("on_ctrl_c", [signal.default_int_handler, signal.SIG_IGN], ids=["here", "in the background"])
def test_a_stop_right_after_the_first_line_is_a_stop(monkeypatch, on_ctrl_c):
    """A supervisor that waits for the line may stop the server before it waits."""
    lines = []

    def tell(line, **options):
        lines.append(line)
        if len(lines) == 1:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(server.threading.Event, "wait", lambda event: pytest.fail("the server goes on"))
    before, before_ctrl_c = signal.getsignal(signal.SIGTERM), signal.signal(signal.SIGINT, on_ctrl_c)
    monkeypatch.setattr(server, "running", lambda *args, **options: nullcontext(server.Server("http://a", None)))
    monkeypatch.setattr(server, "print", tell, raising=False)
    try:
        server.serve(None, "model")
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGINT, before_ctrl_c)
    assert lines == ["Open http://a in a browser. Ctrl-C stops the server.", "Stopped."]


def test_examples_that_the_page_could_not_open_are_left_out(tmp_path, capsys):
    """One damaged file, or one photograph of a phone, is no reason not to start."""
    for name, size in (("a.png", (30, 20)), ("large.png", (60, 50)), ("damaged.png", (9, 9))):
        Image.new("RGB", size).save(tmp_path / name)
    (tmp_path / "damaged.png").write_bytes((tmp_path / "large.png").read_bytes()[:60])
    assert find_examples(tmp_path, Limits(pixels=1000)) == [tmp_path / "a.png"]
    error = capsys.readouterr().err
    assert error.count("\n") == error.count("It is left out.") == 2 and "large.png" in error and "damaged.png" in error
    assert find_examples(tmp_path, Limits(pixels=5000)) == [tmp_path / "a.png", tmp_path / "large.png"]
    with pytest.raises(argparse.ArgumentTypeError, match=r"--examples a\.png"):
        find_examples(tmp_path, Limits(pixels=10))
    assert find_examples(None, Limits()) == sorted(EXAMPLE_IMAGES.glob("*.jpg"))


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["--model", "./nowhere"], 1, "nowhere"),
        (["--examples", "./nowhere"], 2, "no such file or folder"),
        (["--device", "nothing"], 2, "device='nothing'"),
    ],
)
def test_a_missing_model_or_folder_is_told(monkeypatch, capsys, arguments, status, words):
    monkeypatch.setitem(sys.modules, "gradio", sys)  # it is not used before the model is there
    assert cli.main(["app", "--port", "0", *arguments]) == status
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
