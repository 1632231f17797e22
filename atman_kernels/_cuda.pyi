"""The compiled CUDA module, see csrc/cuda/binding.cpp."""

from collections.abc import Sequence

DTYPES: dict[str, int]
ARCHITECTURES: str

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
    def refusal(self, kernel: str) -> str: ...
    def workspace_bytes(self, kernel: str, multiprocessors: int) -> int: ...
    def attend(self, kernel: str, workspace: Tensor, device: int, multiprocessors: int, stream: int) -> None: ...

def device_problem(device: int) -> str: ...
