"""What is compiled where there is time for it, and carried to a GPU where there is little: one archive.

    make gpu-bundle                            # or, with the Python, torch and Triton of the GPU machine:
    python -m benchmarks.gpu.bundle make
    python -m benchmarks.gpu.bundle check      # whether it is as new as the kernels

It holds the CUDA module, the ladder, Triton's kernels of everything in the plan, and which sources they were made of.
`benchmarks.gpu_check` unpacks it, and leaves out what is older than its sources.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.machine import PROVENANCE, REPOSITORY, commit, hashes, sources

ARCHIVE = REPOSITORY / "build" / "gpu-bundle.tar.gz"
PLACE = PROVENANCE.parent  # where it is unpacked
MOST_BYTES = 40 << 20
NEWEST_GLIBC = (2, 34)  # of the machine it is for
CACHE_MARK = "<cache>"  # in place of the folder that Triton writes down in its cache
KEPT = (".json", ".cubin")  # of a kernel: what Triton looks at when it finds one compiled
PART_SOURCES = {"kernels": "triton", "module": "cuda", "ladder": "cuda"}  # part -> name in `sources()`
LADDER_SOURCES = ("ladder.cu", "plan.cu", "plain.cu", "merge.cu", "hopper/maps.cu")


@dataclass(frozen=True)
class Unpacked:
    """What of a bundle can be used here, and why not the rest."""

    parts: tuple[str, ...] = ()
    objections: tuple[str, ...] = ()
    variables: dict[str, str] = field(default_factory=dict)
    made_from: dict[str, Any] | None = None

    def record(self) -> dict[str, Any]:
        return {"parts": self.parts, "objections": self.objections, "made_from": self.made_from}


# Unpacking -------------------------------------------------------------------------------------------------------


def unpack(archive: Path, place: Path = PLACE, package: Path = REPOSITORY / "atman_kernels") -> Unpacked:
    """Put everything where programs look for it; kernels and modules of other sources or versions stay away."""
    if not archive.is_file():
        return Unpacked(objections=(f"there is no {archive.name}: kernels are compiled when they are first called",))
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    with tarfile.open(archive) as tar:
        tar.extractall(place, filter="data")
    made = json.loads((place / PROVENANCE.name).read_text(encoding="utf-8"))
    objections, parts = [], []
    for part, reason in unusable(made).items():
        if reason is not None:
            objections.append(f"{part} left out: {reason}")
        else:
            parts.append(part)
    variables = {}
    if "kernels" in parts:
        cache = place / "triton-cache"
        for group in cache.glob("*/__grp__*.json"):
            group.write_text(group.read_text(encoding="utf-8").replace(CACHE_MARK, str(cache)), encoding="utf-8")
        variables["TRITON_CACHE_DIR"] = str(cache)
    if "module" in parts:
        for module in place.glob("_cuda.*.so"):
            shutil.copy2(module, package / module.name)
    return Unpacked(tuple(parts), tuple(objections), variables, made)


def unusable(made: dict[str, Any]) -> dict[str, str | None]:
    """Part -> why it is of no use here, or None."""
    now = sources()
    reasons: dict[str, str | None] = {}
    for part, source in PART_SOURCES.items():
        reasons[part] = None
        if made["sources"][source] != now[source]:
            reasons[part] = f"it is older than the {source} sources; make gpu-bundle makes it anew"
    if reasons["module"] is None and made["python"] != sysconfig.get_config_var("EXT_SUFFIX"):
        reasons["module"] = f"it is for {made['python']}, not for {sysconfig.get_config_var('EXT_SUFFIX')}"
    if reasons["kernels"] is None and made["triton"] != version("triton"):
        reasons["kernels"] = f"they are Triton {made['triton']}'s, and here is {version('triton')}"
    return reasons


def cached_kernels(environment: dict[str, str]) -> int:
    """How many kernels lie in Triton's cache."""
    place = environment.get("TRITON_CACHE_DIR") or str(Path.home() / ".triton" / "cache")
    return sum(1 for _ in Path(place).glob("*/__grp__*.json"))


# Making ----------------------------------------------------------------------------------------------------------


def make(archive: Path, jobs: int) -> None:
    """Build everything with the Python that runs this, and put it into an archive."""
    archive.parent.mkdir(parents=True, exist_ok=True)
    made_from = sources()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        print("compiling the CUDA module and the ladder", flush=True)
        build_module(folder)
        build_ladder(folder / "ladder")
        cache = folder / "triton-cache"
        compile_kernels(cache, jobs)
        kernels = slim(cache)
        if hashes() != made_from:
            sys.exit("the sources have changed meanwhile: once more")
        made = {
            "commit": commit(),
            "sources": made_from,
            "python": sysconfig.get_config_var("EXT_SUFFIX"),
            "triton": version("triton"),
            "torch": version("torch"),
            "kernels": kernels,
        }
        (folder / PROVENANCE.name).write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
        write_archive(
            archive, folder, (PROVENANCE.name, *(p.name for p in folder.glob("_cuda*")), "ladder", cache.name)
        )
    size = archive.stat().st_size
    print(f"{archive}: {size / 1e6:.1f} MB, {kernels} kernels of Triton {made['triton']}, commit {made['commit']}")
    if size > MOST_BYTES:
        sys.exit(f"the bundle has {size / 1e6:.1f} MB, more than {MOST_BYTES / 1e6:.0f}")


