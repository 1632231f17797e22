"""Work dealt out evenly."""

import heapq
from collections.abc import Sequence


def deal(costs: Sequence[int], shares: int) -> list[list[int]]:
    """Indices of pieces of work in shares of nearly equal cost: the dearest first, each to the share with the least.

    No share costs more than the mean and one piece. The same costs are dealt in the same way everywhere.

    >>> deal([5, 4, 3, 2, 1], 2)
    [[0, 3, 4], [1, 2]]
    """
    dealt: list[list[int]] = [[] for _ in range(shares)]
    least = [(0, number) for number in range(shares)]
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        cost, number = heapq.heappop(least)
        dealt[number].append(index)
        heapq.heappush(least, (cost + costs[index], number))
    return [sorted(own) for own in dealt]
