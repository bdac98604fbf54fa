"""Compile every Triton kernel for every architecture that is supported, without a GPU; fails on a bad result.

Prints a table: kernel, architecture, registers, bytes of spills, shared memory, tensor-core instructions. Exits with 1
if a kernel does not compile, spills more than a few registers, takes more shared memory than the GPU has, or does its
products without the tensor cores. With --out it writes what docs/speed.md shows (every kernel, every architecture);
kernels that the file has, unchanged and compiled by the same versions, are not compiled again.

    python benchmarks/triton_aot.py [--arch 90] [--only matmul] [--quick [EVERY]] [--keys] [--json] [--out FILE]
"""

import argparse
import ast
import functools
import hashlib
import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)  # decided when triton is imported

import torch
import triton
from environment import environment
from records import write_record
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from s2q.ops import triton_math
from s2q.ops.activation_path import triton as activation_path
from s2q.ops.activation_path.tiles import rotation_tile, row_block
from s2q.ops.architectures import SHARED_BYTES, nearest_architecture
from s2q.ops.attention_colsum import triton as attention_colsum
from s2q.ops.attention_colsum.tiles import colsum_tile
from s2q.ops.int8_attention import triton as int8_attention
from s2q.ops.int8_attention.reference import KEY_BLOCK, QUERY_BLOCK
from s2q.ops.int8_attention.tiles import attention_tile
from s2q.ops.level_values import triton as level_values
from s2q.ops.rescaled_int_matmul import tiles as matmul_tiles
from s2q.ops.rescaled_int_matmul import triton as rescaled_int_matmul
from s2q.ops.token_levels import triton as token_levels
from s2q.ops.weight_only_matmul import tiles as weight_only_tiles
from s2q.ops.weight_only_matmul import triton as weight_only_matmul

SPILL_LIMIT = 64
"""Bytes of a thread's registers that may be in local memory."""

INSTRUCTION = re.compile(
    r"(wgmma|mma\.sync)[\w.:]*?\.(?:s32|f32)\.(s8|bf16|f16|tf32)\.|(tcgen05)\.mma[\w.:]*?kind::(\w+)"
)
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
    """The statements of the functions under `triton.jit` of a kernel's module and of what all kernels share."""
    modules = (inspect.getmodule(kernel.fn), triton_math)
    values = [value for module in modules for value in vars(module).values()]
    trees = [ast.parse(value.src).body[0] for value in values if isinstance(value, triton.JITFunction)]
    for tree in trees:
        if ast.get_docstring(tree) is not None:
            del tree.body[0]
    return "\n".join(ast.unparse(tree) for tree in trees)


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
    "": (0, False, "*bf16"),
    " boolean, per key": (1, False, "*u8"),
    " boolean, per pair": (1, True, "*u8"),
    " additive, per pair": (2, True, "*bf16"),
}


def colsum_variants(arch: int) -> Iterator[Variant]:
    numbers = [*(f"q{axis}" for axis in "bhnd"), *(f"k{axis}" for axis in "bhmd"), *(f"m{axis}" for axis in "bhnm")]
    # The innermost strides are 1, which Triton makes constants of; those of a mask may be anything.
    types = {"query_ptr": "*bf16", "key_ptr": "*bf16", "lse_ptr": "*fp32", "sums_ptr": "*fp32"}
    types |= {"factor": "fp32"} | dict.fromkeys(["heads", "queries", "keys", *numbers], "i32")
    aligned = ("query_ptr", "key_ptr", "lse_ptr", "sums_ptr", "qb", "qh", "qn", "kb", "kh", "km")
    pair = " additive, per pair"
    for dtype, head_dim, kinds in (
        ("bf16", 64, list(MASKS)),
        ("fp16", 64, [""]),
        ("bf16", 128, ["", pair]),
        ("bf16", 256, ["", pair]),
        ("fp32", 64, ["", pair]),
        ("fp32", 128, ["", pair]),
        ("fp32", 256, ["", pair]),
    ):
        for mask in kinds:
            kind, is_pair_mask, mask_type = MASKS[mask]
            itemsize = 4 if dtype == "fp32" else 2
            tile = colsum_tile(head_dim, itemsize=itemsize, has_pair_mask=is_pair_mask, architecture=arch)
            assert tile is not None
            constants = {"HEAD_DIM": head_dim, "qd": 1, "kd": 1}
            constants |= {"MASK": kind, "PAIR_MASK": is_pair_mask, "INTERPRET": False}
            for kernel in (attention_colsum.log_sum_kernel, attention_colsum.column_sum_kernel):
                yield Variant(
                    name=f"{kernel.__name__.removesuffix('_kernel')} {dtype} D={head_dim}{mask}",
                    kernel=kernel,
                    types=types | {"query_ptr": f"*{dtype}", "key_ptr": f"*{dtype}", "mask_ptr": mask_type},
                    constants=constants | _sizes(tile),
                    aligned=aligned,
                    options=_options(tile),
                    group=f"column sums {'fp32' if dtype == 'fp32' else 'bf16, fp16'}",
                    needs="tf32" if dtype == "fp32" else "f16",
                    is_quick=mask == pair and head_dim == 128,
                )


