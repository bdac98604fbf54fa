"""The names of the published checkpoints: all of them, written out, and converted back by diffusers."""

from dataclasses import replace

import diffusers
import pytest
import torch

from s2q.checkpoint import S2QConfig
from s2q.common.errors import InvalidInputError
from s2q.exports.export import _marks
from s2q.exports.layout import LAYOUTS, check_layout
from s2q.exports.target import linear_forms
from s2q.exports.targets import TARGETS
from s2q.recipes.load import load_recipe

MODELS = {
    "wan": (diffusers.WanTransformer3DModel, {"num_layers": 1, "added_kv_proj_dim": 5120, "image_dim": 1280}),
    "skyreels-v2": (
        diffusers.SkyReelsV2Transformer3DModel,
        {"num_layers": 1, "added_kv_proj_dim": 5120, "image_dim": 1280},
    ),
    "wan-vace": (
        diffusers.WanVACETransformer3DModel,
        {"num_layers": 1, "vace_layers": [0], "added_kv_proj_dim": 5120, "image_dim": 1280},
    ),
    "hunyuanvideo": (diffusers.HunyuanVideoTransformer3DModel, {"num_layers": 1, "num_single_layers": 1}),
    "ltx": (diffusers.LTXVideoTransformer3DModel, {"num_layers": 1}),
    "ltx-2": (diffusers.LTX2VideoTransformer3DModel, {"num_layers": 1}),
}
WEIGHTS_AND_BIASES = {
    "wan": """
        patch_embedding time_embedding.0 time_embedding.2 time_projection.1 text_embedding.0 text_embedding.2
        img_emb.proj.0 img_emb.proj.1 img_emb.proj.3 img_emb.proj.4 head.head blocks.0.norm3 blocks.0.ffn.0
        blocks.0.ffn.2 blocks.0.self_attn.q blocks.0.self_attn.k blocks.0.self_attn.v blocks.0.self_attn.o
        blocks.0.cross_attn.q blocks.0.cross_attn.k blocks.0.cross_attn.v blocks.0.cross_attn.o
        blocks.0.cross_attn.k_img blocks.0.cross_attn.v_img
    """,
    "hunyuanvideo": """
        img_in.proj time_in.mlp.0 time_in.mlp.2 vector_in.in_layer vector_in.out_layer guidance_in.mlp.0
        guidance_in.mlp.2 txt_in.t_embedder.mlp.0 txt_in.t_embedder.mlp.2 txt_in.c_embedder.linear_1
        txt_in.c_embedder.linear_2 txt_in.input_embedder
        txt_in.individual_token_refiner.blocks.0.norm1 txt_in.individual_token_refiner.blocks.0.norm2
        txt_in.individual_token_refiner.blocks.0.self_attn_qkv txt_in.individual_token_refiner.blocks.0.self_attn_proj
        txt_in.individual_token_refiner.blocks.0.mlp.fc1 txt_in.individual_token_refiner.blocks.0.mlp.fc2
        txt_in.individual_token_refiner.blocks.0.adaLN_modulation.1
        txt_in.individual_token_refiner.blocks.1.norm1 txt_in.individual_token_refiner.blocks.1.norm2
        txt_in.individual_token_refiner.blocks.1.self_attn_qkv txt_in.individual_token_refiner.blocks.1.self_attn_proj
        txt_in.individual_token_refiner.blocks.1.mlp.fc1 txt_in.individual_token_refiner.blocks.1.mlp.fc2
        txt_in.individual_token_refiner.blocks.1.adaLN_modulation.1
        double_blocks.0.img_mod.linear double_blocks.0.txt_mod.linear double_blocks.0.img_attn_qkv
        double_blocks.0.txt_attn_qkv double_blocks.0.img_attn_proj double_blocks.0.txt_attn_proj
        double_blocks.0.img_mlp.fc1 double_blocks.0.img_mlp.fc2 double_blocks.0.txt_mlp.fc1 double_blocks.0.txt_mlp.fc2
        single_blocks.0.linear1 single_blocks.0.linear2 single_blocks.0.modulation.linear
        final_layer.adaLN_modulation.1 final_layer.linear
    """,
    "ltx": """
        patchify_proj adaln_single.emb.timestep_embedder.linear_1 adaln_single.emb.timestep_embedder.linear_2
        adaln_single.linear caption_projection.linear_1 caption_projection.linear_2 proj_out
        transformer_blocks.0.attn1.to_q transformer_blocks.0.attn1.to_k transformer_blocks.0.attn1.to_v
        transformer_blocks.0.attn1.to_out.0 transformer_blocks.0.attn2.to_q transformer_blocks.0.attn2.to_k
        transformer_blocks.0.attn2.to_v transformer_blocks.0.attn2.to_out.0 transformer_blocks.0.ff.net.0.proj
        transformer_blocks.0.ff.net.2
    """,
    "ltx-2": """
        patchify_proj audio_patchify_proj proj_out audio_proj_out caption_projection.linear_1
        caption_projection.linear_2 audio_caption_projection.linear_1 audio_caption_projection.linear_2
        adaln_single.emb.timestep_embedder.linear_1 adaln_single.emb.timestep_embedder.linear_2
        adaln_single.linear audio_adaln_single.emb.timestep_embedder.linear_1
        audio_adaln_single.emb.timestep_embedder.linear_2 audio_adaln_single.linear
        av_ca_video_scale_shift_adaln_single.emb.timestep_embedder.linear_1
        av_ca_video_scale_shift_adaln_single.emb.timestep_embedder.linear_2
        av_ca_video_scale_shift_adaln_single.linear
        av_ca_audio_scale_shift_adaln_single.emb.timestep_embedder.linear_1
        av_ca_audio_scale_shift_adaln_single.emb.timestep_embedder.linear_2
        av_ca_audio_scale_shift_adaln_single.linear av_ca_a2v_gate_adaln_single.emb.timestep_embedder.linear_1
        av_ca_a2v_gate_adaln_single.emb.timestep_embedder.linear_2 av_ca_a2v_gate_adaln_single.linear
        av_ca_v2a_gate_adaln_single.emb.timestep_embedder.linear_1
        av_ca_v2a_gate_adaln_single.emb.timestep_embedder.linear_2 av_ca_v2a_gate_adaln_single.linear
        transformer_blocks.0.attn1.to_q transformer_blocks.0.attn1.to_k transformer_blocks.0.attn1.to_v
        transformer_blocks.0.attn1.to_out.0 transformer_blocks.0.audio_attn1.to_q
        transformer_blocks.0.audio_attn1.to_k transformer_blocks.0.audio_attn1.to_v
        transformer_blocks.0.audio_attn1.to_out.0 transformer_blocks.0.attn2.to_q
        transformer_blocks.0.attn2.to_k transformer_blocks.0.attn2.to_v transformer_blocks.0.attn2.to_out.0
        transformer_blocks.0.audio_attn2.to_q transformer_blocks.0.audio_attn2.to_k
        transformer_blocks.0.audio_attn2.to_v transformer_blocks.0.audio_attn2.to_out.0
        transformer_blocks.0.audio_to_video_attn.to_q transformer_blocks.0.audio_to_video_attn.to_k
        transformer_blocks.0.audio_to_video_attn.to_v transformer_blocks.0.audio_to_video_attn.to_out.0
        transformer_blocks.0.video_to_audio_attn.to_q transformer_blocks.0.video_to_audio_attn.to_k
        transformer_blocks.0.video_to_audio_attn.to_v transformer_blocks.0.video_to_audio_attn.to_out.0
        transformer_blocks.0.ff.net.0.proj transformer_blocks.0.ff.net.2
        transformer_blocks.0.audio_ff.net.0.proj transformer_blocks.0.audio_ff.net.2
    """,
}
OTHERS = {
    "wan": """
        head.modulation blocks.0.modulation blocks.0.self_attn.norm_q.weight blocks.0.self_attn.norm_k.weight
        blocks.0.cross_attn.norm_q.weight blocks.0.cross_attn.norm_k.weight blocks.0.cross_attn.norm_k_img.weight
    """,
    "hunyuanvideo": """
        double_blocks.0.img_attn_q_norm.weight double_blocks.0.img_attn_k_norm.weight
        double_blocks.0.txt_attn_q_norm.weight double_blocks.0.txt_attn_k_norm.weight
        single_blocks.0.q_norm.weight single_blocks.0.k_norm.weight
    """,
    "ltx": """
        scale_shift_table transformer_blocks.0.scale_shift_table
        transformer_blocks.0.attn1.q_norm.weight transformer_blocks.0.attn1.k_norm.weight
        transformer_blocks.0.attn2.q_norm.weight transformer_blocks.0.attn2.k_norm.weight
    """,
    "ltx-2": """
        scale_shift_table audio_scale_shift_table transformer_blocks.0.scale_shift_table
        transformer_blocks.0.audio_scale_shift_table transformer_blocks.0.scale_shift_table_a2v_ca_video
        transformer_blocks.0.scale_shift_table_a2v_ca_audio transformer_blocks.0.attn1.q_norm.weight
        transformer_blocks.0.attn1.k_norm.weight transformer_blocks.0.audio_attn1.q_norm.weight
        transformer_blocks.0.audio_attn1.k_norm.weight transformer_blocks.0.attn2.q_norm.weight
        transformer_blocks.0.attn2.k_norm.weight transformer_blocks.0.audio_attn2.q_norm.weight
        transformer_blocks.0.audio_attn2.k_norm.weight transformer_blocks.0.audio_to_video_attn.q_norm.weight
        transformer_blocks.0.audio_to_video_attn.k_norm.weight
        transformer_blocks.0.video_to_audio_attn.q_norm.weight
        transformer_blocks.0.video_to_audio_attn.k_norm.weight
    """,
}


