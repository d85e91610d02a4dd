"""Attention document by document on a CPU, against SDPA with the mask that it stands for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from transformers.integrations.sdpa_attention import sdpa_attention_forward  # noqa: E402

from dus_cli.models import attention  # noqa: E402

LENGTH = 24
LAYER = SimpleNamespace(is_causal=True, num_key_value_groups=2)


def _mask(*starts: tuple[int, ...], window: int = LENGTH) -> Any:
    """(rows, 1, length, length): causal within documents, which begin at these places, and
    within a window.
    """
    rows = []
    for row in starts:
        number = torch.zeros(LENGTH, dtype=torch.long)
        number[list(row)] = 1
        number = number.cumsum(0)
        rows.append((number[:, None] == number[None, :]).tril().triu(1 - window))
    return torch.stack(rows)[:, None]


def _inputs(rows: int, dtype: Any = torch.float32) -> list[Any]:
    torch.manual_seed(0)
    return [
        torch.randn(rows, heads, LENGTH, 8, dtype=dtype, requires_grad=True) for heads in (4, 2, 2)
    ]


def _attend(inputs: list[Any], mask: Any, **options: Any) -> Any:
    query, key, value = inputs
    return attention._attention(LAYER, query, key, value, mask, **options)[0]


def _gradients(found: Any, inputs: list[Any]) -> list[Any]:
    torch.manual_seed(1)
    weights = torch.randn(found.shape).bfloat16().to(found.dtype)
    return list(torch.autograd.grad((found * weights).sum(), inputs))


@pytest.fixture
def lengths_asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bool]]:
    """(length, whether with a mask) of each call that reaches torch's kernel."""
    asked: list[tuple[int, bool]] = []
    kernel = attention._kernel

    def spy(query: Any, *parts: Any, **options: Any) -> Any:
        asked.append((query.shape[2], options.get("attn_mask") is not None))
        return kernel(query, *parts, **options)

    monkeypatch.setattr(attention, "_kernel", spy)
    return asked


def test_documents_one_by_one_attend_as_under_their_mask(
    lengths_asked: list[tuple[int, bool]],
) -> None:
    inputs, mask = _inputs(2), _mask((5, 6), (17,))
    found = _attend(inputs, mask)
    expected = sdpa_attention_forward(LAYER, *inputs, mask)[0]
    assert torch.allclose(found, expected, atol=1e-6)
    assert lengths_asked == [(5, False), (1, False), (18, False), (17, False), (7, False)]
    for ours, theirs in zip(_gradients(found, inputs), _gradients(expected, inputs), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("mask", [None, _mask((5, 6))], ids=["no mask", "documents"])
def test_gradients_in_bf16_are_within_a_hundredth_of_the_exact_ones(
    mask: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_BLOCK", 7)
    inputs = _inputs(1, torch.bfloat16)
    exact = [each.detach().double().requires_grad_() for each in inputs]
    expected = _gradients(sdpa_attention_forward(LAYER, *exact, mask)[0], exact)
    found = _gradients(_attend(inputs, mask), inputs)
    for ours, right in zip(found, expected, strict=True):
        assert (ours - right).norm() < 0.01 * right.norm()


def test_large_scores_of_keys_after_their_query_do_no_harm() -> None:
    query, key, value = _inputs(1)
    inputs = [query, key.detach().mul(300).requires_grad_(), value]
    found = _gradients(_attend(inputs, None), inputs)
    expected = _gradients(sdpa_attention_forward(LAYER, *inputs, None)[0], inputs)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    "mask", [_mask((5,), window=4), torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool), None]
)
def test_under_any_other_mask_attention_is_that_of_torch(
    mask: Any, lengths_asked: list[tuple[int, bool]]
) -> None:
    inputs = _inputs(1)
    found = _attend(inputs, mask)
    expected = sdpa_attention_forward(LAYER, *inputs, mask)[0]
    assert torch.equal(found, expected)
    assert lengths_asked == [(LENGTH, mask is not None)]
    for ours, theirs in zip(_gradients(found, inputs), _gradients(expected, inputs), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize(
    "options", [{"position_bias": torch.zeros(1, 4, LENGTH, LENGTH)}, {"is_causal": False}]
)
def test_what_the_kernel_does_not_compute_is_left_to_transformers(
    options: dict[str, Any], lengths_asked: list[tuple[int, bool]]
) -> None:
    inputs = _inputs(1)
    found = _attend(inputs, None, **options)
    assert torch.equal(found, sdpa_attention_forward(LAYER, *inputs, None, **options)[0])
    assert lengths_asked == []
