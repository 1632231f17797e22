"""The processes that share a model, by tensor or pipeline parallelism, and what they must do alike.

Each of them, a *rank*, holds a part of the weights and makes the same calls: in every forward they wait for one another
in collectives. What they choose must be the same on all of them, then: prompts, budgets, packs, what a search keeps. An
error of one between two forwards must be one of all; in the middle of a forward it cannot be, since nothing reaches
those that wait in a collective. For this the ranks talk in a group of their own, on the CPU, beside the model's.

A model that lies in one process has `ALONE`, which does nothing, also where a process group was begun for other ends.
"""

import hashlib
import json
import os
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields, is_dataclass
from datetime import timedelta
from functools import wraps
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn

import atman_kernels
from atman_kernels.errors import Cancelled, InputError, RankError, UnsupportedModelError
from atman_kernels.hf.models.memory import free_bytes, is_out_of_memory
from atman_kernels.hf.models.placement import devices_of

Method = TypeVar("Method", bound=Callable[..., Any])

MESSAGE_BYTES = 2048  # of what a rank tells the others at a time
_KINDS: dict[str, type[Exception]] = {kind.__name__: kind for kind in (InputError, UnsupportedModelError, Cancelled)}
_GROUP_TROUBLE = ("gloo", "nccl", "connection closed by peer", "connection reset", "process group")