def int8_attention_variants(arch: int) -> Iterator[Variant]:
    codes = {"query_ptr": "*i8", "key_ptr": "*i8", "query_scale_ptr": "*fp32", "key_scale_ptr": "*fp32"}
    numbers = [*(f"v{axis}" for axis in "bhmd"), *(f"o{axis}" for axis in "bhnd"), *(f"m{axis}" for axis in "bhnm")]
    types = codes | {"factor": "fp32"} | dict.fromkeys(["heads", "queries", "keys", *numbers], "i32")
    aligned = (*codes, "value_ptr", "out_ptr", "vb", "vh", "vm", "ob", "oh", "on")
    pair = " additive, per pair"
    for dtype, head_dim, kinds in (
        ("bf16", 64, list(MASKS)),
        ("fp16", 64, [""]),
        ("bf16", 128, list(MASKS)),
        ("fp32", 64, ["", pair]),
        ("fp32", 128, ["", pair]),
    ):
        for mask in kinds:
            kind, is_pair_mask, mask_type = MASKS[mask]
            itemsize = 4 if dtype == "fp32" else 2
            tile = attention_tile(head_dim, itemsize=itemsize, has_pair_mask=is_pair_mask, architecture=arch)
            assert tile is not None
            constants = int8_attention.attention_constants(head_dim, kind, is_pair_mask) | {"INTERPRET": False}
            yield Variant(
                name=f"int8 attention {dtype} D={head_dim}{mask}",
                kernel=int8_attention.int8_attention_kernel,
                types=types | {"value_ptr": f"*{dtype}", "out_ptr": f"*{dtype}", "mask_ptr": mask_type},
                constants=constants | {"vd": 1, "od": 1} | _sizes(tile),
                aligned=aligned,
                options=_options(tile),
                group=f"int8 attention {'fp32' if dtype == 'fp32' else 'bf16, fp16'}",
                needs="s8",
                is_quick=mask == pair and head_dim == 128,
            )
    strides = dict.fromkeys(("heads", "tokens", "xb", "xh", "xn"), "i32")
    for dtype, head_dim in (("bf16", 64), ("bf16", 128), ("fp32", 128)):
        for size in (QUERY_BLOCK, KEY_BLOCK):
            constants = {
                "HAS_MEAN": size == KEY_BLOCK,
                "HEAD_DIM": head_dim,
                "BLOCK": size,
                "TILE_D": head_dim,
                "xd": 1,
            }
            yield Variant(
                name=f"quantize {'queries' if size == QUERY_BLOCK else 'keys'} {dtype} D={head_dim}",
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
        activation_variants,
        weight_only_variants,
        colsum_variants,
        int8_attention_variants,
    ):
        yield from variants(arch)


def compile_variant(variant: Variant, arch: int, folder: Path) -> dict[str, object]:
    """Compile; returns an entry of the results file, with an `error` if the compiler failed."""
    names = variant.kernel.arg_names
    constants = {(names.index(name),): value for name, value in variant.constants.items()}
    types = {name: "constexpr" if name in variant.constants else variant.types[name] for name in names}
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in variant.aligned if name in names}
    source = ASTSource(variant.kernel, types, constants, aligned)
    entry: dict[str, object] = {"kernel": variant.name, "group": variant.group, "arch": arch, "key": variant.key()}
    try:
        compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=variant.options)
    except Exception as error:  # whatever the compiler raises is a failure of this variant, not of the table
        return entry | {"error": str(error).strip().splitlines()[0][:120], "problems": ["does not compile"]}
    registers, spilled = resources(compiled.asm["cubin"], folder)
    shared = compiled.metadata.shared
    instructions = {" ".join(filter(None, match)) for match in INSTRUCTION.findall(compiled.asm["ptx"])}
    problems = {
        "spills": spilled > SPILL_LIMIT,
        "too much shared memory": shared > SHARED_BYTES[nearest_architecture(divmod(arch, 10))],
        "no tensor-core instruction": variant.needs is not None
        and not any(variant.needs in instruction for instruction in instructions),
    }
    entry |= {"registers": registers, "spills": spilled, "shared": shared, "instructions": sorted(instructions)}
    return entry | {"problems": [name for name, is_there in problems.items() if is_there]}


