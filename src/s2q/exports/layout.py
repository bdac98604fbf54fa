"""The names and the fused linears of the published checkpoints, which single-file programs read.

diffusers converts such checkpoints to its own names; a layout is that conversion run backwards. `check_layout` runs
diffusers' converter on what a layout gives: all names, and the order of all rows, have to come back.

A rule is a pattern and what replaces it, in a name of diffusers. "#i" after the name of a linear marks piece i of a
fused one, "#swap" one whose halves are exchanged.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from s2q.common.errors import InvalidInputError
from s2q.models.originals import from_original

_MARK = re.compile(r"#(\d+|swap)")
_SWAP = "#swap"
_REMEDY = "export to sdnq or diffusers"

Rules = tuple[tuple[str, str], ...]
"""Patterns of regular expressions and their replacements, applied in order."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The original layout of a transformer class.

    Attributes:
        architecture: Name of the model family: `general.architecture` of GGUF files, and the key of linears that
            ComfyUI misreads.
        rules: Rules from names of diffusers to original names.
    """

    architecture: str
    rules: Rules

    def original_name(self, name: str) -> str:
        """Return the original name of a parameter, with its mark if it is a piece."""
        for pattern, replacement in self.rules:
            name = re.sub(pattern, replacement, name)
        return name

    def linear_name(self, name: str) -> str:
        """Return the original name of a linear, without a mark."""
        return _MARK.sub("", self.original_name(f"{name}.weight")).removesuffix(".weight")

    def to_original(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rename tensors whose first dimension is that of out features, and join the pieces of fused linears."""
        pieces: dict[str, list[tuple[str, Tensor]]] = {}
        for name, tensor in tensors.items():
            marked = self.original_name(name)
            pieces.setdefault(_MARK.sub("", marked), []).append((marked, tensor))
        return {name: _joined(parts) for name, parts in pieces.items()}


def _joined(parts: list[tuple[str, Tensor]]) -> Tensor:
    if len(parts) == 1:
        marked, tensor = parts[0]
        return torch.cat(tensor.chunk(2)[::-1]) if _SWAP in marked else tensor
    return torch.cat([tensor for _, tensor in sorted(parts, key=lambda part: part[0])])


def layout_of(model: nn.Module, target: str, *, remedy: str = _REMEDY) -> Layout:
    """Return the layout of a transformer's class, after `check_layout`; `remedy` is for a class without one."""
    name = type(model).__name__
    if name not in LAYOUTS:
        raise InvalidInputError(
            f"{target}: diffusers does not know the original names of {name}, only of {', '.join(LAYOUTS)}; {remedy}"
        )
    check_layout(model, LAYOUTS[name], remedy=remedy)
    return LAYOUTS[name]


def check_layout(model: nn.Module, layout: Layout, *, remedy: str = _REMEDY) -> None:
    """Have diffusers convert the numbered rows of a transformer, maybe on the meta device, back from the layout.

    Raises:
        InvalidInputError: If a name or a row does not come back, as for sizes that the converter does not expect.
    """
    count, rows = 0, {}
    for name, tensor in model.state_dict().items():
        rows[name] = torch.arange(count, count + tensor.shape[0], device="cpu")
        count += tensor.shape[0]
    original = layout.to_original(rows)
    try:
        back = from_original(type(model).__name__, original)
    except (RuntimeError, KeyError, ValueError) as error:
        raise _not_invertible(model, str(error), remedy) from error
    if back.keys() != rows.keys():
        raise _not_invertible(model, sorted(back.keys() ^ rows.keys())[0], remedy)
    for name, tensor in rows.items():
        if not torch.equal(back[name], tensor):
            raise _not_invertible(model, name, remedy)


def _not_invertible(model: nn.Module, what: str, remedy: str) -> InvalidInputError:
    return InvalidInputError(
        f"{type(model).__name__}: diffusers does not convert its original layout back ({what}), which depends on its "
        f"sizes; {remedy}"
    )


