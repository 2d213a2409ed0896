"""The stream that turns end on."""

import pytest
import torch

from samlight_hf.utils import turns
from samlight_hf.utils.turns import current_stream


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
