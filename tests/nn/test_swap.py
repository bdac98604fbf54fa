import pytest
import torch
from torch import nn

from s2q.common.errors import InvalidInputError
from s2q.nn import replace_module


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.to_q = nn.Linear(4, 4)
        self.to_out = nn.ModuleList([nn.Linear(4, 4), nn.Dropout()])

    def forward(self, x):
        return self.to_out[1](self.to_out[0](self.to_q(x)))


def model():
    return nn.ModuleDict({"blocks": nn.ModuleList([Attention(), Attention()])}).eval()


@pytest.mark.parametrize("name", ["blocks.0.to_q", "blocks.1.to_out.0"])
def test_exactly_the_named_module_is_replaced(name):
    root = model()
    before = dict(root.named_modules())
    new = nn.Identity()
    replace_module(root, name, new)
    after = dict(root.named_modules())
    assert list(after) == list(before)
    assert [n for n in before if before[n] is not after[n]] == [name]
    assert after[name] is new
    assert not new.training
    assert root["blocks"][0](torch.ones(4)).shape == (4,)


@pytest.mark.parametrize("name", ["blocks.2.to_q", "blocks.0.to_k", "nothing", "blocks.0.to_out.0.weight", ""])
def test_names_that_do_not_exist_are_refused(name):
    root = model()
    before = dict(root.named_modules())
    with pytest.raises(InvalidInputError, match=r"has no module|empty name"):
        replace_module(root, name, nn.Identity())
    assert dict(root.named_modules()) == before
