"""An input written to a graph's own memory is not copied, and a caller's tensors are not overwritten."""

import pytest
import torch

from samlight_hf.engine.cuda_graphs import GraphedFunction


def test_without_a_graph_there_is_a_new_tensor_each_time():
    function, kind = GraphedFunction(lambda x: x + 1), {"dtype": torch.float64, "device": torch.device("cpu")}
    one, other = function.empty(2, 3, **kind), function.empty(2, 3, **kind)
    assert (one.shape, one.dtype) == ((2, 3), torch.float64)
    assert one.data_ptr() != other.data_ptr()
    assert torch.equal(function(one.fill_(1)), one + 1)


@pytest.mark.gpu
def test_with_a_graph_it_is_what_the_graph_reads():
    function, kind = GraphedFunction(lambda x: 2 * x), {"dtype": torch.float32, "device": torch.device("cuda", 0)}
    own = torch.ones(3, **kind)
    assert function(own).tolist() == [2, 2, 2]
    place = function.empty(3, **kind)
    assert place is function.empty(3, **kind)
    with torch.inference_mode():
        place.fill_(5)
    assert function(place).tolist() == [10, 10, 10]
    assert function.last_ran == "graph" and len(function) == 1
    assert own.tolist() == [1, 1, 1]
    assert function(own).tolist() == [2, 2, 2]
    for other in (function.empty(4, **kind), function.empty(3, **{**kind, "dtype": torch.float16})):
        assert other.data_ptr() != place.data_ptr()


@pytest.mark.gpu
def test_a_graph_reads_what_was_lent_before_it_was_made():
    function = GraphedFunction(lambda x: 2 * x)
    place = function.empty(3, dtype=torch.float32, device=torch.device("cuda", 0))
    assert function(place.fill_(4)).tolist() == [8, 8, 8]
    assert function.empty(3, dtype=torch.float32, device=torch.device("cuda", 0)) is place
