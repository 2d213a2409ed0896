"""Copies to the CPU arrive whole, and wait for nothing that was launched after them."""

import numpy as np
import pytest
import torch

from samlight_hf.utils.host_copies import HostCopy


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_copies_are_the_tensors(device):
    tensors = torch.arange(6.0).view(2, 3).to(device), torch.tensor(True, device=device), torch.zeros(0, device=device)
    copied = HostCopy(*tensors)
    for tensor, there, array in zip(tensors, copied.wait(), copied.arrays(), strict=True):
        assert there.is_cpu and torch.equal(there, tensor.cpu()) and np.array_equal(array, tensor.cpu().numpy())


class Elsewhere(torch.Tensor):
    """Stands for a tensor on a device that is neither the CPU nor CUDA, such as mps."""

    def numpy(self):
        raise TypeError("can't convert mps:0 device type tensor to numpy. Use Tensor.cpu() to copy it first.")

    def cpu(self):
        return self.as_subclass(torch.Tensor)


def test_copies_from_other_devices_arrive_too():
    copied = HostCopy(torch.arange(3).as_subclass(Elsewhere))
    assert [array.tolist() for array in copied.arrays()] == [[0, 1, 2]]
    assert type(copied.wait()[0]) is torch.Tensor


@pytest.mark.gpu
def test_on_a_gpu_that_is_the_default_device():
    with torch.device("cuda"):
        assert HostCopy(torch.arange(3)).arrays()[0].tolist() == [0, 1, 2]


@pytest.mark.gpu
def test_on_a_gpu_later_work_is_not_waited_for():
    numbers = torch.arange(1000, device="cuda")
    HostCopy(numbers)  # pinned memory is there from now on
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        copied = HostCopy(numbers)
        torch.cuda._sleep(2_000_000_000)  # about a second
        end = torch.cuda.Event()
        end.record()
        (array,) = copied.arrays()
        assert not end.query(), "the copy waited for what was launched behind it"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert np.array_equal(array, np.arange(1000))
