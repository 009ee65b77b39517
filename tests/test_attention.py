"""Attention equals its formula in every layout and size, forwards and backwards, by both of its implementations."""

import pytest
import torch
import torch.nn.functional as F

from tiny_diffusion.models import attention
from tiny_diffusion.models.attention import attend

LAYOUTS = [torch.contiguous_format, torch.channels_last]


def by_the_formula(q, k, v, head_width):
    """Vaswani et al. (2017), eq. 1, head by head and pixel by pixel."""
    out = torch.empty_like(v)
    for image in range(len(q)):
        for first in range(0, q.shape[1], head_width):
            rows = slice(first, first + head_width)
            a, b, c = (x[image, rows].flatten(1).T for x in (q, k, v))
            out[image, rows] = ((a @ b.T / head_width**0.5).softmax(1) @ c).T.unflatten(1, q.shape[2:])
    return out


def images(size, layout=torch.contiguous_format, channels=32):
    random = torch.Generator().manual_seed(0)
    shape = (3, channels, *size)
    return [
        torch.randn(shape, generator=random, dtype=torch.double).to(memory_format=layout).requires_grad_()
        for _ in range(3)
    ]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("head_width", [1, 4, 16, 32])
@pytest.mark.parametrize("size", [(1, 1), (3, 5), (7, 7)])
def test_attention_is_its_formula(size, head_width, layout):
    torch.testing.assert_close(
        attend(*images(size, layout), head_width), by_the_formula(*images(size), head_width), rtol=1e-10, atol=1e-12
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("scores_at_once", [1, 500, 10**9])
def test_gradients_are_those_of_torch_however_few_heads_at_a_time(monkeypatch, layout, scores_at_once):
    monkeypatch.setattr(attention, "SCORES_AT_ONCE", scores_at_once)
    ours, theirs = images((4, 3), layout), images((4, 3))
    weight = torch.randn(3, 32, 4, 3, dtype=torch.double, generator=torch.Generator().manual_seed(1))
    attend(*ours, 8).mul(weight).sum().backward()
    heads = (x.flatten(2).unflatten(1, (4, 8)).mT for x in theirs)
    F.scaled_dot_product_attention(*heads).mT.flatten(1, 2).unflatten(2, (4, 3)).mul(weight).sum().backward()
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x.grad, y.grad, rtol=1e-10, atol=1e-12)


def test_gradients_equal_finite_differences():
    assert torch.autograd.gradcheck(lambda *x: attend(*x, 4), images((2, 3), channels=8))


def test_large_logits_do_not_overflow():
    q, k, v = (x.float() for x in images((3, 3)))
    assert torch.isfinite(attend(100 * q, 100 * k, v, 8)).all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("head_width", [8, 32])
def test_under_autocast_attention_is_that_of_float32_on_the_same_input(head_width, layout):
    half = [x.detach().bfloat16() for x in images((5, 4), layout)]
    got, wanted = ([x.clone().requires_grad_() for x in half], [x.float().requires_grad_() for x in half])
    with torch.autocast("cpu", torch.bfloat16):
        output = attend(*got, head_width)
    expected = attend(*wanted, head_width)
    assert output.dtype == torch.float32 and torch.equal(output, expected)
    output.square().sum().backward()
    expected.square().sum().backward()
    for x, y in zip(got, wanted, strict=True):
        assert torch.equal(x.grad, y.grad.bfloat16())
