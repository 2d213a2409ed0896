"""Autocast, which the fast paths and the teacher switch off: their precision is chosen explicitly."""

import contextlib
import functools
from collections.abc import Callable

import torch


def without_autocast(function: Callable) -> Callable:
    """Decorate a function to compute in the dtypes of its tensors, also where it is called under `torch.autocast`."""

    @functools.wraps(function)
    def run(*args, **kwargs):
        enabled = [device_type for device_type in ("cuda", "cpu") if torch.is_autocast_enabled(device_type)]
        if not enabled:
            return function(*args, **kwargs)
        with contextlib.ExitStack() as stack:
            for device_type in enabled:
                stack.enter_context(torch.autocast(device_type, enabled=False))
            return function(*args, **kwargs)

    return run
