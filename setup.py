"""Builds `atman_kernels._C` from csrc/. Everything else about the package is in pyproject.toml.

ATMAN_KERNELS_BUILD names the parts to compile: "cpu", or "none" for a package of Python alone. If it is not set, all
parts are tried, and where no C++17 compiler works the package installs without the module, as `atman doctor` will say;
if it is set, a failure stops the installation. ATMAN_KERNELS_FLAGS is handed to compiler and linker (sanitizers).
"""

import os
import platform
import shlex
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CCompilerError, CompileError

CSRC = Path("csrc")
PARTS = ("cpu",)
REQUESTED = os.environ.get("ATMAN_KERNELS_BUILD")
EXTRA = shlex.split(os.environ.get("ATMAN_KERNELS_FLAGS", ""))
FLAGS = ["-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unused-function", *EXTRA]

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
X86 = platform.machine().lower() in ("x86_64", "amd64")


def requested_parts() -> list[str]:
    parts = PARTS if REQUESTED is None else tuple(part for part in REQUESTED.split(",") if part not in ("", "none"))
    for part in parts:
        if part not in PARTS:
            sys.exit(f"ATMAN_KERNELS_BUILD={REQUESTED}: unknown part {part!r}; known: {', '.join(PARTS)}, none")
    return list(parts)


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

        include = [pybind11.get_include()]
        objects = []
        for source in ("binding.cpp", "tensor.cpp", "cpu/plan.cpp"):
            objects += self._compile(source, [], include)
        # OpenMP's library is not linked: torch has loaded one before this module is imported, and two would keep two
        # pools of threads that wait for each other's cores.
        objects += self._compile("cpu/attention.cpp", ["-fopenmp"] if sys.platform == "linux" else [])
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
        target = self.get_ext_fullpath(extension.name)
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        strip = ["-Wl,-s"] if sys.platform == "linux" and not EXTRA else []
        self.compiler.link_shared_object(objects, target, extra_postargs=[*EXTRA, *strip], target_lang="c++")

    def _compile(self, source: str, flags: list[str], include: list[str] | None = None) -> list[str]:
        return self.compiler.compile(
            [str(CSRC / source)],
            output_dir=self.build_temp,
            include_dirs=[*self.compiler.include_dirs, *(include or [])],
            extra_postargs=[*FLAGS, *flags],
        )


extensions = [Extension("atman_kernels._C", sources=[])] if requested_parts() else []
setup(ext_modules=extensions, cmdclass={"build_ext": BuildModule})
