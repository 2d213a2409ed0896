"""Tensors in one memory."""

import copy

import pytest
import torch
from torch import nn

from samlight_hf.utils.packing import packed, packed_bytes, packed_copy, views_like


def test_copies_are_equal_aligned_and_in_one_memory():
    tensors = [torch.randn(3, 5), torch.arange(7), torch.randn(64, 2).half().mT, torch.empty(0), torch.tensor(True)]
    copies = packed(tensors)
    assert packed_bytes(tensors) == 4 * 256
    assert all(map(torch.equal, copies, tensors)) and all(copy.is_contiguous() for copy in copies)
    assert len({copy.untyped_storage().data_ptr() for copy in copies}) == 1
    assert all(copy.storage_offset() * copy.itemsize % 256 == 0 for copy in copies)
    assert packed([]) == []


def test_views_have_the_bytes_of_the_memory():
    memory = torch.arange(512, dtype=torch.int32).to(torch.uint8)
    bytes_, words = views_like([torch.empty(2, 2, dtype=torch.uint8), torch.empty(3, dtype=torch.int32)], memory)
    assert bytes_.tolist() == [[0, 1], [2, 3]] and words.data_ptr() == memory.data_ptr() + 256


def module_of_all_kinds() -> nn.Module:
    """Make a module with a weight of two names, buffers of two dtypes, and one that is sparse."""
    module = nn.ModuleDict({"first": nn.Linear(3, 5), "second": nn.Linear(3, 5), "norm": nn.BatchNorm1d(7)})
    module["second"].weight = module["first"].weight
    module["second"].bias.requires_grad_(False)
    module["norm"].register_buffer("sparse", torch.eye(3).to_sparse())
    return module.eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_module_is_copied_as_deepcopy_does(dtype):
    module = module_of_all_kinds()
    packed, expected = packed_copy(module, dtype), copy.deepcopy(module).to(dtype)
    assert packed["first"].weight is packed["second"].weight and packed["norm"].num_batches_tracked.dtype == torch.int64
    assert str(packed) == str(expected) and packed.training == expected.training
    own, others = packed.state_dict(), expected.state_dict()
    assert own.keys() == others.keys()
    for name, tensor in own.items():
        assert tensor.dtype == others[name].dtype and torch.equal(tensor.to_dense(), others[name].to_dense())
    for name, parameter in packed.named_parameters():
        assert type(parameter) is nn.Parameter and parameter.requires_grad == module.get_parameter(name).requires_grad
    dense = [tensor for tensor in own.values() if tensor.layout == torch.strided]
    assert len({tensor.untyped_storage().data_ptr() for tensor in dense}) == 1
    packed["first"].bias.data.zero_()
    assert module["first"].bias.any() and packed["norm"].weight.all()


def test_a_module_without_tensors_is_copied():
    assert isinstance(packed_copy(nn.ReLU(), torch.float16), nn.ReLU)