for names in (WEIGHTS_AND_BIASES, OTHERS):
    names["skyreels-v2"] = names["wan"]
    control = [f"vace_{name}" for name in names["wan"].split() if name.startswith("blocks.")]
    names["wan-vace"] = " ".join([names["wan"], *control])
WEIGHTS_AND_BIASES["wan-vace"] += " vace_patch_embedding vace_blocks.0.before_proj vace_blocks.0.after_proj"


MODULATED = {"cross_attn_mod": True, "audio_cross_attn_mod": True}
FURTHER = {"ltx-2": MODULATED}  # sizes of parts that a rule is for


def model_of(name, **further):
    model_class, config = MODELS[name]
    with torch.device("meta"):
        return model_class(**config | further), LAYOUTS[model_class.__name__]


def original_names(model, layout):
    rows = {key: torch.empty(tensor.shape[0]) for key, tensor in model.state_dict().items()}
    return set(layout.to_original(rows))


@pytest.mark.parametrize("name", MODELS)
def test_names_are_the_published_ones_and_diffusers_converts_them_back(name):
    model, layout = model_of(name)
    check_layout(model, layout)
    linears = WEIGHTS_AND_BIASES[name].split()
    published = {f"{linear}.{part}" for linear in linears for part in ("weight", "bias")} | set(OTHERS[name].split())
    assert original_names(model, layout) == published


