"""A CUDA device that is not there: tensors "on it" lie in the CPU's memory, and what would fail on a real one fails.

    python -m benchmarks.gpu.pretended_cuda benchmarks.gpu.small_shapes triton     # any module, with its arguments

What it is for: to see that code meant for a GPU reaches its end. Tensors of two devices in one operation raise as CUDA
has them do; our ops compute with the reference backend; Triton's kernels are launched and do nothing; clocks, names and
memory are an H100's. It says nothing about kernels, nor about time.
"""

import atexit
import contextlib
import ctypes
import runpy
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

aten = torch.ops.aten
DEVICE = torch.device("cuda", 0)
PROPERTIES = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3 (pretended)",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=80 << 30,
    L2_cache_size=50 << 20,
    uuid="GPU-0",
    warp_size=32,
    gcnArchName="",
)
RECORDS = torch._C.DispatchKeySet(torch._C.DispatchKey.AutogradCPU) | torch._C.DispatchKeySet(
    torch._C.DispatchKey.ADInplaceOrView
)
_grad = torch.autograd.grad
MOVES = (aten.copy_.default, aten._to_copy.default)
INDEXED = ("aten.index.", "aten.index_put", "aten._index_put", "aten._unsafe_index")  # by indices that may be anywhere


class Pretended(torch.Tensor):
    """A tensor that calls itself a CUDA tensor; `held` is where its numbers are."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> "Pretended":
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            layout=held.layout,
            device=DEVICE,
            requires_grad=False,
        )
        made.held = held
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return _compute(func, args, kwargs or {})

    # A list of indices becomes a tensor on the device in C++, where there is none.
    def __getitem__(self, index: Any) -> torch.Tensor:
        return torch.Tensor.__getitem__(self, _tensors_for_lists(index))

    def __setitem__(self, index: Any, value: Any) -> None:
        torch.Tensor.__setitem__(self, _tensors_for_lists(index), value)

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        copied: torch.Tensor = Pretended(self.held.clone())
        if isinstance(self, torch.nn.Parameter) or getattr(self, "_is_param", False):
            copied = torch.nn.Parameter(copied, requires_grad=False)
        memo[id(self)] = copied
        return copied

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"pretended CUDA {self.held!r}"


class _Everywhere(TorchDispatchMode):
    """Sees operations that make a tensor on the device out of none."""

    def __init__(self) -> None:
        super().__init__()
        self._mode_key = torch._C._TorchDispatchModeKey.FAKE  # below the modes that tests bring

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(func, args, kwargs or {})


def _compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    given, _ = tree_flatten((args, kwargs))
    on_device = [t for t in given if isinstance(t, Pretended)]
    elsewhere = [t for t in given if isinstance(t, torch.Tensor) and not isinstance(t, Pretended)]
    name = str(func)
    if on_device and func not in MOVES:
        indexed = name.startswith(INDEXED)
        mixed = not isinstance(args[0], Pretended) if indexed else any(t.ndim > 0 for t in elsewhere)  # numbers may mix
        if mixed:
            raise RuntimeError(f"Expected all tensors to be on the same device, but found cuda:0 and cpu: {name}")
    args, kwargs = tree_map(lambda x: x.held if isinstance(x, Pretended) else x, (list(args), dict(kwargs)))
    stays = bool(on_device)
    if kwargs.get("device") is not None:
        stays = torch.device(kwargs["device"]).type == "cuda"
        kwargs["device"] = torch.device("cpu")
    elif func is aten.copy_.default:
        stays = isinstance(given[0], Pretended)
    if kwargs.get("pin_memory"):
        kwargs["pin_memory"] = False
    is_ours = name.startswith("atman_kernels.")
    # An op's own forward is run with gradients switched off.
    records = torch.is_grad_enabled() or (is_ours and any(t.held.requires_grad for t in on_device))
    with _recording() if on_device or is_ours else contextlib.nullcontext(), torch.set_grad_enabled(records):
        result = _ours(func, args) if is_ours and on_device else func(*args, **kwargs)
    known = {id(t.held): t for t in on_device}

    def placed(value: Any) -> Any:
        if not stays or not _plain(value):
            return value
        return known[id(value)] if id(value) in known else Pretended(value)

    return tree_map(placed, result)


@contextlib.contextmanager
def _recording() -> Iterator[None]:
    """Operations on what tensors hold are recorded where gradients are wanted: there is no engine for the device."""
    include, exclude = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    with torch._C._ForceDispatchKeyGuard(include, exclude - RECORDS):
        yield


def _gradients(outputs: Any, inputs: Any, grad_outputs: Any = None, **options: Any) -> tuple[Any, ...]:
    """`torch.autograd.grad` through what the tensors hold."""
    given, _ = tree_flatten((outputs, inputs, grad_outputs))
    held = tree_map(lambda x: x.held if isinstance(x, Pretended) else x, (outputs, inputs, grad_outputs))
    found = _grad(*held, **options)
    if not any(isinstance(x, Pretended) for x in given):
        return found
    return tuple(Pretended(x) if _plain(x) else x for x in found)


def by_reference(func: Any, arguments: list[Any]) -> Any:
    """How our ops compute unless `install` is told otherwise."""
    place = [argument.name for argument in func._schema.arguments].index("backend")
    return func(*arguments[:place], "reference", *arguments[place + 1 :])


_ours: Callable[[Any, list[Any]], Any] = by_reference


def _plain(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and not isinstance(value, Pretended)


def _tensors_for_lists(index: Any) -> Any:
    if isinstance(index, tuple):
        return tuple(torch.tensor(part) if isinstance(part, list) else part for part in index)
    return torch.tensor(index) if isinstance(index, list) else index


class _Event:
    """A CUDA event by the host's clock."""

    def __init__(self, **_: Any) -> None:
        self.at = 0.0

    def record(self, stream: Any = None) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, later: "_Event") -> float:
        return max(1e-4, (later.at - self.at) * 1e3)

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True


