"""One memory meter everywhere: the peak of live tensor bytes, on a GPU, on the CPU and on the meta device.

On a GPU the numbers are those of PyTorch's caching allocator. The CPU has no such counter, and resident set
size says more about malloc than about tensors, so there every operator's outputs are watched
(``TorchDispatchMode``) and the bytes of each storage are counted from the operator that made it until it is
freed. That includes the operators of autograd's backward, of backward calls inside backward, and of
recomputation.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from operator import attrgetter
from types import TracebackType
from typing import Any, ClassVar, Protocol, Self, cast

import torch
from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass

from magc.errors import InputError

_LIFT_FRESH = torch.ops.aten.lift_fresh.default


class MemoryMeter:
    """Context manager that measures live tensor bytes on one device above those live when it was entered.

    ``peak_bytes`` and ``live_bytes`` may be read inside the block and after it (then as of its end), and
    meters may be nested. A meter is entered once.

    On CUDA: bytes handed out by the caching allocator for the whole device, by any thread
    (``memory_allocated``), rounded up to its blocks of 512 bytes. Live bytes go below zero when tensors
    made before are freed. The device is synchronised on entry and exit only.

    On the CPU and the meta device: bytes of storages made by operators called in the block, in the thread
    that entered it and in the backward passes it starts. Each storage counts once however many views it
    has, with its size after in-place resizing. Not counted: storages that existed before (but their growth
    is, and their being freed is not subtracted), temporary buffers inside one operator, tensors without a
    strided storage (sparse), and memory that no operator makes, such as ``torch.from_numpy``'s and
    ``UntypedStorage.resize_``'s.

    Args:
        device: the device to measure, such as ``"cuda"``, ``"cuda:1"``, ``"cpu"`` or ``"meta"``.

    Raises:
        InputError: the device is of another type, or CUDA is asked for and not available; or, on entry, the
            meter was entered before.
    """

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self._entered = False
        self._counter: _Counter
        if self.device.type == "cuda":
            if not torch.cuda.is_available():
                raise InputError(f"cannot measure {str(device)!r}: no CUDA device is available. Use 'cpu' or 'meta'.")
            if self.device == torch.device("cuda"):
                self.device = torch.device("cuda", torch.cuda.current_device())
            self._counter = _AllocatorCounter(self.device)
        elif self.device.type in ("cpu", "meta"):
            self._counter = _StorageCounter(self.device.type)
        else:
            raise InputError(f"cannot measure {str(device)!r}: use a 'cuda', 'cpu' or 'meta' device.")

    @property
    def peak_bytes(self) -> int:
        """Most bytes live at a time since entry or the last ``reset_peak``, above those live at entry."""
        return self._counter.peak_bytes()

    @property
    def live_bytes(self) -> int:
        """Bytes live now (after the block: at its end), above those live at entry."""
        return self._counter.live_bytes()

    def reset_peak(self) -> None:
        """Let the peak start again from the bytes live now; the baseline stays the one at entry."""
        self._counter.reset_peak()

    def __enter__(self) -> Self:
        if self._entered:
            raise InputError("a MemoryMeter is entered only once; make a new one for each measurement.")
        self._entered = True
        self._counter.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._counter.stop()


class _Counter(Protocol):
    def start(self) -> None: ...
    def stop(self) -> None: ...
    def live_bytes(self) -> int: ...
    def peak_bytes(self) -> int: ...
    def reset_peak(self) -> None: ...


class _AllocatorCounter:
    """Counts by the CUDA caching allocator.

    Its peak is one per process and device, so a meter that resets it first tells all other open meters of
    that device.
    """

    _open: ClassVar[list[_AllocatorCounter]] = []

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._baseline = 0
        self._peak = 0
        self._final: tuple[int, int] | None = None

    def start(self) -> None:
        torch.cuda.synchronize(self._device)
        self._baseline = torch.cuda.memory_allocated(self._device)
        self._open.append(self)
        self.reset_peak()

    def stop(self) -> None:
        torch.cuda.synchronize(self._device)
        self._final = self.live_bytes(), self.peak_bytes()
        self._open.remove(self)

    def live_bytes(self) -> int:
        if self._final is not None:
            return self._final[0]
        return torch.cuda.memory_allocated(self._device) - self._baseline

    def peak_bytes(self) -> int:
        if self._final is not None:
            return self._final[1]
        return max(self._peak, torch.cuda.max_memory_allocated(self._device)) - self._baseline

    def reset_peak(self) -> None:
        peak = torch.cuda.max_memory_allocated(self._device)
        for counter in self._open:
            if counter is not self and counter._device == self._device:
                counter._peak = max(counter._peak, peak)
        torch.cuda.reset_peak_memory_stats(self._device)
        self._peak = 0


class _StorageRef(weakref.ref[UntypedStorage]):
    """Weak reference to a watched storage.

    Attributes:
        key: ``id`` of the storage (its Python object lives as long as the storage itself).
        old: its bytes that existed before it was watched and are not counted.
        counted: its bytes that are in the count now.
    """

    __slots__ = ("counted", "key", "old")
    key: int
    old: int
    counted: int


class _StorageCounter(TorchDispatchMode):
    """Counts the storages that operators make."""

    supports_higher_order_operators = True

    def __init__(self, device_type: str) -> None:
        mode: Any = super()  # untyped in torch
        mode.__init__()
        self._is_mine: Callable[[Tensor], bool] = attrgetter(f"is_{device_type}")
        self._watched: dict[int, _StorageRef] = {}
        self._mutable: dict[Any, bool] = {}
        self._live = 0
        self._peak = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # The handler holds nothing that dynamo could compile, and the guard against it would import dynamo
        # and triple the cost of each operator.
        return False

    def start(self) -> None:
        self.__enter__()

    def stop(self) -> None:
        mode: Any = super()
        mode.__exit__(None, None, None)
        # Without their weak references the storages no longer report: the numbers stay those of this moment.
        self._watched.clear()

    def live_bytes(self) -> int:
        return self._live

    def peak_bytes(self) -> int:
        return self._peak

    def reset_peak(self) -> None:
        self._peak = self._live

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        mutable = self._mutable.get(func)
        if mutable is None:
            # Higher-order operators have no schema and are functional.
            mutable = self._mutable[func] = hasattr(func, "_schema") and func._schema.is_mutable
        if mutable:
            for tensor in _tensors((args, kwargs)):
                storage = self._storage(tensor)
                if storage is not None and id(storage) not in self._watched:
                    self._watch(storage, old=storage.nbytes())
        out = func(*args, **kwargs)
        if type(out) is Tensor:
            self._note(out, func, args, kwargs)
        else:
            for tensor in _tensors(out):
                self._note(tensor, func, args, kwargs)
        if mutable:
            # What an operator resizes it need not return: `out=` of several tensors, foreach operators.
            for tensor in _tensors((args, kwargs)):
                self._note(tensor, func, args, kwargs)
        return out

    def _note(self, tensor: Tensor, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        storage = self._storage(tensor)
        if storage is None:
            return
        ref = self._watched.get(id(storage))
        if ref is None:
            # The output may be a view of an input that was never watched. `lift_fresh` returns what
            # `torch.tensor(data)` has just made and filled without an operator: new, though an input.
            existed = func is not _LIFT_FRESH and (self._among(storage, args) or self._among(storage, kwargs))
            self._watch(storage, old=storage.nbytes() if existed else 0)
        elif storage.nbytes() != ref.old + ref.counted:
            counted = max(0, storage.nbytes() - ref.old)
            self._add(counted - ref.counted)
            ref.counted = counted

    def _storage(self, tensor: Tensor) -> UntypedStorage | None:
        try:
            return tensor.untyped_storage() if self._is_mine(tensor) else None
        except RuntimeError:  # sparse and opaque layouts, functorch's wrappers
            return None

    def _among(self, storage: UntypedStorage, inputs: tuple[Any, ...] | dict[str, Any]) -> bool:
        values: Iterable[object] = inputs.values() if isinstance(inputs, dict) else inputs
        for value in values:
            if isinstance(value, Tensor):
                if self._storage(value) is storage:
                    return True
            elif isinstance(value, (tuple, list)):
                items = cast("Sequence[object]", value)
                if any(self._storage(item) is storage for item in _tensors(items)):
                    return True
        return False

    def _watch(self, storage: UntypedStorage, old: int) -> None:
        ref = _StorageRef(storage, self._freed)
        ref.key, ref.old, ref.counted = id(storage), old, storage.nbytes() - old
        self._watched[ref.key] = ref
        self._add(ref.counted)

    def _freed(self, ref: _StorageRef) -> None:
        del self._watched[ref.key]
        self._live -= ref.counted

    def _add(self, nbytes: int) -> None:
        self._live += nbytes
        if self._live > self._peak:
            self._peak = self._live


def _tensors(value: object) -> Iterator[Tensor]:
    """The plain tensors in nested tuples, lists and dicts, and inside wrapper subclasses such as DTensor."""
    if isinstance(value, Tensor):
        if type(value) is Tensor or not is_traceable_wrapper_subclass(value):
            yield value
        else:
            for name in value.__tensor_flatten__()[0]:
                yield from _tensors(getattr(value, name))
    elif isinstance(value, (tuple, list)):
        for item in cast("Sequence[object]", value):
            yield from _tensors(item)
    elif isinstance(value, dict):
        for item in cast("Mapping[object, object]", value).values():
            yield from _tensors(item)
