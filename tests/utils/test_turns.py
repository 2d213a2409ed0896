"""Turns of threads and streams on a device, and the stream that turns end on."""

import threading

import pytest
import torch

from samlight_hf.utils import turns
from samlight_hf.utils.turns import current_stream, turn


@pytest.mark.gpu
def test_the_current_stream_is_that_of_torch_and_always_the_same_object():
    index = torch.cuda.current_device()
    for stream in (torch.cuda.default_stream(), *(torch.cuda.Stream() for _ in range(40)), torch.cuda.default_stream()):
        with torch.cuda.stream(stream):
            found = current_stream(torch.device("cuda"))
            assert found == torch.cuda.current_stream() == stream
            assert found is current_stream(torch.device("cuda", index))


def test_without_a_private_function_of_torch_the_current_stream_is_asked_for(monkeypatch):
    monkeypatch.setattr(turns, "_handle_of_stream", None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda index: ("stream of", index))
    assert current_stream(torch.device("cuda", 3)) == ("stream of", 3)


class Device:
    """Stands for a CUDA device: its current stream, and what streams wait for and record."""

    def __init__(self, monkeypatch):
        self.done, self.current, self.captures = [], self.Stream("first", self), False
        device = self

        class Event:
            def record(self, stream):
                device.done.append(("record", stream.name))

        monkeypatch.setattr(turns, "_turns", {})
        monkeypatch.setattr(turns, "_is_capturing", lambda _: self.captures)
        monkeypatch.setattr(turns, "current_stream", lambda _: self.current)
        monkeypatch.setattr(torch.cuda, "Event", Event)

    class Stream:
        def __init__(self, name, device):
            self.name, self.device = name, device

        def wait_event(self, event):
            self.device.done.append(("wait", self.name))


def test_a_turn_waits_for_the_one_before_if_that_was_on_another_stream(monkeypatch):
    device, name = Device(monkeypatch), torch.device("cuda", 0)
    for _ in range(2):
        with turn(name) as is_captured:
            assert not is_captured
    device.current = Device.Stream("second", device)
    with turn(name), turn(name):
        pass
    device.captures = True  # a graph cannot wait for events outside of it
    with turn(name) as is_captured:
        assert is_captured
    with turn(torch.device("cpu")) as is_captured:
        assert not is_captured
    assert device.done == [("record", "first")] * 2 + [("wait", "second")] * 2 + [("record", "second")] * 2


@pytest.mark.parametrize("where", ["at its begin", "within it"])
def test_after_an_error_another_thread_has_its_turn(monkeypatch, where):
    device, name, had = Device(monkeypatch), torch.device("cuda", 0), []
    if where == "at its begin":
        monkeypatch.setattr(turns, "_is_capturing", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError), turn(name):
        _ = 1 / 0
    assert device.done == ([] if where == "at its begin" else [("record", "first")])
    monkeypatch.setattr(turns, "_is_capturing", lambda _: False)

    def have_turn():
        with turn(name):
            had.append(True)

    thread = threading.Thread(target=have_turn, daemon=True)
    thread.start()
    thread.join(timeout=60)
    assert had
