"""`samlight app`: what goes wrong before it serves. tests/app has the rest."""

import socket
import sys

import pytest

from samlight_hf.commands import cli


def test_a_port_in_use_is_told_before_the_model_is_loaded(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        status = cli.main(["app", "--port", str(port), "--model", "nowhere"])
    error = capsys.readouterr().err
    assert status == 2 and f"127.0.0.1:{port}" in error and "--port" in error and error.count("\n") == 1


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
