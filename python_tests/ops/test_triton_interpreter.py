"""The Triton kernels on a CPU: Triton's interpreter has to be switched on before Triton is imported."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
# Of the shared suites: the short cases with factors per key and per head, in two of the three modes.
SELECTED = (
    "triton and (keys-log_additive or heads-shifted) and not odd_ and not every_prefix and not long_suffixes and "
    "(test_agrees_with_the_formula or test_equals_each_variant_alone)"
)

# Of the backward's tests: dense and packed, each mode, several bases in a tile, keys shared by the batch, one dtype.
BACKWARD = (
    "borders and (causal or shared_keys or bases_in_one_tile or pack_bias_of_keys) or unseen or minimum_is_owed or "
    "tables_are_complete"
)

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


def interpret(*arguments: str) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "not gpu", *arguments]
    done = subprocess.run(command, cwd=HERE.parents[1], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout, done.stdout[-2000:]


def test_kernels() -> None:
    """In one process, which takes longer to start than most of them to run."""
    files = [str(HERE / name) for name in ("test_triton.py", "test_backends.py", "test_pack.py")]
    interpret(*files, "-k", f"test_triton.py or ({SELECTED})")


def test_backward() -> None:
    interpret(str(HERE / "test_triton_backward.py"), "-k", BACKWARD)


@pytest.mark.slow
def test_all_of_the_backward() -> None:
    interpret(str(HERE / "test_triton_backward.py"))


@pytest.mark.slow
@pytest.mark.parametrize("suite", ["test_backends.py", "test_pack.py", "test_op_registration.py", "test_gradients.py"])
def test_everything_shared(suite: str) -> None:
    interpret(str(HERE / suite), "-k", "triton")
