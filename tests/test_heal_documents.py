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


def _inputs(rows: int) -> list[Any]:
    torch.manual_seed(0)
    return [torch.randn(rows, heads, LENGTH, 8, requires_grad=True) for heads in (4, 2, 2)]


@pytest.fixture
def lengths_asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bool]]:
    """(length, whether with a mask) of each call that reaches transformers."""
    asked: list[tuple[int, bool]] = []

    def spy(module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any) -> Any:
        asked.append((query.shape[2], mask is not None))
        return sdpa_attention_forward(module, query, key, value, mask, **options)

    monkeypatch.setattr(attention, "sdpa_attention_forward", spy)
    return asked


def test_documents_one_by_one_attend_as_under_their_mask(
    lengths_asked: list[tuple[int, bool]],
) -> None:
    query, key, value = inputs = _inputs(2)
    mask = _mask((5, 6), (17,))
    found = attention._attention(LAYER, query, key, value, mask)[0]
    expected = sdpa_attention_forward(LAYER, query, key, value, mask)[0]
    assert torch.allclose(found, expected, atol=1e-6)
    assert lengths_asked == [(5, False), (1, False), (18, False), (17, False), (7, False)]
    weights = torch.randn_like(found)
    for ours, theirs in zip(
        torch.autograd.grad((found * weights).sum(), inputs),
        torch.autograd.grad((expected * weights).sum(), inputs),
        strict=True,
    ):
        assert torch.allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize(
    "mask", [_mask((5,), window=4), torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool), None]
)
def test_a_mask_that_says_more_or_less_is_left_to_transformers(
    mask: Any, lengths_asked: list[tuple[int, bool]]
) -> None:
    query, key, value = _inputs(1)
    found = attention._attention(LAYER, query, key, value, mask)[0]
    assert torch.equal(found, sdpa_attention_forward(LAYER, query, key, value, mask)[0])
    assert lengths_asked == [(LENGTH, mask is not None)]
