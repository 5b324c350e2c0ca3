"""The cost model against the meter, on real layers: predicted peaks are measured peaks, budgets hold."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import magc
from magc import MemoryMeter, Plan
from magc.errors import BudgetError
from magc.function import apply_grid
from magc.nn import Mamba2Block, Mamba2Config, Mamba2LM
from magc.profile import profile
from magc.request import make_request, make_schedule
from magc.schedule import Action
from magc.simulate import simulate
from magc.stack import build_stack

WITHIN = 0.10
MAKERS: dict[str, Callable[[int], nn.Module]] = {
    "mamba2": lambda d: Mamba2Block(d, d_state=16, headdim=16, chunk_size=32),
    "lstm": lambda d: nn.LSTM(d, d, batch_first=True),
    "gru": lambda d: nn.GRU(d, d, batch_first=True),
    "mlp": lambda d: magc.stateless(
        nn.Sequential(nn.LayerNorm(d), nn.Linear(d, 3 * d), nn.GELU(), nn.Linear(3 * d, d))
    ),
}


def _first(y: Any) -> Tensor:
    return y if isinstance(y, Tensor) else y[0]


def _case(seed: int) -> tuple[list[nn.Module], Tensor, Plan, str]:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    width = rng.choice([16, 32, 64])
    kinds = rng.choice([["mamba2"], ["lstm"], ["gru"], ["lstm", "gru", "mlp"]])
    layers = [MAKERS[rng.choice(kinds)](width) for _ in range(rng.randint(2, 7))]
    seq_len = rng.choice([96, 128, 171])
    x = torch.randn(rng.randint(1, 3), seq_len, width, requires_grad=rng.random() < 0.5)
    plan = Plan(
        layers=rng.choice([1, 2, 3, None]),
        tokens=rng.choice([16, 32, 50, 100, None]),
        borders=rng.choice(["device", "disk", "rebuild"]),
        states=rng.choice(["device", "disk"]),
        keep=rng.choice([1, 3, "all"]),
        snapshots=rng.choice([None, None, 1, 2]),
    )
    return layers, x, plan, f"{'+'.join(kinds)} d={width} S={seq_len} {plan}"


def _metered(step: Callable[[], Any], params: list[Tensor]) -> int:
    """The peak of a forward and backward, the second of two: the first learns what it must about the layers.

    ``step`` returns the loss, or the stack's result, which is held to the end.
    """
    for _ in range(2):
        for param in params:
            param.grad = None
        with MemoryMeter("cpu") as meter:
            made = step()
            loss = made if isinstance(made, Tensor) else _first(made[0]).sum()
            loss.backward()
    return meter.peak_bytes


@pytest.mark.parametrize("seed", range(24))
def test_predicted_peak_is_the_metered_peak(seed: int) -> None:
    layers, x, plan, label = _case(seed)
    stack = magc.GridCheckpoint(layers, plan)
    params = [x, *stack.parameters()]
    measured = _metered(lambda: stack(x), params)
    predicted = magc.forecast(plan, layers, x).forecast
    assert predicted is not None
    assert predicted.peak_bytes == pytest.approx(measured, rel=WITHIN), label


def test_the_timeline_is_the_executed_one_action_by_action() -> None:
    torch.manual_seed(0)
    layers = [Mamba2Block(32, d_state=16, headdim=16, chunk_size=32) for _ in range(4)]
    x = torch.randn(1, 256, 32, requires_grad=True)
    plan = Plan(layers=2, tokens=64, borders="disk", keep=3)
    stack = build_stack(layers)
    seen: list[tuple[Action, int, int]] = []
    for _ in range(2):
        seen.clear()
        x.grad = None
        for layer in layers:
            layer.zero_grad()
        with MemoryMeter("cpu") as meter:

            def watch(action: Action, meter: MemoryMeter = meter) -> None:
                seen.append((action, meter.live_bytes, meter.peak_bytes))
                meter.reset_peak()

            request = make_request(stack, x, None, {}, observer=watch)
            schedule = make_schedule(request, plan)
            result = apply_grid(request, schedule)
            sum(leaf.sum() for leaf in result.y.tensors).backward()  # pyright: ignore[reportAttributeAccessIssue]
    timeline = simulate(schedule, profile(request, [64]), timeline=True).timeline
    assert [step.action for step in timeline] == [action for action, _, _ in seen]
    for step, (_, live, peak) in zip(timeline, seen, strict=True):
        assert step.live_bytes == pytest.approx(live, rel=0.05, abs=4096), step.action
        assert step.peak_bytes == pytest.approx(peak, rel=0.05, abs=4096), step.action


def test_stem_head_and_states_are_predicted_too() -> None:
    torch.manual_seed(0)
    model = Mamba2LM(Mamba2Config(d_model=32, n_layer=4, vocab_size=100, d_state=16, headdim=16))
    ids = torch.randint(0, 100, (2, 512))
    targets = ids.roll(-1, 1)
    for plan in (Plan.none(), Plan.per_layer(), Plan.sqrt(4), Plan.sequence(128), Plan(layers=2, tokens=256)):
        stack = magc.GridCheckpoint(model.layers, plan)
        params: list[Tensor] = list(model.parameters())
        measured = _metered(lambda s=stack: s.loss(ids, targets, stem=model.stem, head=model.head), params)
        found = magc.forecast(plan, list(model.layers), ids, stem=model.stem, head=model.head, targets=targets).forecast
        assert found is not None
        assert found.peak_bytes == pytest.approx(measured, rel=WITHIN), plan


@pytest.mark.parametrize("kind", ["mamba2", "lstm", "mlp+gru"])
def test_the_metered_peak_stays_within_the_budget(kind: str) -> None:
    torch.manual_seed(0)
    layers = [MAKERS[name](32) for name in kind.split("+") * (4 // len(kind.split("+")))]
    x = torch.randn(2, 128, 32, requires_grad=True)
    with pytest.raises(BudgetError) as raised:
        magc.plan(layers, x, budget=1000)
    least = int(str(raised.value).split("(budget=")[1].split(")")[0])
    times = []
    for factor in (1.0, 2, 50):
        budget = int(least * factor)
        stack = magc.GridCheckpoint(layers, budget=budget)
        params: list[Tensor] = [x, *stack.parameters()]
        assert _metered(lambda s=stack: s(x), params) <= budget
        plan = stack.plan_for(x)
        assert plan.forecast is not None
        times.append(plan.forecast.estimate.forwards_per_cell)
    assert times[-1] == 1.0


def test_a_plan_is_made_once_per_shape() -> None:
    layers = [nn.GRU(8, 8, batch_first=True)]
    stack = magc.GridCheckpoint(layers, budget="50MB")
    x = torch.randn(1, 64, 8)
    assert stack.plan_for(x) is stack.plan_for(torch.randn(1, 64, 8))
    assert stack.plan_for(torch.randn(1, 65, 8)) is not stack.plan_for(x)


def test_measuring_leaves_no_trace() -> None:
    layers = [nn.GRU(8, 8, batch_first=True), magc.stateless(nn.Dropout(0.5))]
    x = torch.randn(1, 64, 8, requires_grad=True)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    magc.plan(layers, x, budget="50MB")
    assert torch.equal(torch.get_rng_state(), before)
    assert x.grad is None
    assert all(param.grad is None for layer in layers for param in layer.parameters())


class Slow(nn.Module):
    """A layer that takes its time, by the token, and at each length's first call as long as a compiler does."""

    def __init__(self, seconds: float, compiles: float = 0.0) -> None:
        super().__init__()
        self.mix = nn.Linear(8, 8)
        self.seconds, self.compiles, self.lengths = seconds, compiles, set[int]()

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if x.shape[1] not in self.lengths:
            time.sleep(self.compiles)
        self.lengths.add(x.shape[1])
        time.sleep(self.seconds * x.shape[1])
        y = self.mix(x)
        return y, y[:, -1]


