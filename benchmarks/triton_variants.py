"""The compilations of `triton_aot`: every Triton kernel, with the tiles, dtypes and shapes that models use.

Imports triton, which decides then whether it interprets.
"""

import ast
import functools
import hashlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton

from s2q.ops import triton_math
from s2q.ops.activation_path import triton as activation_path
from s2q.ops.activation_path.tiles import rotation_tile, row_block
from s2q.ops.attention_colsum import tiles as colsum_tiles
from s2q.ops.attention_colsum import triton as attention_colsum
from s2q.ops.attention_inputs import HeadTiles, find_tile
from s2q.ops.fake_quantize import triton as fake_quantize
from s2q.ops.int8_attention import tiles as int8_tiles
from s2q.ops.int8_attention import triton as int8_attention
from s2q.ops.int8_attention.reference import KEY_BLOCK, QUERY_BLOCK
from s2q.ops.level_values import triton as level_values
from s2q.ops.rescaled_int_matmul import tiles as matmul_tiles
from s2q.ops.rescaled_int_matmul import triton as rescaled_int_matmul
from s2q.ops.token_levels import triton as token_levels
from s2q.ops.triton_attention import ADDITIVE_MASK, BOOLEAN_MASK, NO_MASK, mask_constants
from s2q.ops.weight_only_matmul import tiles as weight_only_tiles
from s2q.ops.weight_only_matmul import triton as weight_only_matmul

SIDES = {(True, True): "", (True, False): " left only", (False, True): " right only"}
"""Factors of a rotation, and how a variant with them is called."""
GRIDS = ((12, 16), (24, 32), (48, 64), (96, 128))
"""n1 and n2 of the models' widths: 192, 768, 3072 (1920 = 40 · 48 pads to the same), 12288."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One compilation.

    Attributes:
        name: In the table.
        kernel: The function under `triton.jit`.
        types: Of the arguments that are not constants, in Triton's spelling.
        constants: Of the compilation.
        aligned: Arguments that are multiples of 16.
        options: num_warps and num_stages.
        group: The row of docs/speed.md.
        needs: Pattern of the tensor-core instructions that have to be there, such as "wgmma s8"; None for kernels
            without products.
        is_quick: Whether it is compiled where time is short: one of each kind, with the largest tile.
    """

    name: str
    kernel: object
    types: dict[str, str]
    constants: dict[str, object]
    aligned: tuple[str, ...]
    options: dict[str, int]
    group: str
    needs: str | None = None
    is_quick: bool = False

    def key(self) -> str:
        """Return a hash of all that is compiled; comments and docstrings do not count."""
        types = {name: self.types[name] for name in self.kernel.arg_names if name not in self.constants}
        parts = (_code_of(self.kernel), types, sorted(self.constants.items()), sorted(self.aligned), self.options)
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


@functools.cache
def _code_of(kernel: object) -> str:
    """Functions under `triton.jit`, and constants, of a kernel's module, those it imports from and `triton_math`."""
    module = inspect.getmodule(kernel.fn)
    imported = {inspect.getmodule(value.fn) for value in vars(module).values() if isinstance(value, triton.JITFunction)}
    others = sorted(imported - {module, triton_math}, key=lambda module: module.__name__)
    values = [item for part in (module, triton_math, *others) for item in vars(part).items()]
    trees = [ast.parse(value.src).body[0] for _, value in values if isinstance(value, triton.JITFunction)]
    for tree in trees:
        if ast.get_docstring(tree) is not None:
            del tree.body[0]
    constants = [f"{name} = {value}" for name, value in values if isinstance(value, triton.language.constexpr)]
    return "\n".join([*map(ast.unparse, trees), *constants])


def _options(tile: dict[str, object]) -> dict[str, int]:
    return {name: value for name, value in tile.items() if name.startswith("num_")}


def _sizes(tile: dict[str, object]) -> dict[str, object]:
    return {name: value for name, value in tile.items() if not name.startswith("num_")}


