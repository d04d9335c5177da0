"""The scan's Triton kernels against its definition: in the interpreter on a CPU, compiled where there is a GPU.

The interpreter runs one program after another, so the shapes are tiny; each is chosen to reach some edge: a length of
one, a last block cut short in time or channels, several stored chunks (more than 64 steps), a padded state.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mambakit.kernels.scan import selective_scan, triton_kernels
from mambakit.kernels.scan.reference import FORWARD, HALF, REVERSE, scan_reference
from mambakit.kernels.testing import assert_close, poisoned_memory, random_tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TENSORS = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")
EVERYTHING = ("D", "z", "delta_bias", "initial_state")


def scan_inputs(
    batch: int = 1,
    length: int = 6,
    channels: int = 4,
    d_state: int = 3,
    B: int | str = "per step",
    C: int | str = "per step",
    optional: tuple[str, ...] = EVERYTHING,
    dtype: torch.dtype = torch.float32,
    packed: bool = False,
    delta_softplus: bool = True,
    direction: int = FORWARD,
) -> dict[str, Any]:
    """Arguments of ``scan_forward`` from fixed seeds. B and C: "per step", "constant", or a number of groups."""
    seeds = iter(range(100))

    def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return random_tensor(*shape, seed=next(seeds), dtype=dtype, device=DEVICE)

    def vector(form: int | str) -> Tensor:
        if form == "constant":
            return random(channels, d_state)
        groups = () if form == "per step" else (int(form),)
        return random(batch, length, *groups, d_state, dtype=dtype)

    delta = random(batch, length, channels, dtype=dtype)
    given: dict[str, Any] = {
        "u": random(batch, length, channels, dtype=dtype),
        "delta": delta if delta_softplus else delta.abs(),
        "A": -random(channels, d_state).exp(),
        "B": vector(B),
        "C": vector(C),
        "D": random(channels),
        "z": random(batch, length, channels, dtype=dtype),
        "delta_bias": random(channels) if delta_softplus else random(channels).abs(),
        "initial_state": random(batch, channels, d_state),
    }
    given |= dict.fromkeys(set(EVERYTHING) - set(optional))
    seq_idx = None
    if packed:
        seq_idx = (random(batch, length) < -0.7).cumsum(1).to(torch.int32)
    return given | {"seq_idx": seq_idx, "delta_softplus": delta_softplus, "direction": direction}


def definition(given: dict[str, Any], dout: Tensor, dfinal: Tensor | None) -> dict[str, Tensor]:
    """Outputs and gradients by the reference and autograd in float64, from the same rounded inputs."""
    wide = {name: value.double() if name in TENSORS and value is not None else value for name, value in given.items()}
    leaves = {name: wide[name].requires_grad_() for name in TENSORS if wide[name] is not None}
    out, final_state = scan_reference(**wide)
    weights = dout.double(), torch.zeros_like(final_state) if dfinal is None else dfinal.double()
    gradients = torch.autograd.grad((out, final_state), list(leaves.values()), weights)
    return {"out": out, "final_state": final_state} | dict(zip(leaves, gradients, strict=True))


def kernels(given: dict[str, Any], dout: Tensor, dfinal: Tensor | None) -> dict[str, Tensor]:
    """Outputs and gradients by the kernels, in memory that holds NaN until it is written."""
    with poisoned_memory():
        out, final_state, checkpoints = triton_kernels.scan_forward(**given)
        *gradients, again = triton_kernels.scan_backward(
            dout, dfinal, **given, checkpoints=checkpoints, recompute_out=True
        )
    finite = torch.isfinite(out)
    assert_close("out from the backward", again[finite], out[finite])  # on a GPU its sum over states has another order
    assert checkpoints.shape == triton_kernels.checkpoint_shape(*out.shape, final_state.shape[2])
    assert final_state.dtype == checkpoints.dtype == torch.float32
    found = {"out": out, "final_state": final_state}
    for name, gradient in zip(TENSORS, gradients, strict=True):
        argument = given[name]
        assert (gradient is None) == (argument is None), name
        if gradient is not None:
            assert gradient.dtype == argument.dtype and gradient.is_contiguous(), name
            found[name] = gradient
    return found


def compare(given: dict[str, Any], last: bool = True) -> None:
    batch, length, channels = given["u"].shape
    dout = random_tensor(batch, length, channels, seed=200, dtype=given["u"].dtype, device=DEVICE)
    dfinal = random_tensor(batch, channels, given["A"].shape[1], seed=201, device=DEVICE) if last else None
    got, want = kernels(given, dout, dfinal), definition(given, dout, dfinal)
    assert got.keys() == want.keys()
    for name in want:
        assert_close(name, got[name], want[name])


@pytest.mark.parametrize(
    "shape",
    [(2, 1, 1, 1), (2, 7, 5, 4), (1, 131, 3, 16), (1, 3, 34, 2), (1, 2, 3, 100), (1, 2, 5, 256)],
    ids="B{0[0]} L{0[1]} D{0[2]} N{0[3]}".format,
)
def test_every_shape(shape: tuple[int, int, int, int]) -> None:
    batch, length, channels, d_state = shape
    compare(scan_inputs(batch, length, channels, d_state))


@pytest.mark.parametrize("direction", [FORWARD, REVERSE, HALF], ids=["forwards", "backwards", "half"])
@pytest.mark.parametrize("packed", [False, True], ids=["one sequence", "packed"])
def test_direction_and_packing(direction: int, packed: bool) -> None:
    given = scan_inputs(length=67, packed=packed, direction=direction)
    assert not packed or given["seq_idx"].max() > 1
    compare(given)


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # NaN is what this test is about
def test_a_reset_clears_any_state() -> None:
    """NaN and infinity stay in their own sequence, in the forward and in the backward: no 0 * inf at its ends."""
    given = scan_inputs(length=84, channels=2, direction=HALF)
    given["seq_idx"] = torch.zeros(1, 84, dtype=torch.int32, device=DEVICE)
    given["seq_idx"][:, 20:64] = 1  # in either direction a chunk of 64 steps begins with the last sequence
    dout = random_tensor(1, 84, 2, seed=200, device=DEVICE)
    want = kernels(given, dout, None)
    given["u"] = given["u"].clone()
    given["u"][:, 30:33] = torch.inf
    dout[:, 32] = torch.nan
    got = kernels(given, dout, None)
    assert not torch.isfinite(got["out"]).all() and not torch.isfinite(got["u"]).all()
    healthy = [*range(20), *range(64, 84)]
    for name in ("out", "u", "delta", "B", "C", "z"):
        assert torch.equal(got[name][:, healthy], want[name][:, healthy]), name
    for name in ("final_state", "initial_state"):
        assert torch.equal(got[name], want[name]), name


@pytest.mark.parametrize(
    ("B", "C"), [("constant", "constant"), ("constant", "per step"), (2, "constant"), (2, 2), (2, 3)], ids=str
)
def test_every_form_of_B_and_C(B: int | str, C: int | str) -> None:
    compare(scan_inputs(length=3, channels=6, B=B, C=C))


@pytest.mark.parametrize(("B", "C"), [("constant", "per step"), (2, "constant"), (2, 4), (1, 2)], ids=str)
def test_every_form_of_B_and_C_in_both_directions(B: int | str, C: int | str) -> None:
    """A group that serves both halves is cut in two, so that a tile's channels all run one way."""
    compare(scan_inputs(length=3, channels=4, B=B, C=C, direction=HALF))


