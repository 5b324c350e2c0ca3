"""The CPU and meta meter against counts done by hand, and on a GPU against the allocator."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from magc.errors import InputError
from magc.meter import MemoryMeter

KIB = 1024
"""Bytes of ``block()``."""


def block(device: str = "cpu") -> Tensor:
    return torch.ones(256, device=device)


@pytest.fixture(params=["cpu", "meta"])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


def test_counts_what_is_live_and_the_most_that_was(device: str) -> None:
    with MemoryMeter(device) as meter:
        assert (meter.live_bytes, meter.peak_bytes) == (0, 0)
        a = block(device)
        b = block(device)
        assert meter.live_bytes == 2 * KIB
        del a
        assert meter.live_bytes == KIB
        del b
        assert (meter.live_bytes, meter.peak_bytes) == (0, 2 * KIB)


def test_chain_of_matmuls_keeps_two_at_a_time(device: str) -> None:
    x, w = torch.ones(16, 16, device=device), torch.ones(16, 16, device=device)
    with MemoryMeter(device) as meter:
        for _ in range(10):
            x = x @ w
        assert meter.live_bytes == KIB  # the last; the first x existed before
    assert meter.peak_bytes == 2 * KIB


def test_views_share_their_storage(device: str) -> None:
    with MemoryMeter(device) as meter:
        a = block(device)
        views = [a.view(16, 16), a[3:9], a.t(), a.detach(), a.expand(4, 256), *a.split(16)]
        assert meter.live_bytes == KIB
        del a
        assert meter.live_bytes == KIB  # the views keep it
        del views
        assert meter.live_bytes == 0


def test_what_existed_before_is_not_counted(device: str) -> None:
    old = block(device)
    with MemoryMeter(device) as meter:
        views = [old.view(16, 16), *old.split(16)]
        old.add_(1).mul_(2)
        torch.add(old, 1, out=old)
        torch._foreach_add_([old], 1)
        old.detach()
        assert (meter.live_bytes, meter.peak_bytes) == (0, 0)
        del old, views
        assert meter.live_bytes == 0


def test_growth_in_place_is_counted(device: str) -> None:
    old = torch.ones(16, device=device)
    with MemoryMeter(device) as meter:
        a = torch.empty(0, device=device)
        a.resize_(256)
        assert meter.live_bytes == KIB
        a.resize_(512)
        assert meter.live_bytes == 2 * KIB
        out = torch.empty(0, device=device)
        torch.add(a, a, out=out)
        assert meter.live_bytes == 4 * KIB
        old.resize_(256)
        assert meter.live_bytes == 5 * KIB - 64  # what it has grown by
        del a, out, old
        assert meter.live_bytes == 0


def test_resizing_outputs_that_are_not_returned_first() -> None:
    with MemoryMeter("cpu") as meter:
        values, indices = torch.empty(0), torch.empty(0, dtype=torch.int64)
        torch.sort(block(), out=(values, indices))
        assert meter.live_bytes == 3 * KIB


def test_nested_outputs_and_mixed_dtypes(device: str) -> None:
    with MemoryMeter(device) as meter:
        pairs = block(device).sort()  # values in float32, indices in int64
        assert meter.live_bytes == 3 * KIB
        many = torch._foreach_add([block(device), block(device)], 1)
        assert meter.live_bytes == 5 * KIB
        del pairs, many
        assert meter.live_bytes == 0


def test_tensors_made_from_data_are_counted() -> None:
    with MemoryMeter("cpu") as meter:
        made = torch.tensor([1.0] * 256)
        assert made.sum() == 256
        assert meter.live_bytes == KIB


def test_sparse_tensors_are_skipped() -> None:
    with MemoryMeter("cpu") as meter:
        sparse = torch.eye(16).to_sparse()
        assert (sparse @ torch.ones(16, 16)).sum() == 256
        del sparse
    assert meter.peak_bytes > 0


def test_only_its_own_device_is_counted() -> None:
    with MemoryMeter("cpu") as cpu, MemoryMeter("meta") as meta:
        a, b = block("cpu"), torch.ones(512, device="meta")
        assert (cpu.live_bytes, meta.live_bytes) == (a.nbytes, b.nbytes)


def test_linear_layers_with_backward() -> None:
    """``n`` square layers keep ``n`` inputs; the backward adds the gradients."""
    n, d = 5, 16
    layers = nn.Sequential(*(nn.Linear(d, d, bias=False) for _ in range(n)))
    x = torch.ones(d, d, requires_grad=True)
    with MemoryMeter("cpu") as meter:
        y = layers(x)
        assert meter.live_bytes == n * KIB  # n - 1 saved and y
        y.backward(torch.ones_like(y))
        del y
        assert meter.live_bytes == (n + 1) * KIB  # gradients of the weights and of x
    assert meter.peak_bytes >= (n + 2) * KIB
    assert meter.peak_bytes <= (n + 4) * KIB


def test_checkpoint_recomputes_within_the_count() -> None:
    def segment(x: Tensor) -> Tensor:
        for _ in range(8):
            x = x.sin()
        return x

    def peak(with_checkpoint: bool) -> int:
        x = block().requires_grad_()
        with MemoryMeter("cpu") as meter:
            y = x
            for _ in range(4):
                y = checkpoint(segment, y, use_reentrant=False) if with_checkpoint else segment(y)
            y.sum().backward()
        return meter.peak_bytes

    assert peak(with_checkpoint=False) >= 32 * KIB
    # Four borders, eight recomputed values and a few gradients.
    assert 12 * KIB <= peak(with_checkpoint=True) <= 16 * KIB


class _Recomputed(torch.autograd.Function):
    """Calls backward inside its backward, as a checkpoint of its own would."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.detach().sin().cos()

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> Tensor:  # pyright: ignore
        (x,) = ctx.saved_tensors  # pyright: ignore[reportAttributeAccessIssue]
        leaf = x.detach().requires_grad_()
        with torch.enable_grad():
            y = leaf
            for _ in range(20):
                y = y.sin()
        y.backward(grad)
        assert leaf.grad is not None
        return leaf.grad


