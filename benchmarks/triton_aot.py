"""Compile every Triton kernel that is used, for the GPUs that are supported, without a GPU; fails on a bad result.

Prints a table: kernel, architecture, registers, bytes of spills, shared memory, tensor-core instructions. Exits with 1
if a kernel does not compile, spills registers, takes more shared memory than the GPU has, or does its products without
the tensor cores.

    python benchmarks/triton_aot.py [--arch 90] [--only matmul]
"""

import argparse
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
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from s2q.ops.activation_path import triton as activation_path
from s2q.ops.activation_path.tiles import rotation_tile, row_block
from s2q.ops.attention_colsum import triton as attention_colsum
from s2q.ops.attention_colsum.tiles import colsum_tile
from s2q.ops.rescaled_int_matmul import tiles as matmul_tiles
from s2q.ops.rescaled_int_matmul import triton as rescaled_int_matmul
from s2q.ops.weight_only_matmul import triton as weight_only_matmul

SHARED_LIMIT = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024}
"""Bytes that one program may have, by architecture."""

INSTRUCTION = re.compile(r"(wgmma\.mma_async|mma\.sync\.aligned)[\w.:]*?\.(s32\.s8\.s8|f32\.\w+\.\w+)")
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
        needs: Pattern of the tensor-core instruction that has to be there; None for kernels without products.
    """

    name: str
    kernel: object
    types: dict[str, str]
    constants: dict[str, object]
    aligned: tuple[str, ...]
    options: dict[str, int]
    needs: str | None = None


def matmul_variants(arch: int) -> Iterator[Variant]:
    types = {"x_ptr": "*i8", "x_scale_ptr": "*fp32", "w_scale_ptr": "*fp32", "bias_ptr": "*bf16"}
    types |= {"branch_x_ptr": "*fp32", "branch_w_ptr": "*bf16", "out_ptr": "*bf16", "rows": "i32", "columns": "i32"}
    types |= {"x_stride": "i32", "w_stride": "i32"}
    pointers = ("x_ptr", "w_ptr", "x_scale_ptr", "w_scale_ptr", "bias_ptr", "branch_x_ptr", "branch_w_ptr", "out_ptr")
    aligned = (*pointers, "columns", "x_stride", "w_stride")
    branches = {"": None, " branch": torch.empty(8, 32)}
    for most, tile in matmul_tiles.TILES[divmod(arch, 10)]:
        # Below 64 rows a warp group's instruction would be half empty: Triton takes the older one.
        needs = r"wgmma.*s8\.s8" if arch == 90 and tile.rows >= 64 else r"mma\.sync.*s8\.s8"
        for packed in (False, True) if most < matmul_tiles.UNPACK_FROM_ROWS else (False,):
            odd = {16: (), 64: () if packed else (77,), 128: (192,)}[tile.rows]
            for depth, branch in [(3072, ""), (3072, " branch"), *((depth, "") for depth in odd)]:
                name = f"{'w4' if packed else 'w8'} {tile.rows}x{tile.columns}x{tile.depth} K={depth}{branch}"
                yield Variant(
                    name=f"matmul {name}",
                    kernel=rescaled_int_matmul.rescaled_matmul_kernel,
                    types=types | {"w_ptr": "*u8" if packed else "*i8"},
                    constants={"HAS_BIAS": True, "INTERPRET": False}
                    | rescaled_int_matmul.matmul_constants(tile, depth=depth, is_packed=packed)
                    | rescaled_int_matmul.branch_constants(branches[branch], torch.bfloat16),
                    aligned=aligned if depth % 16 == 0 else pointers,
                    options={"num_warps": tile.num_warps, "num_stages": tile.num_stages},
                    needs=needs,
                )
    yield Variant(
        name="unpack",
        kernel=rescaled_int_matmul.unpack_kernel,
        types={"packed_ptr": "*u8", "codes_ptr": "*i8", "packed_stride": "i32"},
        constants={"DEPTH": 3072, "BLOCK": matmul_tiles.UNPACK_BLOCK},
        aligned=("packed_ptr", "codes_ptr", "packed_stride"),
        options={"num_warps": 4},
    )


def activation_variants(arch: int) -> Iterator[Variant]:
    pointers = ("x_ptr", "shift_ptr", "scale_ptr", "left_ptr", "right_ptr", "clip_ptr", "codes_ptr", "token_scale_ptr")
    types = dict.fromkeys(pointers, "*fp32") | {"codes_ptr": "*i8", "rows": "i32"}
    types |= {"x_stride": "i32", "clip_stride": "i32"}
    parts = {"HAS_SHIFT": True, "HAS_SCALE": True, "HAS_CLIP": True, "QMAX": 31}
    for dtype, features in (("bf16", 1920), ("fp32", 3072), ("bf16", 12288)):
        block, num_warps = row_block(features)
        yield Variant(
            name=f"quantize {dtype} {features}",
            kernel=activation_path.quantize_kernel,
            types=types | {"x_ptr": f"*{dtype}"},
            constants=parts | {"FEATURES": features, "BLOCK": block},
            aligned=(*pointers, "x_stride"),
            options={"num_warps": num_warps},
        )
    for precision, dtype in (("bf16", "bf16"), ("bf16", "fp32"), ("tf32x3", "fp32")):
        fitting = [grid for grid in GRIDS if rotation_tile(*grid, precision=precision, capability=divmod(arch, 10))]
        for grid in fitting if precision != "bf16" or dtype == "bf16" else fitting[-1:]:
            for sides in ((True, True), (True, False)) if grid == fitting[-1] else ((True, True),):
                tile = rotation_tile(*grid, precision=precision, capability=divmod(arch, 10))
                assert tile is not None
                yield Variant(
                    name=f"rotate {precision} x {dtype} {grid[0]}x{grid[1]}{'' if sides[1] else ' left only'}",
                    kernel=activation_path.rotate_quantize_kernel,
                    types=types | {"x_ptr": f"*{dtype}"},
                    constants=parts
                    | activation_path.rotation_constants(tile, grid, precision, sides)
                    | {"INTERPRET": False},
                    aligned=(*pointers, "x_stride"),
                    options={"num_warps": tile.num_warps, "num_stages": 1},
                    needs="mma",
                )


def colsum_variants(arch: int) -> Iterator[Variant]:
    numbers = [*(f"q{axis}" for axis in "bhnd"), *(f"k{axis}" for axis in "bhmd"), *(f"m{axis}" for axis in "bhnm")]
    # The innermost strides are 1, which Triton makes constants of; those of a mask may be anything.
    types = {"query_ptr": "*bf16", "key_ptr": "*bf16", "lse_ptr": "*fp32", "sums_ptr": "*fp32", "heads": "i32"}
    types |= {"factor": "fp32"} | dict.fromkeys(numbers, "i32")
    aligned = ("query_ptr", "key_ptr", "lse_ptr", "sums_ptr", "qb", "qh", "qn", "kb", "kh", "km")
    masks = {
        "": (0, False, "*bf16"),
        " boolean, per key": (1, False, "*u8"),
        " boolean, per pair": (1, True, "*u8"),
        " additive, per pair": (2, True, "*bf16"),
    }
    for dtype, head_dim, kinds in (
        (torch.bfloat16, 64, list(masks)),
        (torch.bfloat16, 128, ["", " additive, per pair"]),
        (torch.bfloat16, 256, [" additive, per pair"]),
        (torch.float32, 64, [" additive, per pair"]),
    ):
        short = {torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]
        for mask in kinds:
            kind, is_pair_mask, mask_type = masks[mask]
            tile = colsum_tile(head_dim, itemsize=dtype.itemsize, has_pair_mask=is_pair_mask)
            assert tile is not None
            constants = {"QUERIES": 17776, "KEYS": 17776, "HEAD_DIM": head_dim, "qd": 1, "kd": 1}
            constants |= {"MASK": kind, "PAIR_MASK": is_pair_mask, "INTERPRET": False}
            for kernel in (attention_colsum.log_sum_kernel, attention_colsum.column_sum_kernel):
                yield Variant(
                    name=f"{kernel.__name__.removesuffix('_kernel')} {short} D={head_dim}{mask}",
                    kernel=kernel,
                    types=types | {"query_ptr": f"*{short}", "key_ptr": f"*{short}", "mask_ptr": mask_type},
                    constants=attention_colsum.colsum_constants(tile, dtype) | constants,
                    aligned=aligned,
                    options={"num_warps": tile.num_warps, "num_stages": tile.num_stages},
                    needs="mma",
                )


def check(variant: Variant, arch: int, folder: Path) -> tuple[str, bool]:
    """Compile; returns a line of the table and whether all is well."""
    names = variant.kernel.arg_names
    constants = {(names.index(name),): value for name, value in variant.constants.items()}
    types = {name: "constexpr" if name in variant.constants else variant.types[name] for name in names}
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in variant.aligned if name in names}
    source = ASTSource(variant.kernel, types, constants, aligned)
    try:
        compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=variant.options)
    except Exception as error:  # whatever the compiler raises is a failure of this variant, not of the table
        return f"{variant.name:<44} {arch:>4}  does not compile: {str(error).strip().splitlines()[0][:120]}", False
    registers, spilled = resources(compiled.asm["cubin"], folder)
    found = sorted({f"{op.split('.')[0]} {kinds}" for op, kinds in INSTRUCTION.findall(compiled.asm["ptx"])})
    instructions = ", ".join(found)
    problems = []
    if spilled:
        problems.append("spills")
    if compiled.metadata.shared > SHARED_LIMIT[arch]:
        problems.append("too much shared memory")
    if variant.needs and not re.search(variant.needs, compiled.asm["ptx"]):
        problems.append("no tensor-core instruction")
    line = f"{variant.name:<44} {arch:>4} {registers:>9} {spilled:>6} {compiled.metadata.shared:>7}  {instructions}"
    return line + (f"  FAILED: {', '.join(problems)}" if problems else ""), not problems


def resources(cubin: bytes, folder: Path) -> tuple[int, int]:
    """Return registers of a thread and bytes of its stack and local memory, where spills go."""
    file = folder / "kernel.cubin"
    file.write_bytes(cubin)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    printed = subprocess.run([tool, "-res-usage", file], capture_output=True, text=True, check=True)
    found = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", printed.stdout)}
    return found["REG"], found["STACK"] + found["LOCAL"]


def weight_only_variants(arch: int) -> Iterator[Variant]:
    pointers = ("x_ptr", "w_ptr", "w_scale_ptr", "bias_ptr", "out_ptr")
    types = dict.fromkeys(pointers, "*fp32") | dict.fromkeys(("rows", "columns", "x_stride", "w_stride"), "i32")
    for dtype, short in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        for packed, depth in ((True, 512), (True, 77), (False, 512)):
            constants = weight_only_matmul.kernel_constants(dtype, depth=depth, is_packed=packed)
            own = {"x_ptr": f"*{short}", "bias_ptr": f"*{short}", "out_ptr": f"*{short}"}
            yield Variant(
                name=f"weight only {'w4' if packed else 'w8'} {short} K={depth}",
                kernel=weight_only_matmul.weight_only_kernel,
                types=types | own | {"w_ptr": "*u8" if packed else "*i8"},
                constants=constants | {"HAS_BIAS": True, "INTERPRET": False},
                aligned=(*pointers, "columns", "x_stride", "w_stride") if depth % 32 == 0 else pointers,
                options=weight_only_matmul.OPTIONS,
                needs="mma",
            )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, choices=sorted(SHARED_LIMIT), action="append", help="default: all")
    parser.add_argument("--only", default="", help="variants whose name contains this")
    arguments = parser.parse_args()
    print(f"{'kernel':<44} arch registers spills  shared  instructions", flush=True)
    all_well = True
    with tempfile.TemporaryDirectory() as folder:
        triton.knobs.cache.dir = folder
        for arch in arguments.arch or sorted(SHARED_LIMIT):
            for variants in (matmul_variants, activation_variants, weight_only_variants, colsum_variants):
                for variant in variants(arch):
                    if arguments.only in variant.name:
                        line, is_well = check(variant, arch, Path(folder))
                        print(line, flush=True)
                        all_well &= is_well
    return 0 if all_well else 1


if __name__ == "__main__":
    sys.exit(main())
