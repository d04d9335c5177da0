"""``trapezoidal_ssd``: the definition against a sum over pairs of steps in complex numbers, the rest against it."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mambakit.kernels import TrapezoidalState, trapezoidal_ssd, use_backend
from mambakit.kernels.testing import assert_close, poisoned_memory, random_tensor
from mambakit.kernels.trapezoid.testing import arguments, run

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def check(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float | None = None) -> None:
    assert got.keys() == want.keys()
    for name in want:
        assert_close(name, got[name], want[name], tolerance)


def sums_over_pairs(given: dict[str, Any]) -> np.ndarray:
    """The output (B, L, R, H, P) as a double sum: what input s contributes to output t, in complex numbers.

    A rotated pair of states is one complex number c = first + i second; turning it by phi multiplies it by exp(i phi),
    and a product of two turned pairs is the real part of conj(c_q) c_k exp(i (phi_s - phi_t)). Input s enters the state
    at step s with weight gamma_s and again at step s + 1 with weight beta_{s+1}.
    """
    halves = "mimo_x" in given
    g = {name: value.numpy() for name, value in given.items() if isinstance(value, Tensor)}
    if not halves:
        g |= {name: np.expand_dims(g[name], 2) for name in ("B", "C", "z") if name in g}
        g |= {name: np.expand_dims(g[name], 1) for name in ("B_bias", "C_bias") if name in g}
    batch, length, heads, channels = g["x"].shape
    ranks, groups, d_state = g["B"].shape[2:]
    out = np.zeros((batch, length, ranks, heads, channels))
    lam = 1 / (1 + np.exp(-g["trap"]))

    def numbers(b: np.ndarray, bias: np.ndarray | float) -> tuple[np.ndarray, np.ndarray]:
        b = b + bias
        pairs = (b[: d_state // 2], b[d_state // 2 :]) if halves else (b[0::2], b[1::2])
        return pairs[0] + 1j * pairs[1]

    turns = np.zeros((length, d_state // 2))
    for row in range(batch):
        for h in range(heads):
            speeds = np.pi * np.tanh(g["angles"][row]) * g["dt"][row, :, h, None]
            turns[:, : speeds.shape[1]] = np.cumsum(speeds, axis=0)
            for t in range(length):
                for s in range(t + 1):
                    if "seq_idx" in g and len({*np.cumsum(np.diff(g["seq_idx"][row], prepend=0) != 0)[s : t + 1]}) > 1:
                        continue
                    weight = lam[row, s, h] * g["dt"][row, s, h] * np.exp(g["dA"][row, s + 1 : t + 1, h].sum())
                    if s < t:
                        beta = (1 - lam[row, s + 1, h]) * g["dt"][row, s + 1, h] * np.exp(g["dA"][row, s + 1, h])
                        weight += beta * np.exp(g["dA"][row, s + 2 : t + 1, h].sum())
                    for i in range(ranks):
                        for j in range(ranks):
                            group = h * groups // heads
                            q = numbers(g["C"][row, t, i, group], g["C_bias"][h, i] if "C_bias" in g else 0)
                            k = numbers(g["B"][row, s, j, group], g["B_bias"][h, j] if "B_bias" in g else 0)
                            product = (np.conj(q) * k * np.exp(1j * (turns[s] - turns[t]))).real.sum()
                            value = g["x"][row, s, h] * (g["mimo_x"][h, j] if halves else 1)
                            out[row, t, i, h] += weight * product * value
                for i in range(ranks):
                    if "D" in g:
                        out[row, t, i, h] += g["D"][h] * g["x"][row, t, h] * (g["mimo_x"][h, i] if halves else 1)
                    if "z" in g:
                        z = g["z"][row, t, i, h]
                        out[row, t, i, h] *= z / (1 + np.exp(-z))
    return out if halves else out[:, :, 0]


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize(
    "options",
    [{}, {"packed": True}, {"optional": False, "groups": 1, "angles": 3}, {"ranks": 2, "length": 5}],
    ids=str,
)
def test_it_is_the_sum_over_pairs_of_steps(options, backend):
    given = arguments(**{"length": 8, "batch": 1, **options})
    given.pop("initial_state", None)
    out, _ = trapezoidal_ssd(**given, backend=backend)
    assert_close("out", out, torch.from_numpy(sums_over_pairs(given)))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"optional": False},
        {"groups": 1, "angles": 3, "packed": True},
        {"groups": 4, "angles": 1, "chunk_size": 4},
        {"length": 1},
        {"length": 2, "packed": True},
        {"length": 70, "packed": True, "chunk_size": 16},
        {"padded": True},
        {"ranks": 1},
        {"ranks": 2, "packed": True},
        {"ranks": 3, "padded": True, "groups": 1, "optional": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("device", DEVICES)
def test_outputs_and_gradients_are_those_of_the_definition(options, device):
    given = arguments(device=device, **options)
    check(run(given, backend="torch"), run(given, backend="reference"))


@pytest.mark.parametrize("ranks", [0, 2])
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_gradcheck(backend, ranks):
    given = arguments(length=3, heads=2, channels=1, d_state=2, angles=1, groups=1, batch=1, ranks=ranks)
    names = [name for name, value in given.items() if isinstance(value, Tensor)]

    def function(*tensors):
        changed = dict(zip(names, tensors, strict=False))
        state = TrapezoidalState(*tensors[len(names) :])
        out, final = trapezoidal_ssd(**{**given, **changed, "initial_state": state, "backend": backend})
        return (out, *final)

    leaves = [tensor.requires_grad_() for tensor in (*(given[name] for name in names), *given["initial_state"])]
    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
    if backend == "reference":
        assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_narrow_inputs_are_computed_in_float32(dtype, device):
    given = arguments(length=40, dtype=dtype, device=device)
    given["initial_state"] = TrapezoidalState(*(tensor.float() for tensor in given["initial_state"]))
    state = TrapezoidalState(*(tensor.double() for tensor in given["initial_state"]))
    wide = {name: value.double() if isinstance(value, Tensor) else value for name, value in given.items()}
    got, want = run(given), run(wide | {"initial_state": state}, backend="reference")
    assert got["out"].dtype == dtype and all(got[name].dtype == torch.float32 for name in TrapezoidalState._fields)
    # On a GPU the operands of the products are narrow too.
    tolerance = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 2e-5}[dtype] * (4 if device == "cuda" else 1)
    for name in want:
        assert_close(name, got[name], want[name], tolerance)


def test_angles_keep_their_places_over_a_long_sequence():
    """Steps that turn by radians each, 4,096 times: rounding does not add up, as in one float32 sum it would."""
    given = arguments(length=4096, batch=1, heads=1, groups=1, channels=1, optional=False, dtype=torch.float32)
    given["angles"] = given["angles"].abs() + 1
    turns = torch.pi * given["angles"].tanh().unsqueeze(2) * given["dt"].unsqueeze(-1)
    got = trapezoidal_ssd(**given, backend="torch")[1].angle.double()
    wrong = turns.cumsum(1)[:, -1].double()
    want = turns.double().sum(1)
    assert want.min() > 15_000
    errors = [(torch.remainder(angle - want + torch.pi, 2 * torch.pi) - torch.pi).abs().max() for angle in (got, wrong)]
    assert errors[0] < 6e-5 < errors[1] / 5, errors


@pytest.mark.parametrize("cut", [1, 8, 13])
@pytest.mark.parametrize("ranks", [0, 2])
def test_split_law(cut, ranks):
    given = arguments(ranks=ranks)
    whole, end = trapezoidal_ssd(**given)
    timed = ("x", "dt", "dA", "trap", "B", "C", "angles", "z")
    first, middle = trapezoidal_ssd(**{**given, **{name: given[name][:, :cut] for name in timed}})
    rest = {name: given[name][:, cut:] for name in timed} | {"initial_state": middle}
    second, joined = trapezoidal_ssd(**{**given, **rest})
    assert_close("out", torch.cat([first, second], dim=1), whole)
    for name, one, other in zip(TrapezoidalState._fields, joined, end, strict=True):
        assert_close(name, one, other)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("ranks", [0, 2])
def test_a_reset_clears_all_that_is_carried(backend, ranks):
    """However large: what another sequence left must not come through, nor its last element reach over the border."""
    given = arguments(length=12, chunk_size=4, ranks=ranks, backend=backend)
    given["initial_state"] = TrapezoidalState(*(torch.full_like(tensor, 1e30) for tensor in given["initial_state"]))
    given["seq_idx"] = (torch.arange(12) >= 5).int().expand(2, -1)
    out, final = trapezoidal_ssd(**given)
    timed = ("x", "dt", "dA", "trap", "B", "C", "angles", "z")
    alone = {**given, **{name: given[name][:, 5:] for name in timed}, "initial_state": None, "seq_idx": None}
    want, want_final = trapezoidal_ssd(**alone)
    assert_close("out", out[:, 5:], want)
    for name, one, other in zip(TrapezoidalState._fields, final, want_final, strict=True):
        assert_close(name, one, other)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("ranks", [0, 2])
def test_autocast_changes_no_bit(backend, ranks):
    given = arguments(dtype=torch.float32, backend=backend, ranks=ranks)
    want, got = run(given), run(given, autocast=True)
    for name in want:
        assert torch.equal(got[name], want[name]), name


@pytest.mark.parametrize("ranks", [0, 2])
def test_a_training_step_compiles_without_a_break(ranks):
    given = arguments(dtype=torch.float32, packed=True, ranks=ranks)
    want = run(given)
    torch._dynamo.reset()
    leaves = {
        n: t.clone().requires_grad_() for n, t in given.items() if isinstance(t, Tensor) and t.is_floating_point()
    }
    weights = [random_tensor(*want[n].shape, seed=100 + i) for i, n in enumerate(("out", *TrapezoidalState._fields))]

    def loss(leaves):
        out, final = trapezoidal_ssd(**{**given, **leaves})
        return sum((weight * tensor).sum() for weight, tensor in zip(weights, (out, *final), strict=True))

    torch.compile(loss, fullgraph=True, backend="aot_eager")(leaves).backward()
    for name, leaf in leaves.items():
        assert_close(f"d{name}", leaf.grad, want[f"d{name}"])


@pytest.mark.parametrize("ranks", [0, 2])
def test_every_element_is_written_and_strides_do_not_matter(ranks):
    given = arguments(packed=True, ranks=ranks)
    want = run(given)
    turned = {
        name: value.transpose(0, -1).contiguous().transpose(0, -1) if isinstance(value, Tensor) else value
        for name, value in given.items()
    }
    assert not turned["x"].is_contiguous()
    before = {name: value.clone() for name, value in turned.items() if isinstance(value, Tensor)}
    with poisoned_memory():
        check(run(turned), want)
    assert all(torch.equal(turned[name], value) for name, value in before.items())


STATE = {"angle": (2, 4, 2), "ssm": (2, 4, 3, 6), "k": (2, 4, 6), "v": (2, 4, 3)}


def state_with(**changed: tuple[int, ...]) -> TrapezoidalState:
    return TrapezoidalState(**{name: torch.zeros(shape) for name, shape in {**STATE, **changed}.items()})


@pytest.mark.parametrize(
    ("changed", "error", "words"),
    [
        ({"x": torch.zeros(2, 21, 12)}, ValueError, ["x", "(2, 21, 12)", "heads"]),
        ({"x": torch.zeros(2, 0, 4, 3)}, ValueError, ["x", "at least one element"]),
        ({"dt": torch.zeros(2, 21, 3)}, ValueError, ["dt", "heads=4"]),
        ({"dA": torch.zeros(4)}, ValueError, ["dA", "(4,)", "heads=4"]),
        ({"trap": torch.zeros(2, 20, 4)}, ValueError, ["trap", "length=21"]),
        ({"B": torch.zeros(2, 21, 3, 6)}, ValueError, ["B", "3 groups", "4 heads"]),
        ({"C": torch.zeros(2, 21, 1, 6)}, ValueError, ["C", "groups=2"]),
        ({"angles": torch.zeros(2, 21, 4)}, ValueError, ["angles", "4 a step", "state size of 6"]),
        ({"B_bias": torch.zeros(4, 5)}, ValueError, ["B_bias", "d_state=6"]),
        ({"C_bias": torch.zeros(4, 2, 6)}, ValueError, ["C_bias", "(4, 2, 6)"]),
        ({"mimo_x": torch.zeros(4, 2, 5)}, ValueError, ["mimo_x", "channels=3"]),
        ({"mimo_x": torch.zeros(4, 2, 3)}, ValueError, ["B", "ranks=2"]),
        ({"D": torch.zeros(3)}, ValueError, ["D", "heads=4"]),
        ({"z": torch.zeros(2, 21, 4, 2)}, ValueError, ["z", "channels=3"]),
        ({"initial_state": state_with(k=(2, 1, 4, 6))}, ValueError, ["initial_state.k", "d_state=6"]),
        ({"initial_state": state_with(ssm=(2, 4, 6, 3))}, ValueError, ["initial_state.ssm", "channels=3"]),
        ({"initial_state": state_with(angle=(2, 4, 3))}, ValueError, ["initial_state.angle", "angles=2"]),
        ({"initial_state": state_with(v=(1, 4, 3))}, ValueError, ["initial_state.v", "batch=2"]),
        ({"seq_idx": torch.zeros(2, 20, dtype=torch.int32)}, ValueError, ["seq_idx", "length=21"]),
        ({"seq_idx": torch.zeros(2, 21)}, TypeError, ["seq_idx", "int32"]),
        ({"lengths": torch.zeros(3, dtype=torch.int64)}, ValueError, ["lengths", "batch=2"]),
        ({"dA": torch.zeros(2, 21, 4, dtype=torch.complex64)}, TypeError, ["dA", "complex64"]),
        ({"x": 3.0}, TypeError, ["x", "tensor", "float"]),
        ({"chunk_size": 0}, ValueError, ["chunk_size", "0"]),
        ({"backend": "cuda"}, ValueError, ["backend='cuda'", "torch"]),
    ],
)
def test_wrong_arguments_are_named(changed, error, words):
    given = {**arguments(dtype=torch.float32), **changed}
    with pytest.raises(error) as caught:
        trapezoidal_ssd(**given)
    assert all(word in str(caught.value) for word in ["trapezoidal_ssd", *words]), str(caught.value)


def test_an_odd_state_size_is_named():
    with pytest.raises(ValueError, match="state size of 5"):
        trapezoidal_ssd(**arguments(d_state=5, dtype=torch.float32))


def test_backends_are_chosen_by_name():
    given = arguments()
    with use_backend("reference"):
        assert torch.equal(trapezoidal_ssd(**given)[0], trapezoidal_ssd(**given, backend="reference")[0])
    assert torch.equal(trapezoidal_ssd(**given)[0], trapezoidal_ssd(**given, backend="torch")[0])