def test_backward_inside_backward_is_counted() -> None:
    x = block().requires_grad_()
    with MemoryMeter("cpu") as meter:
        _Recomputed.apply(x).sum().backward()
        assert meter.live_bytes == KIB  # x.grad
        assert 20 * KIB <= meter.peak_bytes <= 26 * KIB


def test_reset_peak_starts_from_what_is_live(device: str) -> None:
    with MemoryMeter(device) as meter:
        a, b = block(device), block(device)
        del b
        meter.reset_peak()
        assert meter.peak_bytes == KIB
        c = block(device)
        del a, c
        assert (meter.live_bytes, meter.peak_bytes) == (0, 2 * KIB)


def test_nested_meters_each_count_from_their_entry(device: str) -> None:
    with MemoryMeter(device) as outer:
        a = block(device)
        with MemoryMeter(device) as inner:
            b = block(device)
            inner.reset_peak()
            a.add_(1)
        del b
        c = block(device)
        del a, c
    assert (outer.peak_bytes, outer.live_bytes) == (2 * KIB, 0)
    assert (inner.peak_bytes, inner.live_bytes) == (KIB, KIB)  # as of its end


def test_numbers_stay_after_the_block(device: str) -> None:
    with MemoryMeter(device) as meter:
        a = block(device)
    del a
    b = block(device)
    assert b.nbytes == meter.peak_bytes == meter.live_bytes == KIB


def test_leaves_the_block_by_an_error() -> None:
    with pytest.raises(ZeroDivisionError), MemoryMeter("cpu") as meter:
        _ = block() / (1 // 0)
    assert meter.peak_bytes == KIB
    assert torch.utils._python_dispatch._len_torch_dispatch_stack() == 0


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode: type[torch.no_grad]) -> None:
    layer = nn.Linear(16, 16, bias=False)
    with mode(), MemoryMeter("cpu") as meter:
        x = torch.ones(16, 16)
        for _ in range(4):
            x = layer(x)
    assert (meter.peak_bytes, meter.live_bytes) == (2 * KIB, KIB)


def test_under_autocast() -> None:
    layer, x = nn.Linear(16, 16, bias=False), torch.ones(16, 16)
    with MemoryMeter("cpu") as meter, torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        # The output and the casts of x and of the weight; the latter stays cached.
        assert meter.peak_bytes == 3 * KIB // 2
    assert y.dtype is torch.bfloat16


