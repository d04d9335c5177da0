"""rms_norm, layer_norm and gated_rms_norm: every backend against the definitions and against PyTorch's own norms."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mambakit.kernels.norm import gated_rms_norm, layer_norm, rms_norm
from mambakit.kernels.testing import TOLERANCE, assert_close, poisoned_memory, random_tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NORMS = [rms_norm, layer_norm]
# The schema check compares arguments before and after, seconds each: one backend does, the schema is the same.
CHECKS = {
    "torch": ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static"),
    "triton": ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_static"),
}


def gradients(outputs: Any, arguments: dict[str, Tensor]) -> dict[str, Tensor]:
    """The outputs, and the gradient of every argument through all of them."""
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    weights = [random_tensor(*y.shape, seed=20 + i, device=y.device.type) for i, y in enumerate(outputs)]
    loss = sum((y.double() * w).sum() for y, w in zip(outputs, weights, strict=True))
    found = torch.autograd.grad(loss, list(arguments.values()))
    return {f"output {i}": y for i, y in enumerate(outputs)} | dict(zip(arguments, found, strict=True))


def compare(function: Any, arguments: dict[str, Tensor], tolerance: float | None = None, **options: Any) -> None:
    """``backend`` on the test's device beside the reference in float64."""
    given = {name: value.detach().to(DEVICE).requires_grad_() for name, value in arguments.items()}
    exact = {name: value.detach().double().requires_grad_() for name, value in arguments.items()}
    want = gradients(function(**exact, **(options | {"backend": "reference"})), exact)
    for name, value in gradients(function(**given, **options), given).items():
        assert_close(f"{options['backend']} {name}", value, want[name], tolerance)


