"""Checkpoint stores: the same bits come back from every tier, and nothing is left behind."""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.testing._internal.two_tensor import TwoTensor

from magc import disk
from magc.errors import InputError, StoreError
from magc.meter import MemoryMeter
from magc.store import CheckpointStore, PinnedPool
from magc.tiers import Tier

CPU = torch.device("cpu")
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, gpu])]


def bits(tensor: Tensor) -> bytes:
    plain = tensor.cpu().resolve_conj().resolve_neg().contiguous()
    return plain.reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_same(got: list[Tensor | None], expected: list[Tensor | None]) -> None:
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        if b is None:
            assert a is None
            continue
        assert a is not None
        assert (a.shape, a.dtype, a.device.type) == (b.shape, b.dtype, b.device.type)
        assert not a.requires_grad
        assert bits(a) == bits(b)


def samples(device: str) -> list[Tensor | None]:
    torch.manual_seed(0)
    base = torch.randn(6, 8)
    tensors: list[Tensor | None] = [
        base.to(dtype)
        for dtype in (
            torch.float32,
            torch.float64,
            torch.float16,
            torch.bfloat16,
            torch.float8_e4m3fn,
            torch.complex64,
            torch.int8,
            torch.int64,
            torch.uint8,
            torch.bool,
        )
    ]
    tensors += [
        None,
        torch.tensor(3.5),
        torch.empty(0, 3),
        base.t(),
        base[:, ::2],
        base[2:4],
        torch.randn(1, 3).expand(5, 3),
        torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        torch.randn(4, dtype=torch.complex64).conj(),
        torch.tensor([float("nan"), float("inf"), -0.0, 1e-45]),
        torch.randn(3, requires_grad=True),
        torch.randn(3, requires_grad=True) * 2,
    ]
    return [None if tensor is None else tensor.to(device) for tensor in tensors]


@pytest.mark.parametrize("tier", Tier)
@pytest.mark.parametrize("device", DEVICES)
def test_the_same_bits_come_back(device: str, tier: Tier, tmp_path: Path) -> None:
    expected = samples(device)
    with CheckpointStore(torch.device(device), tmp_path) as store:
        store.put("a", expected, tier)
        store.put(("b", 1), [], tier)
        assert_same(store.get("a"), expected)
        assert_same(store.get("a"), expected)  # it stays
        assert "a" in store
        assert_same(store.pop("a"), expected)
        assert "a" not in store
        assert store.pop(("b", 1)) == []


@pytest.mark.parametrize("tier", Tier)
@pytest.mark.parametrize("device", DEVICES)
def test_strides_of_dense_tensors_come_back(device: str, tier: Tier) -> None:
    """Kernels may round differently for another memory format; a recompute must see the same one."""
    dense = [torch.randn(4, 6, device=device).t(), torch.randn(2, 3, 4, device=device).permute(2, 0, 1)]
    gaps = torch.randn(4, 6, device=device)[:, ::2]
    with CheckpointStore(torch.device(device)) as store:
        store.put(0, [*dense, gaps], tier)
        got = [tensor for tensor in store.get(0) if tensor is not None]
    assert [tensor.stride() for tensor in got[:2]] == [tensor.stride() for tensor in dense]
    assert got[2].is_contiguous()


def test_device_and_host_tiers_of_a_cpu_keep_references() -> None:
    x = torch.randn(3)
    store = CheckpointStore(CPU)
    for tier in (Tier.DEVICE, Tier.HOST):
        store.put(tier, [x], tier)
        (got,) = store.pop(tier)
        assert got is not None
        assert got.data_ptr() == x.data_ptr()


@pytest.mark.parametrize("tier", [Tier.DEVICE, Tier.HOST])
def test_views_do_not_keep_a_larger_storage_alive(tier: Tier) -> None:
    with MemoryMeter("cpu") as meter, CheckpointStore(CPU) as store:
        large = torch.zeros(1000, 256)
        store.put(0, [large[7], large[:, 3]], tier)
        del large
        assert meter.live_bytes == 1024 + 4000
        assert store.device_bytes + store.host_bytes == 1024 + 4000


