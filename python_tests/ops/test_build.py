"""Building and installing: source archive, wheel, what happens without a compiler, and what is in the machine code.

Packages are built from a copy of the sources, in this environment (which needs setuptools and pybind11), and imported
from a directory of their own.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
FOLDERS = ("atman_kernels", "csrc", "python_tests", "docs", "benchmarks", "examples", "kernel_hub", ".ci", ".github")
FILES = (
    "setup.py",
    "pyproject.toml",
    "MANIFEST.in",
    "README.md",
    "LICENSE",
    "Makefile",
    "CHANGELOG.md",
    "CITATION.cff",
)
FILES += ("CODE_OF_CONDUCT.md", "CONTRIBUTING.md", "SECURITY.md", "constraints.txt", "constraints-oldest.txt")
FILES += ("mkdocs.yml", ".gitignore", ".pre-commit-config.yaml")
INSTRUCTIONS = {  # kernel: what it must contain, and what it must not
    "plain": (r"\bmulps\b|\bfmul\b", r"%[yz]mm|\bv[a-z]+[ps][sd]\b"),
    "avx2": (r"\bvfmadd\d+ps\b.*%ymm", r"%zmm|%k[1-7]\b"),
    "avx512": (r"\bvfmadd\d+ps\b.*%zmm", r"\bvdpbf16ps\b|\btdpbf16ps\b"),
    "avx512_bf16": (r"\bvdpbf16ps\b.*%zmm", r"\btdpbf16ps\b"),
    "amx": (r"\btdpbf16ps\b", r"^$"),
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (REPOSITORY / "csrc").is_dir(), reason="these tests are not run from a checkout"),
]


def run(*command: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    settings = {k: v for k, v in os.environ.items() if not k.startswith("ATMAN_") and k not in ("CC", "CXX")}
    return subprocess.run(command, cwd=cwd, env=settings | environment, capture_output=True, text=True, timeout=300)


def wheel_of(source: Path, out: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    pytest.importorskip("pybind11")
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check")
    return run(sys.executable, "-m", "pip", "wheel", *options, "-w", out, source, cwd=source, **environment)


def only(folder: Path, pattern: str) -> Path:
    (found,) = folder.glob(pattern)
    return found


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    return copy_sources(tmp_path / "sources")


def copy_sources(to: Path) -> Path:
    to.mkdir()
    for name in (*FOLDERS, *FILES):
        if (REPOSITORY / name).is_dir():
            shutil.copytree(REPOSITORY / name, to / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
        else:
            shutil.copy(REPOSITORY / name, to / name)
    return to


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with sdist/, the archive's contents in unpacked/, and a wheel built from these in wheel/."""
    pytest.importorskip("pybind11")
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        pytest.skip("there is no C++ compiler here")
    folder = tmp_path_factory.mktemp("build")
    source = copy_sources(folder / "sources")
    (folder / "sdist").mkdir()
    code = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    made = run(sys.executable, "-c", code, folder / "sdist", cwd=source)
    assert made.returncode == 0, made.stderr
    with tarfile.open(only(folder / "sdist", "*.tar.gz")) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    started = time.monotonic()
    result = wheel_of(only(folder / "unpacked", "*"), folder / "wheel", ATMAN_KERNELS_BUILD="cpu")
    assert result.returncode == 0, result.stderr
    assert time.monotonic() - started < 120, "building takes two minutes at most, on two cores"
    return folder


# An editable install would lend its compiled module to a package that has none.
ALONE = """
import sys
sys.meta_path[:] = [x for x in sys.meta_path if "__editable__" not in getattr(x, "__module__", "")]
"""


def doctor(package: Path) -> dict:
    """What the command line says of a package that lies in a folder."""
    code = ALONE + "from atman_kernels.cli import main; sys.argv = ['atman', 'doctor', '--json']; main()"
    result = run(sys.executable, "-P", "-c", code, cwd=package, PYTHONPATH=str(package))
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def unpacked(wheel: Path, to: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(to)
    return to


# --- archive and wheel ---


def test_the_archive_has_all_sources_and_nothing_else(built: Path) -> None:
    root = only(built / "unpacked", "*")
    with tarfile.open(only(built / "sdist", "*.tar.gz")) as archive:
        names = {Path(member.name).relative_to(root.name).as_posix() for member in archive if member.isfile()}
    for folder in FOLDERS:
        files = (x.relative_to(REPOSITORY).as_posix() for x in (REPOSITORY / folder).rglob("*") if x.is_file())
        assert {x for x in files if not x.endswith((".so", ".pyc", ".log"))} <= names
    tops = {name.partition("/")[0] for name in names}
    assert tops == {*FOLDERS, *FILES, "PKG-INFO", "setup.cfg", "atman_kernels.egg-info"}


def test_the_wheel_has_the_package_and_nothing_else(built: Path) -> None:
    wheel = only(built / "wheel", "*.whl")
    assert wheel.stat().st_size <= 5 << 20
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"atman_kernels"}
    assert sum(bool(re.fullmatch(r"atman_kernels/_C\..*\.so", name)) for name in names) == 1
    assert {"atman_kernels/py.typed", "atman_kernels/_C.pyi", "atman_kernels/assets/demo.json"} <= set(names)
    assert not [name for name in names if name.endswith((".cpp", ".h", ".o"))]


