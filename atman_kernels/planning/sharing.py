"""Which stretches of a sequence several variants have in common, so that each is run once.

Two variants whose tokens and factors agree up to a position have the same keys and values there. One question's
leave-one-out variants never agree beyond their first suppressed token, but several questions about one passage do, two
answers to one prompt, and thousands of random subsets of a few units. Such a stretch is run once, as a shared prefix:
it leaves a base behind, from which its variants, or further shared prefixes, go on.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from atman_kernels.planning.packing import Variant

MOST_CANDIDATES = 64  # positions where shared prefixes may end
COPY_COST = 0.02  # of a token's K/V into a new base, in tokens of a forward
LEAST_SAVING = 0.2  # of all tokens; for less, stretches are not worth the room of their K/V, as large as a pack


@dataclass(frozen=True, eq=False)
class PrefixTree:
    """What starts from one set of bases: variants, and the prefixes that some of them share, as a tree.

    Attributes:
        variants: run to their ends.
        prefixes: run up to where what stands on them begins to differ.
    """

    variants: list[Variant]
    prefixes: list["SharedPrefix"] = field(default_factory=list)

    def map(self, change: Callable[[Variant], Variant]) -> "PrefixTree":
        """Every variant and every stretch changed."""
        prefixes = [SharedPrefix(change(shared.stretch), shared.then.map(change)) for shared in self.prefixes]
        return PrefixTree([change(variant) for variant in self.variants], prefixes)

    @property
    def tokens(self) -> int:
        """Of all that is run, what stands on shared prefixes included."""
        return sum(v.suffix for v in self.variants) + sum(t.stretch.suffix + t.then.tokens for t in self.prefixes)


@dataclass(frozen=True, eq=False)
class SharedPrefix:
    """A stretch that several variants share, [prefix, length) of any of them, and what starts where it ends."""

    stretch: Variant
    then: PrefixTree


@dataclass(frozen=True, eq=False)
class Content:
    """What an objective's variants are made of, which decides whether they can share.

    Attributes:
        tokens: (L,) ids that the model reads; None if ids do not say it all (images), so that only variants of this
            objective can share.
        factors: (n_rows, L) on the CPU.
        limit: prefixes end here at most: what comes later predicts the answer.
    """

    tokens: Tensor | None
    factors: Tensor
    limit: int


def share(variants: Sequence[Variant], contents: Sequence[Content], forward_cost: int = 0) -> PrefixTree:
    """The cheapest tree found that ends in these variants.

    Args:
        variants: each with its first suppressed token as prefix.
        contents: per objective.
        forward_cost: what one more forward costs, in tokens.

    Example: two questions on one text of four tokens, whose second is suppressed.

        >>> texts = [torch.tensor([1, 2, 3, 4, 5]), torch.tensor([1, 2, 3, 4, 6])]
        >>> factors = torch.tensor([[1.0, 0.1, 1.0, 1.0, 1.0]])
        >>> tree = share([Variant(q, 0, 1, 5) for q in (0, 1)], [Content(text, factors, 4) for text in texts])
        >>> [(shared.stretch.prefix, shared.stretch.length) for shared in tree.prefixes], tree.tokens
        ([(1, 4)], 5)
    """
    whole = PrefixTree(list(variants))
    if len(variants) < 2:
        return whole
    groups = _groups(variants, contents)
    cuts = _cuts(groups, torch.tensor([v.prefix for v in variants], device="cpu"), forward_cost)
    labels = [(cut, dict(zip(groups[cut].members.tolist(), groups[cut].group.tolist(), strict=True))) for cut in cuts]
    tree = _tree(list(range(len(variants))), dict(enumerate(variants)), labels)
    return tree if tree.tokens <= (1 - LEAST_SAVING) * whole.tokens else whole


def chunks(prefixes: Sequence[SharedPrefix], capacity: int) -> Iterator[list[SharedPrefix]]:
    """Shared prefixes whose bases have `capacity` tokens together, or one alone."""
    taken: list[SharedPrefix] = []
    left = capacity
    for shared in prefixes:
        if taken and shared.stretch.length > left:
            yield taken
            taken, left = [], capacity
        taken.append(shared)
        left -= shared.stretch.length
    if taken:
        yield taken


def standing_on(prefixes: Sequence[SharedPrefix]) -> PrefixTree:
    """What comes after some prefixes, where the base of prefix i is number i."""
    variants = [replace(v, base=i) for i, shared in enumerate(prefixes) for v in shared.then.variants]
    further = [
        SharedPrefix(replace(t.stretch, base=i), t.then)
        for i, shared in enumerate(prefixes)
        for t in shared.then.prefixes
    ]
    return PrefixTree(variants, further)


@dataclass(frozen=True, eq=False)
class _Groups:
    """Variants that agree with another one in all tokens and factors before `end`, and are suppressed before it.

    Attributes:
        members: (n,) indices of variants.
        group: (n,) which of the groups each is in, from 0.
    """

    end: int
    members: Tensor
    group: Tensor


def _groups(variants: Sequence[Variant], contents: Sequence[Content]) -> dict[int, _Groups]:
    """By position, for every position up to which some variants agree."""
    objective = torch.tensor([v.objective for v in variants], device="cpu")
    row = torch.tensor([-1 if v.row is None else v.row for v in variants], device="cpu")
    first = torch.tensor([v.prefix for v in variants], device="cpu")
    limit = torch.tensor([a.limit for a in contents], device="cpu")[objective]
    texts = _texts(contents)  # [objectives, P + 1]
    order = first.argsort(stable=True)
    arrived = torch.searchsorted(first[order], torch.arange(texts.shape[1] + 1, device="cpu"))
    found: dict[int, _Groups] = {}
    members, group = order[:0], order[:0]
    for end in range(1, texts.shape[1]):
        entering = order[arrived[end - 1] : arrived[end]]  # suppressed at end - 1 for the first time
        if len(members) + len(entering) < 2:
            members, group = order[:0], order[:0]
            continue
        # who enters has been as its objective's text so far, which no member has
        before = torch.cat([group, -1 - texts[objective[entering], end - 1]])
        members = torch.cat([members, entering])
        inside = limit[members] >= end
        members, before = members[inside], before[inside]
        factor = _column(contents, objective[members], row[members], end - 1)
        keys = torch.stack([before, texts[objective[members], end], factor.view(torch.int32).long()], dim=1)
        _, group, sizes = torch.unique(keys, dim=0, return_inverse=True, return_counts=True)
        shared = sizes[group] > 1
        members, group = members[shared], torch.unique(group[shared], return_inverse=True)[1]
        if len(members):
            found[end] = _Groups(end, members, group)
    return found


def _texts(contents: Sequence[Content]) -> Tensor:
    """(objectives, P + 1): those with the same number at p read the same p first tokens; P is the largest limit."""
    width = max(a.limit for a in contents)
    ids = torch.full((len(contents), width), -1, dtype=torch.int64, device="cpu")
    for row, one in zip(ids, contents, strict=True):
        if one.tokens is not None:
            row[: len(one.tokens)] = one.tokens[:width].cpu()
    apart = torch.tensor(
        [0 if one.tokens is not None else 1 + index for index, one in enumerate(contents)], device="cpu"
    )
    numbers = [apart]
    for column in ids.T:
        numbers.append(torch.unique(torch.stack([numbers[-1], column], dim=1), dim=0, return_inverse=True)[1])
    return torch.stack(numbers, dim=1)


def _column(contents: Sequence[Content], objective: Tensor, row: Tensor, position: int) -> Tensor:
    """(n,) float32 factors at a position."""
    values = torch.ones(len(objective), dtype=torch.float32, device="cpu")
    for index in objective.unique().tolist():
        own = objective == index
        values[own] = contents[index].factors[row[own], position].float()
    return values + 0.0  # no -0.0, whose bits are others


def _cuts(groups: dict[int, _Groups], first: Tensor, forward_cost: int) -> list[int]:
    """Positions where prefixes should end, ascending: those that save most, by dynamic programming."""
    ends = _candidates(groups)
    best, through = [0.0] * len(ends), [-1] * len(ends)  # saved by cuts up to this one; the cut before it
    for index, end in enumerate(ends):
        own = groups[end]
        sizes = own.group.bincount()
        begins = torch.zeros(len(sizes), dtype=torch.int64, device="cpu").scatter_(0, own.group, first[own.members])
        for before in range(-1, index):
            start = begins.clamp(min=ends[before] if before >= 0 else 0)
            saved = float(((sizes - 1) * (end - start)).sum()) - COPY_COST * end * len(sizes) - forward_cost
            saved += best[before] if before >= 0 else 0.0
            if before < 0 or saved > best[index]:
                best[index], through[index] = saved, before
    chosen: list[int] = []
    at = max(range(len(ends)), key=best.__getitem__) if ends and max(best) > 0 else -1
    while at >= 0:
        chosen.append(ends[at])
        at = through[at]
    return chosen[::-1]


def _candidates(groups: dict[int, _Groups]) -> list[int]:
    """Positions after which most variants part: a stretch that ends elsewhere could as well be longer."""
    parting = {}
    for end, own in groups.items():
        after = groups.get(end + 1)
        together = own.group[:0] if after is None else after.group[torch.isin(after.members, own.members)]
        parting[end] = (len(own.members) - len(own.group.unique())) - (len(together) - len(together.unique()))
    return sorted(sorted(parting, key=parting.__getitem__, reverse=True)[:MOST_CANDIDATES])


def _tree(indices: list[int], variants: dict[int, Variant], cuts: list[tuple[int, dict[int, int]]]) -> PrefixTree:
    """The tree of some variants.

    Args:
        indices: of the variants.
        variants: by index, beginning where their bases end.
        cuts: where prefixes may end from there on, each with the groups of those that agree so far.
    """
    if not cuts:
        return PrefixTree([variants[i] for i in indices])
    families: dict[int, list[int]] = {}
    for i in indices:
        if i in cuts[0][1]:
            families.setdefault(cuts[0][1][i], []).append(i)
    prefixes = []
    for members in families.values():
        last = 0  # the furthest cut before which they do not part
        while last + 1 < len(cuts) and len({cuts[last + 1][1].get(i, -1 - i) for i in members}) == 1:
            last += 1
        end = cuts[last][0]
        grown = {i: replace(variants[i], prefix=end) for i in members}
        stretch = replace(variants[members[0]], length=end)
        prefixes.append(SharedPrefix(stretch, _tree(members, grown, cuts[last + 1 :])))
    others = _tree([i for i in indices if i not in cuts[0][1]], variants, cuts[1:])
    return PrefixTree(others.variants, [*prefixes, *others.prefixes])
