import pytest
import torch
from torch import nn

from s2q.common.errors import InvalidInputError
from s2q.models import FAMILIES, block_linears, block_names, family_of
from tiny import run_transformer, tiny_transformer


def test_every_linear_inside_the_blocks_is_listed_and_none_outside():
    transformer = tiny_transformer(num_layers=3)
    linears = block_linears(transformer, family_of(transformer))
    expected = [
        name
        for name, module in transformer.named_modules()
        if isinstance(module, nn.Linear) and name.startswith("transformer_blocks.")
    ]
    assert [linear.name for linear in linears] == expected
    assert len(linears) == 3 * 8
    outside = [name for name, m in transformer.named_modules() if isinstance(m, nn.Linear) and name not in expected]
    assert outside, "the model has linears outside the blocks, or this test shows nothing"


def test_sizes_biases_and_blocks_are_those_of_the_modules():
    transformer = tiny_transformer()
    for linear in block_linears(transformer, family_of(transformer)):
        module = transformer.get_submodule(linear.name)
        assert tuple(module.weight.shape) == (linear.out_features, linear.in_features)
        assert (module.bias is not None) == linear.has_bias
        assert linear.name.startswith(f"transformer_blocks.{linear.block}.")


def test_modulation_linears_are_the_ones_that_read_the_time_embedding():
    transformer = tiny_transformer()
    linears = block_linears(transformer, family_of(transformer))
    modulation = {linear.name.split(".", 2)[2] for linear in linears if linear.role == "modulation"}
    assert modulation == {"norm1.linear", "norm2.linear"}
    assert all(linear.in_features == 32 for linear in linears if linear.role == "modulation")


def test_works_on_the_meta_device():
    with torch.device("meta"):
        on_meta = tiny_transformer()
    real = tiny_transformer()
    family = family_of(real)
    assert block_linears(on_meta, family) == block_linears(real, family)


def test_linears_that_share_an_input_do():
    """The declared groups, checked against a run: the linears of a group, and no others, get the same tensor."""
    transformer = tiny_transformer()
    family = family_of(transformer)
    block = transformer.transformer_blocks[1]
    inputs = {}

    def keep(name):
        def hook(module, args):
            inputs[name] = args[0]  # keeps the tensor alive, so that its identity is its own

        return hook

    for name, module in block.named_modules():
        if isinstance(module, nn.Linear) and name not in family.modulation:
            module.register_forward_pre_hook(keep(name))
    run_transformer(transformer)
    readers = {}
    for name, tensor in inputs.items():
        readers.setdefault(id(tensor), set()).add(name)
    assert [names for names in readers.values() if len(names) > 1] == [set(names) for names in family.shared_inputs]


def test_unsupported_class_names_the_supported_ones():
    with pytest.raises(InvalidInputError, match=r"'Linear' is not supported.*CogVideoXTransformer3DModel"):
        family_of(nn.Linear(2, 2))


def test_family_of_takes_a_class_name():
    assert family_of("CogVideoXTransformer3DModel") is FAMILIES["CogVideoXTransformer3DModel"]


def test_a_model_without_its_block_list_is_refused():
    family = family_of("CogVideoXTransformer3DModel")
    with pytest.raises(InvalidInputError, match="no block list 'transformer_blocks'"):
        block_names(nn.Linear(2, 2), family)
