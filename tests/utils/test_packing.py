"""Tensors in one memory."""

import torch

from samlight_hf.utils.packing import packed, packed_bytes, views_like


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