def row_inputs(*shape: int, optional: bool = True, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    arguments = {"x": random_tensor(*shape, seed=1, dtype=dtype), "weight": random_tensor(shape[-1], seed=2)}
    if optional:
        arguments |= {"bias": random_tensor(shape[-1], seed=3), "residual": random_tensor(*shape, seed=4) * 2 + 1}
    return arguments


@pytest.mark.parametrize("function", NORMS)
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("optional", [False, True])
@pytest.mark.parametrize("prenorm", [False, True])
def test_add_norm(function: Any, backend: str, optional: bool, prenorm: bool) -> None:
    compare(function, row_inputs(2, 3, 7, optional=optional), backend=backend, prenorm=prenorm, eps=0.1)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("shape", [(1,), (1, 1), (5, 1), (700, 3), (2, 2100)])
def test_sizes(backend: str, shape: tuple[int, ...]) -> None:
    compare(rms_norm, row_inputs(*shape), backend=backend, prenorm=True, eps=0.1)
    if shape[-1] > 1:
        compare(layer_norm, row_inputs(*shape), backend=backend, eps=0.1)
    else:  # exactly zero before the bias: no relative error to speak of
        x, weight = random_tensor(*shape, seed=1, device=DEVICE), torch.ones(1, device=DEVICE)
        assert layer_norm(x, weight, eps=0.1, backend=backend).abs().max() < 1e-6


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("function", NORMS)
def test_a_row_of_several_tiles(backend: str, function: Any) -> None:
    """Not a power of two, the last tile half full, more rows than a tile of them holds."""
    compare(function, row_inputs(9, 330), backend=backend, prenorm=True)
    compare(gated_rms_norm, gated_inputs(9, 330), backend=backend, group_size=165)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("residual_dtype", [torch.bfloat16, torch.float32])
def test_gradients_come_in_their_inputs_dtypes(backend: str, residual_dtype: torch.dtype) -> None:
    """One gradient for x and the residual, rounded to each one's dtype; the float32 one is not rounded on the way."""
    arguments = row_inputs(3, 33, optional=False, dtype=torch.bfloat16)
    arguments["residual"] = random_tensor(3, 33, seed=4, dtype=residual_dtype)
    given = {name: value.to(DEVICE).requires_grad_() for name, value in arguments.items()}
    y, s = rms_norm(**given, prenorm=True, residual_in_fp32=True, backend=backend)
    dx, dresidual = torch.autograd.grad((y.float() * 3 + s).sum(), (given["x"], given["residual"]))
    assert (dx.dtype, dresidual.dtype) == (torch.bfloat16, residual_dtype)
    assert_close("dx", dx, dresidual)
    if residual_dtype == torch.float32:
        assert not torch.equal(dx.float(), dresidual)


def test_blocks_of_rows() -> None:
    """More rows than one cache block, so that the blocks' parameter gradients are added up."""
    for function in NORMS:
        compare(function, row_inputs(300, 1000), backend="torch")
    compare(gated_rms_norm, gated_inputs(300, 1000), backend="torch")


@pytest.mark.parametrize("function", NORMS)
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(function: Any, backend: str, dtype: torch.dtype) -> None:
    """Half x, float32 weights and residual stream: what a block sees under autocast."""
    arguments = row_inputs(4, 33, dtype=dtype)
    compare(function, arguments, TOLERANCE[dtype], backend=backend, prenorm=True)
    y, s = function(**{k: v.to(DEVICE) for k, v in arguments.items()}, prenorm=True, backend=backend)
    assert (y.dtype, s.dtype) == (dtype, torch.float32)


@pytest.mark.parametrize("backend", ["torch", "triton", "reference"])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("in_fp32", [False, True])
def test_dtype_of_the_residual_stream(backend: str, residual: bool, in_fp32: bool) -> None:
    x, weight = torch.ones(2, 4, dtype=torch.bfloat16, device=DEVICE), torch.ones(4, device=DEVICE)
    extra = {"residual": torch.full_like(x, 2.0**-9)} if residual else {}
    y, s = rms_norm(x, weight, **extra, prenorm=True, residual_in_fp32=in_fp32, backend=backend)
    assert (y.dtype, s.dtype) == (torch.bfloat16, torch.float32 if in_fp32 else torch.bfloat16)
    assert (s == (1 + 2.0**-9 if residual and in_fp32 else 1)).all()  # bfloat16 rounds the small addend away


def test_beside_pytorch() -> None:
    x, weight, bias = (random_tensor(*shape, seed=i) for i, shape in enumerate([(6, 9), (9,), (9,)]))
    assert_close("rms_norm", rms_norm(x, weight), F.rms_norm(x, (9,), weight, 1e-5))
    assert_close("layer_norm", layer_norm(x, weight, bias), F.layer_norm(x, (9,), weight, bias))
    assert_close("gated_rms_norm", gated_rms_norm(x, x + 1, weight), F.rms_norm(x * F.silu(x + 1), (9,), weight, 1e-5))


def gated_inputs(*shape: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    x, z = (random_tensor(*shape, seed=i, dtype=dtype) for i in (1, 2))
    return {"x": x, "z": z, "weight": random_tensor(shape[-1], seed=3)}


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("norm_before_gate", [False, True])
@pytest.mark.parametrize("group_size", [None, 6, 1])
def test_gated(backend: str, norm_before_gate: bool, group_size: int | None) -> None:
    options = {"norm_before_gate": norm_before_gate, "group_size": group_size, "eps": 0.1}
    compare(gated_rms_norm, gated_inputs(2, 5, 12), backend=backend, **options)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gated_half_precision(backend: str, dtype: torch.dtype) -> None:
    compare(gated_rms_norm, gated_inputs(3, 24, dtype=dtype), TOLERANCE[dtype], backend=backend, group_size=8)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_strides_do_not_matter(backend: str) -> None:
    wide, weight = random_tensor(3, 4, 12, seed=1, device=DEVICE), random_tensor(12, seed=2, device=DEVICE)[::2]
    for x in (wide[..., :6], wide[..., ::2], wide[..., :6].transpose(0, 1)):
        for function, other in ((rms_norm, {"residual": x}), (layer_norm, {}), (gated_rms_norm, {"z": x})):
            want = function(x.contiguous(), weight=weight.contiguous(), **other, backend="reference")
            assert_close(function.__name__, function(x, weight=weight, **other, backend=backend), want)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_gradcheck(backend: str) -> None:
    tensors = {name: value.double().requires_grad_() for name, value in row_inputs(3, 4).items()}
    for function in NORMS:

        def call(*given: Tensor, function: Any = function) -> Any:
            return function(**dict(zip(tensors, given, strict=True)), prenorm=True, backend=backend)

        assert torch.autograd.gradcheck(call, tuple(tensors.values()))
    gated = tuple(value.double().requires_grad_() for value in gated_inputs(3, 4).values())
    for before in (False, True):
        assert torch.autograd.gradcheck(
            lambda x, z, w, before=before: gated_rms_norm(
                x, z, w, norm_before_gate=before, group_size=2, backend=backend
            ),
            gated,
        )


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_poison(backend: str) -> None:
    with poisoned_memory():
        compare(rms_norm, row_inputs(37, 5), backend=backend, prenorm=True)
        compare(layer_norm, row_inputs(37, 5), backend=backend)
        compare(gated_rms_norm, gated_inputs(37, 6), backend=backend, group_size=3)


@pytest.mark.parametrize("function", NORMS)
def test_only_the_sum_is_used(function: Any) -> None:
    x, residual = (random_tensor(3, 4, seed=i, device=DEVICE, requires_grad=True) for i in (1, 2))
    _, s = function(x, torch.ones(4, device=DEVICE), residual=residual, prenorm=True)
    s.sum().backward()
    assert (x.grad == 1).all() and (residual.grad == 1).all()


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("optional", [False, True])
def test_opcheck(backend: str, optional: bool) -> None:
    given = {name: value.to(DEVICE).requires_grad_() for name, value in row_inputs(3, 4).items()}
    x, weight = given["x"], given["weight"]
    bias, residual = (given["bias"], given["residual"]) if optional else (None, None)
    ops, checks = torch.ops.mambakit, CHECKS[backend]
    forward = (x, residual, weight, bias, 1e-5, optional, torch.float32, backend)
    torch.library.opcheck(ops.add_norm, forward, test_utils=checks)
    with torch.no_grad():
        _, _, mean, rstd = ops.add_norm(*forward)
    saved = [None if t is None else t.detach() for t in (x, residual, x, weight, bias, mean, rstd)]
    torch.library.opcheck(ops.add_norm_backward, (*saved, optional, torch.float32, backend), test_utils=checks)
    torch.library.opcheck(ops.gated_rms_norm, (x, x, weight, 1e-5, optional, 2, backend), test_utils=checks)
    rstd = torch.ones(3, 2, device=DEVICE)
    rows = (x.detach(), x.detach(), x.detach(), weight.detach(), rstd)
    torch.library.opcheck(ops.gated_rms_norm_backward, (*rows, optional, 2, backend), test_utils=checks)


def test_compile_without_a_break() -> None:
    given = {name: value.to(DEVICE).requires_grad_() for name, value in row_inputs(3, 4).items()}

    def loss(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        y, s = rms_norm(x, weight, bias, residual, prenorm=True, residual_in_fp32=True)
        return gated_rms_norm(layer_norm(y, weight), s, weight).square().sum()

    eager = torch.autograd.grad(loss(**given), list(given.values()))
    compiled = torch.autograd.grad(
        torch.compile(loss, fullgraph=True, backend="aot_eager")(**given), list(given.values())
    )
    for name, got, want in zip(given, compiled, eager, strict=True):
        assert_close(name, got, want)


def test_autocast_leaves_the_dtypes_alone() -> None:
    given = {name: value.to(DEVICE).requires_grad_() for name, value in row_inputs(3, 4).items()}
    plain = gradients(rms_norm(**given, prenorm=True), given)
    with torch.autocast(DEVICE, torch.bfloat16):
        cast = gradients(rms_norm(**given, prenorm=True), given)
    for name, value in cast.items():
        assert torch.equal(value, plain[name]), name


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.zeros(2, 0)}, ValueError, "x has shape (2, 0), expected (..., channels); every axis needs at"),
        ({"x": torch.zeros(2, 4).int()}, TypeError, "x has dtype int32, expected one of float16"),
        ({"x": None}, TypeError, "x must be a tensor, got NoneType"),
        ({"weight": torch.zeros(3)}, ValueError, "weight has shape (3,), expected (channels=4)"),
        ({"bias": torch.zeros(3)}, ValueError, "bias has shape (3,), expected (channels=4)"),
        ({"residual": torch.zeros(4)}, ValueError, "residual has shape (4,), expected x's, (2, 4)"),
        ({"residual": torch.zeros(2, 4, device="meta")}, ValueError, "residual is on meta, x is on cpu"),
        ({"backend": "cuda"}, ValueError, "backend='cuda' is unknown"),
    ],
)
@pytest.mark.parametrize("function", NORMS)
def test_messages(function: Any, changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{function.__name__}: ") as caught:
        function(**{"x": torch.zeros(2, 4), "weight": torch.zeros(4), **changes})
    assert message in str(caught.value)


def test_gated_messages() -> None:
    x, weight = torch.zeros(2, 6), torch.zeros(6)
    with pytest.raises(ValueError, match="gated_rms_norm: group_size=4 must divide the 6 channels of x"):
        gated_rms_norm(x, x, weight, group_size=4)
    with pytest.raises(ValueError, match=r"gated_rms_norm: z has shape \(2, 3\), expected x's, \(2, 6\)"):
        gated_rms_norm(x, x[:, :3], weight)


@pytest.mark.parametrize("function", NORMS)
def test_triton_says_what_it_does_not_take(function: Any) -> None:
    x, weight = torch.zeros(2, 4, device=DEVICE), torch.zeros(4, device=DEVICE)
    with pytest.raises(ValueError, match=f"^{function.__name__}: .* an input is float64; use backend="):
        function(x, weight, residual=x.double(), backend="triton")
    with pytest.raises(ValueError, match=f"^{function.__name__}: .* holds a row of at most 8192 channels, not 8193"):
        function(torch.ones(1, 8193, device=DEVICE), torch.ones(8193, device=DEVICE), backend="triton")


@pytest.mark.parametrize("channels", [6, 520])  # of two groups, each one tile or several
@pytest.mark.parametrize("backend", ["chunked", "triton_launch"])
@pytest.mark.parametrize("norm_before_gate", [False, True])
def test_the_gated_backward_writes_where_it_is_told(backend: str, norm_before_gate: bool, channels: int) -> None:
    """dz into columns of a wider tensor and the forward's y once more, as an operator around the norm wants them."""
    module = importlib.import_module(f"mambakit.kernels.norm.{backend}")
    x, z, dy = (random_tensor(5, channels, seed=i, device=DEVICE) for i in range(3))
    weight, options = random_tensor(channels, seed=3, device=DEVICE), (norm_before_gate, channels // 2)
    y, rstd = module.gated_rms_norm(x, z, weight, 1e-5, *options)
    wide, again = torch.full((5, channels + 3), 7.0, device=DEVICE), torch.full_like(y, torch.nan)
    inside = wide[:, 2 : channels + 2]
    got = module.gated_rms_norm_backward(dy, x, z, weight, rstd, *options, dz=inside, y=again)
    plain = importlib.import_module("mambakit.kernels.norm.chunked")
    want = plain.gated_rms_norm_backward(dy, x, z, weight, rstd, *options)
    for one, other in zip(got, want, strict=True):
        assert_close("gradient", one, other)
    assert torch.equal(inside, got[1]) and bool((wide[:, [0, 1, channels + 2]] == 7.0).all())
    assert_close("y", again, y)