def test_puts_no_graph_on_hold() -> None:
    store = CheckpointStore(CPU)
    with MemoryMeter("cpu") as meter:
        x = torch.ones(256, requires_grad=True)
        store.put(0, [x.sin().cos()], Tier.DEVICE)
        assert meter.live_bytes == 2 * 1024  # x and the value; not what cos saved


def test_counts_bytes_by_tier(tmp_path: Path) -> None:
    x = torch.zeros(256)
    store = CheckpointStore(CPU, tmp_path)
    for tier in Tier:
        store.put(tier, [x, None, x.to(torch.bool)], tier)
    assert (store.device_bytes, store.host_bytes, store.disk_bytes) == (1280, 1280, 1280)
    (file,) = tmp_path.glob("*/*")
    assert file.stat().st_size == 1280
    store.drop(Tier.HOST)
    store.pop(Tier.DISK)
    assert (store.device_bytes, store.host_bytes, store.disk_bytes) == (1280, 0, 0)
    assert list(tmp_path.glob("*/*")) == []
    store.close()
    assert store.device_bytes == 0


def test_writing_to_disk_takes_no_second_copy(tmp_path: Path) -> None:
    x = torch.zeros(1 << 20)
    with CheckpointStore(CPU, tmp_path) as store, MemoryMeter("cpu") as meter:
        store.put(0, [x, x.t()], Tier.DISK)
        assert meter.peak_bytes == 0
        store.get(0)
        assert meter.peak_bytes == 2 * x.nbytes  # what it returns


# ---------------------------------------------------------------------- nothing is left behind


def put_some(store: CheckpointStore) -> None:
    store.put(0, [torch.zeros(8)], Tier.DISK)
    store.put(1, [torch.zeros(8)], Tier.DISK)


def test_no_directory_before_it_is_needed_and_none_after_close(tmp_path: Path) -> None:
    store = CheckpointStore(CPU, tmp_path)
    assert list(tmp_path.iterdir()) == []
    put_some(store)
    (directory,) = tmp_path.iterdir()
    assert len(list(directory.iterdir())) == 2
    assert directory.stat().st_mode & 0o077 == 0
    store.close()
    store.close()
    assert list(tmp_path.iterdir()) == []


def test_files_go_with_the_store_when_it_is_collected(tmp_path: Path) -> None:
    store = CheckpointStore(CPU, tmp_path)
    put_some(store)
    del store
    gc.collect()
    assert list(tmp_path.iterdir()) == []


def test_files_go_when_an_error_leaves_the_block(tmp_path: Path) -> None:
    with contextlib.suppress(ZeroDivisionError), CheckpointStore(CPU, tmp_path) as store:
        put_some(store)
        _ = 1 // 0
    assert list(tmp_path.iterdir()) == []


def test_files_go_when_the_interpreter_ends(tmp_path: Path) -> None:
    script = f"""
        import torch
        from magc.store import CheckpointStore
        from magc.tiers import Tier
        store = CheckpointStore(torch.device("cpu"), {str(tmp_path)!r})
        store.put(0, [torch.zeros(8)], Tier.DISK)
        store.self = store  # no reference count will free it
        raise SystemExit(3)
    """
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=False, cwd=Path.cwd())
    assert result.returncode == 3
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_does_not_delete_the_files_of_its_parent(tmp_path: Path) -> None:
    store = CheckpointStore(CPU, tmp_path)
    put_some(store)
    child = os.fork()
    if child == 0:
        store.drop(0)
        store.close()
        os.kill(os.getpid(), signal.SIGKILL)  # no test machinery of the parent may run here
    os.waitpid(child, 0)
    assert_same(store.get(0), [torch.zeros(8)])
    store.close()
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------- errors