def matmul_variants(arch: int) -> Iterator[Variant]:
    types = {"x_ptr": "*i8", "x_scale_ptr": "*fp32", "w_scale_ptr": "*fp32", "bias_ptr": "*bf16"}
    types |= {"branch_x_ptr": "*fp32", "branch_w_ptr": "*bf16", "out_ptr": "*bf16", "rows": "i32", "columns": "i32"}
    types |= {"x_stride": "i32", "w_stride": "i32", "shared_ptr": "*fp32", "shared_rows_ptr": "*i32"}
    pointers = ("x_ptr", "w_ptr", "x_scale_ptr", "w_scale_ptr", "bias_ptr", "branch_x_ptr", "branch_w_ptr", "out_ptr")
    pointers += ("shared_ptr", "shared_rows_ptr")
    aligned = (*pointers, "columns", "x_stride", "w_stride")
    weight, bf16, fp16 = torch.empty(8, 32), torch.bfloat16, torch.float16
    for most, tile in matmul_tiles.TILES[arch]:
        # Below 64 rows a warp group's instruction would be half empty: Triton takes the older one.
        needs = "wgmma s8" if arch == 90 and tile["ROWS"] >= 64 else "mma.sync s8"
        for packed in (False, True) if most < matmul_tiles.UNPACK_FROM_ROWS else (False,):
            odd = {16: (), 64: () if packed else (77,), 128: (192,)}[tile["ROWS"]]
            cases = [(3072, None, bf16, False), (3072, weight, bf16, False)]
            cases += [(depth, None, bf16, False) for depth in odd]
            cases += [] if packed else [(3072, weight, fp16, False), (3072, weight, bf16, True)]
            for depth, branch, dtype, shared in cases:
                name = f"{'w4' if packed else 'w8'} {tile['ROWS']}x{tile['COLUMNS']}x{tile['BLOCK']} K={depth}"
                short = "bf16" if dtype == bf16 else "fp16"
                yield Variant(
                    name=f"matmul {name}" + ("" if branch is None else f" branch {short}") + " shared" * shared,
                    kernel=rescaled_int_matmul.rescaled_matmul_kernel,
                    types=types
                    | {"w_ptr": "*u8" if packed else "*i8", "out_ptr": f"*{short}", "bias_ptr": f"*{short}"},
                    constants={"HAS_BIAS": True, "HAS_SHARED": shared, "INTERPRET": False}
                    | {"DEPTH": depth, "PACKED": packed, "GROUP": matmul_tiles.GROUP_ROWS}
                    | _sizes(tile)
                    | rescaled_int_matmul.branch_constants(branch, dtype),
                    aligned=aligned if depth % 16 == 0 else pointers,
                    options=_options(tile),
                    group="int8 product, few rows" if tile["ROWS"] == 16 else "int8 product",
                    needs=needs,
                    is_quick=(branch is not None and dtype == bf16 and (shared or packed))
                    and (tile["ROWS"] == 128 or (packed and tile["ROWS"] == 16)),
                )
    yield Variant(
        name="unpack",
        kernel=rescaled_int_matmul.unpack_kernel,
        types={"packed_ptr": "*u8", "codes_ptr": "*i8", "packed_stride": "i32"},
        constants={"DEPTH": 3072, "BLOCK": matmul_tiles.UNPACK_BLOCK},
        aligned=("packed_ptr", "codes_ptr", "packed_stride"),
        options={"num_warps": 4},
        group="unpack weights",
        is_quick=True,
    )


def value_variants(arch: int) -> Iterator[Variant]:
    pointers = ("packed_ptr", "levels_ptr", "group_scale_ptr", "values_ptr")
    for groups in (0, 192):
        yield Variant(
            name="level values" + (f" in {groups} groups" if groups else ""),
            kernel=level_values.level_values_kernel,
            types=dict.fromkeys(pointers, "*i8") | {"packed_ptr": "*u8", "packed_stride": "i32"},
            constants=level_values.value_constants(3072, groups),
            aligned=(*pointers, "packed_stride"),
            options={"num_warps": 4},
            group="unpack weights",
            is_quick=groups > 0,
        )


def token_level_variants(arch: int) -> Iterator[Variant]:
    pointers = ("x_ptr", "bounds_ptr", "levels_ptr", "clip_ptr", "values_ptr", "token_scale_ptr")
    types = dict.fromkeys(pointers, "*fp32") | {"values_ptr": "*i8", "unit": "fp32"}
    types |= {"x_stride": "i32", "clip_stride": "i32"}
    for dtype, features in (("bf16", 3072), ("fp32", 12288)):
        yield Variant(
            name=f"token levels {dtype} {features}",
            kernel=token_levels.token_levels_kernel,
            types=types | {"x_ptr": f"*{dtype}"},
            constants=token_levels.level_constants(features, 16),
            aligned=(*pointers, "x_stride"),
            options={"num_warps": 4},
            group="quantize",
            is_quick=dtype == "bf16",
        )


