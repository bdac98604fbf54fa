"""The supported families, by the class of their transformer."""

from torch import nn

from s2q.common.errors import InvalidInputError
from s2q.models.cogvideox import COGVIDEOX
from s2q.models.family import Family
from s2q.models.hunyuanvideo import HUNYUANVIDEO
from s2q.models.hunyuanvideo15 import HUNYUANVIDEO15
from s2q.models.kandinsky5 import KANDINSKY5
from s2q.models.ltx import LTX
from s2q.models.ltx2 import LTX2
from s2q.models.minimax_h3 import MINIMAX_H3
from s2q.models.mochi import MOCHI
from s2q.models.sana_video import SANA_VIDEO
from s2q.models.skyreels_v2 import SKYREELS_V2
from s2q.models.wan import WAN
from s2q.models.wan_animate import WAN_ANIMATE
from s2q.models.wan_vace import WAN_VACE

FAMILIES: dict[str, Family] = {
    family.transformer_class: family
    for family in (
        COGVIDEOX,
        HUNYUANVIDEO,
        HUNYUANVIDEO15,
        KANDINSKY5,
        LTX,
        LTX2,
        MINIMAX_H3,
        MOCHI,
        SANA_VIDEO,
        SKYREELS_V2,
        WAN,
        WAN_ANIMATE,
        WAN_VACE,
    )
}
"""Supported families, by the class name of their transformer."""


def family_of(transformer: nn.Module | str) -> Family:
    """Return the family of a transformer, given itself or the name of its class."""
    class_name = transformer if isinstance(transformer, str) else type(transformer).__name__
    family = FAMILIES.get(class_name)
    if family is None:
        raise InvalidInputError(
            f"transformer class {class_name!r} is not supported; supported classes: {', '.join(sorted(FAMILIES))} "
            "(see docs/models.md to add one)"
        )
    return family
