"""The written-out attention against torch's own, values and gradients."""

import pytest
import torch
import torch.nn.functional as F

from beit import cpu_attention


def reference(qkv, bias, num_heads):
    B, T, _ = qkv.shape
    q, k, v = qkv.view(B, T, 3, num_heads, -1).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).reshape(B, T, -1)


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("shape", [(2, 5, 3, 4), (1, 197, 2, 8), (3, 1, 1, 2)])
def test_values_and_gradients_equal_those_of_torch(shape, biased):
    batch, tokens, heads, width = shape
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(batch, tokens, 3 * heads * width, generator=generator, dtype=torch.float64)
    bias = torch.randn(1, heads, tokens, tokens, generator=generator, dtype=torch.float64)
    grad = torch.randn(batch, tokens, heads * width, generator=generator, dtype=torch.float64)
    results = []
    for function in (cpu_attention.attention, reference):
        inputs = [qkv.clone().requires_grad_(), bias.clone().requires_grad_() if biased else None]
        out = function(*inputs, heads)
        # A gradient that is not contiguous, as a following transpose makes it.
        out.backward(grad.transpose(0, 1).contiguous().transpose(0, 1))
        results.append((out.detach(), *(each.grad for each in inputs if each is not None)))
    torch.testing.assert_close(results[0], results[1], atol=1e-12, rtol=1e-10)


def test_gradients_agree_with_finite_differences():
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(2, 3, 12, generator=generator, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(1, 2, 3, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b: cpu_attention.attention(a, b, 2), (qkv, bias))


@pytest.mark.parametrize("biased", [True, False])
def test_autocast_rounds_as_often_as_that_of_torch(biased):
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(4, 65, 96, generator=generator)
    bias = torch.randn(1, 2, 65, 65, generator=generator) if biased else None
    grad = torch.randn(4, 65, 32, generator=generator)
    exact, *rounded = (
        _results(function, qkv.to(dtype), bias, grad.to(dtype))
        for function, dtype in (
            (reference, torch.float32),
            (cpu_attention.attention, torch.bfloat16),
            (reference, torch.bfloat16),
        )
    )
    for one, ours, theirs in zip(exact, *rounded, strict=True):
        error, usual = (float((r.float() - one).norm() / one.norm()) for r in (ours, theirs))
        assert 1e-4 < usual < 0.01
        assert error < 1.2 * usual


def _results(function, qkv, bias, grad):
    inputs = [each.clone().requires_grad_() for each in (qkv, bias) if each is not None]
    with torch.autocast("cpu", torch.bfloat16, enabled=qkv.dtype == torch.bfloat16):
        out = function(inputs[0], *(inputs[1:] or [None]), 2)
    out.backward(grad)
    assert all(each.grad.dtype == torch.float32 for each in inputs[1:])
    return out.detach(), *(each.grad for each in inputs)


def test_it_is_for_eager_training_alone():
    qkv = torch.zeros(1, 2, 6, requires_grad=True)
    bias = torch.zeros(1, 1, 2, 2, requires_grad=True)
    assert cpu_attention.wanted(qkv, bias)
    assert not cpu_attention.wanted(qkv, None)
    assert not cpu_attention.wanted(qkv, bias.detach())
    with torch.no_grad():
        assert not cpu_attention.wanted(qkv, bias)
    for each in (bias, None):
        assert cpu_attention.wanted(qkv.bfloat16(), each)
        with torch.no_grad():
            assert not cpu_attention.wanted(qkv.bfloat16(), each)
