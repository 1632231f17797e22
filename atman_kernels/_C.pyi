"""The compiled module, see csrc/binding.cpp."""

from collections.abc import Sequence

DTYPES: dict[str, int]

class Tensor:
    def __init__(self, address: int, bytes: int, dtype: int, shape: Sequence[int], strides: Sequence[int]) -> None: ...

class Call:
    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        output: Tensor,
        lse: Tensor | None = None,
        own_key: Tensor | None = None,
        own_value: Tensor | None = None,
        suffix_starts: Tensor | None = None,
        prefix_lengths: Tensor | None = None,
        base_starts: Tensor | None = None,
        row_variant: Tensor | None = None,
        factor: Tensor | None = None,
        key_mask: Tensor | None = None,
        sinks: Tensor | None = None,
        position_bias: Tensor | None = None,
        *,
        mode: str,
        is_causal: bool,
        scale: float,
        sliding_window: int = 0,
        softcap: float = 0.0,
    ) -> None: ...

def attend_cpu(call: Call, instruction_set: str, threads: int) -> None: ...
def differentiate_cpu(
    call: Call,
    instruction_set: str,
    threads: int,
    delta: Tensor,
    grad_query: Tensor | None = None,
    grad_key: Tensor | None = None,
    grad_value: Tensor | None = None,
    grad_own_key: Tensor | None = None,
    grad_own_value: Tensor | None = None,
    grad_factor: Tensor | None = None,
) -> None: ...
def cpu_instruction_sets(dtype: int) -> list[str]: ...
