"""A shape's tensors, and the plain formula on samples of its rows.

Each row's query points to the key that its variant suppresses, by so much that this key alone weighs as much as all
others: a contender that leaves a factor out, or applies another variant's, is off by half of every output and not by
what one key among 100 000 contributes.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

import atman_kernels as ak
from benchmarks.gpu.cases import Covers, DenseShape, PackShape, Shape, planted_score

FACTOR = 0.1  # of the suppressed key
SAMPLED_SCORES = 1 << 27  # of one piece at most
SAMPLED_VARIANTS, SAMPLED_ROWS = 16, 256


@dataclass(frozen=True, eq=False)
class Piece:
    """Some rows of one variant (or batch entry) and all keys that they may see, at positions 0, 1, 2, …"""

    entry: int  # of the output's first axis
    rows: Tensor  # (R,) of its third
    variant: int
    query: Tensor  # (Hq, R, D)
    key: Tensor  # (Hkv, N, D)
    value: Tensor  # (Hkv, N, D)
    last: Tensor  # (R,) the last key that each row sees

    def of(self, output: Tensor) -> Tensor:
        """This piece of a contender's output (B, Hq, rows, D)."""
        return output[self.entry][:, self.rows]


@dataclass(frozen=True, eq=False)
class DenseProblem:
    """Tensors of a dense call, in the memory layouts that models give them."""

    shape: DenseShape
    query: Tensor  # (B, Hq, Lq, D)
    key: Tensor  # (B, Hkv, Lk, D)
    value: Tensor
    factors: dict[str, Tensor | None]  # none | sparse | dense: (B, Lk)

    @classmethod
    def build(cls, shape: DenseShape, dtype: torch.dtype, device: torch.device) -> "DenseProblem":
        normal, heads = _normal(dtype, device), shape.heads
        query = normal(shape.batch, shape.queries, heads.query, heads.dim).transpose(1, 2)
        if shape.queries == shape.keys:  # all from this call's projections
            key, value = (normal(shape.batch, shape.keys, heads.kv, heads.dim).transpose(1, 2) for _ in range(2))
        else:  # from a cache
            key, value = (normal(shape.batch, heads.kv, shape.keys, heads.dim) for _ in range(2))
        entries = torch.arange(shape.batch, device=device)
        suppressed = (shape.keys // 4 + 7 * entries) % shape.keys
        towards = _directions(key[entries, :, suppressed], heads.query)  # [B, Hq, D]
        query += planted_score(shape.keys) * towards[:, :, None]
        factors = _factors(shape.batch, shape.keys, suppressed, device)
        return cls(shape, query, key, value, factors)

    def pieces(self, covers: Covers = "everything") -> Iterator[Piece]:
        shape = self.shape
        for entry in _sample(shape.batch, SAMPLED_VARIANTS):
            rows = torch.tensor(_sample(shape.queries, _rows_of(shape, shape.keys)), device=self.query.device)
            last = rows + shape.keys - shape.queries if shape.is_causal else torch.full_like(rows, shape.keys - 1)
            yield Piece(entry, rows, entry, self.query[entry][:, rows], self.key[entry], self.value[entry], last)


@dataclass(frozen=True, eq=False)
class PackProblem:
    """Tensors of a packed call."""

    shape: PackShape
    query: Tensor  # (Hq, T, D)
    key: Tensor  # (Hkv, T, D)
    value: Tensor
    base_key: Tensor  # (Hkv, S, D)
    base_value: Tensor
    pack: ak.VariantPack
    factors: dict[str, Tensor | None]  # none | sparse | dense: (V, K)

    @classmethod
    def build(cls, shape: PackShape, dtype: torch.dtype, device: torch.device) -> "PackProblem":
        normal, heads = _normal(dtype, device), shape.heads
        pack = ak.VariantPack.build(shape.suffixes, shape.prefixes, device=device)
        query = normal(shape.rows, heads.query, heads.dim).transpose(0, 1)
        key, value = (normal(shape.rows, heads.kv, heads.dim).transpose(0, 1) for _ in range(2))
        base_key, base_value = (normal(heads.kv, shape.base, heads.dim) for _ in range(2))
        suppressed = torch.tensor(shape.suppressed, device=device)
        in_base = suppressed < pack.prefix_lengths
        planted = torch.where(  # [Hkv, V, D]
            in_base[:, None],
            base_key[:, suppressed.clamp(max=shape.base - 1)],
            key[:, pack.suffix_starts[:-1].long()],
        )
        towards = _directions(planted.transpose(0, 1), heads.query).transpose(0, 1)  # [Hq, V, D]
        query += planted_score(shape.longest) * towards[:, pack.row_variant.long()]
        factors = _factors(shape.variants, shape.longest, suppressed, device)
        return cls(shape, query, key, value, base_key, base_value, pack, factors)

    def pieces(self, covers: Covers = "everything") -> Iterator[Piece]:
        shape = self.shape
        starts = [0]
        for suffix in shape.suffixes:
            starts.append(starts[-1] + suffix)
        for variant in _sample(shape.variants, SAMPLED_VARIANTS):
            start, suffix, prefix = starts[variant], shape.suffixes[variant], shape.prefixes[variant]
            own = slice(start, start + (suffix if covers == "everything" else 0))
            key = torch.cat([self.base_key[:, :prefix], self.key[:, own]], dim=1)
            value = torch.cat([self.base_value[:, :prefix], self.value[:, own]], dim=1)
            chosen = _sample(suffix, _rows_of(shape, prefix + suffix))
            rows = torch.tensor(chosen, device=key.device)
            last = (rows + prefix).clamp(max=key.shape[1] - 1)
            yield Piece(0, rows + start, variant, self.query[:, rows + start], key, value, last)


Problem = DenseProblem | PackProblem


def build(shape: Shape, dtype: torch.dtype, device: torch.device) -> Problem:
    if isinstance(shape, DenseShape):
        return DenseProblem.build(shape, dtype, device)
    return PackProblem.build(shape, dtype, device)


def plain_attention(piece: Piece, factor: Tensor | None, mode: str, dtype: torch.dtype) -> Tensor:
    """(Hq, R, D): the formula, with every step in `dtype`."""
    query, key, value = (tensor.to(dtype) for tensor in (piece.query, piece.key, piece.value))
    (heads, rows, dim), (kv_heads, keys, _) = query.shape, key.shape
    scores = (query.reshape(kv_heads, -1, dim) @ key.mT).reshape(heads, rows, keys) * dim**-0.5
    visible = torch.arange(keys, device=key.device) <= piece.last[:, None]  # [R, N]
    if factor is not None:
        kept = factor[piece.variant, :keys].to(dtype)
        if mode == "log_additive":
            scores = scores + kept.log()
        elif mode == "multiplicative":
            scores = scores * kept
        else:
            lowest = scores.masked_fill(~visible, math.inf).amin(dim=-1, keepdim=True)
            scores = lowest + kept * (scores - lowest)
    weights = scores.masked_fill(~visible, -math.inf).softmax(dim=-1)
    return (weights.reshape(kv_heads, -1, keys) @ value).reshape(heads, rows, dim)


def _normal(dtype: torch.dtype, device: torch.device) -> Callable[..., Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    return lambda *sizes: torch.randn(*sizes, generator=generator, dtype=dtype, device=device)


def _directions(keys: Tensor, query_heads: int) -> Tensor:
    """(N, Hkv, D) -> (N, Hq, D): what added to a query raises its score with that key by about 1."""
    keys = keys.float()
    unit = keys * keys.shape[-1] ** 0.5 / keys.square().sum(dim=-1, keepdim=True)
    return unit.repeat_interleave(query_heads // keys.shape[1], dim=1)


def _factors(variants: int, keys: int, suppressed: Tensor, device: torch.device) -> dict[str, Tensor | None]:
    """Sparse: one key per variant. Dense: every key another factor, some of them gone."""
    sparse = torch.ones(variants, keys, device=device)
    sparse[torch.arange(variants, device=device), suppressed] = FACTOR
    generator = torch.Generator(device).manual_seed(1)
    dense = torch.rand(variants, keys, generator=generator, device=device).mul_(1.5)
    dense.masked_fill_(dense < 0.1, 0.0)
    dense[torch.arange(variants, device=device), suppressed] = FACTOR
    return {"none": None, "sparse": sparse, "dense": dense}


def _rows_of(shape: Shape, keys: int) -> int:
    return max(4, min(SAMPLED_ROWS, SAMPLED_SCORES // (shape.heads.query * keys)))


def _sample(count: int, most: int) -> list[int]:
    """Up to `most` of 0 … count - 1: the first, the last and some between, in order."""
    if count <= most:
        return list(range(count))
    between = torch.randperm(count - 2, generator=torch.Generator().manual_seed(count))[: most - 2] + 1
    return [0, *sorted(between.tolist()), count - 1]
