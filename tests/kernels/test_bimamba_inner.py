"""bimamba_inner: every backend against the definition in float64, values, gradients, packing, padding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from mambakit.kernels.inner import Direction, bimamba_inner, mamba_inner
from mambakit.kernels.inner.bimamba_op import _inner, _inner_backward
from mambakit.kernels.testing import assert_close, poisoned_memory, random_tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ["torch", "triton"]
SIDES = ("forwards", "backwards")
OPTIONAL = ("conv_bias", "out_proj_bias")
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
    sizes: dict[str, tuple[int, ...]] = {"xz": (batch, length, 2 * channels)}
    one: dict[str, tuple[int, ...]] = {
        "conv_weight": (channels, 1, width),
        "conv_bias": (channels,),
        "x_proj_weight": (rank + 2 * d_state, channels),
        "dt_proj_weight": (channels, rank),
        "dt_bias": (channels,),
        "A_log": (channels, d_state),
        "D": (channels,),
    }
    sizes |= {f"{side}.{name}": size for side in SIDES for name, size in one.items()}
    sizes |= {"out_proj_weight": (d_model, channels), "out_proj_bias": (d_model,)}
    drawn = {name: random_tensor(*size, seed=i) for i, (name, size) in enumerate(sizes.items())}
    drawn["xz"] = drawn["xz"].to(dtype)
    return {name: tensor for name, tensor in drawn.items() if name.split(".")[-1] not in absent}


def side_of(given: dict[str, Tensor], side: str) -> dict[str, Tensor]:
    return {name.split(".")[1]: tensor for name, tensor in given.items() if name.startswith(side)}


def call(given: dict[str, Tensor], **options: Any) -> Tensor:
    sides = [Direction(**({"conv_bias": None} | side_of(given, side))) for side in SIDES]  # type: ignore[arg-type]
    shared = {name: tensor for name, tensor in given.items() if "." not in name}
    return bimamba_inner(forwards=sides[0], backwards=sides[1], **shared, scale=0.5, **options)


def everything(given: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
    """out, and the gradients of a random projection of it."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in given.items()}
    out = call(leaves, **options)
    weight = random_tensor(*out.shape, seed=50, dtype=torch.float64).to(out.device, out.dtype)
    gradients = torch.autograd.grad((out * weight).sum(), list(leaves.values()))
    return {"out": out} | dict(zip(leaves, gradients, strict=True))


def compare(given: dict[str, Tensor], backend: str, tolerance: float = 2e-5, **options: Any) -> None:
    """``backend`` on the test's device beside the definition in float64 on the CPU."""
    want = everything({name: tensor.double() for name, tensor in given.items()}, backend="reference", **options)
    moved = {name: option.to(DEVICE) for name, option in options.items()}
    with poisoned_memory():
        got = everything({name: tensor.to(DEVICE) for name, tensor in given.items()}, backend=backend, **moved)
    for name, value in got.items():
        if name in given:
            assert value.dtype == given[name].dtype, name
        assert_close(f"{backend} {name}", value, want[name], tolerance)


