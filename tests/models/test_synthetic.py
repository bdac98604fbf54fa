import pytest
import torch

from quick import slow
from s2q.benchmark.synthetic_blocks import block_inputs, random_packed_linear, synthetic_block
from s2q.common.errors import InvalidInputError
from s2q.core.tokens import token_grid
from s2q.models import block_linears, linears_of_block
from s2q.models.synthetic import synthetic_model, synthetic_names
from s2q.nn import PackedLinear
from s2q.planning import plan
from s2q.planning.resolve import resolve
from s2q.recipes.load import load_recipe
from tiny import shrunken

PARAMETERS = {  # of the published weights
    "cogvideox-2b": 1_693_783_872,
    "cogvideox-5b": 5_570_283_072,
    "hunyuanvideo": 12_821_012_544,
    "kandinsky5-lite": 2_007_702_848,
    "ltx-2": 18_876_174_592,
    "ltx-2.3": 18_988_838_144,
    "ltx-2b": 1_923_385_472,
    "minimax-h3": 33_122_992_896,
    "sana-video-2b": 2_056_862_144,
    "skyreels-v2-14b": 14_288_491_584,
    "wan-1.3b": 1_418_996_800,
    "wan-animate-14b": 17_274_816_884,
    "wan-a14b": 14_288_491_584,  # of each of two
    "wan-14b": 14_288_491_584,
    "wan-vace-14b": 17_337_592_896,
}


def test_the_published_parameter_counts():
    assert set(synthetic_names()) == set(PARAMETERS)
    for name, count in PARAMETERS.items():
        transformer = synthetic_model(name).meta_transformer()
        assert sum(parameter.numel() for parameter in transformer.parameters()) == count


@pytest.mark.parametrize(
    ("name", "tokens", "text", "linears"),
    [
        ("cogvideox-2b", 17_550, 226, 30 * 8),
        ("cogvideox-5b", 17_550, 226, 42 * 8),
        ("hunyuanvideo", 118_800, 256, 20 * 14 + 40 * 6),
        ("kandinsky5-lite", 47_616, 512, 32 * 11),
        ("ltx-2", 6_144, 1024, 48 * 28),
        ("ltx-2.3", 6_144, 1024, 48 * 28),
        ("ltx-2b", 7_392, 128, 28 * 10),
        ("sana-video-2b", 32_760, 300, 20 * 8),
        ("skyreels-v2-14b", 51_000, 512, 40 * 10),
        ("wan-1.3b", 32_760, 512, 30 * 10),
        ("wan-animate-14b", 75_600, 512, 40 * 12),
        ("wan-a14b", 32_760, 512, 40 * 10),
        ("wan-14b", 32_760, 512, 40 * 10),
        ("wan-vace-14b", 32_760, 512, 40 * 10 + 8 * 11 + 1),
    ],
)
def test_tokens_and_linears(name, tokens, text, linears):
    model = synthetic_model(name)
    assert (model.tokens, model.text_tokens) == (tokens, text)
    found = block_linears(model.meta_transformer(), model.family)
    assert len(found) == linears
    assert len({one.name for one in found}) == linears
    assert {one.block for one in found} == set(range(sum(one.count for one in model.block_lists)))


@pytest.mark.parametrize(
    ("name", "recipe", "least"),
    [("cogvideox-2b", "rtn-w4a6", 3.88), ("cogvideox-5b", "rtn-w4a6", 3.93)]
    + [("cogvideox-2b", "s2q-w4a6", 3.86), ("cogvideox-5b", "s2q-w4a6", 3.91)],
)
def test_packed_size(name, recipe, least):
    assert plan(f"synthetic:{name}", recipe=recipe).storage["ratio"] >= least


@pytest.mark.parametrize(
    ("name", "least"),
    [("cogvideox-2b", 3.9), ("cogvideox-5b", 3.94), ("hunyuanvideo", 3.86), ("ltx-2b", 3.84)]
    + [("wan-1.3b", 3.8), ("wan-14b", 3.86)],
)
def test_packed_size_with_the_linears_outside_the_blocks_at_8_bits(name, least):
    assert plan(f"synthetic:{name}", recipe="s2q-w4a6", overrides=["outer.num_bits=8"]).storage["ratio"] >= least