def test_the_wheel_works(built: Path, tmp_path: Path) -> None:
    package = unpacked(only(built / "wheel", "*.whl"), tmp_path / "package")
    found = doctor(package)
    assert found["compiled_module"] is None
    assert found["cpu_kernels"][-2:] == ["plain", "torch"]
    code = """
import torch, atman_kernels as ak
from atman_kernels import _C
print(_C.__file__)
q, k, v = torch.ones(1, 2, 3, 8), torch.randn(1, 1, 5, 8), torch.randn(1, 1, 5, 8)
ours, other = (ak.suppressed_attention(q, k, v, torch.rand(1, 5), backend=b) for b in ("cpu:plain", "cpu"))
assert ours.isfinite().all()
"""
    result = run(sys.executable, "-P", "-c", code, cwd=tmp_path, PYTHONPATH=str(package))
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(str(package))


# --- without a compiler, and what ATMAN_KERNELS_BUILD says ---


def test_without_a_compiler_the_package_installs_and_says_what_is_missing(sources: Path, tmp_path: Path) -> None:
    result = wheel_of(sources, tmp_path / "wheel", CC="false", CXX="false")
    assert result.returncode == 0, result.stderr
    found = doctor(unpacked(only(tmp_path / "wheel", "*.whl"), tmp_path / "package"))
    assert "no C++17 compiler" in found["compiled_module"]
    assert found["cpu_kernels"] == ["torch"]


def test_none_leaves_the_module_out(sources: Path, tmp_path: Path) -> None:
    result = wheel_of(sources, tmp_path / "wheel", ATMAN_KERNELS_BUILD="none")
    assert result.returncode == 0, result.stderr
    assert only(tmp_path / "wheel", "*.whl").name.endswith("py3-none-any.whl")


BROKEN = {"ATMAN_KERNELS_BUILD": "cpu", "CC": "false", "CXX": "false"}
FAILED = r".*(exit code|exit status) 1"


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (BROKEN, f"error:.*false{FAILED}"),
        ({"ATMAN_KERNELS_BUILD": "gpu"}, "unknown part 'gpu'; known: cpu, cuda, none"),
        ({"ATMAN_KERNELS_BUILD": "cpu,metal"}, "unknown part 'metal'"),
        ({"ATMAN_KERNELS_BUILD": "cpu", "ATMAN_KERNELS_FLAGS": "-fno-such-flag"}, f"error:.*-fno-such-flag{FAILED}"),
    ],
)
def test_what_was_asked_for_and_cannot_be_built_stops(
    environment: dict[str, str], message: str, sources: Path, tmp_path: Path
) -> None:
    result = wheel_of(sources, tmp_path / "wheel", **environment)
    assert result.returncode != 0
    assert re.search(message, result.stdout + result.stderr)
    assert not list(tmp_path.glob("wheel/*.whl"))


# --- machine code ---


def objects(built: Path) -> dict[str, Path]:
    if shutil.which("objdump") is None:
        pytest.skip("there is no objdump here")
    found = {x.stem: x for x in (built / "unpacked").rglob("*.o")}
    assert {"binding", "attention", "kernel_plain"} <= set(found)
    return found


def disassembled(file: Path) -> list[str]:
    result = run("objdump", "-dr", "--no-show-raw-insn", file, cwd=file.parent)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_a_kernel_has_the_instructions_of_its_name(name: str, built: Path) -> None:
    file = objects(built).get(f"kernel_{name}")
    if file is None:
        pytest.skip(f"the compiler or the processor does not know {name}")
    wanted, forbidden = INSTRUCTIONS[name]
    lines = disassembled(file)
    assert any(re.search(wanted, line) for line in lines)
    assert [line for line in lines if re.search(forbidden, line) and "%" in line] == []


def test_code_that_every_processor_runs_has_no_wide_vectors(built: Path) -> None:
    """A function compiled for one instruction set and shared by the linker would be found by all."""
    for name, file in objects(built).items():
        if not name.startswith("kernel_"):
            assert [line for line in disassembled(file) if re.search(r"%[yz]mm|%xmm(1[6-9]|[23]\d)", line)] == [], name
            continue
        symbols = run("nm", "-C", "--defined-only", "--extern-only", file, cwd=file.parent).stdout.splitlines()
        assert [line.split()[-1] for line in symbols] == [f"atman::cpu::{name.removeprefix('kernel_')}::kernel"]


def test_amx_is_configured_from_a_constant(built: Path) -> None:
    """Eight registers of 16 rows of 64 bytes. Stores to a local variable might be dropped, see csrc/cpu/tiles.h."""
    file = objects(built).get("kernel_amx")
    if file is None:
        pytest.skip("the compiler or the processor does not know AMX")
    lines = disassembled(file)
    assert any(re.search(r"\btileloadd\b", line) for line in lines)
    assert any(re.search(r"\btilestored\b", line) for line in lines)
    assert any(re.search(r"\btilerelease\b", line) for line in lines)
    loads = [line for line in lines if re.search(r"\bldtilecfg\b", line)]
    assert loads
    assert all("(%rip)" in line for line in loads)
    config = bytes([1]) + bytes(15) + b"\x40\x00" * 8 + bytes(16) + bytes([16] * 8) + bytes(8)
    assert config in file.read_bytes()
