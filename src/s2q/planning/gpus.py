"""GPUs that a run can be planned for without having one: peak rates from data sheets, and what is reached of them."""

import functools
from dataclasses import dataclass
from importlib import resources
from typing import Any

import yaml

from s2q.common.errors import InvalidInputError, short_repr
from s2q.planning.flop import Work

_GIGA, _TERA = 10**9, 10**12


@dataclass(frozen=True, kw_only=True)
class Efficiency:
    """Shares of the peak rates that a run reaches.

    Attributes:
        products: Of dense products; fp64 ones, which are factorizations, reach a third of it.
        attention: Of attention, forward and backward.
        memory: Of the memory's bandwidth, in elementwise operations.
        link: Of the link to the host.
        launch_seconds: Host time of an operation.
    """

    products: float
    attention: float
    memory: float
    link: float
    launch_seconds: float


EXPECTED = Efficiency(products=0.6, attention=0.4, memory=0.7, link=0.7, launch_seconds=8e-6)
FAST = Efficiency(products=0.75, attention=0.55, memory=0.85, link=0.85, launch_seconds=5e-6)
SLOW = Efficiency(products=0.45, attention=0.25, memory=0.5, link=0.4, launch_seconds=15e-6)
"""Expected shares and a range around them, as large products, fused attention and elementwise kernels of PyTorch reach
them. They are assumptions; no run on a GPU has been compared with them."""

_FACTORIZATION = 1 / 3


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Peak rates of a device.

    Attributes:
        flops: FLOP/s of dense products by dtype: bf16, tf32, fp32, fp64.
        memory_bytes: Size of its memory.
        bandwidth: Bytes/s of its memory.
        link: Bytes/s from the host.
        source: Where the figures are from.
        queues: Whether it computes while the host launches further operations.
        capability: Its compute capability; None for a CPU.
    """

    name: str
    title: str
    flops: dict[str, float]
    memory_bytes: int
    bandwidth: float
    link: float
    source: str
    queues: bool = True
    capability: tuple[int, int] | None = None

    def seconds(self, work: Work, efficiency: Efficiency = EXPECTED) -> float:
        """Return how long it takes: products, attention, elementwise operations and transfers in turn."""
        total = work.traffic / (self.bandwidth * efficiency.memory) + work.transfer / (self.link * efficiency.link)
        for dtype, flop in work.products.items():
            share = efficiency.products * (_FACTORIZATION if dtype == "fp64" else 1)
            total += flop / (self.flops[dtype] * share)
        for dtype, flop in work.attention.items():
            total += flop / (self.flops[dtype] * efficiency.attention)
        launching = work.launches * efficiency.launch_seconds
        return max(total, launching) if self.queues else total + launching


@functools.cache
def gpus() -> dict[str, Rates]:
    """Return the GPUs by name, "h100", in the order of the file."""
    text = resources.files("s2q.planning").joinpath("gpus.yaml").read_text(encoding="utf-8")
    content: dict[str, dict[str, Any]] = yaml.safe_load(text)
    return {
        name: Rates(
            name=name,
            title=entry["title"],
            flops={dtype: rate * _TERA for dtype, rate in entry["tflops"].items()},
            memory_bytes=entry["memory_gb"] * _GIGA,
            bandwidth=entry["bandwidth_gbs"] * _GIGA,
            link=entry["link_gbs"] * _GIGA,
            source=entry["source"],
            capability=(entry["capability"][0], entry["capability"][1]),
        )
        for name, entry in content.items()
    }


def gpu(name: str) -> Rates:
    """Return a GPU by its name, in either case; InvalidInputError with the names if there is none."""
    known = gpus()
    if name.lower() not in known:
        raise InvalidInputError(
            f"device={short_repr(name)} is unknown; use cpu, cuda, cuda:N, or one of {', '.join(known)}"
        )
    return known[name.lower()]