def test_lengths_that_would_take_too_long_are_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan has longer segments, and is extrapolated from those that there is time for."""
    monkeypatch.setattr("magc.profile.PROFILE_SECONDS", 0.5)
    x = torch.randn(1, 4096, 8)
    fast, compiled, slow = Slow(0.0), Slow(0.0, compiles=0.5), Slow(2e-4)
    for layer in (fast, compiled, slow):
        made = magc.plan([layer], x, budget="1GiB")
        assert made.grid(1, 4096).tokens.part_length(0) > 1024
    assert max(fast.lengths) == max(compiled.lengths) == 4096
    assert max(slow.lengths) < 1024


def test_meta_layers_are_measured_without_memory() -> None:
    with torch.device("meta"):
        layers = [Mamba2Block(256) for _ in range(3)]
        x = torch.empty(1, 512, 256, requires_grad=True)
    on_meta = magc.forecast(Plan(layers=1, tokens=128), layers, x).forecast
    real = [Mamba2Block(256) for _ in range(3)]
    on_cpu = magc.forecast(Plan(layers=1, tokens=128), real, torch.randn(1, 512, 256, requires_grad=True)).forecast
    assert on_meta is not None
    assert on_cpu is not None
    assert on_meta.peak_bytes == pytest.approx(on_cpu.peak_bytes, rel=0.02)
    assert on_meta.estimate.seconds > 0


@pytest.mark.gpu
@pytest.mark.parametrize(
    "plan",
    [
        Plan.none(),
        Plan.per_layer(),
        Plan(layers=2, tokens=1024),
        Plan(layers=4, tokens=1024, borders="host", states="host"),
        Plan(tokens=1024, states="disk"),
        Plan(layers=2, tokens=512, borders="rebuild", states="host", keep=9),
        Plan(tokens=512, snapshots=2),
    ],
    ids=str,
)
def test_predicted_peak_on_cuda(plan: Plan) -> None:
    torch.manual_seed(0)
    config = Mamba2Config(d_model=512, n_layer=8, vocab_size=1000)
    model = Mamba2LM(config, device="cuda", dtype=torch.bfloat16)
    ids = torch.randint(0, 1000, (1, 4096))
    targets = ids.roll(-1, 1)
    stack = magc.GridCheckpoint(model.layers, plan)
    for _ in range(2):
        model.zero_grad()
        with MemoryMeter("cuda") as meter:
            stack.loss(ids, targets, stem=model.stem, head=model.head).backward()
    found = magc.forecast(plan, list(model.layers), ids, stem=model.stem, head=model.head, targets=targets).forecast
    assert found is not None
    assert found.peak_bytes == pytest.approx(meter.peak_bytes, rel=WITHIN)


@pytest.mark.gpu
def test_budget_holds_on_cuda() -> None:
    torch.manual_seed(0)
    model = Mamba2LM(Mamba2Config(d_model=512, n_layer=8, vocab_size=1000), device="cuda", dtype=torch.bfloat16)
    ids = torch.randint(0, 1000, (1, 8192))
    for budget in ("400MiB", "800MiB", "4GiB"):
        stack = magc.GridCheckpoint(model.layers, budget=budget, host_budget="2GiB")
        peaks = []
        for _ in range(2):
            model.zero_grad()
            with MemoryMeter("cuda") as meter:
                stack.loss(ids, ids.roll(-1, 1), stem=model.stem, head=model.head).backward()
            peaks.append(meter.peak_bytes)
        assert stack.budget is not None
        assert peaks[-1] <= stack.budget