def fake_quantize_variants(arch: int) -> Iterator[Variant]:
    pointers = ("x_ptr", "ratio_ptr", "grad_ptr", "amax_ptr", "grad_x_ptr", "grad_ratio_ptr", "out_ptr")
    types = dict.fromkeys(pointers, "*fp32") | {"num_rows": "i32", "ratio_stride": "i32"}
    for dtype, length, of_weight in (("fp32", 3072, False), ("bf16", 15360, False), ("fp32", 64, True)):
        kernels = {"values": fake_quantize.fake_quantize_kernel, "gradient": fake_quantize.gradient_kernel}
        for kind, kernel in kernels.items():
            named = {name: types[name] for name in kernel.arg_names if name in types}
            in_dtype = dict.fromkeys(("x_ptr", "grad_ptr", "grad_x_ptr", "out_ptr"), f"*{dtype}")
            constants = fake_quantize.row_constants(length, num_bits=4 if of_weight else 6, of_weight=of_weight)
            warps = constants.pop("num_warps")
            yield Variant(
                name=f"fake quantization {kind} {dtype} {length}",
                kernel=kernel,
                types=named | {name: kind for name, kind in in_dtype.items() if name in named},
                constants=constants,
                aligned=tuple(name for name in named if name in pointers),
                options={"num_warps": warps},
                group="fake quantization",
                is_quick=dtype == "fp32",
            )


def activation_variants(arch: int) -> Iterator[Variant]:
    pointers = ("x_ptr", "shift_ptr", "scale_ptr", "left_ptr", "right_ptr", "clip_ptr", "codes_ptr", "token_scale_ptr")
    types = dict.fromkeys(pointers, "*fp32") | {"codes_ptr": "*i8", "rows": "i32"}
    types |= {"x_stride": "i32", "clip_stride": "i32"}
    types |= {"mean_codes_ptr": "*i8", "mean_scale_ptr": "*fp32", "cubes_ptr": "*i32"}
    pointers += ("mean_codes_ptr", "mean_scale_ptr", "cubes_ptr")
    parts = {"HAS_SHIFT": True, "HAS_SCALE": True, "HAS_CLIP": True, "HAS_MEANS": False, "QMAX": 31}
    means = parts | {"HAS_MEANS": True}
    for dtype, features, given in (
        ("fp16", 1920, parts),
        ("fp32", 3072, parts),
        ("bf16", 12288, parts),
        ("bf16", 12288, means),
    ):
        block, num_warps = row_block(features)
        yield Variant(
            name=f"quantize {dtype} {features}" + " means" * given["HAS_MEANS"],
            kernel=activation_path.quantize_kernel,
            types=types | {"x_ptr": f"*{dtype}"},
            constants=given | {"FEATURES": features, "BLOCK": block},
            aligned=(*pointers, "x_stride"),
            options={"num_warps": num_warps},
            group="quantize",
            is_quick=given["HAS_MEANS"],
        )
    for precision, dtype in (("bf16", "bf16"), ("tf32x3", "fp32"), ("tf32x3", "fp16")):
        tiles = {grid: rotation_tile(*grid, precision=precision, architecture=arch) for grid in GRIDS}
        widest = max(grid for grid, tile in tiles.items() if tile is not None)
        for grid, tile in tiles.items():
            if tile is None or (dtype == "fp16" and grid != widest):
                continue
            cases = [(sides, parts) for sides in (SIDES if grid == widest else ((True, True),))]
            cases += [((True, True), means)] if grid == widest else []
            for sides, given in cases:
                name = f"rotate {precision} x {dtype} {grid[0]}x{grid[1]}{SIDES[sides]}"
                yield Variant(
                    name=name + " means" * given["HAS_MEANS"],
                    kernel=activation_path.rotate_quantize_kernel,
                    types=types | {"x_ptr": f"*{dtype}"},
                    constants=given
                    | activation_path.rotation_constants(_sizes(tile), grid, precision, sides)
                    | {"INTERPRET": False},
                    aligned=(*pointers, "x_stride"),
                    options=_options(tile),
                    group=f"rotate and quantize {'bf16' if dtype == 'bf16' else 'fp32, fp16'}",
                    needs="tf32" if precision == "tf32x3" else "f16",
                    is_quick=given["HAS_MEANS"] and dtype != "fp16",
                )
    for dtype, deflates in (("bf16", True), ("bf16", False), ("fp32", True)):
        of_torch = torch.bfloat16 if dtype == "bf16" else torch.float32
        constants = activation_path.low_rank_constants(3072, 32, of_torch, deflates=deflates)
        low_rank_types = {
            "x_ptr": f"*{dtype}",
            "rest_ptr": f"*{dtype}",
            "basis_ptr": "*bf16",
            "coefficients_ptr": "*fp32",
        }
        yield Variant(
            name=f"low rank {dtype} 3072{'' if deflates else ' of the weight'}",
            kernel=activation_path.low_rank_kernel,
            types=types | low_rank_types,
            constants={"HAS_SHIFT": True, "HAS_SCALE": True, "INTERPRET": False} | _sizes(constants),
            aligned=(*pointers, "x_stride", "basis_ptr", "coefficients_ptr", "rest_ptr"),
            options=_options(constants),
            group="low-rank branch",
            needs="f16" if dtype == "bf16" else "tf32",
            is_quick=deflates,
        )