def line_of(entry: dict[str, object]) -> str:
    """A line of the printed table."""
    first = f"{entry['kernel']:<44} {entry['arch']:>4}"
    if "error" in entry:
        return f"{first}  FAILED: does not compile: {entry['error']}"
    line = (
        f"{first} {entry['registers']:>9} {entry['spills']:>6} {entry['shared']:>7}  {', '.join(entry['instructions'])}"
    )
    return line + (f"  FAILED: {', '.join(entry['problems'])}" if entry["problems"] else "")


def resources(cubin: bytes, folder: Path) -> tuple[int, int]:
    """Return registers of a thread and bytes of its stack and local memory, where spills go."""
    file = folder / "kernel.cubin"
    file.write_bytes(cubin)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    printed = subprocess.run([tool, "-res-usage", file], capture_output=True, text=True, check=True)
    sizes = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", printed.stdout)}
    return sizes["REG"], sizes["STACK"] + sizes["LOCAL"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, action="append", help=f"default: {', '.join(map(str, SHARED_BYTES))}")
    parser.add_argument("--only", default="", help="variants whose name contains this")
    parser.add_argument(
        "--quick",
        type=int,
        nargs="?",
        const=1,
        metavar="EVERY",
        help="one variant of each kind, with the largest tile; of these every n-th, on every architecture others",
    )
    parser.add_argument("--keys", action="store_true", help="compile nothing; print the key of every variant as JSON")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--out", type=Path, help="results file to write")
    arguments = parser.parse_args()
    wanted = []
    for offset, arch in enumerate(arguments.arch or SHARED_BYTES):
        variants = [variant for variant in variants_of(arch) if arguments.only in variant.name]
        if arguments.quick:
            variants = [variant for variant in variants if variant.is_quick][
                offset % arguments.quick :: arguments.quick
            ]
        wanted += [(variant, arch) for variant in variants]
    if arguments.keys:
        print(json.dumps([[variant.name, arch, variant.key()] for variant, arch in wanted]))
        return 0
    if not arguments.json:
        print(f"{'kernel':<44} arch registers spills  shared  instructions", flush=True)
    entries = []
    with tempfile.TemporaryDirectory() as folder:
        triton.knobs.cache.dir = folder
        about = environment()
        about["versions"] |= {"triton": triton.__version__, "ptxas": _ptxas_versions()}
        stored = _stored(arguments.out, about["versions"])
        for variant, arch in wanted:
            kept = stored.get((variant.name, arch, variant.key()))
            entries.append(kept or compile_variant(variant, arch, Path(folder)))
            if not arguments.json:
                print(line_of(entries[-1]), flush=True)
    if arguments.json:
        print(json.dumps(entries))
    if arguments.out:
        write_record(arguments.out, about | {"results": entries})
    return int(any(entry["problems"] for entry in entries))


def _stored(path: Path | None, versions: dict[str, object]) -> dict[tuple[str, int, str], dict[str, object]]:
    """Return the results of a file, by name, architecture and key; none of other versions of Triton."""
    if path is None or not path.is_file():
        return {}
    content = json.loads(path.read_text())
    same = all(content["versions"][name] == versions[name] for name in ("triton", "ptxas"))
    return {(entry["kernel"], entry["arch"], entry["key"]): entry for entry in content["results"]} if same else {}


def _ptxas_versions() -> list[str]:
    """Versions of the assemblers that Triton ships, for architectures below 100 and from it on."""
    return [getattr(triton.knobs.nvidia, name).version for name in ("ptxas", "ptxas_blackwell")]


if __name__ == "__main__":
    sys.exit(main())
