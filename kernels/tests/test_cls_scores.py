"""cls_scores against torch.nn.MultiheadAttention in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from umt_kernels import cls_scores


def case(device: torch.device, rows: int, heads: int, length: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """q and k in float64, and MultiheadAttention's averaged weights of query 0 to the patches."""
    torch.manual_seed(0)
    layer = torch.nn.MultiheadAttention(width, heads, batch_first=True, dtype=torch.float64)
    torch.nn.init.normal_(layer.in_proj_bias)
    x = 3 * torch.randn(rows, length, width, dtype=torch.float64)
    with torch.no_grad():
        _, weights = layer(x, x, x, need_weights=True, average_attn_weights=True)
        q, k, _ = torch.nn.functional.linear(x, layer.in_proj_weight, layer.in_proj_bias).chunk(3, -1)
    q = q[:, 0].unflatten(-1, (heads, -1))
    k = k.unflatten(-1, (heads, -1)).transpose(1, 2)
    return q.to(device), k.to(device), weights[:, 0, 1:].to(device)


@pytest.mark.parametrize(("rows", "heads", "length", "width"), [(3, 4, 17, 32), (1, 1, 2, 8), (2, 12, 197, 96)])
def test_matches_multihead_attention(device, rows, heads, length, width):
    q, k, expected = case(device, rows, heads, length, width)
    scores = cls_scores(q, k)
    assert scores.dtype == torch.float64
    assert scores.shape == (rows, length - 1)
    assert (scores - expected).abs().max() < 1e-12
    scores = cls_scores(q.float(), k.float())
    assert scores.dtype == torch.float32
    assert (scores - expected).abs().max() < 1e-5


def test_bf16_inputs_are_computed_in_float32(device):
    q, k, _ = (x.bfloat16() for x in case(device, 3, 4, 17, 32))
    scores = cls_scores(q, k)
    assert scores.dtype == torch.float32
    assert (scores - cls_scores(q.double(), k.double())).abs().max() < 1e-6


def test_autocast_changes_nothing(device):
    q, k, _ = (x.float() for x in case(device, 3, 4, 17, 32))
    with torch.autocast(device.type, torch.bfloat16):
        inside = cls_scores(q, k)
    assert torch.equal(inside, cls_scores(q, k))


def test_a_row_sums_to_less_than_one_by_the_class_tokens_share(device):
    q, k, _ = case(device, 3, 4, 17, 32)
    total = cls_scores(q, k).sum(-1)
    assert (total < 1).all()
    k[:, :, 0] = -1000 * q  # the class token gets no attention
    assert (cls_scores(q, k).sum(-1) - 1).abs().max() < 1e-12


def test_keys_need_not_be_contiguous(device):
    q, k, expected = case(device, 3, 4, 17, 32)
    assert (cls_scores(q, k.transpose(1, 2).contiguous().transpose(1, 2)) - expected).abs().max() < 1e-12


@pytest.mark.parametrize(
    ("q", "k"),
    [((2, 3, 4), (2, 3, 5, 8)), ((2, 3, 4), (2, 4, 5, 4)), ((2, 3, 4), (1, 3, 5, 4)), ((2, 12), (2, 3, 5, 4))],
)
def test_shapes_that_do_not_fit_are_named(device, q, k):
    with pytest.raises(ValueError) as caught:  # noqa: PT011, the words follow
        cls_scores(torch.zeros(q, device=device), torch.zeros(k, device=device))
    assert str(list(q)) in str(caught.value)
    assert str(list(k)) in str(caught.value)


@pytest.mark.parametrize("shape", [(2, 0, 5, 4), (2, 3, 0, 4), (2, 3, 5, 0)])
def test_no_head_no_key_or_no_column(device, shape):
    rows, heads, _, depth = shape
    with pytest.raises(ValueError, match="it needs a head, a key"):
        cls_scores(torch.zeros(rows, heads, depth, device=device), torch.zeros(shape, device=device))


def test_wrong_tensors_are_named():
    q, k = torch.zeros(2, 3, 4), torch.zeros(2, 3, 5, 4)
    with pytest.raises(TypeError, match=r"k has dtype torch\.int64"):
        cls_scores(q, k.long())
    with pytest.raises(ValueError, match="k is on meta, but q is on cpu"):
        cls_scores(q, k.to("meta"))


@pytest.mark.parametrize("dtypes", [(torch.float64, torch.float32), (torch.float16, torch.bfloat16)])
def test_queries_may_have_another_dtype(device, dtypes, assert_near):
    q, k, upstream = drawn(device, (2, 3, 6, 4), torch.float32)
    q, k = q.to(dtypes[0]), k.to(dtypes[1])
    expected = differentiated(q.double(), k.double(), upstream)
    actual = differentiated(q, k, upstream)
    assert [x.dtype for x in actual[1:]] == list(dtypes)
    for ours, theirs in zip(actual, expected, strict=True):
        assert_near(ours, theirs)


DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# rows, heads, keys, width of a head: one patch, one of everything, no powers of two, no patch at all
SHAPES = [(2, 3, 2, 4), (1, 1, 2, 1), (3, 2, 10, 5), (2, 2, 50, 24), (2, 1, 1, 3)]


def drawn(device: torch.device, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    rows, heads, length, depth = shape
    generator = torch.Generator().manual_seed(sum(shape))
    q = 3 * torch.randn(rows, heads, depth, generator=generator)
    k = torch.randn(rows, heads, length, depth, generator=generator)
    upstream = torch.randn(rows, length - 1, generator=generator)
    return q.to(device, dtype), k.to(device, dtype), upstream.to(device)


def differentiated(q: Tensor, k: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k = q.detach().requires_grad_(), k.detach().requires_grad_()
    scores = cls_scores(q, k)
    return scores.detach(), *torch.autograd.grad(scores, (q, k), upstream.to(scores.dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", ["contiguous", "spread", "transposed"])
def test_kernel_against_float64(device, shape, dtype, layout, spread, assert_near):
    q, k, upstream = drawn(device, shape, dtype)
    if layout == "spread":
        given = spread(q), spread(k), spread(upstream)
    elif layout == "transposed":  # as from a projection of all heads, and with a stride in the last dimension
        given = q.mT.contiguous().mT, k.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0), upstream
    else:
        given = q, k, upstream
    expected = differentiated(q.double(), k.double(), upstream)
    actual = differentiated(*given)
    assert [x.dtype for x in actual] == [torch.float32, dtype, dtype]
    for ours, theirs in zip(actual, expected, strict=True):
        assert_near(ours, theirs)


def test_heads_of_a_fused_projection(device, assert_near):
    """k as a view of a qkv tensor [R, L, 3, H, d], as in a teacher."""
    qkv = torch.randn(2, 7, 3, 4, 6, generator=torch.Generator().manual_seed(0)).to(device)
    q, k = qkv[:, 0, 0], qkv[:, :, 1].transpose(1, 2)
    assert_near(cls_scores(q, k), cls_scores(q.double(), k.double()))


def test_logits_far_apart_do_not_overflow(device, assert_near):
    q, k, _ = drawn(device, (2, 2, 9, 8), torch.float32)
    assert_near(cls_scores(300 * q, k), cls_scores(300 * q.double(), k.double()), 1e-4)


def test_backward_twice_no_grad_and_one_gradient(device):
    q, k, upstream = drawn(device, (2, 3, 6, 4), torch.float32)
    _, grad_q, _ = differentiated(q, k, upstream)
    q.requires_grad_()
    scores = cls_scores(q, k)
    scores.backward(upstream, retain_graph=True)
    assert torch.equal(q.grad, grad_q)
    scores.backward(upstream)
    assert torch.equal(q.grad, 2 * grad_q)
    assert k.grad is None
    with torch.no_grad():
        assert torch.equal(cls_scores(q, k), scores)
        assert not cls_scores(q, k).requires_grad


def test_empty_batch(device):
    q = torch.zeros(0, 3, 4, device=device, requires_grad=True)
    k = torch.zeros(0, 3, 6, 4, device=device, requires_grad=True)
    scores = cls_scores(q, k)
    assert scores.shape == (0, 5)
    scores.sum().backward()
    assert q.grad.shape == q.shape
    assert k.grad.shape == k.shape


def test_gradcheck(device):
    q, k, _ = (x.double() for x in drawn(device, (2, 2, 4, 3), torch.float32))
    assert torch.autograd.gradcheck(cls_scores, (q.requires_grad_(), k.requires_grad_()))


@pytest.mark.parametrize("prefix", [0, 3, 6])
def test_registers_are_attended_to_and_dropped(device, prefix, assert_near):
    q, k, _ = drawn(device, (2, 3, 6, 4), torch.float32)
    weights = torch.softmax(torch.einsum("rhd,rhld->rhl", q.double(), k.double()) / 2, -1).mean(1)
    upstream = torch.linspace(-1, 1, 2 * (6 - prefix), device=device).view(2, -1)
    grads = []
    for dtype in (torch.float32, torch.float64):
        inputs = [x.to(dtype).requires_grad_() for x in (q, k)]
        scores = cls_scores(*inputs, num_prefix_tokens=prefix)
        assert_near(scores.detach(), weights[:, prefix:])
        grads.append(torch.autograd.grad(scores, inputs, upstream.to(dtype)))
    for ours, theirs in zip(*grads, strict=True):
        assert_near(ours, theirs)


def test_more_prefix_tokens_than_keys_are_named():
    with pytest.raises(ValueError, match="num_prefix_tokens = 7, but k has 6 tokens"):
        cls_scores(torch.zeros(2, 3, 4), torch.zeros(2, 3, 6, 4), num_prefix_tokens=7)
