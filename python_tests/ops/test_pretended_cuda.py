"""Tests for GPUs, on a device that is pretended: that they reach their end, and notice what they are there for."""

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
# a few of every kind; each of the suites has been through it as a whole
SELECTED = (
    "(triton or cuda) and not shifted and (window_causal_cached or few_tokens or empty_suffixes) "
    "or triton and 64 and bfloat16 and (two_bases or decoding) or test_values and bfloat16 and 192 "
    "or placement and (shifted and gemma2 or additive and bloom or shared_prefixes or patterns or suppression)"
)
MIXING = """
import torch
from benchmarks.gpu import pretended_cuda

pretended_cuda.install()
here, there = torch.ones(3), torch.ones(3, device="cuda")
for wrong in (lambda: there + here, lambda: here[torch.tensor([0], device="cuda")], lambda: there != here):
    try:
        wrong()
    except RuntimeError as error:
        assert "Expected all tensors to be on the same device" in str(error), error
    else:
        raise AssertionError("two devices met")
assert (there[torch.tensor([0, 2])] + 1 * torch.tensor(2.0)).device.type == "cuda"
assert torch.equal(there.cpu() + here, 2 * here)
assert there.to(torch.float16).is_cuda and not there.to("cpu").is_cuda
"""


def pretend(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=HERE.parents[1], capture_output=True, text=True, check=False)


def test_tests_for_gpus_run_to_their_end() -> None:
    """They compare what a GPU computes with what a CPU does: moving one of the two is easily forgotten."""
    suites = [str(HERE / name) for name in ("test_backends.py", "test_pack.py", "test_real_head_dimensions.py")]
    suites.append(str(HERE.parent / "models" / "test_placement.py"))
    pytest = ["-m", "benchmarks.gpu.pretended_cuda", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu"]
    done = pretend(*pytest, *suites, "-k", SELECTED)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


def test_two_devices_in_one_operation() -> None:
    done = pretend("-c", MIXING)
    assert done.returncode == 0, done.stderr
