"""Columns of a weight during GPTQ: codes of scales that are known before, or of tables that are found on the way.

`ScaledColumns` and `TableColumns` have one interface. Columns are rows of memory, [I, O], in the order of GPTQ.

Shapes: `I/O` in/out features, `G` groups, `K` columns of a block.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from s2q.core.codebook import group_levels, levels_of, nearest_level
from s2q.core.qparams import RoundedWeight, code_range, quantize
from s2q.core.schemes import QuantScheme, num_groups
from s2q.rounding.table import search_table


class ScaledColumns:
    """Codes of a weight whose scales [O] or [O, G] are known, in an order of its columns [I].

    Attributes:
        multiple: Columns that a block holds a multiple of.
    """

    multiple = 1

    def __init__(self, scale: Tensor, scheme: QuantScheme, order: Tensor) -> None:
        groups = scale.view(len(scale), -1).t()  # [G, O] or [1, O]
        self._scale, self._scheme, self._order = scale, scheme, order
        self._scales = groups[order.div(len(order) // len(groups), rounding_mode="floor")]
        self._divisors = torch.where(self._scales == 0, 1, self._scales)
        self._levels = levels_of(scheme, len(order), device=scale.device)
        self._codes = torch.empty(self._scales.shape, dtype=torch.int8, device=scale.device)
        self._units = torch.empty(0)

    def round(self, block: Tensor, column: int, start: int, *, error: Tensor) -> None:
        """Round a column of a block, [K, O], whose first one has the place `start`; the error is w - q, [O].

        It takes three operations, and those of a block's codes: on a GPU their number is what takes time.
        """
        if column == 0:
            self._units = torch.empty_like(block)
        value = self._units[column]
        torch.div(block[column], self._divisors[start + column], out=value)
        if self._levels is None:
            value.round_().clamp_(*code_range(self._scheme.num_bits))
        else:
            value.copy_(self._levels[nearest_level(value, self._levels).long()])
        torch.addcmul(block[column], value, self._scales[start + column], value=-1, out=error)
        if column == len(block) - 1:
            one = value.new_ones(())
            codes = quantize(self._units, one, num_bits=self._scheme.num_bits, levels=self._levels)
            self._codes[start : start + len(block)] = codes

    def rounded(self, rows: Sequence[int]) -> list[RoundedWeight]:
        """Return the rounded weights that have these numbers of rows."""
        codes = _in_place(self._codes, self._order)
        parts = zip(*(torch.split(tensor, list(rows)) for tensor in (codes, self._scale)), strict=True)
        return [RoundedWeight(codes=codes, scale=scale) for codes, scale in parts]


class TableColumns:
    """Codes of a weight with tables, and the bytes of its groups, which are found when their turn comes.

    Attributes:
        multiple: Columns of a group.

    Args:
        importance: Weights of squared errors of the columns in the search, fp32 [I], in their order.
    """

    def __init__(self, scale: Tensor, scheme: QuantScheme, order: Tensor, *, importance: Tensor) -> None:
        groups = num_groups(scheme, len(order))
        self.multiple = len(order) // groups
        self._scale, self._order, self._importance, self._levels = scale, order, importance, scheme.levels
        self._codes = torch.empty(len(order), len(scale), dtype=torch.int8, device=scale.device)
        self._group_scale = torch.empty(groups, len(scale), dtype=torch.int8, device=scale.device)
        self._values = torch.empty(0)

    def round(self, block: Tensor, column: int, start: int, *, error: Tensor) -> None:
        """Round a column of a block; see `ScaledColumns.round`."""
        place = start + column
        if place % self.multiple == 0:
            self._search(block[column : column + self.multiple], place)
        nearest = (block[column].unsqueeze(1) - self._values).abs_().argmin(dim=1, keepdim=True)
        torch.sub(block[column], self._values.gather(1, nearest).squeeze(1), out=error)
        self._codes[place] = nearest.squeeze(1) - self._values.shape[1] // 2

    def _search(self, group: Tensor, place: int) -> None:
        """Find the byte of a group, of its weights [I / G, O] as they are now, and the values of its codes."""
        ratio = (group.t() / self._scale.unsqueeze(1)).contiguous().unsqueeze(1)  # sums are in the order of memory
        _, found = search_table(ratio, levels=self._levels, importance=self._importance[place : place + self.multiple])
        self._group_scale[place // self.multiple] = found.squeeze(1)
        self._values = group_levels(found.squeeze(1)) * self._scale.unsqueeze(1)

    def rounded(self, rows: Sequence[int]) -> list[RoundedWeight]:
        """Return the rounded weights that have these numbers of rows."""
        codes = _in_place(self._codes, self._order)
        group_scale = _in_place(self._group_scale, self._order[:: self.multiple] // self.multiple)
        parts = zip(*(torch.split(tensor, list(rows)) for tensor in (codes, self._scale, group_scale)), strict=True)
        return [RoundedWeight(codes=codes, scale=scale, group_scale=grouped) for codes, scale, grouped in parts]


def _in_place(columns: Tensor, order: Tensor) -> Tensor:
    """Return columns [I, O] that are in an order as [O, I] in their own places."""
    result = torch.empty(columns.shape[1], columns.shape[0], dtype=columns.dtype, device=columns.device)
    result[:, order] = columns.t()
    return result
