"""S4D against the dense system, closed forms and a plain convolution; its two views; another sampling rate."""

import math
from typing import get_args

import pytest
import torch
import torch.nn.functional as F

from mambakit.kernels.testing import assert_close, random_tensor
from mambakit.mixers import DSS, S4, S4D
from mambakit.mixers.s4d import Discretization, Init, fast_length, fft_convolve, initial_A
from mambakit.optim import parameter_groups

INITS, DISCRETIZATIONS = get_args(Init), get_args(Discretization)


def hippo_legs(n: int) -> torch.Tensor:
    """HiPPO-LegS by its definition (Gu et al. 2020, theorem 2), with the minus sign of the state matrix."""
    A = torch.zeros(n, n, dtype=torch.float64)
    for row in range(n):
        for column in range(row):
            A[row, column] = -math.sqrt(2 * row + 1) * math.sqrt(2 * column + 1)
        A[row, row] = -(row + 1)
    return A


def test_legs_is_the_spectrum_of_hippo_plus_rank_one():
    root = (torch.arange(8, dtype=torch.float64) + 0.5).sqrt()
    spectrum = torch.linalg.eigvals(hippo_legs(8) + torch.outer(root, root))
    spectrum = spectrum[spectrum.imag > 0]
    assert_close("legs", initial_A("legs", 8), spectrum[spectrum.imag.argsort()], 1e-10)


def test_the_other_initial_eigenvalues():
    lin, inv, real = (initial_A(init, 6) for init in ("lin", "inv", "real"))
    assert_close("lin", lin, torch.tensor([-0.5, -0.5 + math.pi * 1j, -0.5 + 2j * math.pi], dtype=torch.complex128))
    want = [-0.5 + 6j / math.pi * x for x in (5, 1, 1 / 5)]
    assert_close("inv", inv, torch.tensor(want, dtype=torch.complex128))
    assert_close("real", real, torch.tensor([-1, -2, -3], dtype=torch.complex128))


@torch.no_grad()
@pytest.mark.parametrize("discretization", DISCRETIZATIONS)
@pytest.mark.parametrize("init", INITS)
def test_kernel_is_the_impulse_response_of_the_dense_system(init: str, discretization: str):
    """Discretised as textbooks do any matrix: the exponential of (A B; 0 0) dt, or Tustin's pair of linear systems."""
    torch.manual_seed(0)
    mixer = S4D(3, 6, init=init, discretization=discretization, rate=1.5).double()
    got, p, length = mixer.kernel(30, mixer.rate), mixer.kernel, 30
    unit = torch.eye(3, dtype=torch.complex128)
    for d in range(3):
        dt = 1.5 * p.log_dt[d].exp()
        A, B = torch.diag(torch.complex(-p.log_A_real[d].exp(), p.A_imag[d])), torch.ones_like(unit[:, :1])
        if discretization == "zoh":
            block = torch.cat((torch.cat((A, B), dim=1), torch.zeros_like(unit[:1, [0, 0, 0, 0]])))
            dA, dB = torch.linalg.matrix_exp(dt * block)[:3].split([3, 1], dim=1)
        else:
            dA = torch.linalg.solve(unit - dt / 2 * A, unit + dt / 2 * A)
            dB = torch.linalg.solve(unit - dt / 2 * A, dt * B)
        powers = [torch.linalg.matrix_power(dA, t) @ dB for t in range(length)]
        want = 2 * (torch.view_as_complex(p.C[d]) @ torch.cat(powers, dim=1)).real
        assert_close(f"channel {d}", got[d], want, 1e-7)


@pytest.mark.parametrize("length", [1, 2, 21])
def test_fft_convolution_is_the_plain_one(length: int):
    x, kernel = random_tensor(2, length, 3, seed=0, dtype=torch.float64), random_tensor(3, length, seed=1).double()
    leaves, results = [x.requires_grad_(), kernel.requires_grad_()], []
    for convolve in (fft_convolve, plain_convolution):
        y = convolve(x, kernel)
        results.append([y, *torch.autograd.grad(y, leaves, random_tensor(2, length, 3, seed=2, dtype=torch.float64))])
    for got, want in zip(*results, strict=True):
        assert_close("y", got, want)
    assert results[0][0].is_contiguous()


