"""What the tests of the trunk's operations share: inputs, the formulas in plain PyTorch, and comparisons with fp64."""

import torch

from icegrt.kernels import add_rms_norm, rms_norm, rope, rope_qkv, swiglu, use_backend
from tests.helpers.kernel_cases import assert_within_budget

EPS = 1e-6
OPERATIONS = (rms_norm, add_rms_norm, rope, rope_qkv, swiglu)


def plain_norm(x, weight):
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + EPS) * weight


def plain_rope(x, cos, sin):
    low, high = x.chunk(2, dim=-1)
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    if x.dtype == torch.float64:  # as complex numbers: low + i high, times e^(i angle)
        turned = torch.complex(low, high) * torch.complex(cos, sin)
        return torch.cat([turned.real, turned.imag], dim=-1)
    return x * torch.cat([cos, cos], dim=-1) + torch.cat([-high, low], dim=-1) * torch.cat([sin, sin], dim=-1)


def plain_rope_qkv(qkv, cos, sin):
    q, k, v = qkv[:, :, :-2].flatten(1, 2), qkv[:, :, -2], qkv[:, :, -1]
    return plain_rope(q, cos, sin), plain_rope(k, cos, sin), v


def plain_swiglu(gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    return gate * torch.sigmoid(gate) * up


# The oracles: formulas that share no line with the references.
PLAIN = {
    rms_norm: plain_norm,
    add_rms_norm: lambda x, residual, weight: (plain_norm(x + residual, weight), x + residual),
    rope: lambda q, k, cos, sin: (plain_rope(q, cos, sin), plain_rope(k, cos, sin)),
    rope_qkv: plain_rope_qkv,
    swiglu: plain_swiglu,
}
KEYWORDS = {rms_norm: {"eps": EPS}, add_rms_norm: {"eps": EPS}}


def tables(tokens, half, seed=0):
    """Return cosines and sines [tokens, half] in fp32, of positions that start again, as in a packed stream."""
    generator = torch.Generator().manual_seed(seed)
    positions = torch.randint(0, 4000, (tokens,), generator=generator).double()
    angles = positions[:, None] * 10_000.0 ** (-torch.arange(half, dtype=torch.float64) / max(1, half))
    return angles.cos().float(), angles.sin().float()


def inputs(op, rows, width, dtype=torch.float32, seed=0):
    """Return arguments of an operation: `rows` rows of about `width` elements."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    half = -(-width // 2)
    if op in (rms_norm, add_rms_norm):
        return [*(draw(rows, 1, width) for _ in range(1 + (op is add_rms_norm))), 1 + 0.3 * draw(width)]
    if op is swiglu:
        return [3 * draw(rows, 1, 2 * width)]
    shapes = [(rows, 3, 4, 2 * half)] if op is rope_qkv else [(rows, 6, 2 * half), (rows, 3, 2 * half)]
    return [*(draw(*shape) for shape in shapes), *tables(rows, half, seed)]


def results(call, arguments, dtype=None):
    """Return all outputs of a call and the gradients by its arguments, for upstream gradients that are not 1.

    dtype: what the arguments are converted to; None: nothing. Tables of angles get no gradient.
    """
    arguments = [x if dtype is None else x.to(dtype) for x in arguments]
    leaves = [x.detach().requires_grad_(not is_table(x, arguments)) for x in arguments]
    out = call(*leaves)
    out = out if isinstance(out, tuple) else (out,)
    generator = torch.Generator().manual_seed(5)
    upstream = [torch.randn(x.shape, generator=generator).bfloat16().to(x.dtype) for x in out]
    return [*out, *torch.autograd.grad(out, [x for x in leaves if x.requires_grad], upstream)]


def is_table(x, arguments):
    return len(arguments) > 2 and x.dim() == 2


def fused_call(op, backend):
    """Return a call of the public function on one backend."""

    def call(*arguments, **buffers):
        with use_backend(backend):
            return op(*arguments, **KEYWORDS.get(op, {}), **buffers)

    return call


def assert_trunk_within_budget(op, backend, arguments, slack=1e-6):
    """Assert that results and gradients are within the error budget against fp64.

    slack: permitted error relative to the largest element; the interpreter truncates to bf16 where devices round.
    """
    fused = results(fused_call(op, backend), arguments)
    plain, truth = results(PLAIN[op], arguments), results(PLAIN[op], arguments, torch.float64)
    for ours, theirs, exact in zip(fused, plain, truth, strict=True):
        assert ours.dtype == arguments[0].dtype and ours.shape == exact.shape
        if exact.numel():
            assert_within_budget(ours, theirs, exact, slack * max(1.0, exact.abs().max().item()))


def assert_same_bits(ours, theirs):
    """Assert that two lists of tensors have equal bits."""
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