@pytest.mark.parametrize("name", MODELS)
def test_no_rule_is_to_spare(name):
    model, layout = model_of(name, **FURTHER.get(name, {}))
    published = original_names(model, layout)
    for index, rule in enumerate(layout.rules):
        reduced = replace(layout, rules=layout.rules[:index] + layout.rules[index + 1 :])
        assert original_names(model, reduced) != published, rule


@pytest.mark.parametrize(
    ("name", "pattern"),
    [("wan", "norm2"), ("hunyuanvideo", "to_k"), ("hunyuanvideo", "proj_mlp")],
)
def test_names_that_diffusers_does_not_convert_back_are_refused(name, pattern):
    model, layout = model_of(name)
    rules = tuple(rule for rule in layout.rules if pattern not in rule[0].replace("\\", ""))
    assert len(rules) < len(layout.rules)
    with pytest.raises(InvalidInputError, match="does not convert its original layout back"):
        check_layout(model, replace(layout, rules=rules))


def test_the_modulated_text_of_ltx_2_3_is_refused():
    model, layout = model_of("ltx-2", **MODULATED)
    with pytest.raises(InvalidInputError, match=r"does not convert .* back \(.*prompt_adaln"):
        check_layout(model, layout)


@pytest.mark.parametrize(("mark", "wrong"), [("#0", "#9"), ("#swap", "")])
def test_rows_in_another_order_are_refused(mark, wrong):
    model, layout = model_of("hunyuanvideo")
    rules = tuple((pattern, replacement.replace(mark, wrong)) for pattern, replacement in layout.rules)
    with pytest.raises(InvalidInputError, match="does not convert its original layout back"):
        check_layout(model, replace(layout, rules=rules))


def test_sizes_that_the_converter_does_not_expect_are_refused():
    with torch.device("meta"):
        model = diffusers.HunyuanVideoTransformer3DModel(num_layers=1, num_single_layers=1, num_attention_heads=2)
    with pytest.raises(InvalidInputError, match="does not convert its original layout back"):
        check_layout(model, LAYOUTS["HunyuanVideoTransformer3DModel"])


def marks(name, recipe, *linears):
    """The marks of linears of a recipe in ComfyUI's file of a model."""
    model, layout = model_of(name)
    schemes = {linear: load_recipe(recipe).linear_scheme() for linear in linears}
    config = S2QConfig.from_schemes(schemes, recipe=recipe, compute_dtype="float32")
    return _marks(model, linear_forms(model, config), layout, TARGETS["comfyui"])


def test_comfyui_gets_the_linear_that_tells_it_the_width_of_ltx_texts_unquantized_or_in_8_bits():
    to_q, to_k, to_v = (f"transformer_blocks.0.attn2.to_{part}" for part in "qkv")
    with pytest.raises(
        InvalidInputError, match=r"attn2.to_k: .*width of the text.*skip=\['transformer_blocks.0.attn2.to_k'\]"
    ):
        marks("ltx", "convrot-w4a8", to_q, to_k)
    assert marks("ltx", "convrot-w8a8", to_q, to_k).keys() == {to_q, to_k}
    assert marks("ltx", "convrot-w4a8", to_q, to_v).keys() == {to_q, to_v}


def test_parts_of_a_fused_linear_with_other_formats_are_refused():
    parts = [f"transformer_blocks.0.attn.to_{part}" for part in "qkv"]
    assert marks("hunyuanvideo", "convrot-w8a8", *parts).keys() == {"double_blocks.0.img_attn_qkv"}
    with pytest.raises(InvalidInputError, match=r"as a part of double_blocks.0.img_attn_qkv, whose other parts"):
        marks("hunyuanvideo", "convrot-w8a8", parts[0])