def build_module(folder: Path) -> None:
    """`atman_kernels._cuda` for this Python, in a folder of its own."""
    environment = {**os.environ, "ATMAN_KERNELS_BUILD": "cuda"}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(folder / "lib"),
               "--build-temp", str(folder / "objects")]  # fmt: skip
    subprocess.run(command, cwd=REPOSITORY, env=environment, check=True, stdout=subprocess.DEVNULL)
    (module,) = (folder / "lib" / "atman_kernels").glob("_cuda.*.so")
    wanted = glibc(module)
    if wanted > NEWEST_GLIBC:
        sys.exit(f"{module.name} wants glibc {wanted}, newer than {NEWEST_GLIBC}")
    shutil.move(module, folder / module.name)


def build_ladder(target: Path) -> None:
    """The ladder's program, see benchmarks/ladder."""
    cuda = REPOSITORY / "csrc" / "cuda"
    first = REPOSITORY / "benchmarks" / "ladder" / LADDER_SOURCES[0]
    files = [str(first), *(str(cuda / name) for name in LADDER_SOURCES[1:])]
    arch = "-gencode=arch=compute_90a,code=sm_90a"
    subprocess.run([_nvcc(), "-std=c++17", "-O3", "-w", arch, "-o", str(target), *files], cwd=first.parent, check=True)
    if glibc(target) > NEWEST_GLIBC:
        sys.exit(f"the ladder wants glibc {glibc(target)}, newer than {NEWEST_GLIBC}")


def _nvcc() -> str:
    home = os.environ.get("CUDA_HOME")
    return str(Path(home, "bin", "nvcc")) if home else shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"


def glibc(binary: Path) -> tuple[int, ...]:
    """The newest version of glibc that a program or library asks for."""
    found = re.findall(rb"GLIBC_(\d+)\.(\d+)", binary.read_bytes())
    return max((int(major), int(minor)) for major, minor in found)


def compile_kernels(cache: Path, jobs: int) -> None:
    """Triton's kernels of the plan, by several processes at once."""
    cache.mkdir(parents=True)
    environment = {**os.environ, "TRITON_CACHE_DIR": str(cache)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "benchmarks.gpu.precompile"]
    parts = [
        subprocess.Popen([*command, "--part", f"{i}/{jobs}"], cwd=REPOSITORY, env=environment) for i in range(jobs)
    ]
    codes = [part.wait() for part in parts]  # every one of them, before any is judged
    if any(codes):
        sys.exit("not all kernels could be compiled")


def slim(cache: Path) -> int:
    """Leave of each kernel what is looked at when it is found compiled, under a path that holds anywhere."""
    groups = 0
    for path in [*cache.rglob("*")]:
        if path.is_file() and path.suffix not in KEPT:
            path.unlink()
    for group in cache.glob("*/__grp__*.json"):
        group.write_text(group.read_text(encoding="utf-8").replace(str(cache), CACHE_MARK), encoding="utf-8")
        groups += 1
    return groups


def write_archive(archive: Path, folder: Path, names: Iterable[str]) -> None:
    partial = archive.with_name(archive.name + ".partial")
    with tarfile.open(partial, "w:gz") as tar:
        for name in names:
            tar.add(folder / name, arcname=name)
    os.replace(partial, archive)


def digest(archive: Path) -> str:
    return hashlib.sha256(archive.read_bytes()).hexdigest()


def check(archive: Path) -> int:
    """Say what of an archive could be used with the sources as they are."""
    if not archive.is_file():
        print(f"there is no {archive}; make gpu-bundle makes it")
        return 1
    with tarfile.open(archive) as tar:
        member = tar.extractfile(PROVENANCE.name)
        assert member is not None
        made = json.load(member)
    now = sources()
    old = [part for part, source in PART_SOURCES.items() if made["sources"][source] != now[source]]
    print(f"{archive.stat().st_size / 1e6:.1f} MB, sha256 {digest(archive)[:16]}, {json.dumps(made)}")
    print("older than their sources: " + ", ".join(old) if old else "as new as its sources")
    return 1 if old else 0


def run_ladder(program: Path) -> int:
    """Every step of benchmarks/ladder at its default shape and in decoding; 2 where there is none to run."""
    if not program.is_file():
        print("the ladder was not unpacked: it comes with a bundle that is as new as its sources")
        return 2
    codes = [
        subprocess.run([program, *shape], check=False).returncode for shape in ((), ("1", "1", "65536", "32", "8"))
    ]
    return 1 if any(codes) else 0


def main() -> int:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.gpu.bundle", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=("make", "check", "ladder"), help="ladder: run the one that was unpacked")
    parser.add_argument("--archive", type=Path, default=ARCHIVE)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    if options.action == "ladder":
        return run_ladder(PLACE / "ladder")
    if options.action == "check":
        return check(options.archive)
    make(options.archive, options.jobs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
