"""``trapezoidal_ssd`` by its Triton kernels, against the definition in float64; on a GPU, or in the interpreter."""

from typing import Any

import pytest
import torch
from torch import Tensor

from mambakit.kernels import TrapezoidalState, trapezoidal_ssd
from mambakit.kernels.testing import assert_close, poisoned_memory
from mambakit.kernels.trapezoid import fused
from mambakit.kernels.trapezoid.testing import arguments, run

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def check(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float) -> None:
    assert got.keys() == want.keys()
    for name in want:
        assert_close(name, got[name], want[name], tolerance)


def given(**options: Any) -> dict[str, Any]:
    return arguments(**{"dtype": torch.float32, "device": DEVICE, "batch": 1, "length": 18, "heads": 2, **options})


def in_float64(given: dict[str, Any]) -> dict[str, Any]:
    def widen(value: Any) -> Any:
        if isinstance(value, TrapezoidalState):
            return TrapezoidalState(*map(widen, value))
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    return {name: widen(value) for name, value in given.items()} | {"backend": "reference"}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"length": 37, "packed": True, "groups": 1, "heads": 5, "angles": 3},
        {"length": 5, "optional": False},
        {"length": 16, "packed": True, "heads": 4, "channels": 5, "d_state": 8, "angles": 4},
        {"length": 18, "padded": True, "batch": 2},
        {"length": 2, "d_state": 40, "angles": 17},
        {"length": 33, "optional": False, "packed": True},
        {"length": 70, "packed": True, "heads": 1, "groups": 1},
        {"length": 65},
        {"length": 1},
    ],
    ids=str,
)
def test_triton_computes_the_definition(options):
    inputs = given(**options)
    check(run(inputs, backend="triton"), run(in_float64(inputs)), 2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_triton_takes_narrow_inputs(dtype):
    inputs = given(dtype=dtype, packed=True)
    inputs["initial_state"] = TrapezoidalState(*(tensor.float() for tensor in inputs["initial_state"]))
    got, want = run(inputs, backend="triton"), run(in_float64(inputs))
    assert got["out"].dtype == got["dx"].dtype == dtype
    assert all(got[name].dtype == torch.float32 for name in TrapezoidalState._fields)
    check(got, want, 4e-2 if dtype == torch.bfloat16 else 8e-3)


def test_triton_turns_by_large_angles_as_well():
    """Sines and cosines of the kernels' own: steps of many turns, of both signs."""
    inputs = given(optional=False)
    inputs["dt"] = inputs["dt"] * 20
    assert (torch.tanh(inputs["angles"]).unsqueeze(2) * inputs["dt"].unsqueeze(-1)).abs().max() > 20
    check(run(inputs, backend="triton"), run(in_float64(inputs)), 2e-4)


def test_triton_lets_nothing_through_a_reset():
    inputs = given(length=20)
    inputs["initial_state"] = TrapezoidalState(*(torch.full_like(tensor, 1e18) for tensor in inputs["initial_state"]))
    inputs["initial_state"] = inputs["initial_state"]._replace(
        ssm=torch.full_like(inputs["initial_state"].ssm, torch.inf)
    )
    inputs["seq_idx"] = (torch.arange(20, device=DEVICE) >= 7).int().unsqueeze(0)
    clean = {**inputs, "initial_state": None}
    (out, final), (want, want_final) = (trapezoidal_ssd(**g, backend="triton") for g in (inputs, clean))
    assert_close("out", out[:, 7:], want[:, 7:], 1e-6)
    for name, one, other in zip(TrapezoidalState._fields, final, want_final, strict=True):
        assert_close(name, one, other, 1e-6)


def test_triton_writes_every_element_whatever_the_strides():
    inputs = given(packed=True, length=19)
    want = run(inputs, backend="triton")
    turned = {
        name: value.transpose(0, -1).contiguous().transpose(0, -1) if isinstance(value, Tensor) else value
        for name, value in inputs.items()
    }
    assert not turned["x"].is_contiguous()
    with poisoned_memory():
        check(run(turned, backend="triton"), want, 1e-5)


def test_triton_operators_pass_opcheck():
    """Schema, fake tensors and autograd of the three operators and of their backwards."""
    inputs = given(length=5, d_state=4, channels=2)
    state, runs = inputs["initial_state"], torch.tensor([[0, 0, 1, 1, 1]], dtype=torch.int32, device=DEVICE)
    dt, x = inputs["dt"], inputs["x"]
    angle = torch.rand(1, 5, 2, 2, device=DEVICE)
    keys = [inputs[name] for name in ("B", "C", "B_bias", "C_bias")] + [angle]
    output = [x.clone(), state.v, x, *(inputs[name] for name in ("z", "D", "dA", "trap")), dt.clone()]
    rows = torch.rand(1, 5, 2, 4, device=DEVICE)
    torch.library.opcheck(fused._angles_backward, (angle, state.angle, inputs["angles"], dt, runs))
    torch.library.opcheck(fused._keys_backward, (rows, rows.clone(), dt, *keys))
    torch.library.opcheck(fused._output_backward, (x.clone(), *output, runs))
    for tensor in (inputs["angles"], dt, state.angle, *keys, *output):
        tensor.requires_grad_()
    torch.library.opcheck(fused._angles, (inputs["angles"], dt, state.angle, runs))
    torch.library.opcheck(fused._angles, (inputs["angles"], dt, None, None))
    torch.library.opcheck(fused._keys, (*keys, torch.float32))
    torch.library.opcheck(fused._keys, (*keys[:2], None, None, angle, torch.float32))
    torch.library.opcheck(fused._output, (*output, runs))
    torch.library.opcheck(fused._output, (output[0], None, x, None, None, *output[5:], None))


def test_a_training_step_by_triton_compiles_without_a_break():
    inputs = given(packed=True, length=6)
    want = run(inputs, backend="triton")
    torch._dynamo.reset()
    leaves = {
        n: t.clone().requires_grad_() for n, t in inputs.items() if isinstance(t, Tensor) and t.is_floating_point()
    }
    weights = [torch.randn_like(want[n]) for n in ("out", *TrapezoidalState._fields)]

    def loss(leaves):
        out, final = trapezoidal_ssd(**{**inputs, **leaves}, backend="triton")
        return sum((weight * tensor).sum() for weight, tensor in zip(weights, (out, *final), strict=True))

    eager = torch.autograd.grad(loss(leaves), list(leaves.values()))
    torch.compile(loss, fullgraph=True, backend="aot_eager")(leaves).backward()
    for (name, leaf), gradient in zip(leaves.items(), eager, strict=True):
        assert_close(f"d{name}", leaf.grad, gradient, 1e-5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dtype": torch.float64}, ["float64", "float32"]),
        ({"ranks": 2}, ["mimo_x"]),
        ({"channels": 129}, ["129 channels"]),
        ({"d_state": 258}, ["d_state is 258"]),
    ],
)
def test_what_triton_cannot_serve_is_named(options, words):
    with pytest.raises(ValueError) as error:
        trapezoidal_ssd(**given(length=2, **options), backend="triton")
    assert all(word in str(error.value) for word in ["trapezoidal_ssd", "backend='auto'", *words]), str(error.value)