def test_with_saved_tensors_hooks() -> None:
    x = block().requires_grad_()
    packed = list[int]()

    def pack(tensor: Tensor) -> Tensor:
        packed.append(tensor.nbytes)
        return tensor.to(torch.bfloat16)

    def unpack(tensor: Tensor) -> Tensor:
        return tensor.to(torch.float32)

    with MemoryMeter("cpu") as meter, torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        y = x
        for _ in range(4):
            y = y.sin()
        assert meter.live_bytes == KIB + 4 * KIB // 2  # y, and four halves
        y.sum().backward()
    assert packed == [KIB] * 4


@pytest.mark.parametrize("seed", range(5))
def test_random_programs_agree_with_a_count_of_all_held_storages(seed: int) -> None:
    rng = random.Random(seed)
    steps: list[Callable[[Tensor], Tensor | Sequence[Tensor]]] = [
        lambda t: torch.ones(rng.randint(1, 99)),
        lambda t: t + 1,
        lambda t: t.add_(1),
        lambda t: t.view(-1),
        lambda t: t[: t.numel() // 2 + 1],
        lambda t: t.chunk(3),
        lambda t: torch.cat([t, t]),
        lambda t: t.sort(),
        lambda t: torch.empty(0).resize_(rng.randint(1, 99)).fill_(1),
        lambda t: torch.add(t, 1, out=torch.empty(0)),
        lambda t: t.to(rng.choice([torch.float64, torch.bool, torch.float32])).float(),
        lambda t: nn.functional.linear(t.double(), torch.ones(3, t.numel(), dtype=torch.float64)),
    ]
    with MemoryMeter("cpu") as meter:
        held = [torch.ones(7)]
        for _ in range(300):
            made = rng.choice(steps)(rng.choice(held))
            held += [made] if isinstance(made, Tensor) else list(made)
            del made
            rng.shuffle(held)
            del held[rng.randint(1, 12) :]
            storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in held}
            assert meter.live_bytes == sum(storages.values())


def test_a_recurrent_layer_leaves_its_gradients() -> None:
    module, x = nn.LSTM(8, 16, 2), torch.ones(5, 3, 8)
    with MemoryMeter("cpu") as meter:
        module(x)[0].sum().backward()
        gradients = [parameter.grad for parameter in module.parameters()]
        assert meter.live_bytes == sum(grad.nbytes for grad in gradients if grad is not None)
    assert meter.peak_bytes > 2 * meter.live_bytes


def test_overhead_stays_small() -> None:
    """A guard against a slow path (a pytree flattening per operator, dynamo): not a benchmark."""

    def work() -> float:
        x = torch.ones(4)
        started = time.perf_counter()
        for _ in range(2000):
            x = x + 1
        return (time.perf_counter() - started) / 2000

    bare = min(work() for _ in range(3))
    with MemoryMeter("cpu"):
        metered = min(work() for _ in range(3))
    assert metered - bare < 60e-6  # about 4 microseconds on an idle core


@pytest.mark.parametrize("name", ["mps", "xpu"])
def test_refuses_devices_it_cannot_measure(name: str) -> None:
    with pytest.raises(InputError, match="use a 'cuda', 'cpu' or 'meta' device"):
        MemoryMeter(name)


def test_refuses_cuda_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="no CUDA device is available"):
        MemoryMeter("cuda")


def test_is_entered_once() -> None:
    meter = MemoryMeter("cpu")
    with meter:
        pass
    with pytest.raises(InputError, match="only once"), meter:
        pass


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_cuda_counts_the_allocator_with_nested_meters() -> None:
    old = torch.ones(2**18, device="cuda")
    with MemoryMeter("cuda") as outer:
        a = torch.ones(2**20, device="cuda")
        b = torch.ones(2**20, device="cuda")
        del a
        with MemoryMeter("cuda:0") as inner:
            assert (inner.live_bytes, inner.peak_bytes) == (0, 0)
            c = torch.ones(2**18, device="cuda")
            inner.reset_peak()
            assert inner.peak_bytes == inner.live_bytes == c.nbytes
        assert outer.live_bytes == b.nbytes + c.nbytes
        outer_peak = outer.peak_bytes
        del old
        assert outer.live_bytes == b.nbytes + c.nbytes - 2**20
    assert outer_peak == outer.peak_bytes == 2 * 2**22
    assert (inner.peak_bytes, inner.live_bytes) == (2**20, 2**20)