def test_the_definition_is_two_blocks() -> None:
    """The reference equals two blocks of one direction, the second on what was turned round."""
    given = {name: tensor.double() for name, tensor in inputs(absent=("out_proj_bias",)).items()}
    xz, outputs = given["xz"], []
    for side in SIDES:
        own = side_of(given, side)
        own |= {"A": -own.pop("A_log").exp(), "conv_weight": own["conv_weight"].squeeze(1)}
        y, _ = mamba_inner(xz, **own, out_proj_weight=given["out_proj_weight"], backend="reference")
        outputs.append(y)
        xz = xz.flip(1)
    assert_close("out", call(given, backend="reference"), (outputs[0] + outputs[1].flip(1)) / 2, 1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("absent", [(), OPTIONAL])
def test_outputs_and_gradients(backend: str, absent: tuple[str, ...]) -> None:
    compare(inputs(absent=absent), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autograd_keeps_the_gradients_as_they_are(backend: str) -> None:
    """Laid out as their parameters: autograd would copy others, one launch each."""
    given = {name: tensor.to(DEVICE) for name, tensor in inputs().items()}
    gradients = everything(given, backend=backend)
    assert [name for name in given if gradients[name].stride() != given[name].stride()] == []


@pytest.mark.parametrize("backend", BACKENDS)
def test_packing(backend: str) -> None:
    compare(inputs(), backend, seq_idx=SEQ_IDX)


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding(backend: str) -> None:
    """Either direction keeps to each row's real elements; what stands at padding gets no gradient."""
    given = {name: tensor.to(DEVICE) for name, tensor in inputs().items()}
    leaf = given["xz"].clone().requires_grad_()
    out = call(given | {"xz": leaf}, lengths=torch.tensor([9, 4], device=DEVICE), backend=backend)
    want = call(inputs() | {"xz": inputs()["xz"][1:, :4]}, backend="reference")
    assert_close("out", out[1:, :4], want, 2e-5)
    out[1, :4].sum().backward()
    assert leaf.grad is not None and bool((leaf.grad[1, 4:] == 0).all()) and bool((leaf.grad[1, :4] != 0).any())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sizes", [{"length": 1}, {"length": 2, "width": 2}, {"rank": 1, "d_state": 1, "channels": 1}])
def test_smallest(backend: str, sizes: dict[str, int]) -> None:
    compare(inputs(**sizes), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16(backend: str) -> None:
    """Products in bfloat16, parameters and their gradients in float32."""
    # The interpreter cuts a number's last bits off where a GPU rounds.
    tolerance = 0.05 if backend == "triton" and DEVICE == "cpu" else 0.03
    compare(inputs(channels=16, d_model=8, absent=OPTIONAL, dtype=torch.bfloat16), backend, tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
def test_parameters_in_bfloat16(backend: str) -> None:
    """Their gradients come in their own dtype, which ``compare`` asserts."""
    given = {name: tensor.bfloat16() for name, tensor in inputs(channels=16, d_model=8).items()}
    compare(given, backend, 6e-2)


def test_many_channels() -> None:
    """More than one tile of the gate, more than one program of each part of the packing."""
    compare(inputs(1, 2, 320, 1, rank=17), "triton")


@pytest.mark.parametrize("bias", [True, False])
def test_convolutions_of_both_directions(bias: bool) -> None:
    """Several chunks of time and tiles of channels in one launch, beside one convolution after another."""
    from mambakit.kernels.conv import chunked, triton_launch

    length, channels = 70, 80
    xz = random_tensor(2, length, 2 * channels, seed=1, device=DEVICE)
    seq_idx = (torch.arange(length, device=DEVICE) // 27).int().expand(2, -1).contiguous()
    weight = random_tensor(2, channels, 4, seed=2, device=DEVICE)
    shift = random_tensor(2, channels, seed=3, device=DEVICE) if bias else None
    dout = random_tensor(2, length, 2 * channels, seed=4, device=DEVICE)
    found = []
    for way in (chunked, triton_launch):
        with poisoned_memory():
            x, dx = xz[..., :channels], torch.empty_like(xz)[..., :channels]
            y = way.forward_both(x, weight, shift, seq_idx, True)
            found.append((y, dx, *way.backward_both(dout, x, weight, shift, seq_idx, True, dx)))
    for name, want, got in zip(("y", "dx", "dweight", "dbias"), *found, strict=True):
        if got is not None:
            assert_close(name, got, want, 1e-5)
    one = [
        chunked.forward(x, weight[i], None if shift is None else shift[i], None, seq_idx, True, bool(i)) for i in (0, 1)
    ]
    assert_close("y", found[0][0], torch.cat(one, dim=-1), 1e-6)


def test_strided_input() -> None:
    given = inputs()
    turned = given["xz"].transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(call(given | {"xz": turned}), call(given))


def test_gradcheck() -> None:
    given = {n: t.double().requires_grad_() for n, t in inputs(1, 4, 2, 2, 1, 3, 2).items()}
    names, leaves = zip(*given.items(), strict=True)
    assert torch.autograd.gradcheck(
        lambda *tensors: call(dict(zip(names, tensors, strict=True)), backend="torch"), leaves, fast_mode=True
    )


def flat(absent: tuple[str, ...]) -> list[Tensor | None]:
    """The tensors of a call in the operator's order, all but seq_idx and lengths."""
    given = inputs(absent=absent)
    sides = [f"{side}.{name}" for side in SIDES for name in Direction._fields]
    return [given.get(name) for name in ("xz", *sides, "out_proj_weight", "out_proj_bias")]


@pytest.mark.parametrize("absent", [(), OPTIONAL])
def test_operator(absent: tuple[str, ...]) -> None:
    tensors = [None if tensor is None else tensor.requires_grad_() for tensor in flat(absent)]
    torch.library.opcheck(_inner, (*tensors, SEQ_IDX, torch.tensor([9, 4]), 0.5, "torch"))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("absent", [(), OPTIONAL])
def test_results_are_as_a_compiler_is_told(backend: str, absent: tuple[str, ...]) -> None:
    """Shapes, strides and dtypes, forward and backward: compiled code reads the results by them."""
    tensors = [None if tensor is None else tensor.to(DEVICE) for tensor in flat(absent)]
    given = (*tensors, SEQ_IDX.to(DEVICE), torch.tensor([9, 4], device=DEVICE), 0.5, backend)
    out, *saved = _inner(*given)
    for operator, arguments in ((_inner, given), (_inner_backward, (torch.ones_like(out), *saved, *given))):
        got = operator(*arguments)
        with FakeTensorMode() as mode:
            want = operator(*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in arguments))
        for number, (real, fake) in enumerate(zip(got, want, strict=True)):
            kind = (real.shape, real.stride(), real.dtype)
            assert kind == (fake.shape, fake.stride(), fake.dtype), f"{operator} {number}"


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("xz", lambda t: t[..., 1:], ["xz", "twice_channels=12", "11"]),
        ("forwards.A_log", lambda t: t[0], ["forwards.A_log", "channels, d_state"]),
        ("backwards.A_log", lambda t: t[1:], ["backwards.A_log", "channels=6"]),
        ("forwards.conv_weight", lambda t: t.repeat(1, 1, 2), ["conv_weight", "width 8"]),
        ("backwards.conv_weight", lambda t: t[..., 1:], ["backwards.conv_weight", "width=4"]),
        ("backwards.x_proj_weight", lambda t: t[1:], ["backwards.x_proj_weight", "10", "11"]),
        ("backwards.dt_proj_weight", lambda t: t[1:], ["dt_proj_weight", "channels=6"]),
        ("out_proj_bias", lambda t: t[1:], ["out_proj_bias", "d_model=5"]),
        ("backwards.dt_bias", lambda t: t.long(), ["backwards.dt_bias", "int64", "float32"]),
        ("backwards.conv_bias", lambda t: None, ["conv_bias", "both"]),
    ],
)
def test_bad_input_is_named(name: str, change: Any, words: list[str]) -> None:
    given = inputs()
    with pytest.raises((ValueError, TypeError)) as error:
        call(given | {name: change(given[name])})
    assert all(word in str(error.value) for word in words), str(error.value)