class _FullDisk:
    """Stands in for a file on a full disk: takes some bytes, then fails."""

    def __init__(self, path: Path, room: int, error: BaseException) -> None:
        self._file = path.open("xb")
        self._room, self._error = room, error

    def __enter__(self) -> _FullDisk:
        return self

    def __exit__(self, *args: object) -> None:
        self._file.close()

    def write(self, data: memoryview) -> int:
        self._room -= data.nbytes
        if self._room < 0:
            raise self._error
        return self._file.write(data)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    store = CheckpointStore(CPU, tmp_path)
    store.put("kept", [torch.ones(4)], Tier.DISK)

    def open_full(path: Path, mode: str) -> _FullDisk:
        return _FullDisk(Path(os.fspath(path)), 3000, error)

    with monkeypatch.context() as patch:
        real_open = Path.open

        def fake_open(path: Path, mode: str = "r") -> object:
            # The stand-in opens the real file through `real_open`.
            patch.setattr(Path, "open", real_open)
            return open_full(path, mode)

        patch.setattr(Path, "open", fake_open)
        with pytest.raises((StoreError, KeyboardInterrupt)) as caught:
            store.put((2, 3), [torch.zeros(512), torch.zeros(512)], Tier.DISK)
    if isinstance(error, OSError):
        message = str(caught.value)
        for part in (
            "(2, 3)",
            "4.0 KiB (4096 bytes)",
            str(tmp_path),
            "No space left",
            " free there",
            "disk_dir",
        ):
            assert part in message
        assert isinstance(caught.value.__cause__, OSError)
    else:
        assert caught.value is error
    assert (2, 3) not in store
    assert store.disk_bytes == 16
    assert len(list(tmp_path.glob("*/*"))) == 1  # no part of the file stays
    store.put((2, 3), [torch.zeros(512)], Tier.DISK)  # the store is usable
    assert_same(store.get("kept"), [torch.ones(4)])


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_write_that_the_system_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real error, at the flush of the last bytes: the file is a link to a device that is always full."""

    def new_file(directory: disk.CheckpointDirectory) -> Path:
        class Full(type(Path())):
            def open(self, mode: str = "r", **_: object) -> object:  # type: ignore[override]
                return Path("/dev/full").open("wb")

        return Full(tmp_path / "x.bin")

    monkeypatch.setattr(disk.CheckpointDirectory, "new_file", new_file)
    with (
        CheckpointStore(CPU, tmp_path) as store,
        pytest.raises(StoreError, match=r"cannot write checkpoint 0 of 32 B .*No space left on device"),
    ):
        store.put(0, [torch.zeros(8)], Tier.DISK)


def test_a_file_that_something_else_changed(tmp_path: Path) -> None:
    store = CheckpointStore(CPU, tmp_path)
    put_some(store)
    first, second = sorted(tmp_path.glob("*/*"))
    os.truncate(first, 31)
    with pytest.raises(StoreError, match=r"cannot read checkpoint 0 of 32 B .*shorter than what was written"):
        store.get(0)
    second.unlink()
    with pytest.raises(StoreError, match=r"cannot read checkpoint 1 .*No such file.*nothing cleans up"):
        store.get(1)
    store.drop(1)


@pytest.mark.parametrize("tier", Tier)
@pytest.mark.parametrize("device", DEVICES)
def test_what_was_fetched_ahead_is_what_was_put(device: str, tier: Tier, tmp_path: Path) -> None:
    expected = [torch.randn(1 << 16, device=device), None, torch.arange(5, device=device)]
    with CheckpointStore(torch.device(device), tmp_path) as store:
        for key in range(3):
            store.put(key, expected, tier)
        for key in (0, 1, 1, 2):
            store.fetch(key)
        for key in (1, 0, 1, 2):
            assert_same(store.get(key), expected)


def test_a_fetch_takes_its_memory_at_once_and_only_once(tmp_path: Path) -> None:
    x = torch.zeros(1 << 18)
    with CheckpointStore(CPU, tmp_path) as store, MemoryMeter("cpu") as meter:
        store.put(0, [x], Tier.DISK)
        store.fetch(0)
        store.fetch(0)
        assert meter.live_bytes == x.nbytes
        got = store.get(0)
        assert meter.live_bytes == x.nbytes
        del got
        assert meter.live_bytes == 0


def test_a_fetch_that_fails_says_so_when_it_is_needed(tmp_path: Path) -> None:
    with CheckpointStore(CPU, tmp_path) as store:
        put_some(store)
        sorted(tmp_path.glob("*/*"))[0].unlink()
        store.fetch(0)
        store.fetch(1)
        with pytest.raises(StoreError, match=r"cannot read checkpoint 0 .*No such file"):
            store.get(0)
        assert_same(store.get(1), [torch.zeros(8)])


def test_what_was_fetched_and_not_needed_goes_too(tmp_path: Path) -> None:
    threads = threading.active_count()
    store = CheckpointStore(CPU, tmp_path)
    put_some(store)
    for key in (0, 1):
        store.fetch(key)
    store.drop(0)
    store.close()
    assert list(tmp_path.iterdir()) == []
    assert threading.active_count() == threads


def test_keys_are_put_once_and_got_while_held() -> None:
    store = CheckpointStore(CPU)
    store.put("k", [torch.ones(1)], Tier.DEVICE)
    with pytest.raises(StoreError, match=r"'k' is held already: drop it"):
        store.put("k", [torch.ones(1)], Tier.DEVICE)
    for call in (store.get, store.pop, store.drop):
        with pytest.raises(StoreError, match=r"no checkpoint 'other' is held \(of 1\)"):
            call("other")
    store.close()
    for call in (store.get, store.pop, store.drop, lambda key: store.put(key, [], Tier.DEVICE)):
        with pytest.raises(StoreError, match="is closed"):
            call("k")


def test_refuses_what_it_cannot_hold(tmp_path: Path) -> None:
    store = CheckpointStore(CPU, tmp_path)
    with pytest.raises(StoreError, match="a tensor on meta, the store is for cpu"):
        store.put(0, [torch.ones(1, device="meta")], Tier.DEVICE)
    for tier in Tier:
        with pytest.raises(StoreError, match=r"layout torch.sparse_coo: make it dense"):
            store.put(0, [torch.eye(2).to_sparse()], tier)
    with pytest.raises(StoreError, match=r"a TwoTensor, of which only references .* not on the disk tier"):
        store.put(0, [TwoTensor(torch.ones(1), torch.ones(1))], Tier.DISK)
    store.put(0, [TwoTensor(torch.ones(1), torch.ones(1))], Tier.DEVICE)
    with pytest.raises(StoreError, match="no existing directory: make it"):
        CheckpointStore(CPU, tmp_path / "missing")
    with pytest.raises(InputError, match="use a CPU or CUDA device"):
        CheckpointStore(torch.device("meta"))
    with pytest.raises(InputError, match="CUDA devices only"):
        PinnedPool(CPU)
    with pytest.raises(ValueError, match="tape"):
        store.put(1, [], "tape")  # pyright: ignore[reportArgumentType]


# ---------------------------------------------------------------------- pinned memory


@gpu
@pytest.mark.gpu
def test_pinned_memory_is_reused_across_stores() -> None:
    device = torch.device("cuda")
    pool = PinnedPool(device)
    x = torch.randn(3 << 20, device=device)
    for step in range(5):
        with CheckpointStore(device, pool=pool) as store:
            for key in range(4):
                store.put(key, [x + step * 10 + key], Tier.HOST)
            assert store.host_bytes == 4 * x.nbytes
            for key in range(4):
                (got,) = store.pop(key)
                assert got is not None
                assert torch.equal(got, x + step * 10 + key)
        if step == 0:
            reserved = pool.reserved_bytes
            assert 4 * x.nbytes <= reserved <= 8 * x.nbytes
        assert pool.reserved_bytes == reserved
    # Other sizes start afresh in the same memory.
    with CheckpointStore(device, pool=pool) as store:
        store.put(0, [x[: 1 << 20].clone()], Tier.HOST)
    assert pool.reserved_bytes == reserved


@gpu
@pytest.mark.gpu
def test_a_tensor_larger_than_a_piece(tmp_path: Path) -> None:
    device = torch.device("cuda")
    x = torch.randint(0, 256, ((33 << 20) + 5,), dtype=torch.uint8, device=device)
    with CheckpointStore(device, tmp_path) as store:
        for tier in Tier:
            store.put(tier, [x, x[:7]], tier)
        for tier in Tier:
            assert_same(store.pop(tier), [x, x[:7]])


@gpu
@pytest.mark.gpu
def test_copies_are_ordered_across_streams() -> None:
    """Slow work before each copy; the source is freed, the block reused, the copy read on other streams."""
    device = torch.device("cuda")
    pool = PinnedPool(device)
    work = torch.randn(4096, 4096, device=device)
    streams = [torch.cuda.Stream() for _ in range(3)]
    torch.cuda.synchronize()
    results = list[tuple[int, Tensor]]()
    for step in range(12):
        store = CheckpointStore(device, pool=pool)
        with torch.cuda.stream(streams[step % 3]):
            for _ in range(5):
                work @ work
            store.put(0, [torch.full((1 << 20,), step, device=device)], Tier.HOST)
            torch.full((1 << 20,), -1, device=device)  # takes the freed source, if it may
        with torch.cuda.stream(streams[(step + 1) % 3]):
            (got,) = store.pop(0)
            assert got is not None
            results.append((step, got))
        store.close()
    torch.cuda.synchronize()
    for step, got in results:
        assert (got == step).all()


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize("tier", [Tier.HOST, Tier.DISK])
def test_copies_run_beside_the_work_in_the_right_order(tier: Tier, tmp_path: Path) -> None:
    """A long product before each value is there, and before the memory that it comes back to is free."""
    device = torch.device("cuda")
    work = torch.randn(8192, 8192, device=device)
    results = list[tuple[int, Tensor]]()
    with CheckpointStore(device, tmp_path) as store:
        for step in range(8):
            for _ in range(3):
                work @ work
            store.put(step, [torch.full((1 << 22,), step, device=device)], tier)
        for step in range(7, -1, -1):
            if step:
                store.fetch(step - 1)
            scratch = torch.full((1 << 22,), -1, device=device)  # what is fetched must not be written over by it
            for _ in range(3):
                work @ work
            (got,) = store.pop(step)
            assert got is not None
            results.append((step, got.clone()))
            del scratch, got
    for step, got in results:
        assert (got == step).all()


@gpu
@pytest.mark.gpu
def test_copies_to_the_host_do_not_wait_for_the_work_after_them() -> None:
    device = torch.device("cuda")
    work = torch.randn(8192, 8192, device=device)
    x = torch.randn(64 << 20, device=device)
    pool = PinnedPool(device)
    with CheckpointStore(device, pool=pool) as store:
        store.put("warm", [x], Tier.HOST)  # pins
        store.pop("warm")
        torch.cuda.synchronize()
        before, copied, done = (torch.cuda.Event(enable_timing=True) for _ in range(3))
        before.record()
        store.put(0, [x], Tier.HOST)
        for _ in range(20):
            work @ work
        store.fetch(0)
        copied.record(pool.back)
        for _ in range(20):
            work @ work
        done.record()
        torch.cuda.synchronize()
        (got,) = store.pop(0)
        assert got is not None
        assert torch.equal(got, x)
    assert before.elapsed_time(copied) < 0.9 * before.elapsed_time(done)


@gpu
@pytest.mark.gpu
def test_the_disk_waits_for_copies_that_still_read_its_buffer(tmp_path: Path) -> None:
    device = torch.device("cuda")
    pool = PinnedPool(device)
    work = torch.randn(8192, 8192, device=device)
    with CheckpointStore(device, tmp_path, pool=pool) as store:
        store.put("disk", [torch.full((1 << 20,), 7.0, device=device)], Tier.DISK)
        for _ in range(5):
            store.put("host", [torch.full((1 << 20,), 3.0, device=device)], Tier.HOST)
            for _ in range(10):
                work @ work
            (host,) = store.pop("host")  # its copy waits behind the products; its block is free to reuse
            (disk_copy,) = store.get("disk")
            assert host is not None
            assert disk_copy is not None
            assert (host == 3).all()
            assert (disk_copy == 7).all()


@gpu
@pytest.mark.gpu
def test_a_pool_for_another_kind_of_device_is_refused() -> None:
    with pytest.raises(InputError, match="use one device"):
        CheckpointStore(CPU, pool=PinnedPool(torch.device("cuda")))
