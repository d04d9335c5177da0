"""mamba_inner: every backend against the operators one after another, values, gradients, states, packing, padding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mambakit.kernels.inner import fused, mamba_inner
from mambakit.kernels.inner.op import _inner
from mambakit.kernels.testing import assert_close, poisoned_memory, random_tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ["torch", "triton"]
OPTIONAL = ("conv_bias", "out_proj_bias", "conv_state", "ssm_state")
SEQ_IDX = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2, 2], [0, 1, 1, 1, 1, 1, 1, 1, 5]], dtype=torch.int32)


def inputs(
    batch: int = 2,
    length: int = 9,
    channels: int = 6,
    d_state: int = 4,
    rank: int = 3,
    width: int = 4,
    d_model: int = 5,
    absent: tuple[str, ...] = (),
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """Parameters in float32, xz in ``dtype``."""
    sizes: dict[str, tuple[int, ...]] = {
        "xz": (batch, length, 2 * channels),
        "conv_weight": (channels, width),
        "conv_bias": (channels,),
        "x_proj_weight": (rank + 2 * d_state, channels),
        "dt_proj_weight": (channels, rank),
        "A": (channels, d_state),
        "D": (channels,),
        "dt_bias": (channels,),
        "out_proj_weight": (d_model, channels),
        "out_proj_bias": (d_model,),
        "conv_state": (batch, channels, width - 1),
        "ssm_state": (batch, channels, d_state),
    }
    drawn = {name: random_tensor(*size, seed=i) for i, (name, size) in enumerate(sizes.items())}
    drawn["A"] = -drawn["A"].exp()
    drawn["xz"] = drawn["xz"].to(dtype)
    return {name: tensor for name, tensor in drawn.items() if name not in absent}


def call(given: dict[str, Tensor], **options: Any) -> tuple[Tensor, Tensor]:
    return mamba_inner(**({"conv_bias": None} | given), **options)


def everything(given: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
    """out, final state, and the gradients of a random projection of both."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in given.items()}
    out, state = call(leaves, **options)
    weights = [random_tensor(*t.shape, seed=50, dtype=torch.float64).to(t.device, t.dtype) for t in (out, state)]
    loss = (out * weights[0]).sum() + (state * weights[1]).sum()
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    return {"out": out, "state": state} | dict(zip(leaves, gradients, strict=True))