@pytest.mark.parametrize("optional", [(), *((name,) for name in EVERYTHING)], ids=str)
def test_absent_arguments(optional: tuple[str, ...]) -> None:
    compare(scan_inputs(length=3, optional=optional), last=False)


def test_without_softplus() -> None:
    compare(scan_inputs(delta_softplus=False))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype: torch.dtype) -> None:
    compare(scan_inputs(batch=2, length=9, dtype=dtype))


def test_any_strides() -> None:
    """Views as a model makes them: slices of one projection, turned axes, expanded rows. Same bits as their copies."""
    given = scan_inputs(batch=2, length=5, channels=4, d_state=4)
    twin = torch.cat((given["u"], given["z"]), dim=-1)
    given["u"], given["z"] = twin.chunk(2, dim=-1)
    given["delta"] = given["delta"].transpose(1, 2).contiguous().transpose(1, 2)
    both = torch.cat((given["B"], given["C"]), dim=-1)
    given["B"], given["C"] = both.chunk(2, dim=-1)
    given["A"] = given["A"].T.contiguous().T
    given["D"] = given["D"][:1].expand(4)
    dout = random_tensor(1, 1, 1, seed=200, device=DEVICE).expand(2, 5, 4)
    dfinal = random_tensor(2, 4, 4, seed=201, device=DEVICE).transpose(1, 2)
    copies = {name: value.contiguous() if isinstance(value, Tensor) else value for name, value in given.items()}
    assert sum(copies[name] is not given[name] for name in TENSORS) == 7
    got, want = kernels(given, dout, dfinal), kernels(copies, dout.contiguous(), dfinal.contiguous())
    for name in want:
        assert torch.equal(got[name], want[name]), name


def test_two_runs_agree_in_every_bit() -> None:
    given = scan_inputs(batch=2, length=3, channels=40)
    dout = random_tensor(2, 3, 40, seed=200, device=DEVICE)
    first, second = kernels(given, dout, None), kernels(given, dout, None)
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.filterwarnings("ignore:overflow encountered in exp2")  # sigmoid(-1e4) = 1 / (1 + inf) = 0, as it should
def test_padding_steps_change_nothing() -> None:
    """A raw step of -1e4 is exactly 0 after softplus: the state passes, and the gradients stay finite."""
    given = scan_inputs(length=5)
    padded = dict(given)
    for name in ("u", "delta", "z", "B", "C"):
        filler = -1e4 if name == "delta" else 1.0
        padded[name] = torch.cat((given[name], torch.full_like(given[name][:, :2], filler)), dim=1)
    dout = random_tensor(1, 7, 4, seed=200, device=DEVICE)
    dfinal = random_tensor(1, 4, 3, seed=201, device=DEVICE)
    got, want = kernels(padded, dout, dfinal), kernels(given, dout[:, :5].contiguous(), dfinal)
    assert torch.equal(got["final_state"], want["final_state"])
    assert torch.equal(got["out"][:, :5], want["out"])
    assert got["delta"][:, 5:].abs().max() == 0
    assert all(torch.isfinite(gradient).all() for gradient in got.values())


