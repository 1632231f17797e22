"""Head dimensions of models in use, with tiles that are full, on a GPU: the shared suites are for small ones.

On a CPU the kernels are tried at such dimensions by `test_triton.py`, a few rows at a time.
"""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from attention_cases import BACKEND_DTYPES, BACKENDS, MODES, DenseCase, PackCase, one_thread, poisoned_memory
from op_checks import check_dense, check_packed

from atman_kernels import backends

pytestmark = pytest.mark.gpu

HEAD_DIMS = (64, 80, 128, 192, 256)
DENSE = {
    "causal": DenseCase(1, 1, 8, 2, 150, 300, is_causal=True, factor_values="sparse"),
    "both_ways": DenseCase(2, 2, 4, 4, 129, 257),
    "decoding": DenseCase(2, 2, 8, 1, 1, 900, is_causal=True, factor_values="lone"),
    "window_bias_sinks": DenseCase(
        2, 2, 6, 2, 70, 200, is_causal=True, sliding_window=90, position_bias="full", sinks=True, softcap=20.0
    ),
}
PACKS = {
    "short_suffixes": PackCase((3,) * 60, (200,) * 60, query_heads=8, kv_heads=2, factor_values="lone"),
    "long_suffixes": PackCase((150, 1, 70), (130, 257, 0), query_heads=4, kv_heads=4, factor_values="sparse"),
    "two_bases": PackCase((40, 9, 33), (64, 150, 190), (0, 30, 200), query_heads=8, kv_heads=1, layout="rows_first"),
}
WITH_A_GPU = [name for name in ("triton", "cuda") if name in BACKENDS]
DTYPES = [(backend, dtype) for backend in WITH_A_GPU for dtype in BACKEND_DTYPES[backend]]


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    with poisoned_memory(), one_thread():
        yield


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize(("backend", "dtype"), DTYPES, ids=str)
def test_dense(backend: str, dtype: torch.dtype, name: str, head_dim: int) -> None:
    case = replace(DENSE[name], head_dim=head_dim, value_dim=head_dim)
    for mode in MODES:
        check_dense(backend, case, mode, "keys", dtype)
    check_dense(backend, case, MODES[0], "none", dtype)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("name", PACKS)
@pytest.mark.parametrize(("backend", "dtype"), DTYPES, ids=str)
def test_packs(backend: str, dtype: torch.dtype, name: str, head_dim: int) -> None:
    case = replace(PACKS[name], head_dim=head_dim, value_dim=head_dim)
    for mode in MODES:
        check_packed(backend, case, mode, "keys", dtype)
    check_packed(backend, case, MODES[0], "none", dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("head_dim", "value_dim"), [(192, 128), (128, 64), (80, 256)])
def test_values_of_another_dimension(head_dim: int, value_dim: int, dtype: torch.dtype) -> None:
    backends.load("triton", "cuda")
    dense = replace(DENSE["causal"], head_dim=head_dim, value_dim=value_dim)
    check_dense("triton", dense, MODES[0], "keys", dtype)
    pack = replace(PACKS["long_suffixes"], head_dim=head_dim, value_dim=value_dim)
    check_packed("triton", pack, MODES[0], "heads", dtype)