def plain_convolution(x: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
    padded = F.pad(x.transpose(1, 2), (x.shape[1] - 1, 0))
    return F.conv1d(padded, kernel.flip(1).unsqueeze(1), groups=len(kernel)).transpose(1, 2)


def test_gradients_of_the_fft_convolution():
    x, kernel = (random_tensor(*shape, seed=0, dtype=torch.float64).requires_grad_() for shape in ((2, 3, 2), (2, 3)))
    assert torch.autograd.gradcheck(fft_convolve, (x, kernel))
    assert torch.autograd.gradgradcheck(fft_convolve, (x, kernel))


def test_lengths_of_transforms_have_small_factors():
    for least in (1, 2, 7, 31, 393, 1999, 32767):
        n = fast_length(least)
        assert least <= n <= 1.15 * least + 1
        for factor in (2, 3, 5):
            while n % factor == 0:
                n //= factor
        assert n == 1


@torch.no_grad()
def test_states_after_different_lengths_are_the_steps_states():
    """What recur sums up in closed form, from a state on, beside one step after another; padding may hold anything."""
    torch.manual_seed(0)
    mixer = S4D(3, 6, dt_min=0.05).double()
    x, lengths = random_tensor(3, 9, 3, seed=0, dtype=torch.float64), torch.tensor([9, 4, 1])
    state = mixer(random_tensor(3, 5, 3, seed=1, dtype=torch.float64), return_state=True)[1]
    mask = torch.arange(9) < lengths.unsqueeze(1)
    y, last = mixer(torch.where(mask.unsqueeze(-1), x, torch.nan), state=state, mask=mask, return_state=True)
    for b, length in enumerate(lengths):
        h = mixer.state_type(state.ssm[b : b + 1])
        for t in range(length):
            y_t, h = mixer.step(x[b : b + 1, t], h)
            assert_close("y", y[b, t], y_t[0], 1e-9)
        assert_close("state", last.ssm[b], h.ssm[0], 1e-9)


@torch.no_grad()
@pytest.mark.parametrize("kind", [S4D, S4])
def test_packed_sequences_after_a_state_are_steps(kind: type):
    """The first sequence of a row goes on from the state, the others from nothing; rows end in their 1st to 3rd one."""
    torch.manual_seed(0)
    mixer, lengths = kind(3, 6, dt_min=0.05).double(), torch.tensor([40, 23, 5, 0])
    x = random_tensor(4, 40, 3, seed=0, dtype=torch.float64)
    seq_idx = torch.repeat_interleave(torch.tensor([2, 0, 2]), torch.tensor([6, 17, 17])).int().expand(4, -1)
    state = mixer(random_tensor(4, 5, 3, seed=1, dtype=torch.float64), return_state=True)[1]
    mask = torch.arange(40) < lengths.unsqueeze(1)
    y, last = mixer(x, state=state, seq_idx=seq_idx, mask=mask, return_state=True)
    for b, length in enumerate(lengths):
        h = mixer.state_type(state.ssm[b : b + 1])
        for t in range(length):
            h = mixer.init_state(1) if t and seq_idx[b, t] != seq_idx[b, t - 1] else h
            y_t, h = mixer.step(x[b : b + 1, t], h)
            assert_close("y", y[b, t], y_t[0], 1e-9)
        assert_close("state", last.ssm[b], h.ssm[0], 1e-9)


@torch.no_grad()
@pytest.mark.parametrize("kind", [S4D, DSS, S4])
def test_packed_training_takes_the_convolution_alone(monkeypatch, kind: type):
    mixer, x = kind(2, 4), torch.randn(1, 6, 2)
    seq_idx = torch.tensor([[0, 0, 0, 1, 1, 1]], dtype=torch.int32)
    want = mixer(x, seq_idx=seq_idx, return_state=True)[0]
    monkeypatch.setattr(type(mixer.kernel), "recur", None)
    assert_close("y", mixer(x, seq_idx=seq_idx), want, 1e-5)


@torch.no_grad()
@pytest.mark.parametrize("discretization", DISCRETIZATIONS)
@pytest.mark.parametrize("init", INITS)
def test_both_views_agree_in_float32(init: str, discretization: str):
    torch.manual_seed(0)
    mixer = S4D(4, 16, init=init, discretization=discretization)
    x = torch.randn(1, 1500, 4)
    convolved = mixer(x)
    recurred, state = mixer(x, return_state=True)
    assert_close("recurrence", recurred, convolved, 1e-4)
    y_t, _ = mixer.step(x[:, 0], state)
    want = mixer(torch.cat((x, x[:, :1]), dim=1))[:, -1]
    assert_close("step", y_t, want, 1e-4)


@torch.no_grad()
def test_half_the_sampling_frequency_is_rate_two():
    """A signal held over two samples: zero-order hold is exact for it, so every second output is the slow one's."""
    torch.manual_seed(0)
    mixer = S4D(4, 8, dt_min=0.01).double()
    slow = torch.randn(2, 40, 4, dtype=torch.float64)
    fast = slow.repeat_interleave(2, dim=1)
    want = mixer(fast)[:, 1::2]
    mixer.rate = 2.0
    assert_close("convolution", mixer(slow), want, 1e-9)
    assert_close("recurrence", mixer(slow, return_state=True)[0], want, 1e-9)
    assert_close("step", mixer.step(slow[:, 0], mixer.init_state(2))[0], want[:, 0], 1e-9)


def test_keys_and_function_are_those_of_the_s4_repository():
    """Its minimal S4D, written again: channels first, a sum of powers, GELU, a 1x1 convolution and GLU."""
    torch.manual_seed(0)
    mixer = S4D(3, 8)
    weights = mixer.state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    assert shapes == {
        "D": (3,),
        "kernel.log_dt": (3,),
        "kernel.log_A_real": (3, 4),
        "kernel.A_imag": (3, 4),
        "kernel.C": (3, 4, 2),
        "output_linear.0.weight": (6, 3, 1),
        "output_linear.0.bias": (6,),
    }
    x = torch.randn(2, 12, 3)
    dt = weights["kernel.log_dt"].exp().unsqueeze(-1)
    A = -weights["kernel.log_A_real"].exp() + 1j * weights["kernel.A_imag"]
    C = torch.view_as_complex(weights["kernel.C"]) * (torch.exp(dt * A) - 1) / A
    K = 2 * torch.stack([(C * torch.exp(dt * A * t)).sum(-1).real for t in range(12)], dim=1)
    u = x.transpose(1, 2)
    y = F.conv1d(F.pad(u, (11, 0)), K.flip(1).unsqueeze(1), groups=3) + weights["D"].unsqueeze(-1) * u
    y = F.conv1d(F.gelu(y), weights["output_linear.0.weight"], weights["output_linear.0.bias"])
    assert_close("output", mixer(x), F.glu(y, dim=-2).transpose(1, 2), 1e-5)


def test_dss_is_s4d_with_the_spectrum_of_legs():
    mixer = DSS(2, 4)
    A = torch.complex(-mixer.kernel.log_A_real.exp(), mixer.kernel.A_imag)
    assert_close("A", A[1], initial_A("legs", 4), 1e-6)
    assert mixer.kernel.discretization == "zoh"


def test_step_and_eigenvalues_may_learn_at_a_rate_of_their_own():
    groups = parameter_groups(S4D(4, 8, lr=1e-3), weight_decay=0.1)
    special = {name for group in groups if group.get("lr") == 1e-3 for name in group["names"]}
    assert special == {"kernel.log_dt", "kernel.log_A_real", "kernel.A_imag"}
    assert all("lr" not in group for group in parameter_groups(S4D(4, 8), weight_decay=0.1))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"d_state": 7}, ["S4D", "d_state=7", "even"]),
        ({"d_state": 0}, ["d_state=0"]),
        ({"init": "linear"}, ["init='linear'", "lin, inv, legs, real"]),
        ({"discretization": "euler"}, ["discretization='euler'", "zoh, bilinear"]),
        ({"dt_min": 0.2}, ["dt_min=0.2", "dt_max=0.1"]),
        ({"rate": 0.0}, ["rate=0.0"]),
    ],
)
def test_bad_options_are_named(options: dict, words: list[str]):
    with pytest.raises(ValueError) as error:
        S4D(4, **options)
    assert all(word in str(error.value) for word in words), str(error.value)