def test_small_steps_keep_their_digits() -> None:
    """softplus(-12) is 6e-6: log(1 + exp(x)) computed as written would be wrong by 1 % there."""
    given = scan_inputs(length=4, optional=())
    given["delta"] = given["delta"] - 12
    compare(given, last=False)


def test_a_state_is_kept_every_64_steps() -> None:
    shapes = [triton_kernels.checkpoint_shape(2, length, 5, 3) for length in (1, 64, 65, 1 << 20)]
    assert shapes == [(2, 1, 15), (2, 1, 15), (2, 2, 15), (2, 1 << 14, 15)]


def test_through_the_operator() -> None:
    """``backend="triton"`` and autograd through it, beside the definition."""
    given = scan_inputs(length=66, packed=True)
    found = []
    for backend in ("triton", "reference"):
        leaves = {name: given[name].detach().clone().requires_grad_() for name in TENSORS}
        out, final_state = selective_scan(
            **leaves, delta_softplus=True, seq_idx=given["seq_idx"], return_final_state=True, backend=backend
        )
        (out.square().sum() + final_state.square().sum()).backward()
        found.append({"out": out} | {name: leaf.grad for name, leaf in leaves.items()})
    for name in found[0]:
        assert_close(name, found[0][name], found[1][name])


def update_reference(state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, **extra: Any) -> Tensor:
    """One step with heads, row by row, in float64; writes ``state``."""
    out = torch.zeros_like(x)
    slots = extra.get("state_batch_indices")
    for row in range(x.shape[0]):
        slot = row if slots is None else int(slots[row])
        if slot < 0:
            continue
        step = dt[row].double()
        if extra.get("dt_bias") is not None:
            step = step + extra["dt_bias"]
        if extra.get("dt_softplus"):
            step = torch.nn.functional.softplus(step)
        share = x.shape[1] // B.shape[1]
        entry, exit = (vector[row].double().repeat_interleave(share, 0)[:, None] for vector in (B, C))
        h = torch.exp(step[..., None] * A) * state[slot].double() + (step * x[row])[..., None] * entry
        state[slot] = h.to(state.dtype)
        y = (h * exit).sum(-1)
        if extra.get("D") is not None:
            y = y + extra["D"] * x[row]
        if extra.get("z") is not None:
            y = y * torch.nn.functional.silu(extra["z"][row].double())
        out[row] = y.to(x.dtype)
    return out


@pytest.mark.parametrize("full", [True, False], ids=["every option", "bare"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied heads", "free heads"])
def test_state_update_with_heads(full: bool, tied: bool) -> None:
    def random(*shape: int) -> Tensor:
        return random_tensor(*shape, seed=sum(shape), device=DEVICE)

    if tied:  # Mamba-2's use: one step size and one decay a head, expanded with zero strides
        dt, A = random(3, 4, 1).expand(3, 4, 5), -random(4, 1, 1).exp().expand(4, 5, 6)
    else:
        dt, A = random(3, 4, 5), -random(4, 5, 6).exp()
    dt = dt if full else dt.abs()
    given = {"x": random(3, 4, 5), "dt": dt, "A": A, "B": random(3, 2, 6), "C": random(3, 2, 6) + 1}
    if full:
        indices = torch.tensor([4, -1, 0], dtype=torch.int32, device=DEVICE)
        given |= {"D": random(4, 5), "z": random(3, 4, 5).flip(0), "dt_bias": random(4, 5) - 1, "dt_softplus": True}
        given |= {"state_batch_indices": indices}
    state = random(5 if full else 3, 4, 6, 5).transpose(2, 3)
    kept, got_state, want_state = state.clone(), state.clone(), state.clone()
    with poisoned_memory():
        got = triton_kernels.state_update(got_state, **given)
    assert_close("out", got, update_reference(want_state, **given))
    assert_close("state", got_state, want_state)
    if full:
        assert got[1].abs().max() == 0
        assert torch.equal(got_state[1:4], kept[1:4])


def test_state_update_is_one_step_of_the_scan() -> None:
    given = scan_inputs(batch=2, length=2, channels=5, d_state=6)
    out, final_state, _ = triton_kernels.scan_forward(**given)
    state = given["initial_state"].clone()
    for t in range(2):
        u, delta, B, C, z = (given[name][:, t] for name in ("u", "delta", "B", "C", "z"))
        y = triton_kernels.state_update(state, u, delta, given["A"], B, C, given["D"], z, given["delta_bias"], True)
        assert_close("out", y, out[:, t])
    assert_close("state", state, final_state)
