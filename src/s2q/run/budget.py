"""Choosing one candidate for each of many within a common budget: the multiple-choice knapsack.

    minimise Σ_u error[u, k_u]   where   Σ_u cost[u, k_u] ≤ limit

By dynamic programming over what is spent beyond the cheapest candidates, in steps of the greatest common divisor of
these extra costs, which is exact. Where that would be more than `STEPS` steps, they are coarser and costs are rounded
up to them: the budget is kept, and the choice is the best within what rounding up leaves of it.

Example: two with candidates (cost, error) (1, 9), (3, 1) and (1, 4), (2, 3), limit 4: the first gets its second and the
other its first, for 4 and an error of 5.

Legend: `u` unit (linears with one choice), `k` candidate.
"""

import math
from collections.abc import Sequence

import torch

STEPS = 50_000


def choose(options: Sequence[Sequence[tuple[int, float]]], limit: int, *, steps: int = STEPS) -> list[int]:
    """Choose a candidate for each; of equal sums, one that spends less.

    Args:
        options: Cost and error of each candidate, for each.
        limit: Most that the costs may add up to; at least what the cheapest candidates cost.

    Returns:
        Index of the candidate, for each.
    """
    cheapest = [min(cost for cost, _ in candidates) for candidates in options]
    left = limit - sum(cheapest)
    assert left >= 0, (limit, sum(cheapest))
    extras = [[cost - least for cost, _ in candidates] for candidates, least in zip(options, cheapest, strict=True)]
    divisor = math.gcd(*(extra for costs in extras for extra in costs)) or 1
    step = max(divisor, -(-left // steps))
    best = torch.zeros(left // step + 1, dtype=torch.float64)  # smallest error by how many steps may be spent
    chosen = []
    for candidates, costs in zip(options, extras, strict=True):
        reached, index = torch.full_like(best, math.inf), torch.zeros(len(best), dtype=torch.int16)
        for candidate in sorted(range(len(candidates)), key=costs.__getitem__):
            spent = -(-costs[candidate] // step)
            if spent >= len(best):
                continue
            sums = best[: len(best) - spent] + candidates[candidate][1]
            better = sums < reached[spent:]
            reached[spent:][better] = sums[better]
            index[spent:][better] = candidate
        best = reached
        chosen.append(index)
    position, taken = len(best) - 1, []
    for index, costs in zip(reversed(chosen), reversed(extras), strict=True):
        candidate = int(index[position])
        taken.append(candidate)
        position -= -(-costs[candidate] // step)
    return taken[::-1]
