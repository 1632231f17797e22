"""Writes the kernel into a folder, in the layout that the library `kernels` loads.

    python -m kernel_hub build/kernel-hub

The layout is `FOLDER/build/torch-universal/`: the modules of `atman_kernels` up to the ops, `kernel_hub/package` beside
them, and `metadata.json`. A kernel is loaded from any path, under a name of its own, and several versions at once. So
imports become relative, and the ops get a namespace that no other version has: a hash of everything written.
"""

import ast
import hashlib
import json
import re
import sys
from pathlib import Path

import atman_kernels

NAME, VERSION = "suppressed-attention", 1  # a new version number is for changes that callers notice
VARIANT = Path("build") / "torch-universal"
OWN = Path(__file__).parent / "package"
SOURCE = Path(atman_kernels.__file__).parent
NOT_NEEDED = {"backends/triton/offline.py", "backends/triton/tuning.py"}  # for those who tune it


def parts(module: str = "ops") -> set[str]:
    """The modules that the ops stand on, and what these stand on, by their first names; of the compiled ones none."""
    found, waiting = set(), {module}
    while waiting:
        name = waiting.pop()
        found.add(name)
        place = SOURCE / name
        for path in place.rglob("*.py") if place.is_dir() else [place.with_suffix(".py")]:
            code = path.read_text(encoding="utf-8")
            named = re.findall(r"^ *from atman_kernels\.(\w+)", code, flags=re.MULTILINE)
            for line in re.findall(r"^ *from atman_kernels import (.*)", code, flags=re.MULTILINE):
                named += re.findall(r"\w+", line)
            waiting |= {x for x in named if (SOURCE / x).is_dir() or (SOURCE / f"{x}.py").is_file()} - found
    return found


def sources() -> dict[str, str]:
    """Path in the package → text, imports relative; the ops' namespace is still the package's own."""
    found = {path.name: path.read_text(encoding="utf-8") for path in OWN.iterdir() if path.is_file()}
    for part in parts():
        place = SOURCE / part
        for path in place.rglob("*") if place.is_dir() else [place.with_suffix(".py")]:
            name = path.relative_to(SOURCE).as_posix()
            if path.suffix in (".py", ".json") and name not in NOT_NEEDED:
                text = path.read_text(encoding="utf-8")
                found[name] = relative(text, name.count("/")) if path.suffix == ".py" else text
    return dict(sorted(found.items()))


def relative(code: str, depth: int) -> str:
    """The code of a module that lies `depth` folders down, with the package's own imports made relative."""
    dots = "." * (depth + 1)
    code = re.sub(r"^( *)from atman_kernels import ", rf"\1from {dots} import ", code, flags=re.MULTILINE)
    return re.sub(r"^( *)from atman_kernels\.", rf"\1from {dots}", code, flags=re.MULTILINE)


def in_namespace(code: str, namespace: str) -> str:
    """The code with its torch ops under another name."""
    code = code.replace("torch.ops.atman_kernels", f"torch.ops.{namespace}")
    code = code.replace('Library("atman_kernels"', f'Library("{namespace}"')
    return re.sub(r"""(['"])atman_kernels::""", rf"\1{namespace}::", code)


def check(name: str, code: str) -> None:
    """Stops where something would still reach for the installed package or for its ops."""
    for node in ast.walk(ast.parse(code)):
        imported = [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
        imported += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        text = node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""
        if any(str(module).split(".")[0] == "atman_kernels" for module in imported):
            raise SystemExit(f"{name}:{node.lineno} imports the installed package")
        if isinstance(node, ast.Attribute) and node.attr == "atman_kernels":
            raise SystemExit(f"{name}:{node.lineno} calls the installed package's ops")
        if re.match(r"atman_kernels(::|\.\w+$)", text):
            raise SystemExit(f"{name}:{node.lineno} names the installed package: {text}")


def write(folder: Path) -> Path:
    """Writes the kernel below `folder`; returns the folder of its build variant."""
    files = sources()
    digest = hashlib.sha256("".join(f"{name}\0{text}\0" for name, text in files.items()).encode()).hexdigest()[:12]
    identity = f"{NAME.replace('-', '_')}_{digest}"
    target = folder / VARIANT
    for name, text in files.items():
        if name.endswith(".py"):
            text = in_namespace(text, identity)
            check(name, text)
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_text(text, encoding="utf-8")
    metadata = {
        "id": identity,
        "name": NAME,
        "version": VERSION,
        "license": "Apache-2.0",
        "kernels-minver": "0.17.0",
        "python-depends": [],
        "backend": {"type": "cuda"},  # what it is for; without a GPU it runs on PyTorch
    }
    (target / "metadata.json").write_text(json.dumps(metadata, indent=1) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(card(), encoding="utf-8")
    return target


def card() -> str:
    """What the hub shows: the package's own words, and how to load it."""
    words = ast.get_docstring(ast.parse((OWN / "__init__.py").read_text(encoding="utf-8")))
    return f"""---
library_name: kernels
license: apache-2.0
---

# {NAME}

{words}

Of atman-kernels {atman_kernels.__version__}, Apache-2.0.

```python
from kernels import get_kernel

kernel = get_kernel("OWNER/{NAME}", version={VERSION})
output = kernel.suppressed_attention(query, key, value, factor, is_causal=True)

model.set_attn_implementation(kernel.register())
with kernel.suppress(model, factor):
    logits = model(**inputs).logits
```
"""


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m kernel_hub FOLDER")
    print(f"wrote {write(Path(sys.argv[1]))}")
