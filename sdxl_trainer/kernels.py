"""The operations that a UNet spends its time in, each in the form that is fastest where it runs."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
# Its matrix products in fp32 reach twice the speed of the BLAS that PyTorch calls on AMD's CPUs with AVX-512 at least;
# on Intel's that is MKL, which is the faster there.
_FACTS: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # not in older PyTorch
_ON_INTEL = "Intel" in _FACTS.get("cpu_name", "")
_MULTIPLIES_FP32 = _HAS_ONEDNN and not (_ON_INTEL and torch.backends.mkl.is_available())

# Without instructions for bf16, products of it take three times as long as those of the same numbers in fp32.
_HAS_BF16 = torch.cpu._is_avx512_bf16_supported()
_LACKS_BF16 = torch.backends.cpu.get_cpu_capability().startswith("AVX") and not _HAS_BF16
# oneDNN multiplies bf16 numbers that lie in fp32 (PyTorch 2.9), where the CPU has instructions for it.
_WIDENS_BF16 = _HAS_ONEDNN and hasattr(torch._C, "_set_fp32_precision_setter") and _HAS_BF16
# Pairs of places up to which attention may keep what it computes for each: 512 x 512, 2,048 x 77 and more of text.
_PAIRS = 1 << 18

# The type of device that tensors without values stand for, where memory is counted.
stands_for = "cpu"


def on_cpu(x: Tensor) -> bool:
    return x.is_cpu and stands_for == "cpu"


def onednn() -> bool:
    """Whether oneDNN is there and not switched off."""
    return _HAS_ONEDNN and bool(torch.backends.mkldnn.enabled)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., I] times weight [O, I] transposed, plus bias [O]."""
    if _is_slow(x, weight):
        return _Linear.apply(x, weight, bias)
    return F.linear(x, weight, bias)


def _is_slow(x: Tensor, weight: Tensor) -> bool:
    """Whether a matrix product of PyTorch's own is not the fastest that there is."""
    kinds = {torch.float32: _MULTIPLIES_FP32 and onednn(), torch.bfloat16: _LACKS_BF16}
    on = on_cpu(x) and weight.is_cpu and not torch.is_autocast_enabled("cpu")
    return on and x.dtype == weight.dtype and kinds.get(x.dtype, False)