def test_rows_of_linears():
    hunyuan = synthetic_model("hunyuanvideo")
    dual, single = hunyuan.block_lists
    assert hunyuan.rows(dual, "attn.to_q", tokens=100) == 100
    assert hunyuan.rows(dual, "ff_context.net.2", tokens=100) == 256
    assert hunyuan.rows(dual, "norm1.linear", tokens=100) == 1
    assert hunyuan.rows(single, "proj_out", tokens=100) == 356
    wan = synthetic_model("wan-14b")
    assert wan.rows(wan.block_lists[0], "attn2.to_k", tokens=100) == 512
    assert wan.rows(wan.block_lists[0], "attn2.to_q", tokens=100) == 100


@pytest.mark.parametrize("name", sorted(PARAMETERS))
def test_rows_are_what_linears_see(name):
    model = shrunken(name)
    generator = torch.Generator().manual_seed(0)
    for block_list in model.block_lists:
        block = synthetic_block(model, block_list, generator=generator)
        rows = {}
        for inner, module in block.named_modules():
            if isinstance(module, torch.nn.Linear) and inner not in model.family.kept_linears:
                module.register_forward_pre_hook(
                    lambda _module, args, rows=rows, inner=inner: rows.update({inner: args[0][..., 0].numel()})
                )
        with torch.no_grad():
            block(**block_inputs(model, block_list, tokens=10, generator=generator))
        wanted = {inner: model.batch * model.rows(block_list, inner, tokens=10) for inner in rows}
        assert rows == wanted
        assert len(rows) == len(linears_of_block(block, "block", model.family))


def packed_blocks(model, recipe, generator):
    """A block of each list, packed as a checkpoint would be, and inputs for it."""
    linears = resolve(load_recipe(recipe), block_linears(model.meta_transformer(), model.family))
    plans = {linear.name: linear for linear in linears}

    def packed(linear):
        return random_packed_linear(plans[linear.name], generator=generator)

    for block_list in model.block_lists:
        block = synthetic_block(model, block_list, generator=generator, linear_of=packed)
        yield block, block_inputs(model, block_list, tokens=10, generator=generator)


@pytest.mark.parametrize("name", sorted(PARAMETERS))
@pytest.mark.parametrize("recipe", ["s2q-plus-w4a4", "rtn-w8a8"])
def test_packed_blocks_run(name, recipe):
    """Their output is about as large as their input."""
    model = shrunken(name)
    for block, inputs in packed_blocks(model, recipe, torch.Generator().manual_seed(0)):
        named = {inner: module for inner, module in block.named_modules() if isinstance(module, torch.nn.Linear)}
        linears = [module for inner, module in named.items() if inner not in model.family.kept_linears]
        assert linears
        assert all(isinstance(module, PackedLinear) for module in linears)
        with torch.no_grad(), token_grid(None):
            output = block(**inputs)
        output = output[0] if isinstance(output, tuple) else output
        assert output.shape == inputs[model.family.block_argument("hidden_states")].shape
        assert output.dtype == torch.bfloat16
        assert 0.5 < float(output.float().std()) < 10


@pytest.mark.parametrize(
    ("name", "quantized"),  # how often inputs are quantized in a block of each list; q, k and v share one
    [slow("cogvideox-2b", [4]), ("hunyuanvideo", [8, 3]), slow("wan-1.3b", [7])],
)
def test_packed_blocks_compile_into_one_graph(name, quantized):
    counts = []

    def backend(graph, _inputs):
        counts.append(sum("activation_path" in str(node.target) for node in graph.graph.nodes))
        return graph.forward

    for block, inputs in packed_blocks(shrunken(name), "s2q-w4a6", torch.Generator().manual_seed(0)):
        with torch.no_grad():
            expected = block(**inputs)
            found = torch.compile(block, backend=backend, fullgraph=True)(**inputs)
        torch.testing.assert_close(found, expected)
    assert counts == quantized


def test_what_a_model_keeps_in_fp32_stays_so():
    model = shrunken("wan-1.3b")
    block = synthetic_block(model, model.block_lists[0], generator=torch.Generator())
    assert block.scale_shift_table.dtype == torch.float32
    assert block.norm2.weight.dtype == torch.float32
    assert block.attn1.to_q.weight.dtype == torch.bfloat16


def test_unknown_synthetic_names_are_refused():
    with pytest.raises(
        InvalidInputError, match=r"unknown synthetic model 'cogvideo-5b': nearest names are cogvideox-5b"
    ):
        synthetic_model("synthetic:cogvideo-5b")


def test_nothing_is_drawn_from_the_global_generator():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    model = shrunken("cogvideox-2b")
    synthetic_block(model, model.block_lists[0], generator=torch.Generator().manual_seed(1))
    assert torch.rand(1) == expected