MASKS = {  # kind, whether it differs from query to query, and type
    "": (NO_MASK, False, "*bf16"),
    " boolean, per key": (BOOLEAN_MASK, False, "*u8"),
    " boolean, per pair": (BOOLEAN_MASK, True, "*u8"),
    " additive, per pair": (ADDITIVE_MASK, True, "*bf16"),
}
NO_MASKS, ENDS = [*MASKS][:1], [*MASKS][:: len(MASKS) - 1]
HALVES = {"bf16": "bf16, fp16", "fp16": "bf16, fp16", "fp32": "fp32"}
"""Rows of docs/speed.md by dtype."""


@dataclass(frozen=True, kw_only=True)
class AttentionCase:
    """Heads and a mask that a kernel is compiled for, with its tile."""

    dtype: str
    head_dim: int
    mask: str
    tile: dict[str, object]

    @property
    def name(self) -> str:
        return f"{self.dtype} D={self.head_dim}{self.mask}"

    @property
    def mask_type(self) -> str:
        return MASKS[self.mask][2]

    @property
    def is_quick(self) -> bool:
        return self.mask == ENDS[-1] and self.head_dim == 128

    def constants(self) -> dict[str, object]:
        kind, is_pair_mask, _ = MASKS[self.mask]
        masking = mask_constants(kind, is_pair_mask)
        return {"HEAD_DIM": self.head_dim, "INTERPRET": False} | masking | _sizes(self.tile)


def attention_cases(
    tiles: HeadTiles, min_depth: int, masks: dict[tuple[str, int], list[str]]
) -> Iterator[AttentionCase]:
    """The cases of dtypes, head dims and masks."""
    for (dtype, head_dim), kinds in masks.items():
        for mask in kinds:
            itemsize, has_pair_mask = 4 if dtype == "fp32" else 2, MASKS[mask][1]
            tile = find_tile(tiles, head_dim, min_depth=min_depth, itemsize=itemsize, has_pair_mask=has_pair_mask)
            yield AttentionCase(dtype=dtype, head_dim=head_dim, mask=mask, tile=tile)


def colsum_variants(arch: int) -> Iterator[Variant]:
    numbers = [*(f"q{axis}" for axis in "bhnd"), *(f"k{axis}" for axis in "bhmd"), *(f"m{axis}" for axis in "bhnm")]
    # The innermost strides are 1, which Triton makes constants of; those of a mask may be anything.
    types = {"lse_ptr": "*fp32", "sums_ptr": "*fp32", "factor": "fp32"}
    types |= dict.fromkeys(["heads", "queries", "keys", *numbers], "i32")
    aligned = ("query_ptr", "key_ptr", "lse_ptr", "sums_ptr", "qb", "qh", "qn", "kb", "kh", "km")
    masks = {("bf16", 64): list(MASKS), ("fp16", 64): NO_MASKS, ("bf16", 128): ENDS, ("bf16", 256): ENDS}
    masks |= {("fp32", head_dim): ENDS for head_dim in (64, 128, 256)}
    for case in attention_cases(colsum_tiles.TILES[arch], colsum_tiles.MIN_DEPTH, masks):
        for kernel in (attention_colsum.log_sum_kernel, attention_colsum.column_sum_kernel):
            yield Variant(
                name=f"{kernel.__name__.removesuffix('_kernel')} {case.name}",
                kernel=kernel,
                types=types | dict.fromkeys(("query_ptr", "key_ptr"), f"*{case.dtype}") | {"mask_ptr": case.mask_type},
                constants=case.constants() | {"qd": 1, "kd": 1},
                aligned=aligned,
                options=_options(case.tile),
                group=f"column sums {HALVES[case.dtype]}",
                needs="tf32" if case.dtype == "fp32" else "f16",
                is_quick=case.is_quick,
            )


