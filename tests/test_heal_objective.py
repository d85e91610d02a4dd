"""The loss, the schedule and the rounding of `dus heal`, against plain PyTorch."""

from __future__ import annotations

import math
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from dus_cli.errors import HealError  # noqa: E402
from dus_cli.heal.run import RecipePlan  # noqa: E402
from dus_cli.heal.train import optimizer as adam  # noqa: E402
from dus_cli.heal.train import schedule  # noqa: E402
from dus_cli.heal.train.gains import Gains  # noqa: E402
from dus_cli.heal.train.masters import joined, split, stochastically_rounded  # noqa: E402
from dus_cli.models import losses  # noqa: E402
from dus_cli.models.devices import computes_in_bf16  # noqa: E402
from dus_cli.models.losses import Head, Teaching, check_head, loss_sums  # noqa: E402
from dus_cli.models.team import Team  # noqa: E402

VOCAB, WIDTH = 97, 16


def _inputs(bias: bool = False, seed: int = 0) -> tuple[Any, Any, Any]:
    torch.manual_seed(seed)
    hidden = torch.randn(2, 150, WIDTH, requires_grad=True)
    output = torch.nn.Linear(WIDTH, VOCAB, bias=bias)
    labels = torch.randint(0, VOCAB, (2, 150))
    labels[0, :40] = -100
    return hidden, output, labels


def _reference(hidden: Any, output: Any, labels: Any, head: Head, teaching: Teaching | None) -> Any:
    """The same with full logits and autograd."""
    logits = output(hidden) * head.scale
    if head.cap is not None:
        logits = head.cap * torch.tanh(logits / head.cap)
    logits, labels = logits.flatten(0, 1), labels.flatten()
    loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    if teaching is None:
        return loss, loss, torch.zeros(())
    raw = teaching.output(teaching.hidden).detach() * head.scale
    theirs = torch.log_softmax(raw, -1)
    if head.cap is not None:
        theirs = torch.log_softmax(head.cap * torch.tanh(raw / head.cap), -1)
    each = (theirs.exp() * (theirs - torch.log_softmax(logits, -1))).sum(-1)
    divergence = each[labels != -100].sum()
    return (1 - teaching.weight) * loss + teaching.weight * divergence, loss, divergence


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    # 300 rows: four whole chunks and a part
    monkeypatch.setattr(losses, "chunk_rows", lambda *_: 64)
    # of each chunk: two whole blocks and a part
    monkeypatch.setattr(losses, "block_rows", lambda *_: 24)


@pytest.mark.parametrize(
    "head", [Head(), Head(scale=0.25), Head(cap=3.0), Head(scale=2.0, cap=5.0)]
)
@pytest.mark.parametrize("weight", [None, 0.0, 0.3, 1.0])
@pytest.mark.parametrize("bias", [False, True])
def test_loss_and_gradients_are_those_of_full_logits(
    head: Head, weight: float | None, bias: bool
) -> None:
    hidden, output, labels = _inputs(bias)
    teaching = None
    if weight is not None:
        teaching = Teaching(
            torch.randn(300, WIDTH), torch.nn.Linear(WIDTH, VOCAB, bias=bias), head, weight
        )
    parameters = [hidden, *output.parameters()]
    expected = _reference(hidden, output, labels, head, teaching)
    expected_gradients = torch.autograd.grad(expected[0], parameters)
    found = loss_sums(hidden, output, labels, head, teaching)
    gradients = torch.autograd.grad(found[0], parameters)
    for ours, theirs in zip(found, expected, strict=True):
        assert float(ours.detach()) == pytest.approx(float(theirs.detach()), rel=1e-5, abs=1e-3)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bias", [False, True])
def test_a_measurement_multiplies_once_and_gives_the_same_sums(bias: bool) -> None:
    hidden, output, labels = _inputs(bias)
    expected = loss_sums(hidden, output, labels, Head())[1]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        _, found, _ = loss_sums(hidden, output, labels, Head())
    assert torch.equal(found, expected)
    assert counter.get_total_flops() == 2 * 300 * WIDTH * VOCAB


