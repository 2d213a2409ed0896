"""Errors are told in one line, wherever they come from."""

import pytest
from torch.utils.data import DataLoader

from samlight_hf.data import SampleError, SkipReason
from samlight_hf.utils.messages import one_line


class Failing:
    def __init__(self, error: BaseException, cause: BaseException | None = None):
        self.error, self.cause = error, cause

    def __len__(self):
        return 1

    def __getitem__(self, index: int):
        raise self.error from self.cause


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("a.png: too small.\n  3 images: a reason (a, b)"), "a.png: too small. 3 images: a reason (a, b)"),
        (SampleError(SkipReason.GREY_MASK, "a.png"), f"a.png: {SkipReason.GREY_MASK}"),  # takes two arguments
        (PermissionError(13, "Permission denied", "a.png"), "[Errno 13] Permission denied: 'a.png'"),
        (MemoryError(), "MemoryError"),
    ],
)
@pytest.mark.parametrize("cause", [None, KeyError("x")])
def test_an_error_of_a_worker_is_told_as_if_it_were_ones_own(error, said, cause):
    with pytest.raises(Exception, match="Caught .* in DataLoader worker process 0") as raised:
        list(DataLoader(Failing(error, cause), batch_size=None, num_workers=1))
    assert one_line(raised.value) == said
    assert one_line(error) == said


def test_other_messages_are_left_as_they_are():
    assert one_line(ValueError("a:\n b")) == "a: b"
    assert one_line(ValueError("Traceback (most recent call last):\n  x\nE: y")).startswith("Traceback")
    assert one_line(ValueError("x" * 30), 10) == "xxxxxxx..."