def _product(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """left [..., K] times right [N, K] transposed, plus bias [N]."""
    if left.dtype == torch.float32:
        return torch.ops.mkldnn._linear_pointwise(left, right, bias, "none", [], "")
    return F.linear(left.float(), right.float(), None if bias is None else bias.float()).to(left.dtype)


class _Linear(torch.autograd.Function):
    """A linear layer whose three products are all oneDNN's, or in bf16 those of the same numbers in fp32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        rows = gradient.flatten(0, -2)
        of_x = _product(gradient, weight.t()) if wanted[0] else None
        of_weight = _product(rows.t(), x.flatten(0, -2).t()) if wanted[1] else None
        return of_x, of_weight, rows.sum(0) if wanted[2] else None


class _Conv(torch.autograd.Function):
    """A convolution in bf16 whose three convolutions are those of the same numbers in fp32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, stride: int, padding: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.places = ([stride] * 2, [padding] * 2)
        return F.conv2d(x.float(), weight.float(), bias.float(), stride, padding).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        wide = (t.float() for t in (gradient, x, weight))
        rest = (*ctx.places, [1, 1], False, [0, 0], 1, ctx.needs_input_grad[:3])
        found = torch.ops.aten.convolution_backward(*wide, [len(weight)], *rest)
        return *(None if t is None else t.to(x.dtype) for t in found), None, None


def geglu(both: Tensor) -> Tensor:
    """[..., 2 D] to [..., D]: the first half times the exact (erf) GELU of the second (Shazeer 2020)."""
    if torch.compiler.is_compiling():  # the compiler writes one kernel each way, and cannot look into ours
        value, gate = both.chunk(2, dim=-1)
        return F.gelu(gate) * value
    return _Geglu.apply(both)


class _Geglu(torch.autograd.Function):
    """Keeps its input alone: autograd would keep three more halves, and put two gradients together with a copy."""

    @staticmethod
    def forward(ctx: Any, both: Tensor) -> Tensor:
        ctx.save_for_backward(both)
        value, gate = both.chunk(2, dim=-1)
        return F.gelu(gate).mul_(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (both,) = ctx.saved_tensors
        value, gate = both.chunk(2, dim=-1)
        of_both = torch.empty_like(both)
        of_value, of_gate = of_both.chunk(2, dim=-1)
        torch.mul(gradient, F.gelu(gate), out=of_value)
        torch.ops.aten.gelu_backward.grad_input(gradient * value, gate, grad_input=of_gate)
        return of_both


def attention(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """[B, S, H * d] from query [B, S, H * d], key and value [B, L, H * d]."""
    few = query.shape[1] * key.shape[1] <= _PAIRS
    if few and on_cpu(query) and query.dtype == torch.bfloat16 and _WIDENS_BF16 and onednn():
        return _Attention.apply(query, key, value, heads)
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (query, key, value))
    if on_cpu(q) and q.dtype != torch.float32:
        # PyTorch's kernel for 16 bits on a CPU is up to three times slower than the one for 32.
        with torch.autocast("cpu", enabled=False):
            found = F.scaled_dot_product_attention(q.float(), k.float(), v.float()).to(q.dtype)
    else:
        found = F.scaled_dot_product_attention(q, k, v)
    return found.transpose(1, 2).flatten(2)


class _Attention(torch.autograd.Function):
    """Attention in bf16 by oneDNN's products. Scores, the softmax and the gradients of both are fp32; what is
    multiplied is bf16, as in kernels for GPUs. It keeps the softmax."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
        q, k, v = (_by_head(t, heads) for t in (query, key, value))
        weights = _wide_product(q, k.mT).mul_(q.shape[-1] ** -0.5).softmax(-1).bfloat16()
        ctx.save_for_backward(q, k, v, weights)
        ctx.heads = heads
        return _side_by_side(torch.bmm(weights, v), heads)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, weights = ctx.saved_tensors
        gradient = _by_head(gradient, ctx.heads)
        of_scores = torch._softmax_backward_data(_wide_product(gradient, v.mT), weights.float(), -1, torch.float32)
        of_scores = of_scores.mul_(q.shape[-1] ** -0.5).bfloat16()
        pairs = ((of_scores, k), (of_scores.mT, q), (weights.mT, gradient))
        wanted = zip(pairs, ctx.needs_input_grad[:3], strict=True)
        return *(_side_by_side(torch.bmm(*pair), ctx.heads) if want else None for pair, want in wanted), None


def _by_head(x: Tensor, heads: int) -> Tensor:
    """[B * H, S, d] from [B, S, H * d]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2).flatten(0, 1)


def _side_by_side(x: Tensor, heads: int) -> Tensor:
    """[B, S, H * d] from [B * H, S, d]."""
    return x.unflatten(0, (-1, heads)).transpose(1, 2).flatten(2)


def _wide_product(left: Tensor, right: Tensor) -> Tensor:
    """Matrix products in fp32 of matrices in bf16. oneDNN is allowed to round to bf16 what it multiplies, which is bf16
    already, so that nothing is lost."""
    backend: Any = torch.backends.mkldnn
    before, backend.matmul.fp32_precision = backend.matmul.fp32_precision, "bf16"
    try:
        with torch.autocast("cpu", enabled=False):
            return torch.bmm(left.float(), right.float())
    finally:
        backend.matmul.fp32_precision = before


class GroupNorm(nn.GroupNorm):
    """In fp32 on a CPU: PyTorch's backward pass for 16 bits is many times slower where channels lie last."""

    def forward(self, x: Tensor) -> Tensor:
        if (
            not x.requires_grad
            and torch.is_grad_enabled()
            and on_cpu(x)
            and any(p.requires_grad for p in self.parameters())
        ):
            # With channels last, PyTorch's backward pass writes to the gradient of x, whether there is one or not.
            x = x.detach().requires_grad_()
        if not on_cpu(x) or x.dtype == torch.float32:
            return super().forward(x)
        return F.group_norm(x.float(), self.num_groups, self.weight.float(), self.bias.float(), self.eps).to(x.dtype)


class Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class Conv(nn.Conv2d):
    """A convolution with a bias that looks at square surroundings."""

    def forward(self, x: Tensor) -> Tensor:
        if not on_cpu(x):
            return super().forward(x)
        weight, layout = self.weight, x
        if weight.numel() > x.numel():
            # PyTorch lays out the weight as the picture is, in each pass: the picture is the smaller one to lay out.
            layout = x.contiguous()
        if x.dtype == torch.bfloat16 and _is_slow(x, weight):
            found = _Conv.apply(layout, weight, self.bias, self.stride[0], self.padding[0])
        else:
            found = self._conv_forward(layout, weight, self.bias)
        return found.contiguous(memory_format=torch.channels_last)


class Conv1x1(nn.Conv2d):
    """A convolution that looks at one place: on a CPU a matrix product, with no copy where channels lie last."""

    def forward(self, x: Tensor) -> Tensor:
        if not on_cpu(x):
            return super().forward(x)
        return linear(x.permute(0, 2, 3, 1), self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)