def test_a_teacher_that_agrees_has_no_divergence() -> None:
    hidden, output, labels = _inputs()
    teaching = Teaching(hidden.detach().flatten(0, 1), output, Head(), 1.0)
    loss, _, divergence = loss_sums(hidden, output, labels, Head(), teaching)
    assert float(divergence.detach()) == pytest.approx(0.0, abs=1e-3)
    assert torch.autograd.grad(loss, hidden)[0].abs().max() < 1e-5


def test_a_frozen_head_gets_no_gradient_and_the_hidden_states_the_same() -> None:
    hidden, output, labels = _inputs()
    expected = torch.autograd.grad(loss_sums(hidden, output, labels, Head())[0], hidden)[0]
    output.requires_grad_(False)
    assert torch.equal(
        torch.autograd.grad(loss_sums(hidden, output, labels, Head())[0], hidden)[0], expected
    )


def test_an_unknown_way_to_logits_is_refused() -> None:
    check_head(3.0, 3.001, "llama")
    with pytest.raises(HealError, match=r"3\.0000, transformers' is 9\.0000"):
        check_head(3.0, 9.0, "odd")
    with pytest.raises(HealError):
        check_head(math.nan, 3.0, "odd")


def test_weights_that_give_no_loss_are_called_damaged() -> None:
    with pytest.raises(HealError, match=r"loss before training is nan: its weights are damaged"):
        check_head(math.nan, math.nan, "llama")


def test_stochastic_rounding_is_right_on_average_and_exact_where_it_can_be() -> None:
    generator = torch.Generator().manual_seed(1)
    step = 2.0**-7  # of bf16 at 1
    value = torch.full((200_000,), 1.0 + 0.3 * step)
    rounded = stochastically_rounded(value, generator)
    assert rounded.dtype == torch.bfloat16
    assert set(rounded.float().tolist()) == {1.0, 1.0 + step}
    assert float(rounded.double().mean()) == pytest.approx(1.0 + 0.3 * step, abs=step / 100)
    exact = torch.tensor([0.0, -1.5, 3.0e-5, 1e30], dtype=torch.bfloat16)
    assert torch.equal(stochastically_rounded(exact.float(), generator), exact)


