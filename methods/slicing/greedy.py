"""NViT's greedy removal: which groups go first, by importance and saved cost.

Pure functions on `Widths` and `Scores`: no model runs here and no weight changes.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from torch import Tensor

from vitpareto.methods.slicing.importance import BlockScores, Scores
from vitpareto.methods.slicing.plan import GROUPS, SLACK, Cost, check_reachable, least
from vitpareto.methods.slicing.widths import PARTS, Widths


def plan(
    scores: Scores,
    widths: Widths,
    cost: Cost,
    target: float,
    *,
    eta: float,
    fixed: Collection[str] = (),
) -> Widths:
    """The widths left after removing the globally least important groups, one at a time, until
    `cost` is at most `target` (in cost's unit).

    The next group is the one with the lowest `importance - eta * saved cost` over all blocks and
    dimensions (arXiv:2110.04869, section 3.2). Importances and saved costs are relative to their
    mean per group, so that `eta` has no unit. `importance.top(scores, …)` gives the units that
    stay. Raises BadInput if the least widths cost more than the target.
    """
    check_reachable(cost, widths, target, fixed)
    greedy = _Greedy(scores, widths, cost, eta, fixed)
    while greedy.cost > target:
        greedy.remove(target)
    return greedy.widths


#: a dimension: its name and its block, -1 for the embedding
_Key = tuple[str, int]


def _grouped(scores: Tensor, size: int) -> Tensor:
    """Sums over groups of `size` scores in increasing order: [..., width // size]."""
    ranked = scores.sort(dim=-1).values
    count = ranked.shape[-1] // size
    return ranked[..., : count * size].unflatten(-1, (count, size)).sum(dim=-1)


class _BlockGroups:
    """The importance of the groups of a block in the order of their removal."""

    def __init__(self, scores: BlockScores):
        # heads in the order of their removal
        order = scores.heads.argsort(stable=True)
        self.heads = _grouped(scores.heads, GROUPS["heads"]).tolist()
        self.mlp = _grouped(scores.mlp, GROUPS["mlp"]).tolist()
        # [h, groups]: over the heads that are left when the first h are removed
        self.qk, self.v = (
            _grouped(own[order], GROUPS[part]).flip(0).cumsum(0).flip(0)
            for part, own in (("qk", scores.qk), ("v", scores.v))
        )

    def importance(self, part: str, done: int, heads_removed: int) -> float:
        """The importance of the next group of `part`, of which `done` groups are removed."""
        if part in ("heads", "mlp"):
            return float(getattr(self, part)[done])
        return float(getattr(self, part)[heads_removed, done])


class _Greedy:
    """The state of a greedy removal: current widths, and the next group of every dimension.

    What a dimension saves depends only on its block and the embedding, so that a removal updates
    few of them.
    """

    def __init__(
        self, scores: Scores, widths: Widths, cost: Cost, eta: float, fixed: Collection[str]
    ):
        self.widths, self._start, self._cost, self._eta = widths, widths, cost, eta
        self._floor = least(widths, fixed)
        self._blocks = [_BlockGroups(block) for block in scores.blocks]
        self._embedding = _grouped(scores.embedding, GROUPS["embedding"]).tolist()
        self.cost = cost(widths)
        self._next: dict[_Key, tuple[float, float]] = {}
        self._update(self._keys())
        groups = {
            key: (self._width(key) - self._least(key)) // GROUPS[key[0]] for key in self._next
        }
        count = max(1, sum(groups.values()))
        every = (self._importance(key, i) for key, many in groups.items() for i in range(many))
        # 1.0 for a model without importances
        self._mean_importance = sum(every) / count or 1.0
        self._mean_saving = (self.cost - cost(self._floor)) / count or 1.0

    def _keys(self) -> list[_Key]:
        keys = [(part, b) for b in range(len(self.widths.blocks)) for part in PARTS]
        return [("embedding", -1), *keys]

    @staticmethod
    def _of(widths: Widths, key: _Key) -> int:
        part, block = key
        return int(widths.embedding if block < 0 else getattr(widths.blocks[block], part))

    def _width(self, key: _Key) -> int:
        return self._of(self.widths, key)

    def _least(self, key: _Key) -> int:
        return self._of(self._floor, key)

    def _importance(self, key: _Key, done: int) -> float:
        part, block = key
        if block < 0:
            return float(self._embedding[done])
        removed = self._start.blocks[block].heads - self.widths.blocks[block].heads
        return self._blocks[block].importance(part, done, removed)

    def _without(self, key: _Key) -> Widths:
        """The widths with one group of this dimension less."""
        part, block = key
        width = self._width(key) - GROUPS[part]
        if block < 0:
            return replace(self.widths, embedding=width)
        blocks = list(self.widths.blocks)
        blocks[block] = replace(blocks[block], **{part: width})
        return replace(self.widths, blocks=tuple(blocks))

    def _update(self, keys: list[_Key]) -> None:
        for key in keys:
            self._next.pop(key, None)
            if self._width(key) > self._least(key):
                done = (self._of(self._start, key) - self._width(key)) // GROUPS[key[0]]
                saved = self.cost - self._cost(self._without(key))
                self._next[key] = self._importance(key, done), saved

    def _score(self, key: _Key) -> tuple[float, _Key]:
        """The dimension with the lowest score is removed first, ties by name."""
        importance, saved = self._next[key]
        return importance / self._mean_importance - self._eta * saved / self._mean_saving, key

    def remove(self, target: float) -> None:
        """Remove the group with the lowest score.

        If that would leave the cost more than `SLACK` below the target, remove the group with the
        lowest score among those that save cost and stay above that limit. If there is none, remove
        the group that leaves the cost nearest below the target.
        """
        key, low = min(self._next, key=self._score), (1 - SLACK) * target
        ends = {k: self.cost - saved for k, (_, saved) in self._next.items()}
        if ends[key] < low:
            short = [k for k, end in ends.items() if low <= end < self.cost]
            if short:
                key = min(short, key=self._score)
            else:
                below = [k for k, end in ends.items() if end <= target]
                nearest = max(ends[k] for k in below)
                key = min((k for k in below if ends[k] == nearest), key=self._score)
        self.widths = self._without(key)
        self.cost = self._cost(self.widths)
        own = [(part, key[1]) for part in PARTS] if key[1] >= 0 else self._keys()
        self._update([("embedding", -1), *own])