class _Graph:
    """Does nothing when it is replayed: what was captured has run once."""

    def replay(self) -> None:
        pass

    def reset(self) -> None:
        pass


class _NoGrad(torch.no_grad):
    """Stands for inference_mode, in which wrapped tensors cannot be made."""

    def __init__(self, mode: bool = True) -> None:
        super().__init__()


@contextlib.contextmanager
def _block(*_: Any, **__: Any) -> Iterator[None]:
    yield


def _constant(value: Any) -> Callable[..., Any]:
    return lambda *_, **__: value


CUDA: dict[str, Any] = {
    "is_available": _constant(True),
    "is_initialized": _constant(True),
    "is_bf16_supported": _constant(True),
    "device_count": _constant(1),
    "current_device": _constant(0),
    "current_stream": _constant(SimpleNamespace(cuda_stream=0)),
    "get_device_capability": _constant((9, 0)),
    "get_device_properties": _constant(PROPERTIES),
    "get_device_name": _constant(PROPERTIES.name),
    "mem_get_info": _constant((70 << 30, 80 << 30)),
    "memory_allocated": _constant(0),
    "max_memory_allocated": _constant(1),
    "device": _block,
    "graph": _block,
    "Event": _Event,
    "CUDAGraph": _Graph,
}
for _name in ("init", "_lazy_init", "synchronize", "empty_cache", "reset_peak_memory_stats", "manual_seed_all"):
    CUDA[_name] = _constant(None)
for _name in ("_sleep", "set_sync_debug_mode"):
    CUDA[_name] = _constant(None)


def install(ours: Callable[[Any, list[Any]], Any] = by_reference) -> None:
    """From here on this process, and none that it starts, has a CUDA device. `ours` computes our ops."""
    global _ours
    _ours = ours
    torch.version.cuda = torch.version.cuda or "13.0"
    torch.inference_mode = _NoGrad  # type: ignore[misc, assignment]
    for name, stand_in in CUDA.items():
        setattr(torch.cuda, name, stand_in)
    _guard_devices()
    _patch_tensors()
    mode = _Everywhere()
    mode.__enter__()
    _patch_backends()


