"""What tests share: seeds, one thread, and a look at what a block may have left."""

import pytest
import torch
from cases import CASES
from torch.nn.modules import module as torch_module

from vmapsafe._block import open_blocks

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def nothing_left():
    hooks = dict(torch_module._global_forward_pre_hooks)
    yield
    assert torch._C._len_torch_function_stack() == 0
    assert dict(torch_module._global_forward_pre_hooks) == hooks
    assert not open_blocks.blocks() and not open_blocks.everywhere()


@pytest.fixture(params=["cpu", *(["cuda"] if torch.cuda.is_available() else [])])
def device(request):
    return request.param


@pytest.fixture(params=CASES, ids=str)
def case(request):
    return request.param