def test_a_master_is_its_weight_and_16_bits_more() -> None:
    torch.manual_seed(0)
    master = torch.cat([torch.randn(200_000), torch.tensor([0.0, -0.0, 1e30, -3e-39])])
    half_way = torch.tensor([1.0 + 2**-8, 1.0 + 3 * 2**-8, -1.0 - 2**-8])  # between bf16 numbers
    master = torch.cat([master[master.view(torch.int32) % 2**16 != 2**15], half_way])
    weight = torch.empty(master.shape, dtype=torch.bfloat16)
    lower = torch.empty(master.shape, dtype=torch.int16)
    split(master, weight, lower)
    assert torch.equal(weight, master.bfloat16())
    back = joined(weight, lower)
    assert torch.equal(back[:-3].view(torch.int32), master[:-3].view(torch.int32))
    # rounded down, up, down: only where it is down, one fp32 number nearer to the weight
    assert back[-3:].tolist() == [1.0 + 2**-8 - 2**-23, 1.0 + 3 * 2**-8, -1.0 - 2**-8 + 2**-23]
    assert torch.equal(back.bfloat16(), weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_updates_in_parts_are_those_of_torchs_adamw_over_fp32_masters(
    monkeypatch: pytest.MonkeyPatch, dtype: Any
) -> None:
    monkeypatch.setitem(adam._PART, "cpu", 40)
    team = Team(0, 1, 1, torch.device("cpu"), None, None)
    torch.manual_seed(0)
    parameters = {
        name: torch.nn.Parameter(torch.randn(shape).to(dtype))
        for name, shape in {"matrix": (33, 7), "norm": (7,), "number": ()}.items()
    }
    theirs = {name: each.detach().float() for name, each in parameters.items()}
    expected = torch.optim.AdamW(
        [
            {"params": [each], "weight_decay": 0.1 if each.ndim > 1 else 0.0}
            for each in theirs.values()
        ],
        lr=0.01,
        betas=(0.9, 0.95),
        fused=True,
    )
    ours = adam.Optimizer(
        parameters, _recipe(lr=0.01, weight_decay=0.1), team, masters=True, num_replicas=1
    )
    ours.prepare(parameters)
    for step in range(20):
        for name, parameter in parameters.items():
            gradient = torch.randn(parameter.shape).to(dtype)
            theirs[name].grad = gradient.float()
            (gradient * parameter).sum().backward()
        ours.step(1.0, norm=0.0, step=step)
        expected.step()
    assert ours.steps() == dict.fromkeys(parameters, 20)
    for name, parameter in parameters.items():
        trained = ours.trained(name)
        assert trained is not None
        assert trained.dtype == torch.float32
        torch.testing.assert_close(trained, theirs[name], rtol=1e-6, atol=1e-7)
        assert torch.equal(parameter, trained.to(dtype))


def _recipe(**fields: Any) -> RecipePlan:
    values: dict[str, Any] = {
        "lr": 1e-3,
        "gain_lr": 0.0,
        "schedule": "wsd",
        "warmup_steps": 4,
        "decay_steps": 10,
        "weight_decay": 0.0,
        "betas": (0.9, 0.95),
        "grad_clip": 1.0,
        "seed": 0,
        "train_layers": None,
        "distill_weight": 0.0,
        "distill_steps": 100,
        "max_skipped": 10,
    }
    return RecipePlan(**(values | fields))


def test_each_group_learns_at_its_share_of_the_rate() -> None:
    team = Team(0, 1, 1, torch.device("cpu"), None, None)
    scales = {"whole": 1.0, "tenth": 0.1, "default": None}
    parameters = {name: torch.nn.Parameter(torch.zeros(3, 3)) for name in scales}
    given = {name: scale for name, scale in scales.items() if scale is not None}
    optimizer = adam.Optimizer(
        parameters, _recipe(lr=0.5), team, masters=True, num_replicas=1, scales=given
    )
    optimizer.prepare(parameters)
    for parameter in parameters.values():
        (3 * parameter).sum().backward()
    optimizer.step(1.0, norm=0.0, step=0)
    moved = {name: float(parameter.detach().mean()) for name, parameter in parameters.items()}
    # Adam's first step is as long as its rate, whatever the gradient
    assert moved == pytest.approx({"whole": -0.5, "tenth": -0.05, "default": -0.5})


def test_wsd_warms_up_stays_and_falls_to_nothing_after_the_last_step() -> None:
    rates = [schedule.rate_share(_recipe(), step, 100) for step in range(100)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4:90] == [1.0] * 86
    assert rates[90] == pytest.approx(10 / 11)
    assert rates[99] == pytest.approx(1 / 11)


def test_constant_stays_after_the_warm_up() -> None:
    rates = [schedule.rate_share(_recipe(schedule="constant"), step, 100) for step in range(100)]
    assert rates == [0.25, 0.5, 0.75] + [1.0] * 97


def test_gains_keep_their_rate_for_the_repair_and_then_fade() -> None:
    recipe = _recipe(gain_lr=0.06)
    assert [schedule.gain_rate(recipe, step) for step in (0, 31)] == [0.06, 0.06]
    assert schedule.gain_rate(recipe, 3199) == pytest.approx(0.0006)


def test_distillation_fades_out_where_it_was_told_to() -> None:
    recipe = _recipe(distill_weight=0.5, distill_steps=40)
    weights = [schedule.distill_weight(recipe, step) for step in (0, 20, 39, 40, 99)]
    assert weights == pytest.approx([0.5, 0.25, 0.0125, 0.0, 0.0])


def test_gains_follow_adam_and_leave_what_does_not_learn() -> None:
    gains = Gains(
        {
            name: torch.empty(4, 4)
            for name in ("a.o_proj.weight", "a.q_proj.weight", "b.down_proj.weight")
        }
    )
    assert gains.names == ["a.o_proj.weight", "b.down_proj.weight"]
    # Adam's first step has the size of its rate whatever the gradient's, and goes against its sign.
    assert gains.factors([5.0, None], [0.1, 0.1]) == pytest.approx([math.exp(-0.1), 1.0])
    assert gains.factors([5.0, -3.0], [0.1, 0.1]) == pytest.approx([math.exp(-0.1), math.exp(0.1)])


def test_a_cpu_beside_an_accelerator_is_asked_for_its_own_bf16(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    assert [computes_in_bf16(), computes_in_bf16("cuda"), computes_in_bf16("cpu")] == [
        True,
        True,
        False,
    ]
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert not computes_in_bf16()
