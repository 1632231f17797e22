"""What users install, tried in environments of their own.

    python .ci/environments.py wheel     source archive, a wheel built from it, the same without a compiler; each of
                                         the wheels installed into an empty environment, and tried
    python .ci/environments.py extras    each extra of a built wheel installed alone, and what it promises imported

Archive and wheels go to dist/. torch comes from pip's index, or from the environment's TORCH_INDEX.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DIST = ROOT / "dist"
PINS = ROOT / "constraints.txt"
PROMISES = {  # extra: what can be done with it
    "bench": "import captum, inseq, pytest_benchmark, scipy",
    "captum": "from atman_kernels.adapters.captum import AtManAttribution",
    "dev": "import httpx, hypothesis, mypy, pre_commit, pybind11, pytest, build",
    "docs": "import mkdocs, material, mkdocstrings_handlers.python",
    "evaluation": "import scipy; from atman_kernels.evaluation.metrics import interquartile_mean",
    "gguf": "import gguf, accelerate",
    "hub": "import kernels",
    "images": "from atman_kernels.result.overlay import overlay",
    "inseq": "from atman_kernels.adapters.inseq import AtManAttribution",
    "lasso": "from sklearn.linear_model import Lasso",
    "loading": "import accelerate, bitsandbytes, optimum.quanto, peft, torchao",
    "notebooks": "import jupytext, nbclient, ipykernel, ipywidgets, matplotlib",
    "plots": "from atman_kernels import plots",
    "ray": "import ray, pyarrow.parquet; from atman_kernels.scale import Pool, explain_dataset",
    "serve": "from atman_kernels.serve.app import create_app",
    "triton": "import triton",
}


def run(*command: str | Path, cwd: Path = ROOT, **settings: str) -> None:
    print("$", *command, flush=True)
    done = subprocess.run(command, cwd=cwd, env={**os.environ, **settings}, check=False)
    if done.returncode:
        sys.exit(f"{Path(command[0]).name} ended with {done.returncode}")


def build() -> list[Path]:
    """The source archive, and from it a compiled wheel and a pure one."""
    shutil.rmtree(DIST, ignore_errors=True)
    run(sys.executable, "-m", "build", "--no-isolation", "--sdist", "--outdir", DIST, ROOT)
    (archive,) = DIST.glob("*.tar.gz")
    wheels = []
    for parts in ("cpu", "none"):
        with tempfile.TemporaryDirectory() as folder:
            shutil.unpack_archive(archive, folder, filter="data")
            (source,) = Path(folder).iterdir()
            run(
                sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", DIST, source,
                ATMAN_KERNELS_BUILD=parts,
            )  # fmt: skip
        wheels.append(max(DIST.glob("*.whl"), key=lambda wheel: wheel.stat().st_mtime))
    return wheels


@contextmanager
def environment() -> Iterator[Path]:
    """The python of an empty environment."""
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        yield Path(folder, "bin", "python")


def install(python: Path, *what: str | Path) -> None:
    run(python, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--constraint", PINS, *what)


def install_torch(python: Path) -> None:
    index = os.environ.get("TORCH_INDEX")
    install(python, "torch", *(["--index-url", index] if index else []))


def site_packages(python: Path) -> str:
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def wheel() -> None:
    compiled, pure = build()
    with environment() as python:
        install_torch(python)
        for built, kind in ((compiled, "--compiled"), (pure, "--pure")):
            install(python, "--force-reinstall", "--no-deps", built) if kind == "--pure" else install(python, built)
            run(python, "-P", ROOT / ".ci" / "smoke.py", kind, cwd=python.parent)


def extras() -> None:
    wheels = [*DIST.glob("*-cp3*.whl")] or build()[:1]
    metadata = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    listed = sorted(metadata["project"]["optional-dependencies"])
    if listed != sorted(PROMISES):
        sys.exit(f"extras are {listed}, but what they promise is known of {sorted(PROMISES)}")
    with environment() as base:
        install_torch(base)
        install(base, wheels[0])
        for extra in listed:
            with environment() as python:  # on top of the package, nothing but this extra
                Path(site_packages(python), "base.pth").write_text(site_packages(base) + "\n", encoding="utf-8")
                install(python, f"atman-kernels[{extra}] @ {wheels[0].as_uri()}")
                run(python, "-P", "-c", PROMISES[extra], cwd=python.parent)
                print(f"extra {extra}: fine", flush=True)


if __name__ == "__main__":
    tasks = {"wheel": wheel, "extras": extras}
    if len(sys.argv) != 2 or sys.argv[1] not in tasks:
        sys.exit(__doc__)
    tasks[sys.argv[1]]()
