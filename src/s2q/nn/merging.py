"""Telling that an adapter is about to be merged into a packed linear, which has no weight to merge it into.

peft merges by adding to `weight.data` and asks no one; at 8 bits that can pass silently and ruin the codes. It offers
no hook to refuse in, so its merging code is refused the reading itself.
"""

from types import FrameType

_READS_BASE_WEIGHT = frozenset({"merge", "unmerge", "get_base_weight", "set_base_weight", "dequantize_module_weight"})


def is_merging(caller: FrameType) -> bool:
    """Tell whether it is peft's merging code that reads.

    Args:
        caller: The frame that reads the weight.
    """
    module = caller.f_globals.get("__name__", "")
    return caller.f_code.co_name in _READS_BASE_WEIGHT and str(module).partition(".")[0] == "peft"
