"""Which stretches of a sequence several variants have in common, so that each is run once.

Two variants whose tokens and factors agree up to a position have the same keys and values there. One question's
leave-one-out variants never agree beyond their first suppressed token, but several questions about one passage do, two
answers to one prompt, and thousands of random subsets of a few units. A trunk computes such a stretch and leaves a base
behind, from which the variants go on; trunks stand on trunks.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from atman_kernels.planning.packing import Variant

MOST_CANDIDATES = 64  # positions where trunks may end
COPY_COST = 0.02  # of a token's K/V into a new base, in tokens of a forward
LEAST_SAVING = 0.2  # of all tokens; for less, stretches are not worth the room of their K/V, as large as a pack


@dataclass(frozen=True, eq=False)
class Stage:
    """What starts from one set of bases.

    Attributes:
        variants: run to their ends.
        trunks: run up to where what stands on them begins to differ.
    """

    variants: list[Variant]
    trunks: list["Trunk"] = field(default_factory=list)

    def map(self, change: Callable[[Variant], Variant]) -> "Stage":
        """Every variant and every stretch changed."""
        trunks = [Trunk(change(trunk.stretch), trunk.then.map(change)) for trunk in self.trunks]
        return Stage([change(variant) for variant in self.variants], trunks)

    @property
    def tokens(self) -> int:
        """Of all that is run, further stages included."""
        return sum(v.suffix for v in self.variants) + sum(t.stretch.suffix + t.then.tokens for t in self.trunks)


@dataclass(frozen=True, eq=False)
class Trunk:
    """A stretch that several variants share, [prefix, length) of any of them, and what starts where it ends."""

    stretch: Variant
    then: Stage


@dataclass(frozen=True, eq=False)
class Content:
    """What a question's variants are made of, which decides whether they can share.

    Attributes:
        tokens: (L,) ids that the model reads; None if ids do not say it all (images), so that only variants of this
            question can share.
        factors: (n_units, L) on the CPU.
        limit: trunks end here at most: what comes later predicts the answer.
    """

    tokens: Tensor | None
    factors: Tensor
    limit: int


def share(variants: Sequence[Variant], contents: Sequence[Content], forward_cost: int = 0) -> Stage:
    """The cheapest stages found that end in these variants.

    Args:
        variants: each with its first suppressed token as prefix.
        contents: per question.
        forward_cost: what one more forward costs, in tokens.

    Example: two questions on one text of four tokens, whose second is suppressed.

        >>> texts = [torch.tensor([1, 2, 3, 4, 5]), torch.tensor([1, 2, 3, 4, 6])]
        >>> factors = torch.tensor([[1.0, 0.1, 1.0, 1.0, 1.0]])
        >>> stage = share([Variant(q, 0, 1, 5) for q in (0, 1)], [Content(text, factors, 4) for text in texts])
        >>> [(trunk.stretch.prefix, trunk.stretch.length) for trunk in stage.trunks], stage.tokens
        ([(1, 4)], 5)
    """
    whole = Stage(list(variants))
    if len(variants) < 2:
        return whole
    groups = _groups(variants, contents)
    cuts = _cuts(groups, torch.tensor([v.prefix for v in variants], device="cpu"), forward_cost)
    labels = [(cut, dict(zip(groups[cut].members.tolist(), groups[cut].group.tolist(), strict=True))) for cut in cuts]
    stage = _stage(list(range(len(variants))), dict(enumerate(variants)), labels)
    return stage if stage.tokens <= (1 - LEAST_SAVING) * whole.tokens else whole


def chunks(trunks: Sequence[Trunk], capacity: int) -> Iterator[list[Trunk]]:
    """Trunks whose bases have `capacity` tokens together, or one alone."""
    taken: list[Trunk] = []
    left = capacity
    for trunk in trunks:
        if taken and trunk.stretch.length > left:
            yield taken
            taken, left = [], capacity
        taken.append(trunk)
        left -= trunk.stretch.length
    if taken:
        yield taken


def standing_on(trunks: Sequence[Trunk]) -> Stage:
    """What comes after some trunks, where the base of trunk i is number i."""
    variants = [replace(v, base=i) for i, trunk in enumerate(trunks) for v in trunk.then.variants]
    further = [Trunk(replace(t.stretch, base=i), t.then) for i, trunk in enumerate(trunks) for t in trunk.then.trunks]
    return Stage(variants, further)


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
    question = torch.tensor([v.question for v in variants], device="cpu")
    unit = torch.tensor([-1 if v.unit is None else v.unit for v in variants], device="cpu")
    first = torch.tensor([v.prefix for v in variants], device="cpu")
    limit = torch.tensor([a.limit for a in contents], device="cpu")[question]
    texts = _texts(contents)  # [questions, P + 1]
    order = first.argsort(stable=True)
    arrived = torch.searchsorted(first[order], torch.arange(texts.shape[1] + 1, device="cpu"))
    found: dict[int, _Groups] = {}
    members, group = order[:0], order[:0]
    for end in range(1, texts.shape[1]):
        entering = order[arrived[end - 1] : arrived[end]]  # suppressed at end - 1 for the first time
        if len(members) + len(entering) < 2:
            members, group = order[:0], order[:0]
            continue
        # who enters has been as its question's text so far, which no member has
        before = torch.cat([group, -1 - texts[question[entering], end - 1]])
        members = torch.cat([members, entering])
        inside = limit[members] >= end
        members, before = members[inside], before[inside]
        factor = _column(contents, question[members], unit[members], end - 1)
        keys = torch.stack([before, texts[question[members], end], factor.view(torch.int32).long()], dim=1)
        _, group, sizes = torch.unique(keys, dim=0, return_inverse=True, return_counts=True)
        shared = sizes[group] > 1
        members, group = members[shared], torch.unique(group[shared], return_inverse=True)[1]
        if len(members):
            found[end] = _Groups(end, members, group)
    return found


def _texts(contents: Sequence[Content]) -> Tensor:
    """(questions, P + 1): questions with the same number at p read the same p first tokens; P is the largest limit."""
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


def _column(contents: Sequence[Content], question: Tensor, unit: Tensor, position: int) -> Tensor:
    """(n,) float32 factors at a position."""
    values = torch.ones(len(question), dtype=torch.float32, device="cpu")
    for index in question.unique().tolist():
        own = question == index
        values[own] = contents[index].factors[unit[own], position].float()
    return values + 0.0  # no -0.0, whose bits are others


def _cuts(groups: dict[int, _Groups], first: Tensor, forward_cost: int) -> list[int]:
    """Positions where trunks should end, ascending: those that save most, by dynamic programming."""
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


def _stage(indices: list[int], variants: dict[int, Variant], cuts: list[tuple[int, dict[int, int]]]) -> Stage:
    """The stages of some variants.

    Args:
        indices: of the variants.
        variants: by index, beginning where their bases end.
        cuts: where trunks may end from there on, each with the groups of those that agree so far.
    """
    if not cuts:
        return Stage([variants[i] for i in indices])
    families: dict[int, list[int]] = {}
    for i in indices:
        if i in cuts[0][1]:
            families.setdefault(cuts[0][1][i], []).append(i)
    trunks = []
    for members in families.values():
        last = 0  # the furthest cut before which they do not part
        while last + 1 < len(cuts) and len({cuts[last + 1][1].get(i, -1 - i) for i in members}) == 1:
            last += 1
        end = cuts[last][0]
        grown = {i: replace(variants[i], prefix=end) for i in members}
        stretch = replace(variants[members[0]], length=end)
        trunks.append(Trunk(stretch, _stage(members, grown, cuts[last + 1 :])))
    others = _stage([i for i in indices if i not in cuts[0][1]], variants, cuts[1:])
    return Stage(others.variants, [*trunks, *others.trunks])
