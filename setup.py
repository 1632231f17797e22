"""Builds `atman_kernels._C` and `._cuda` from csrc/. Everything else about the package is in pyproject.toml.

ATMAN_KERNELS_BUILD names the parts to compile: "cpu", "cuda", "cpu,cuda", or "none" for a package of Python alone. If
it is not set, "cpu" is tried, and where no C++17 compiler works the package installs without the module, as `atman
doctor` will say; if it is set, a failure stops the installation. ATMAN_KERNELS_FLAGS is handed to compiler and linker
(sanitizers). "cuda" needs nvcc (CUDA_HOME, or on the PATH); ATMAN_KERNELS_ARCHS says for which GPUs: "90a" if not set,
"80,90a" and so on. Kernels that need one architecture are compiled for that one only.
"""

import os
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CCompilerError, CompileError

CSRC = Path("csrc")
PARTS = ("cpu", "cuda")
REQUESTED = os.environ.get("ATMAN_KERNELS_BUILD")
EXTRA = shlex.split(os.environ.get("ATMAN_KERNELS_FLAGS", ""))
QUIET = ["-Wno-unused-function", "-Wno-maybe-uninitialized"]  # the latter: of GCC 12's own intrinsics
FLAGS = ["-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-Wall", "-Wextra", *QUIET, *EXTRA]

# The same kernel is compiled once for each of these, and which copy runs is decided at run time.
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
INSTRUCTION_SETS = {
    "plain": [],
    "avx2": AVX2,
    "avx512": AVX512,
    "avx512_bf16": [*AVX512, "-mavx512bf16"],
    "amx": [*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"],
}
# The CUDA part: what runs on every GPU, and what only one architecture has.
ARCHS = [arch.strip() for arch in os.environ.get("ATMAN_KERNELS_ARCHS", "90a").split(",") if arch.strip()]
CUDA_SOURCES = ("plan", "plain", "merge")
INSTANTIATIONS = [f"instantiations/{dtype}_d{dim}" for dtype in ("bf16", "fp16") for dim in (64, 128, 256)]
HOPPER_SOURCES = ("attend", "maps", *INSTANTIATIONS)
X86 = platform.machine().lower() in ("x86_64", "amd64")


def requested_parts() -> list[str]:
    parts = PARTS[:1] if REQUESTED is None else tuple(part for part in REQUESTED.split(",") if part not in ("", "none"))
    for part in parts:
        if part not in PARTS:
            sys.exit(f"ATMAN_KERNELS_BUILD={REQUESTED}: unknown part {part!r}; known: {', '.join(PARTS)}, none")
    return list(parts)


def find_nvcc() -> str:
    home = os.environ.get("CUDA_HOME")
    found = str(Path(home, "bin", "nvcc")) if home else shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    if not Path(found).is_file():
        raise CompileError(f"no nvcc at {found}: set CUDA_HOME, or leave cuda out of ATMAN_KERNELS_BUILD")
    return found


class BuildModule(build_ext):
    def run(self) -> None:
        try:
            super().run()
        except (BaseError, CCompilerError, OSError, ImportError) as error:
            if REQUESTED is not None:
                raise
            print(f"warning: atman_kernels._C was not built, PyTorch's kernels do its work: {error}", file=sys.stderr)
            self.extensions = []

    def build_extension(self, extension: Extension) -> None:
        import pybind11  # at build time only

        target = self.get_ext_fullpath(extension.name)
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        if extension.name.endswith("._cuda"):
            self._build_cuda(target, [pybind11.get_include()])
        else:
            self._build_cpu(target, [pybind11.get_include()])

    def _build_cuda(self, target: str, include: list[str]) -> None:
        for arch in ARCHS:
            if not arch.removesuffix("a").isdigit():
                raise CompileError(f"ATMAN_KERNELS_ARCHS: {arch!r} is no architecture such as 80 or 90a")
        nvcc = find_nvcc()
        macros = [f'-DATMAN_CUDA_ARCHS="{",".join(ARCHS)}"', *(["-DATMAN_HAS_HOPPER"] if "90a" in ARCHS else [])]
        objects = [self._compile_cuda(nvcc, f"cuda/{name}.cu", ARCHS, []) for name in CUDA_SOURCES]
        objects.append(self._compile_cuda(nvcc, "cuda/attention.cu", ARCHS, macros))
        if "90a" in ARCHS:
            objects += [self._compile_cuda(nvcc, f"cuda/hopper/{name}.cu", ["90a"], []) for name in HOPPER_SOURCES]
        objects += [*self._compile("tensor.cpp", []), *self._compile("cuda/call.cpp", [])]
        objects += self._compile("cuda/binding.cpp", [], include)
        # CUDA's runtime goes in whole: the module shares none with torch, and so works beside every build of it.
        link = [nvcc, "-shared", "-cudart", "static", "-Xlinker", "--exclude-libs=ALL", "-o", target, *objects]
        self._call([*link, *(["-Xlinker", "-s"] if not EXTRA else [])])

    def _compile_cuda(self, nvcc: str, source: str, archs: list[str], macros: list[str]) -> str:
        output = Path(self.build_temp, "csrc", source).with_suffix(".o")
        output.parent.mkdir(parents=True, exist_ok=True)
        targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
        flags = ["-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall", *macros, *targets]
        self._call([nvcc, *flags, "-c", str(CSRC / source), "-o", str(output)])
        return str(output)

    def _call(self, command: list[str]) -> None:
        print(shlex.join(command))
        done = subprocess.run(command, check=False)
        if done.returncode != 0:
            raise CompileError(f"{command[0]} failed with status {done.returncode}")

    def _build_cpu(self, target: str, include: list[str]) -> None:
        objects = []
        for source in ("binding.cpp", "tensor.cpp", "cpu/plan.cpp"):
            objects += self._compile(source, [], include)
        # OpenMP's library is not linked: torch has loaded one before this module is imported, and two would keep two
        # pools of threads that wait for each other's cores.
        for source in ("preparation", "attention", "gradients"):
            objects += self._compile(f"cpu/{source}.cpp", ["-fopenmp"] if sys.platform == "linux" else [])
        macros = []
        for name, flags in INSTRUCTION_SETS.items():
            if name != "plain" and not X86:
                continue
            try:
                objects += self._compile(f"cpu/kernel_{name}.cpp", flags)
                macros.append(f"-DATMAN_HAS_{name.upper()}")
            except CompileError:
                print(f"warning: the compiler does not know {name}; that kernel is left out", file=sys.stderr)
                if name == "plain":
                    raise
        objects += self._compile("cpu/instruction_sets.cpp", macros)
        strip = ["-Wl,-s"] if sys.platform == "linux" and not EXTRA else []
        self.compiler.link_shared_object(objects, target, extra_postargs=[*EXTRA, *strip], target_lang="c++")

    def _compile(self, source: str, flags: list[str], include: list[str] | None = None) -> list[str]:
        return self.compiler.compile(
            [str(CSRC / source)],
            output_dir=self.build_temp,
            include_dirs=[*self.compiler.include_dirs, *(include or [])],
            extra_postargs=[*FLAGS, *flags],
        )


MODULES = {"cpu": "atman_kernels._C", "cuda": "atman_kernels._cuda"}
extensions = [Extension(MODULES[part], sources=[]) for part in requested_parts()]
setup(ext_modules=extensions, cmdclass={"build_ext": BuildModule})
