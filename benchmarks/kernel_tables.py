"""The table of the Triton kernels as `triton_aot.py` compiled them."""

import json
from pathlib import Path

from markdown_tables import table_head, table_row

from s2q.ops.architectures import SHARED_BYTES

RESULTS = Path(__file__).parent / "results" / "triton-aot.json"

CARDS: dict[int, str] = {
    80: "A100, A30",
    86: "RTX 30, A10, A40, RTX A6000",
    89: "RTX 40, L4, L40S",
    90: "H100, H200, GH200",
    100: "B200, GB200",
    103: "B300, GB300",
    120: "RTX 50, RTX PRO Blackwell",
}
"""Some GPUs of each architecture."""


def kernels_table(_which: str) -> str:
    """The largest figures of each kind of kernel on each architecture."""
    content = json.loads(RESULTS.read_text())
    groups: dict[tuple[str, int], list[dict]] = {}
    for variant in content["results"]:
        groups.setdefault((variant["group"], variant["arch"]), []).append(variant)
    head = ["architecture", "variants", "registers", "spills, bytes", "shared, KiB", "instructions"]
    lines = table_head("kernel", head)
    kinds = list(dict.fromkeys(group for group, _ in groups))
    for group, arch in sorted(groups, key=lambda pair: (kinds.index(pair[0]), pair[1])):
        variants = groups[group, arch]
        cells = [
            str(arch),
            str(len(variants)),
            str(max(variant["registers"] for variant in variants)),
            str(max(variant["spills"] for variant in variants)),
            f"{max(variant['shared'] for variant in variants) / 1024:.1f} of {SHARED_BYTES[arch] // 1024}",
            ", ".join(sorted({instruction for variant in variants for instruction in variant["instructions"]})),
        ]
        lines.append(table_row(group, cells))
    versions = content["versions"]
    cards = "; ".join(f"{arch}: {CARDS[arch]}" for arch in SHARED_BYTES)
    lines += [
        "",
        f"Maximum over the variants: registers and spills per thread, shared memory per program. {cards}. "
        f"Triton {versions['triton']}, ptxas {versions['ptxas'][0]} ({versions['ptxas'][1]} from 100 on); "
        f"made by `{content['command']}`.",
    ]
    return "\n".join(lines)
