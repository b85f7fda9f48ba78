"""A search for the best arrangements: how many cards of each kind get which arrangement.

Every arrangement gives each model some images/s. A model's capacity is their sum over all cards.
The search looks for the greatest geometric mean of the capacities, weighted by the models' shares.
The logarithm of this mean is concave in the numbers of cards, so hill climbing ends near the best.
With few cards a single card makes a difference, so all possibilities are tried.

Pure: standard library only.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import combinations_with_replacement, product
from operator import mul

MAX_TRIED = 3000  # with more possibilities than this, hill climbing searches them
TARGETS = 4  # arrangements that are tried as the new one of a card in each move of the climb
NO_CAPACITY = 1e-9  # images/s; a capacity up to this counts as none

Counts = list[list[int]]  # for each kind of card: how many cards have each arrangement


class Search:
    """The possibilities of one packing problem.

    `cards`: the number of cards of each kind. `rates`: for each kind of card and each arrangement,
    the images/s of each model. `shares`: the share of each model.
    """

    def __init__(
        self,
        cards: Sequence[int],
        rates: Sequence[Sequence[tuple[float, ...]]],
        shares: Sequence[float],
    ) -> None:
        self._cards, self._rates, self._shares = cards, rates, shares

    def best(self) -> Counts | None:
        """The best counts; None if they leave a model without a place."""
        counts = self.all() if self.possibilities <= MAX_TRIED else self.climb()
        return None if self.score(counts)[0] else counts

    @property
    def possibilities(self) -> int:
        """The number of ways to give every card an arrangement."""
        return math.prod(
            math.comb(n + len(r) - 1, n) for n, r in zip(self._cards, self._rates, strict=True)
        )

    def capacities(self, counts: Counts) -> list[float]:
        """Images/s of each model over all cards."""
        total = [0.0] * len(self._shares)
        for ns, rates in zip(counts, self._rates, strict=True):
            for n, images_s in zip(ns, rates, strict=True):
                if n:
                    total = [t + n * r for t, r in zip(total, images_s, strict=True)]
        return total

    def score(self, counts: Counts) -> tuple[int, float]:
        """The score of counts; the smallest score is the best.

        The first part is the number of models without a place. The second part is minus the sum of
        share · log(capacity) over the other models. That sum is the logarithm of their weighted
        geometric mean times the sum of their shares.
        """
        return _score(self.capacities(counts), self._shares)

    def all(self) -> Counts:
        """Find the best counts by trying all possibilities."""

        def counted(picks: Iterable[int], kinds: int) -> list[int]:
            picked = Counter(picks)
            return [picked[i] for i in range(kinds)]

        each_group = [
            [counted(p, len(r)) for p in combinations_with_replacement(range(len(r)), n)]
            for n, r in zip(self._cards, self._rates, strict=True)
        ]
        return min(map(list, product(*each_group)), key=self.score)

    def climb(self) -> Counts:
        """Find good counts by hill climbing.

        In each move some cards change from one arrangement to another: first many cards at a time,
        then fewer, as long as that improves the score. Only the `TARGETS` arrangements of the
        highest value are tried as new ones. The value of an arrangement is the sum of its images/s,
        each multiplied by the model's share ÷ capacity (the gradient of the score).
        """
        counts = [[n, *[0] * (len(r) - 1)] for n, r in zip(self._cards, self._rates, strict=True)]
        capacities = self.capacities(counts)
        best = _score(capacities, self._shares)
        step = max(self._cards)
        while step:
            better = False
            for ns, rates in zip(counts, self._rates, strict=True):
                gradient = [
                    s / max(c, NO_CAPACITY) for s, c in zip(self._shares, capacities, strict=True)
                ]
                values = [sum(map(mul, images_s, gradient)) for images_s in rates]
                ranked = sorted(range(len(values)), key=values.__getitem__, reverse=True)
                for a, b in product([i for i, n in enumerate(ns) if n], ranked[:TARGETS]):
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
    """The score of capacities, as `Search.score` describes it."""
    placed = [(c, s) for c, s in zip(capacities, shares, strict=True) if c > NO_CAPACITY]
    return len(shares) - len(placed), -sum(s * math.log(c) for c, s in placed)