def _pair(pattern: str, replacement: str) -> Rules:
    """Rules of the two linears of an embedding."""
    return tuple((rf"{pattern}\.linear_{number}\.", f"{replacement}.{index}.") for number, index in ((1, 0), (2, 2)))


def _fused(pattern: str, replacement: str) -> Rules:
    """Rules of q, k and v as the pieces of one linear; "{}" in the pattern is the letter."""
    return tuple((rf"{pattern.format(part)}\.", f"{replacement}#{piece}.") for piece, part in enumerate("qkv"))


_WAN = Layout(
    architecture="wan",
    rules=(
        *_pair(r"^condition_embedder\.time_embedder", "time_embedding"),
        *_pair(r"^condition_embedder\.text_embedder", "text_embedding"),
        (r"^condition_embedder\.time_proj\.", "time_projection.1."),
        (r"^condition_embedder\.image_embedder\.norm1\.", "img_emb.proj.0."),
        (r"^condition_embedder\.image_embedder\.ff\.net\.0\.proj\.", "img_emb.proj.1."),
        (r"^condition_embedder\.image_embedder\.ff\.net\.2\.", "img_emb.proj.3."),
        (r"^condition_embedder\.image_embedder\.norm2\.", "img_emb.proj.4."),
        (r"^scale_shift_table$", "head.modulation"),
        (r"\.scale_shift_table$", ".modulation"),
        (r"^proj_out\.", "head.head."),
        (r"\.attn1\.", ".self_attn."),
        (r"\.attn2\.", ".cross_attn."),
        (r"\.to_out\.0\.", ".o."),
        (r"\.to_([qkv])\.", r".\1."),
        (r"\.add_([kv])_proj\.", r".\1_img."),
        (r"\.norm_added_k\.", ".norm_k_img."),
        (r"\.ffn\.net\.0\.proj\.", ".ffn.0."),
        (r"\.ffn\.net\.2\.", ".ffn.2."),
        (r"\.norm2\.", ".norm3."),  # norm2 of the original is norm3 of diffusers, which has no weight
    ),
)
_VACE = replace(
    _WAN,
    rules=(
        *_WAN.rules,
        (r"^vace_blocks\.(\d+)\.proj_in\.", r"vace_blocks.\1.before_proj."),
        (r"^vace_blocks\.(\d+)\.proj_out\.", r"vace_blocks.\1.after_proj."),
    ),
)
_LTX = Layout(
    architecture="ltxv",
    rules=(
        (r"^proj_in\.", "patchify_proj."),
        (r"^time_embed\.", "adaln_single."),
        (r"\.norm_([qk])\.", r".\1_norm."),
    ),
)
_LTX2 = Layout(
    architecture="ltxv",
    rules=(
        (r"^(audio_)?proj_in\.", r"\1patchify_proj."),
        (r"^(audio_)?time_embed\.", r"\1adaln_single."),
        (r"^(audio_)?prompt_adaln\.", r"\1prompt_adaln_single."),  # of 2.3, which diffusers does not convert back
        (r"^av_cross_attn_(video|audio)_scale_shift\.", r"av_ca_\1_scale_shift_adaln_single."),
        (r"^av_cross_attn_(?:video|audio)_(a2v|v2a)_gate\.", r"av_ca_\1_gate_adaln_single."),
        (r"\.(video|audio)_a2v_cross_attn_scale_shift_table$", r".scale_shift_table_a2v_ca_\1"),
        (r"\.norm_([qk])\.", r".\1_norm."),
    ),
)
_DOUBLE, _SINGLE = r"^transformer_blocks\.(\d+)\.", r"^single_transformer_blocks\.(\d+)\."
_REFINER, _ORIGINAL_REFINER = (
    r"^context_embedder\.token_refiner\.refiner_blocks\.(\d+)\.",
    r"txt_in.individual_token_refiner.blocks.\1.",
)
_HUNYUAN = Layout(
    architecture="hyvid",
    rules=(
        *_fused(_DOUBLE + r"attn\.to_{}", r"double_blocks.\1.img_attn_qkv"),
        *_fused(_DOUBLE + r"attn\.add_{}_proj", r"double_blocks.\1.txt_attn_qkv"),
        (_DOUBLE + r"attn\.norm_([qk])\.", r"double_blocks.\1.img_attn_\2_norm."),
        (_DOUBLE + r"attn\.norm_added_([qk])\.", r"double_blocks.\1.txt_attn_\2_norm."),
        (_DOUBLE + r"attn\.to_out\.0\.", r"double_blocks.\1.img_attn_proj."),
        (_DOUBLE + r"attn\.to_add_out\.", r"double_blocks.\1.txt_attn_proj."),
        (_DOUBLE + r"norm1\.linear\.", r"double_blocks.\1.img_mod.linear."),
        (_DOUBLE + r"norm1_context\.linear\.", r"double_blocks.\1.txt_mod.linear."),
        (_DOUBLE + r"ff\.net\.0\.proj\.", r"double_blocks.\1.img_mlp.fc1."),
        (_DOUBLE + r"ff\.net\.2\.", r"double_blocks.\1.img_mlp.fc2."),
        (_DOUBLE + r"ff_context\.net\.0\.proj\.", r"double_blocks.\1.txt_mlp.fc1."),
        (_DOUBLE + r"ff_context\.net\.2\.", r"double_blocks.\1.txt_mlp.fc2."),
        *_fused(_SINGLE + r"attn\.to_{}", r"single_blocks.\1.linear1"),
        (_SINGLE + r"proj_mlp\.", r"single_blocks.\1.linear1#3."),
        (_SINGLE + r"attn\.norm_([qk])\.", r"single_blocks.\1.\2_norm."),
        (_SINGLE + r"norm\.linear\.", r"single_blocks.\1.modulation.linear."),
        (_SINGLE + r"proj_out\.", r"single_blocks.\1.linear2."),
        *_fused(_REFINER + r"attn\.to_{}", f"{_ORIGINAL_REFINER}self_attn_qkv"),
        (_REFINER + r"attn\.to_out\.0\.", rf"{_ORIGINAL_REFINER}self_attn_proj."),
        (_REFINER + r"norm_out\.linear\.", rf"{_ORIGINAL_REFINER}adaLN_modulation.1."),
        (_REFINER + r"ff\.net\.0\.proj\.", rf"{_ORIGINAL_REFINER}mlp.fc1."),
        (_REFINER + r"ff\.net\.2\.", rf"{_ORIGINAL_REFINER}mlp.fc2."),
        (_REFINER, _ORIGINAL_REFINER),
        (r"^context_embedder\.proj_in\.", "txt_in.input_embedder."),
        *_pair(r"^context_embedder\.time_text_embed\.timestep_embedder", "txt_in.t_embedder.mlp"),
        (r"^context_embedder\.time_text_embed\.text_embedder\.", "txt_in.c_embedder."),
        (r"^x_embedder\.", "img_in."),
        *_pair(r"^time_text_embed\.timestep_embedder", "time_in.mlp"),
        *_pair(r"^time_text_embed\.guidance_embedder", "guidance_in.mlp"),
        (r"^time_text_embed\.text_embedder\.linear_1\.", "vector_in.in_layer."),
        (r"^time_text_embed\.text_embedder\.linear_2\.", "vector_in.out_layer."),
        (r"^norm_out\.linear\.", f"final_layer.adaLN_modulation.1{_SWAP}."),
        (r"^proj_out\.", "final_layer.linear."),
    ),
)
LAYOUTS: Mapping[str, Layout] = {
    "WanTransformer3DModel": _WAN,
    "SkyReelsV2Transformer3DModel": _WAN,
    "WanVACETransformer3DModel": _VACE,
    "HunyuanVideoTransformer3DModel": _HUNYUAN,
    "LTXVideoTransformer3DModel": _LTX,
    "LTX2VideoTransformer3DModel": _LTX2,
}
"""By transformer class."""