class Ranks:
    """The ranks of one model, as seen from one of them.

    Attributes:
        own, size: this rank's number among them, and how many there are.
        tensor: the same within its tensor-parallel group.
        stage: transformers' pipeline stage of this rank; None where every rank has all layers.
        gone: why the ranks can do nothing together any more; None as long as they can.
    """

    def __init__(
        self, members: Sequence[int] = (), tensor: tuple[int, int] = (0, 1), stage: Any = None, last: int = 0
    ) -> None:
        """
        Args:
            members: the ranks' numbers in torch's default group.
            tensor: see above.
            stage: see above.
            last: a member that has the last layers, and therefore the logits.
        """
        self._members, self._last = list(members), last
        self.size = max(1, len(members))
        self.own = self._members.index(dist.get_rank()) if members else 0
        self.tensor, self.stage = tensor, stage
        self._turn = threading.RLock()
        self._group: Any = None
        self.gone: str | None = None
        self._heard: BaseException | None = None  # an error that all of them have

    def layers_of(self, decoder: nn.Module) -> int | None:
        """How many of a decoder's layers this rank runs; None where its config does not count them."""
        config: Any = decoder.config
        count = getattr(config, "num_hidden_layers", None)
        if count is None or self.stage is None:
            return count
        first, end = self.stage.layer_range_for_rank(self.stage.pp_rank, count)
        return int(end - first)

    # What is the same on all ranks ----------------------------------------------------------------------------

    def agree(self, about: str, **content: Any) -> None:
        """Nothing but a check: that all ranks have come here, with the same content.

        Args:
            about: where this is, for errors.
            content: tensors, numbers, texts and what is made of these, by the names that errors give them.

        Raises:
            InputError: the content differs, or other ranks are elsewhere.
            RankError: another rank failed; InputError, UnsupportedModelError and Cancelled are raised as such.
        """
        if self.size > 1:
            self._exchange(about, {name: _digest(value) for name, value in content.items()})

    def gathered(self, about: str, value: Any) -> list[Any]:
        """A small value of every rank, in their order."""
        return [value] if self.size == 1 else self._exchange(about, {}, value)

    def least(self, about: str, number: int) -> int:
        """The smallest of the ranks' numbers."""
        numbers: list[int] = self.gathered(about, number)
        return min(numbers)

    def free_bytes(self, model: nn.Module) -> int:
        """What the rank with the least memory has free; ranks on one machine's CPU share what it has."""
        if self.size == 1:
            return free_bytes(model)
        on_cpu = any(device.type == "cpu" for device in devices_of(model))
        beside = int(os.environ.get("LOCAL_WORLD_SIZE", self.size)) if on_cpu else 1
        return self.least("memory", free_bytes(model) // max(1, beside))

    def shared(self, tensor: Tensor, *, of_the_first: bool = False) -> Tensor:
        """The tensor of one rank, on all: of those with the last layers, or of the first rank.

        Args:
            tensor: of the same shape and dtype everywhere.
        """
        if self.size == 1:
            return tensor
        values = tensor.to("cpu", copy=True).contiguous()
        with self._turn, self._in_contact():
            dist.broadcast(values, src=self._members[0] if of_the_first else self._last, group=self._own_group())
        return values.to(tensor.device)

    def summed(self, of_own_heads: Tensor) -> Tensor:
        """The sum over the ranks of a tensor-parallel group, on all."""
        if self.tensor[1] == 1:
            return of_own_heads
        values = of_own_heads.to("cpu", copy=True)
        with self._turn, self._in_contact():
            dist.all_reduce(values, group=self._own_group())
        return (values * self.tensor[1] / self.size).to(of_own_heads.device)  # several groups have the same parts

    @contextmanager
    def logits_staying(self) -> Iterator[None]:
        """Inside, logits of a pipeline stay on its last stage, and are None elsewhere.

        transformers sends them to all stages, rounded to the model's dtype.
        """
        if not hasattr(self.stage, "broadcast_from_last"):
            yield
            return
        self.stage.broadcast_from_last = lambda tensor, **_: tensor
        try:
            yield
        finally:
            del self.stage.broadcast_from_last

    # Failing together -----------------------------------------------------------------------------------------

    @contextmanager
    def in_step(self, call: str) -> Iterator[None]:
        """Around a call that every rank makes: an error of one between forwards is one of all of them.

        Raises:
            RankError: another rank failed, or cannot be reached; also whatever `agree` raises.
        """
        if self.size == 1:
            yield
            return
        with self._turn:
            self._heard = None
            self.agree(f"the beginning of {call}", versions=_versions())
            try:
                yield
            except BaseException as error:
                if error is not self._heard and self.gone is None:
                    self._tell(error)
                raise
            self.agree(f"the end of {call}")

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Around a forward, which ends on all ranks or on none.

        Errors of ours come on all ranks at the same place, as long as all of them have the same layers.

        Raises:
            MemoryError: this rank ran out of memory.
            RankError: another rank ended in the middle of the forward.
        """
        if self.size == 1:
            yield
            return
        try:
            yield
        except BaseException as error:
            ours = type(error).__module__.startswith("atman_kernels")
            alike = isinstance(error, Cancelled | RankError) or (ours and self.stage is None)
            if alike or self.gone is not None:
                raise
            if is_out_of_memory(error):
                raise self.out_of_memory(error) from error
            self.gone = f"rank {self.own} left a forward that the others are in ({type(error).__name__})"
            if _is_of_the_group(error):
                raise self._lost_contact(error) from error
            raise

    def out_of_memory(self, error: BaseException) -> MemoryError:
        """What running out of memory is here: no reason to try again in halves.

        The other ranks wait in the middle of the forward, and a collective of the next one would meet theirs.
        """
        self.gone = f"rank {self.own} left a forward that the others are in (out of memory)"
        return MemoryError(
            f"out of memory on rank {self.own} of {self.size}, in the middle of a forward that the others wait in: the "
            "work cannot be halved, and all processes have to be started anew, with a smaller token_budget "
            f"({_first_line(error)})"
        )

    def _tell(self, error: BaseException) -> None:
        """Lets the ranks that wait in the next `agree` know."""
        self._heard = error
        with suppress(RankError):  # they are gone, too; what is raised is what came first
            self._send({"error": [type(error).__name__, _first_line(error)[:300]]})

    def _exchange(self, about: str, digests: dict[str, str], value: Any = None) -> list[Any]:
        every = self._send({"about": about, "digests": digests, "value": value})
        try:
            for number, said in enumerate(every):
                if "error" in said:
                    raise self._of_another(number, *said["error"])
            self._check_alike(every)
        except Exception as error:
            self._heard = error
            raise
        return [said["value"] for said in every]

    def _of_another(self, number: int, kind: str, text: str) -> Exception:
        """What another rank's error is here."""
        message = f"rank {number} of {self.size}, which has a part of this model, cannot go on: {text}"
        if kind in _KINDS:
            return _KINDS[kind](message)
        return RankError(f"{message} ({kind})")

    def _check_alike(self, every: list[dict[str, Any]]) -> None:
        """Raises InputError where ranks do different things, or do them to different ones."""
        first = every[0]
        for number, said in enumerate(every):
            if said["about"] != first["about"]:
                raise InputError(
                    f"ranks that share a model must make the same calls in the same order: rank 0 is at "
                    f"{first['about']}, rank {number} at {said['about']}"
                )
            names = sorted(name for name, own in said["digests"].items() if first["digests"].get(name) != own)
            if names:
                raise InputError(
                    f"{', '.join(names)}: not the same on ranks 0 and {number} of {self.size}, which share this model"
                )

    # Talking --------------------------------------------------------------------------------------------------

    def _send(self, said: Mapping[str, Any]) -> list[dict[str, Any]]:
        """What all ranks say."""
        text = json.dumps(said).encode()
        if len(text) > MESSAGE_BYTES:
            raise ValueError(f"a message of {len(text)} bytes is too long for the other ranks")
        own = torch.zeros(MESSAGE_BYTES, dtype=torch.uint8, device="cpu")
        own[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        every = [torch.empty_like(own) for _ in range(self.size)]
        with self._turn, self._in_contact():
            dist.all_gather(every, own, group=self._own_group())
        return [json.loads(bytes(one.numpy()).rstrip(b"\0")) for one in every]

    def _own_group(self) -> Any:
        if self._group is None:
            self._group = dist.new_group(
                self._members, timeout=_timeout(), backend="gloo", use_local_synchronization=True
            )
        return self._group

    @contextmanager
    def _in_contact(self) -> Iterator[None]:
        if self.gone is not None:
            raise RankError(f"the processes that share this model have to be started anew: {self.gone}")
        try:
            yield
        except RuntimeError as error:
            self.gone = "another rank did not answer"
            raise self._lost_contact(error) from error

    def _lost_contact(self, error: BaseException) -> RankError:
        return RankError(
            f"another process that has a part of this model ended or did not answer, as rank {self.own} of {self.size} "
            f"sees it; its own error says why ({_first_line(error)[:200]})"
        )


ALONE = Ranks()
_known: weakref.WeakKeyDictionary[nn.Module, Ranks] = weakref.WeakKeyDictionary()
_known_lock = threading.Lock()


def ranks_of(model: nn.Module) -> Ranks:
    """The processes that share a model."""
    if not (dist.is_available() and dist.is_initialized()):
        return ALONE
    with _known_lock:
        if model not in _known:
            _known[model] = _found(model)
        return _known[model]


def _found(model: nn.Module) -> Ranks:
    stage: Any = getattr(model, "_pp_stage", None)
    mesh: Any = getattr(model, "_device_mesh", None)  # transformers'
    if mesh is None:
        mesh = next((p.device_mesh for p in model.parameters() if hasattr(p, "placements")), None)  # type: ignore[attr-defined]
    if mesh is None and stage is None:
        return ALONE
    if mesh is None:
        members = dist.get_process_group_ranks(stage.pp_group)
        return Ranks(members, stage=_if_several(stage), last=members[-1])
    names = mesh.mesh_dim_names or ("tp",)
    tensor, stages = (0, 1), mesh.mesh[None]
    if "tp" in names:
        tensor = (mesh.get_local_rank(names.index("tp")), mesh.size(names.index("tp")))
    if "pp" in names:
        stages = mesh.mesh.movedim(names.index("pp"), 0)
    return Ranks(mesh.mesh.flatten().tolist(), tensor, _if_several(stage), int(stages[-1].flatten()[0]))


def _if_several(stage: Any) -> Any:
    return stage if stage is not None and stage.pp_size > 1 else None


def in_step(method: Method) -> Method:
    """A method, of what has `ranks`, that all of them call together; see `Ranks.in_step`."""

    @wraps(method)
    def called(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self.ranks.in_step(method.__name__):
            return method(self, *args, **kwargs)

    return called  # type: ignore[return-value]


def _versions() -> list[str]:
    return [atman_kernels.__version__, torch.__version__, transformers.__version__]


def _timeout() -> timedelta | None:
    """How long the default group waits; None for torch's default."""
    group: Any = dist.group.WORLD
    try:
        return group._get_backend(torch.device(group._device_types[0])).options._timeout  # type: ignore[no-any-return]
    except (AttributeError, RuntimeError, IndexError):
        return None


def _is_of_the_group(error: BaseException) -> bool:
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(sign in text for sign in _GROUP_TROUBLE)


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n", 1)[0] or type(error).__name__


def _digest(value: Any) -> str:
    digest = hashlib.blake2b(digest_size=8)
    _add(digest.update, value)
    return digest.hexdigest()


def _add(update: Callable[[bytes], object], value: Any) -> None:
    """Feeds whatever a call may be given to a hash: equal content gives equal bytes in every process."""
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        update(f"{value.dtype}{tuple(value.shape)}".encode())
        update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b"")
    elif isinstance(value, Mapping):
        for key in sorted(value, key=str):
            update(f"{key}:".encode())
            _add(update, value[key])
    elif isinstance(value, list | tuple | set | frozenset):
        update(f"[{len(value)}]".encode())
        for each in sorted(value, key=str) if isinstance(value, set | frozenset) else value:
            _add(update, each)
    elif is_dataclass(value):
        _add(update, {field.name: getattr(value, field.name) for field in fields(value)})
    elif hasattr(value, "tobytes"):  # arrays and pictures
        update(f"{getattr(value, 'dtype', '')}{getattr(value, 'shape', getattr(value, 'size', ''))}".encode())
        update(value.tobytes())
    elif value is None or isinstance(value, bool | int | float | str | bytes):
        update(f"{type(value).__name__}{value!r}".encode())
    else:  # a function, or something that a method refuses later
        update(getattr(value, "__qualname__", type(value).__qualname__).encode())
