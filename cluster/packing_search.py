"""Which card of which kind gets which arrangement: a search over counts.

Every arrangement gives each model so many images/s. The score of counts is the geometric mean of
the models' sums, weighted by shares. It is concave in the counts, so climbing ends near the top;
with few cards a single one makes a difference, and all possibilities are tried.

Pure: standard library only.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import combinations_with_replacement, product
from operator import mul

TRIED = 3000  # possibilities at most; with more it climbs
TARGETS = 4  # arrangements that a card may change to in one move of the climb
SCARCE = 1e-9  # images/s that count as none

Counts = list[list[int]]  # of each kind of card: how many have each arrangement


class Search:
    """`rates`: by group and arrangement, the images/s of each model."""

    def __init__(
        self,
        cards: Sequence[int],
        rates: Sequence[Sequence[tuple[float, ...]]],
        shares: Sequence[float],
    ) -> None:
        self._cards, self._rates, self._shares = cards, rates, shares

    def best(self) -> Counts | None:
        """None if a model would have no place."""
        counts = self.all() if self.possibilities <= TRIED else self.climb()
        return None if self.score(counts)[0] else counts

    @property
    def possibilities(self) -> int:
        return math.prod(
            math.comb(n + len(r) - 1, n) for n, r in zip(self._cards, self._rates, strict=True)
        )

    def capacities(self, counts: Counts) -> list[float]:
        total = [0.0] * len(self._shares)
        for ns, rates in zip(counts, self._rates, strict=True):
            for n, images_s in zip(ns, rates, strict=True):
                if n:
                    total = [t + n * r for t, r in zip(total, images_s, strict=True)]
        return total

    def score(self, counts: Counts) -> tuple[int, float]:
        """Models without a place, and minus the logarithm of the weighted geometric mean."""
        return _score(self.capacities(counts), self._shares)

    def all(self) -> Counts:
        """The best by trying all."""

        def counted(picks: Iterable[int], kinds: int) -> list[int]:
            picked = Counter(picks)
            return [picked[i] for i in range(kinds)]

        each_group = [
            [counted(p, len(r)) for p in combinations_with_replacement(range(len(r)), n)]
            for n, r in zip(self._cards, self._rates, strict=True)
        ]
        return min(map(list, product(*each_group)), key=self.score)

    def climb(self) -> Counts:
        """Cards change their arrangement, many at a time and then fewer, while that helps.

        They try the `TARGETS` that are worth most as things stand: by the gradient of the score.
        """
        counts = [[n, *[0] * (len(r) - 1)] for n, r in zip(self._cards, self._rates, strict=True)]
        capacities = self.capacities(counts)
        best = _score(capacities, self._shares)
        step = max(self._cards)
        while step:
            better = False
            for ns, rates in zip(counts, self._rates, strict=True):
                gradient = [
                    s / max(c, SCARCE) for s, c in zip(self._shares, capacities, strict=True)
                ]
                values = [sum(map(mul, images_s, gradient)) for images_s in rates]
                worth = sorted(range(len(values)), key=values.__getitem__, reverse=True)
                for a, b in product([i for i, n in enumerate(ns) if n], worth[:TARGETS]):
                    moved = min(step, ns[a])
                    after = [
                        c + moved * (rb - ra)
                        for c, ra, rb in zip(capacities, rates[a], rates[b], strict=True)
                    ]
                    score = _score(after, self._shares)
                    if moved and score < (best[0], best[1] - 1e-12):
                        ns[a], ns[b] = ns[a] - moved, ns[b] + moved
                        capacities, best, better = after, score, True
            step = step if better else step // 2
        return counts


def _score(capacities: Sequence[float], shares: Sequence[float]) -> tuple[int, float]:
    """Better is less."""
    there = [(c, s) for c, s in zip(capacities, shares, strict=True) if c > SCARCE]
    return len(shares) - len(there), -sum(s * math.log(c) for c, s in there)
