"""Check that errors and warnings become single lines."""

import logging

import pytest
from torch.utils.data import DataLoader

from samlight_hf.data import SampleError, SkipReason
from samlight_hf.utils.messages import log_to_stderr, one_line


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
        (SampleError(SkipReason.GREY_MASK, "a.png"), f"a.png: {SkipReason.GREY_MASK}"),  # its class takes two arguments
        (PermissionError(13, "Permission denied", "a.png"), "a.png: Permission denied"),
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


@pytest.mark.parametrize("module", ["samlight_hf.images.levels", "samlight_hf.loading", "samlight_hf"])
def test_warnings_of_every_module_are_printed(capfd, module):
    with log_to_stderr("samlight: "):
        logging.getLogger(module).warning("%s:\n stretched", "a.tif")
    assert capfd.readouterr().err == "samlight: a.tif: stretched\n"


def test_repeated_warnings_are_counted(capfd):
    logger = logging.getLogger("samlight_hf.images.levels")
    with log_to_stderr("samlight: "):
        for number in range(1_021):
            logger.warning("%d: stretched", number)
        logger.warning("another")
    lines = capfd.readouterr().err.splitlines()
    assert lines == [
        *(f"samlight: {number}: stretched" for number in range(20)),
        "samlight: another",
        "samlight: 1,001 further lines like these.",
    ]