def compare(given: dict[str, Tensor], backend: str, tolerance: float = 2e-5, **options: Any) -> None:
    """``backend`` on the test's device beside the definition in float64 on the CPU."""
    want = everything({name: tensor.double() for name, tensor in given.items()}, backend="reference", **options)
    moved = {name: o.to(DEVICE) if isinstance(o, Tensor) else o for name, o in options.items()}
    with poisoned_memory():
        got = everything({name: tensor.to(DEVICE) for name, tensor in given.items()}, backend=backend, **moved)
    for name, value in got.items():
        if name in given:
            assert value.dtype == given[name].dtype, name
        assert_close(f"{backend} {name}", value, want[name], tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("absent", [(), OPTIONAL, ("conv_state",), ("ssm_state", "out_proj_bias")])
def test_outputs_and_gradients(backend: str, absent: tuple[str, ...]) -> None:
    compare(inputs(absent=absent), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_reverse(backend: str) -> None:
    """From the end is forwards on what was turned round, states and gradients included; so is packing."""
    for options in ({}, {"seq_idx": SEQ_IDX}):
        compare(inputs(), backend, reverse=True, **options)
        turned = {name: value.flip(1) for name, value in options.items()}
        want = call(inputs() | {"xz": inputs()["xz"].flip(1)}, backend="reference", **turned)
        got = call(inputs(), backend="reference", reverse=True, **options)
        assert_close("out", got[0].flip(1), want[0], 1e-6)
        assert_close("state", got[1], want[1], 1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_reverse_starts_at_the_end_of_each_row(backend: str) -> None:
    """Whatever stands at padding reaches nothing, and gets no gradient."""
    given, lengths = inputs(absent=("conv_state",)), torch.tensor([9, 4])
    short = {name: t[1:, :4] if name == "xz" else t[1:] if "state" in name else t for name, t in given.items()}
    want_out, want_state = call(short, backend="reference", reverse=True)
    moved = {name: tensor.to(DEVICE) for name, tensor in given.items()}
    leaf = moved["xz"].clone().requires_grad_()
    out, state = call(moved | {"xz": leaf}, lengths=lengths.to(DEVICE), backend=backend, reverse=True)
    assert_close("out", out[1:, :4], want_out, 2e-5)
    assert_close("state", state[1:], want_state, 2e-5)
    out[1:, :4].sum().backward()
    assert leaf.grad is not None and bool((leaf.grad[1, 4:] == 0).all())
    with pytest.raises(ValueError, match="conv_state.*reverse"):
        call(inputs(), lengths=lengths, reverse=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_packing_and_padding(backend: str) -> None:
    """A change of seq_idx resets convolution and scan; padding leaves the state alone, in its gradient as well."""
    compare(inputs(), backend, seq_idx=SEQ_IDX)
    # What stands at padding means nothing, so it takes no part in the comparison.
    given, lengths = inputs(), torch.tensor([9, 4])
    short = {name: t[1:, :4] if name == "xz" else t[1:] if "state" in name else t for name, t in given.items()}
    moved = {name: tensor.to(DEVICE) for name, tensor in given.items()}
    out, state = call(moved, lengths=lengths.to(DEVICE), backend=backend)
    want_out, want_state = call(short, backend="reference")
    assert_close("out", out[1:, :4], want_out, 2e-5)
    assert_close("state", state[1:], want_state, 2e-5)
    leaf = moved["xz"].clone().requires_grad_()
    call(moved | {"xz": leaf}, lengths=lengths.to(DEVICE), backend=backend)[1].sum().backward()
    assert leaf.grad is not None and bool((leaf.grad[1, 4:] == 0).all()) and bool((leaf.grad[1, :4] != 0).any())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sizes", [{"length": 1}, {"length": 2, "width": 2}, {"rank": 1, "d_state": 1, "channels": 1}])
def test_smallest(backend: str, sizes: dict[str, int]) -> None:
    compare(inputs(**sizes), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_one_output_is_used(backend: str) -> None:
    given = {name: tensor.to(DEVICE).requires_grad_() for name, tensor in inputs().items()}
    wanted = [given[name] for name in ("xz", "A", "dt_proj_weight")]
    for i in range(2):
        got, want = (torch.autograd.grad(call(given, backend=b)[i].sum(), wanted) for b in (backend, "reference"))
        for one, other in zip(got, want, strict=True):
            assert_close(f"output {i}", one, other, 2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16(backend: str) -> None:
    """Products in bfloat16, parameters and their gradients in float32."""
    compare(inputs(channels=16, d_model=8, absent=OPTIONAL, dtype=torch.bfloat16), backend, tolerance=0.03)


def test_autocast_decides_the_dtype() -> None:
    given = {name: tensor.to(DEVICE) for name, tensor in inputs().items()}
    for backend in ("reference", "torch"):
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            out, state = call(given, backend=backend)
        assert out.dtype == torch.bfloat16 and state.dtype == torch.float32


def test_gradcheck() -> None:
    given = {n: t.double().requires_grad_() for n, t in inputs(1, 4, 2, 2, 1, 3, 2).items()}
    names, leaves = zip(*given.items(), strict=True)

    def function(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return call(dict(zip(names, tensors, strict=True)), backend="torch")

    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("absent", [(), OPTIONAL])
def test_operator(absent: tuple[str, ...]) -> None:
    given = inputs(absent=absent)
    tensors = [given[name].requires_grad_() if name in given else None for name in fused.Arguments._fields[:-2]]
    torch.library.opcheck(_inner, (*tensors, SEQ_IDX, torch.tensor([9, 4]), False, "torch"))


def test_keeps_little_for_the_backward() -> None:
    """Beside the arguments: the narrow projections and states at chunk boundaries, and y where the backend wants it."""
    given = {name: t.requires_grad_() for name, t in inputs(2, 64, 32, 4, 2, absent=OPTIONAL).items()}
    for backend, most in (("torch", 1), ("triton", 0)):
        kept: dict[int, int] = {}

        def pack(tensor: Tensor, kept: dict[int, int] = kept) -> Tensor:
            kept[tensor.data_ptr()] = tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            call({name: t.to(DEVICE) for name, t in given.items()}, backend=backend)
        wide = sum(1 for numel in kept.values() if numel == 2 * 64 * 32)
        assert wide == most, f"{backend} keeps {wide} tensors of a number for each token and channel"


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("xz", lambda t: t[..., 1:], ["xz", "twice_channels=12", "11"]),
        ("conv_weight", lambda t: t.repeat(1, 2), ["conv_weight", "width 8"]),
        ("x_proj_weight", lambda t: t[1:], ["x_proj_weight", "11", "10"]),
        ("dt_proj_weight", lambda t: t[1:], ["dt_proj_weight", "channels=6"]),
        ("out_proj_bias", lambda t: t[1:], ["out_proj_bias", "d_model=5"]),
        ("ssm_state", lambda t: t[1:], ["ssm_state", "batch=2"]),
        ("conv_state", lambda t: t[..., 1:], ["conv_state", "width_less_1=3"]),
        ("dt_bias", lambda t: t.long(), ["dt_bias", "int64", "float32"]),
    ],
)
def test_bad_input_is_named(name: str, change: Any, words: list[str]) -> None:
    given = inputs()
    with pytest.raises((ValueError, TypeError)) as error:
        call(given | {name: change(given[name])})
    assert all(word in str(error.value) for word in words), str(error.value)


def test_lengths_are_checked() -> None:
    with pytest.raises(ValueError, match="lengths.*batch=2"):
        call(inputs(), lengths=torch.tensor([9]))
    with pytest.raises(TypeError, match="lengths.*int64"):
        call(inputs(), lengths=torch.tensor([9.0, 4.0]))