def int8_attention_variants(arch: int) -> Iterator[Variant]:
    codes = {"query_ptr": "*i8", "key_ptr": "*i8", "query_scale_ptr": "*fp32", "key_scale_ptr": "*fp32"}
    numbers = [*(f"v{axis}" for axis in "bhmd"), *(f"o{axis}" for axis in "bhnd"), *(f"m{axis}" for axis in "bhnm")]
    types = codes | {"factor": "fp32"} | dict.fromkeys(["heads", "queries", "keys", *numbers], "i32")
    aligned = (*codes, "value_ptr", "out_ptr", "vb", "vh", "vm", "ob", "oh", "on")
    masks = {("bf16", 64): list(MASKS), ("fp16", 64): NO_MASKS, ("bf16", 128): list(MASKS)}
    masks |= {("fp32", head_dim): ENDS for head_dim in (64, 128)}
    for case in attention_cases(int8_tiles.TILES[arch], int8_tiles.MIN_DEPTH, masks):
        yield Variant(
            name=f"int8 attention {case.name}",
            kernel=int8_attention.int8_attention_kernel,
            types=types | dict.fromkeys(("value_ptr", "out_ptr"), f"*{case.dtype}") | {"mask_ptr": case.mask_type},
            constants=case.constants() | int8_attention.BLOCKS | {"vd": 1, "od": 1},
            aligned=aligned,
            options=_options(case.tile),
            group=f"int8 attention {HALVES[case.dtype]}",
            needs="s8",
            is_quick=case.is_quick,
        )
    strides = dict.fromkeys(("heads", "tokens", "xb", "xh", "xn"), "i32")
    for dtype, head_dim in (("bf16", 64), ("bf16", 128), ("fp32", 128)):
        for tokens, size in (("queries", QUERY_BLOCK), ("keys", KEY_BLOCK)):
            constants = {"HAS_MEAN": tokens == "keys", "HEAD_DIM": head_dim, "BLOCK": size, "TILE_D": head_dim, "xd": 1}
            yield Variant(
                name=f"quantize {tokens} {dtype} D={head_dim}",
                kernel=int8_attention.quantize_block_kernel,
                types=strides | {"x_ptr": f"*{dtype}", "mean_ptr": "*fp32", "codes_ptr": "*i8", "scale_ptr": "*fp32"},
                constants=constants,
                aligned=("x_ptr", "mean_ptr", "codes_ptr", "scale_ptr", "xb", "xh", "xn"),
                options={"num_warps": int8_attention.QUANTIZE_WARPS},
                group="quantize",
                is_quick=dtype == "fp32",
            )


def weight_only_variants(arch: int) -> Iterator[Variant]:
    pointers = ("x_ptr", "w_ptr", "w_scale_ptr", "bias_ptr", "out_ptr")
    types = dict.fromkeys(pointers, "*fp32") | dict.fromkeys(("rows", "columns", "x_stride", "w_stride"), "i32")
    tile = weight_only_tiles.TILES[arch]
    for dtype, short in ((torch.bfloat16, "bf16"), (torch.float16, "fp16"), (torch.float32, "fp32")):
        for packed, depth in ((True, 512), (True, 77), (False, 512)):
            constants = {"DEPTH": depth, "PACKED": packed, "PRECISION": weight_only_matmul.product_precision(dtype)}
            pointer_types = {"x_ptr": f"*{short}", "bias_ptr": f"*{short}", "out_ptr": f"*{short}"}
            yield Variant(
                name=f"weight only {'w4' if packed else 'w8'} {short} K={depth}",
                kernel=weight_only_matmul.weight_only_kernel,
                types=types | pointer_types | {"w_ptr": "*u8" if packed else "*i8"},
                constants=constants | _sizes(tile) | {"HAS_BIAS": True, "INTERPRET": False},
                aligned=(*pointers, "columns", "x_stride", "w_stride") if depth % 32 == 0 else pointers,
                options=_options(tile),
                group="weight-only product",
                needs="tf32" if short == "fp32" else "f16",
                is_quick=packed and depth == 512 and short != "fp16",
            )


def variants_of(arch: int) -> Iterator[Variant]:
    """Everything that is compiled with the tiles of an architecture."""
    for variants in (
        matmul_variants,
        value_variants,
        token_level_variants,
        fake_quantize_variants,
        activation_variants,
        weight_only_variants,
        colsum_variants,
        int8_attention_variants,
    ):
        yield from variants(arch)
