"""Copies of tensors from a CUDA device to the CPU that other work does not wait for."""

import numpy as np
import torch

from .turns import current_stream


class HostCopy:
    """Copies of tensors, which arrive on the CPU while the device and the caller go on.

    `wait` waits for these copies and for what comes before them on their stream, and not for what comes after.

    Args:
        *tensors: Of one device. What is on the CPU is not copied; copies from other devices than CUDA are waited for.
    """

    def __init__(self, *tensors: torch.Tensor):
        self._event = None
        if not tensors[0].is_cuda:
            self._tensors = tuple(tensor.cpu() for tensor in tensors)
        else:
            # Only from pinned memory on does a copy run beside other work.
            self._tensors = tuple(
                torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True).copy_(
                    tensor, non_blocking=True
                )
                for tensor in tensors
            )
            self._event = torch.cuda.Event()
            self._event.record(current_stream(tensors[0].device))

    def wait(self) -> tuple[torch.Tensor, ...]:
        """Return the tensors on the CPU. They may be in pinned memory, of which there is little: do not keep them."""
        if self._event is not None:
            self._event.synchronize()
        return self._tensors

    def arrays(self) -> list[np.ndarray]:
        """Return the tensors as arrays that may be kept."""
        return [tensor.numpy().copy() if self._event is not None else tensor.numpy() for tensor in self.wait()]
