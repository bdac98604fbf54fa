"""Compile every Triton kernel for every architecture that is supported, without a GPU; fails on a bad result.

Prints a table: kernel, architecture, registers, bytes of spills, shared memory, tensor-core instructions. Exits with 1
if a kernel does not compile, spills more than a few registers, takes more shared memory than the GPU has, or does its
products without the tensor cores. With --out it writes what docs/speed.md shows (every kernel, every architecture);
kernels that the file has, unchanged and compiled by the same versions, are not compiled again.

    python benchmarks/triton_aot.py [--arch 90] [--only matmul] [--quick [EVERY]] [--keys] [--json] [--out FILE]
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)  # decided when triton is imported

import triton
from environment import environment
from records import write_record
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton_variants import Variant, variants_of

from s2q.ops.architectures import SHARED_BYTES, nearest_architecture

SPILL_LIMIT = 64
"""Bytes of a thread's registers that may be in local memory."""

INSTRUCTION = re.compile(
    r"(wgmma|mma\.sync)[\w.:]*?\.(?:s32|f32)\.(s8|bf16|f16|tf32)\.|(tcgen05)\.mma[\w.:]*?kind::(\w+)"
)


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
