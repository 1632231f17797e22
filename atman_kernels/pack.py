"""VariantPack: which rows of a packed sequence belong to which variant, and what each variant reuses."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from atman_kernels.arguments import described, entries, integer, shown
from atman_kernels.errors import InputError

LAST_INDEX = 2**31 - 1


@dataclass(frozen=True, eq=False)
class VariantPack:
    """Suffixes of many variants, concatenated along one sequence axis.

    Row r of the pack belongs to variant ``v = row_variant[r]`` and stands at the absolute position
    ``prefix_lengths[v] + (r - suffix_starts[v])``. It sees the base keys
    ``[base_starts[v], base_starts[v] + prefix_lengths[v])``, which stand at positions ``0 .. prefix_lengths[v] - 1``,
    and the rows of its own variant.

    Build one with `VariantPack.build`. The tensors live on one device; the integers are known on the host, so
    that nothing has to be read back from a GPU.

    Attributes:
        suffix_starts: (V + 1,) int32, first row of each variant; the last entry is the number of rows.
        prefix_lengths: (V,) int32, base keys that each variant reuses.
        base_starts: (V,) int32, where each variant's base begins in the base K/V.
        row_variant: (T,) int32.
        row_position: (T,) int64, absolute position of each row: the model's position_ids.
        num_rows: T.
        longest: largest prefix + suffix length; factors must reach this far.
        base_end: base K/V must hold at least this many keys.

    Example:
        >>> pack = VariantPack.build(suffix_lengths=[3, 2], prefix_lengths=[5, 6])
        >>> pack.row_position.tolist()
        [5, 6, 7, 6, 7]
    """

    suffix_starts: Tensor
    prefix_lengths: Tensor
    base_starts: Tensor
    row_variant: Tensor
    row_position: Tensor
    num_rows: int
    longest: int
    base_end: int

    @property
    def num_variants(self) -> int:
        """V."""
        return self.prefix_lengths.shape[0]

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.prefix_lengths.device

    def to(self, device: torch.device | str) -> "VariantPack":
        """The same pack with its tensors on a device; itself where they are there already."""
        if self.device == torch.device(device):
            return self
        return replace(
            self,
            suffix_starts=self.suffix_starts.to(device),
            prefix_lengths=self.prefix_lengths.to(device),
            base_starts=self.base_starts.to(device),
            row_variant=self.row_variant.to(device),
            row_position=self.row_position.to(device),
        )

    @classmethod
    def build(
        cls,
        suffix_lengths: Sequence[int] | Tensor,
        prefix_lengths: Sequence[int] | Tensor,
        base_starts: Sequence[int] | Tensor | None = None,
        device: torch.device | str | None = None,
    ) -> "VariantPack":
        """Lay out variants one after the other.

        Args:
            suffix_lengths: rows that each variant recomputes itself, (V,), >= 0.
            prefix_lengths: base keys that each variant reuses, (V,), >= 0.
            base_starts: first base key of each variant, (V,), >= 0; None means 0, one base for all.
            device: where the tensors go; None means the CPU.

        Raises:
            InputError: a length is negative or not an integer, or the three do not have one entry per variant.
        """
        suffixes = _integers("suffix_lengths", suffix_lengths)
        prefixes = _integers("prefix_lengths", prefix_lengths)
        bases = [0] * len(suffixes) if base_starts is None else _integers("base_starts", base_starts)
        if not suffixes:
            raise InputError("suffix_lengths is empty; a pack needs at least one variant")
        for name, values in (("prefix_lengths", prefixes), ("base_starts", bases)):
            if len(values) != len(suffixes):
                raise InputError(f"{name} has {len(values)} entries, but suffix_lengths has {len(suffixes)}")
        if sum(suffixes) > LAST_INDEX:
            raise InputError(f"suffix_lengths must add up to at most {LAST_INDEX:,}, got {shown(sum(suffixes))}")

        suffix = torch.tensor(suffixes, dtype=torch.int64, device="cpu")
        prefix = torch.tensor(prefixes, dtype=torch.int64, device="cpu")
        base = torch.tensor(bases, dtype=torch.int64, device="cpu")
        starts = torch.cat([suffix.new_zeros(1), suffix.cumsum(0)])
        row_variant = torch.repeat_interleave(torch.arange(len(suffixes), device="cpu"), suffix)
        row_position = torch.arange(int(starts[-1]), device="cpu") + (prefix - starts[:-1])[row_variant]
        return cls(
            suffix_starts=starts.to(device, torch.int32),
            prefix_lengths=prefix.to(device, torch.int32),
            base_starts=base.to(device, torch.int32),
            row_variant=row_variant.to(device, torch.int32),
            row_position=row_position.to(device),
            num_rows=int(starts[-1]),
            longest=int((prefix + suffix).max()),
            base_end=int((base + prefix).max()),
        )


def _integers(name: str, values: Sequence[int] | Tensor) -> list[int]:
    if isinstance(values, Tensor) and (values.ndim != 1 or values.is_floating_point() or values.dtype == torch.bool):
        raise InputError(f"{name} must be a 1-D integer tensor, got {values.dtype} of shape {tuple(values.shape)}")
    try:
        listed = [integer(value, name) for value in entries(values, name, "integers")]
    except InputError:
        raise InputError(f"{name} must hold integers, got {described(values)}") from None
    if any(value < 0 for value in listed):
        raise InputError(f"{name} must be >= 0, got {min(listed)}")
    if listed and max(listed) > LAST_INDEX:
        raise InputError(f"{name} must be at most {LAST_INDEX:,}, as 32 bits count, got {shown(max(listed))}")
    return listed