def _guard_devices() -> None:
    """Switching to the device becomes a step that does nothing.

    A build of torch with CUDA has such a switch for machines without a GPU; one without CUDA has none at all, and there
    the CPU's is entered in C++'s table of switches as CUDA's.
    """
    torch._C._ensureCUDADeviceGuardSet()
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    table = (ctypes.c_void_p * 2).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")  # the CPU's, CUDA's
    if not table[1]:
        table[1] = table[0]


def _patch_tensors() -> None:
    """What C++ would ask the device for before any operation is dispatched."""
    tolist, data_ptr, to = torch.Tensor.tolist, torch.Tensor.data_ptr, torch.Tensor.to
    make, generator, requires = torch.tensor, torch.Generator, torch.Tensor.requires_grad_

    def held(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.held if isinstance(tensor, Pretended) else tensor

    def moved(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        device, dtype, other = (kwargs.get(name) for name in ("device", "dtype", "other"))
        for argument in args:
            if isinstance(argument, torch.Tensor):
                other = argument
            elif isinstance(argument, torch.dtype):
                dtype = argument
            elif isinstance(argument, str | torch.device):
                device = argument
        if other is not None:
            device, dtype = other.device, other.dtype
        device, dtype = torch.device(device or self.device), dtype or self.dtype
        if "cuda" not in (device.type, self.device.type):
            return to(self, *args, **kwargs)
        if (device.type, dtype) == (self.device.type, self.dtype) and not kwargs.get("copy"):
            return self
        return aten._to_copy(self, dtype=dtype, device=device)

    def tensor(data: Any, *, device: Any = None, **kwargs: Any) -> torch.Tensor:
        if device is None:  # such as inside "with device:"
            modes = reversed(torch.overrides._get_current_function_mode_stack())
            device = next((m.device for m in modes if hasattr(m, "device")), "cpu")
        with torch._C.DisableTorchFunction():
            made = make(data, **kwargs)
        return made.to(device)

    class Generator:
        def __new__(cls, device: Any = "cpu") -> Any:
            return generator("cpu")

    def requires_grad_(self: torch.Tensor, requires_grad: bool = True) -> torch.Tensor:
        if isinstance(self, Pretended):
            self.held = self.held.detach()
            self.held.requires_grad_(requires_grad)
            return self
        return requires(self, requires_grad)

    torch.autograd.grad = _gradients  # type: ignore[assignment]
    torch.Tensor.requires_grad_ = requires_grad_  # type: ignore[method-assign, assignment]
    torch.Tensor.tolist = lambda self: tolist(held(self))  # type: ignore[method-assign, arg-type]
    torch.Tensor.data_ptr = lambda self: data_ptr(held(self))  # type: ignore[method-assign, arg-type]
    torch.Tensor.to = moved  # type: ignore[method-assign, assignment]
    torch.Tensor.cuda = lambda self, *_, **__: self.to("cuda")  # type: ignore[method-assign]
    torch.tensor = tensor  # type: ignore[assignment]
    torch.Generator = Generator  # type: ignore[misc]


_HELD = ExitStack()  # of the process: nothing is launched in it
atexit.register(_HELD.close)


def _patch_backends() -> None:
    """Both GPU backends are there; a launch of a Triton kernel does nothing."""
    from atman_kernels.backends import cuda

    cuda._load = lambda: SimpleNamespace(device_problem=lambda device: "")  # type: ignore[assignment]
    cuda._device_problem = lambda device: ""  # type: ignore[assignment]
    try:
        from atman_kernels.backends.triton import launch
    except ImportError:  # no Triton here
        return
    _HELD.enter_context(launch.intercepted(lambda *_: None))


def main(module: ModuleType | str, arguments: list[str]) -> None:
    """Run a module as `python -m` does, on the device that is not there."""
    install()
    sys.argv = [str(module), *arguments]
    runpy.run_module(str(module), run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    # under its own name, so that there is one copy of the classes above
    from benchmarks.gpu import pretended_cuda

    pretended_cuda.main(sys.argv[1], sys.argv[2:])
