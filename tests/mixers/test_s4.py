"""S4 against dense systems, HiPPO-LegS itself, its own recurrence and steps; rate, rounding, options."""

import copy
import math
import warnings

import pytest
import torch

from mambakit.kernels.testing import assert_close
from mambakit.mixers import S4, S4D
from mambakit.mixers.hippo import legs
from mambakit.mixers.s4 import CHUNK, S4Kernel
from mambakit.optim import parameter_groups


def perturbed(**options) -> S4:
    """A small S4 in float64, its parameters moved away from the symmetries of their start."""
    torch.manual_seed(0)
    mixer = S4(4, 6, **({"dt_min": 0.05, "dt_max": 1.0} | options)).double()
    with torch.no_grad():
        for parameter in mixer.kernel.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return mixer


def dense(kernel: S4Kernel, channel: int, rate: float) -> tuple[torch.Tensor, ...]:
    """dA, dB and C of one channel with both halves of the pairs, by solving Tustin's linear systems."""
    shared = channel % len(kernel.A_imag)
    dt = rate * kernel.log_dt[channel].exp()
    P, B, C = (torch.view_as_complex(p.detach()) for p in (kernel.P[shared], kernel.B[shared], kernel.C[channel]))
    Lambda = torch.complex(-kernel.log_A_real[shared].exp(), kernel.A_imag[shared])
    Lambda, P, B, C = (torch.cat((half, half.conj())) for half in (Lambda, P, B, C))
    A, unit = torch.diag(Lambda) - torch.outer(P, P.conj()), torch.eye(len(P), dtype=P.dtype)
    back = unit - dt / 2 * A
    return torch.linalg.solve(back, unit + dt / 2 * A), torch.linalg.solve(back, dt * B), C


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 2, 3, 7, 16, 33])
def test_kernel_is_the_impulse_response_of_the_dense_system(length: int):
    kernel = perturbed(n_ssm=2).kernel
    got = kernel(length, 1.5)
    for channel in range(4):
        dA, dB, C = dense(kernel, channel, 1.5)
        want = [(C @ torch.linalg.matrix_power(dA, t) @ dB).real for t in range(length)]
        assert_close(f"channel {channel}", got[channel], torch.stack(want), 1e-10)


@torch.no_grad()
def test_at_the_start_it_is_hippo_legs():
    """The real N x N system of the paper and S4's complex one: one discretisation, one response under C = B^*."""
    n, length = 8, 40
    kernel = S4Kernel(1, n, 1, 0.1, 0.1, None).double()
    kernel.C.copy_(kernel.B)  # B is real here, so that C B = B^* B over both halves
    A, B = legs(n)
    dt, unit = kernel.log_dt.exp(), torch.eye(n, dtype=torch.float64)
    dA = torch.linalg.solve(unit - dt / 2 * A, unit + dt / 2 * A)
    dB = torch.linalg.solve(unit - dt / 2 * A, dt * B)
    want = torch.stack([B @ torch.linalg.matrix_power(dA, t) @ dB for t in range(length)])
    # float32 rounded the start; in the other basis nothing else is lost.
    assert_close("kernel", kernel(length)[0], want, 1e-6)


@torch.no_grad()
def test_recurrence_over_several_chunks_is_the_convolution():
    mixer = perturbed(n_ssm=2)
    x = torch.randn(2, 5 * CHUNK + 3, 4, dtype=torch.float64)
    want = mixer(x)
    recurred, state = mixer(x, return_state=True)
    assert_close("recurrence", recurred, want, 1e-10)
    stepped, outputs = mixer.init_state(2), []
    for x_t in x.unbind(1):
        y_t, stepped = mixer.step(x_t, stepped)
        outputs.append(y_t)
    assert_close("steps", torch.stack(outputs, dim=1), want, 1e-10)
    assert_close("state", state.ssm, stepped.ssm, 1e-10)


@torch.no_grad()
@pytest.mark.parametrize("lengths", [(CHUNK, 1, CHUNK - 2, 2 * CHUNK + 5, 3), (3 * CHUNK + 4, 2 * CHUNK)])
def test_packing_over_several_chunks(lengths: tuple[int, ...]):
    """Boundaries on, before and behind a chunk's edge, and within the second chunk of two that are joined."""
    mixer = perturbed()
    seq_idx = torch.repeat_interleave(torch.tensor([3, 1, 3, 0, 7][: len(lengths)]), torch.tensor(lengths))
    x = torch.randn(1, sum(lengths), 4, dtype=torch.float64)
    alone = [mixer(piece, return_state=True) for piece in x.split(lengths, dim=1)]
    packed, state = mixer(x, seq_idx=seq_idx.int().unsqueeze(0), return_state=True)
    assert_close("packed", packed, torch.cat([y for y, _ in alone], dim=1), 1e-10)
    assert_close("state", state.ssm, alone[-1][1].ssm, 1e-10)


@torch.no_grad()
def test_a_state_after_any_number_of_elements():
    """Padding to one length ends each row at another place, on a chunk's edge and off it, continuing a state."""
    mixer, total = perturbed(), 2 * CHUNK
    x = torch.randn(1, total, 4, dtype=torch.float64)
    _, state = mixer(torch.randn(1, 9, 4, dtype=torch.float64), return_state=True)
    start = state.index_select(torch.zeros(total + 1, dtype=torch.int64))
    mask = torch.arange(total) < torch.arange(total + 1).unsqueeze(1)
    _, ends = mixer(x.expand(total + 1, -1, -1), state=start, mask=mask, return_state=True)
    for length in range(total + 1):
        assert_close(f"state after {length}", ends.ssm[length], state.ssm[0], 1e-10)
        if length < total:
            _, state = mixer.step(x[:, length], state)


@torch.no_grad()
@pytest.mark.parametrize("dt", [1e-6, 1e-3, 0.1])
def test_float32_keeps_both_views_to_1e_4(dt: float):
    """However small the step: neither view takes dA itself, in which 1 would swallow it."""
    torch.manual_seed(0)
    mixer = S4(3, 64, dt_min=dt, dt_max=dt)
    x = torch.randn(1, 2000, 3)
    want = copy.deepcopy(mixer).double()(x.double()).float()
    assert_close("convolution", mixer(x), want, 1e-4)
    assert_close("recurrence", mixer(x, return_state=True)[0], want, 1e-4)
    assert_close("kernel", mixer.kernel(500), copy.deepcopy(mixer.kernel).double()(500).float(), 2e-5)


@torch.no_grad()
def test_half_the_sampling_frequency_is_rate_two():
    """A slow signal, sampled half as often, is answered with every second output, but for the bilinear rule's error."""
    mixer = perturbed(dt_min=0.01, dt_max=0.02)
    signal = torch.sin(torch.arange(400, dtype=torch.float64) / 40).view(1, -1, 1).expand(-1, -1, 4)
    fast = mixer(signal)[:, 1::2]
    slow = mixer(signal[:, ::2])
    mixer.rate = 2.0
    right = mixer(signal[:, ::2])
    assert_close("at rate 2", right[:, 50:], fast[:, 50:], 0.03)
    assert (slow - fast)[:, 50:].norm() > 3 * (right - fast)[:, 50:].norm()
    assert_close("recurrence", mixer(signal[:, ::2], return_state=True)[0], right, 1e-9)
    assert_close("step", mixer.step(signal[:, 0], mixer.init_state(1))[0], right[:, 0], 1e-9)


@torch.no_grad()
def test_a_length_beyond_float_accuracy_is_warned_of_once():
    torch.manual_seed(0)
    kernel = S4Kernel(2, 16, 1, 0.1, 0.1, None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kernel(4096)  # at the start every mode fades
        kernel.log_A_real.fill_(-20.0)
        kernel.P.zero_()  # now none does
        kernel(512)
        kernel.double()(2**17)
        kernel.float()
    with pytest.warns(
        UserWarning, match=r"S4: .*length 131072 in torch.float32.*relative error.*float64.*steps"
    ) as told:
        got = kernel(2**17)
        kernel(2**17)
    assert len(told) == 1
    error = got.double() - copy.deepcopy(kernel).double()(2**17)
    assert error.norm() > 1e-3 * got.double().norm()  # the warning was not for nothing


def test_step_and_matrices_may_learn_at_a_rate_of_their_own():
    groups = parameter_groups(S4(4, 8, lr=1e-3), weight_decay=0.1)
    special = {name for group in groups if group.get("lr") == 1e-3 for name in group["names"]}
    assert special == {f"kernel.{name}" for name in ("log_dt", "log_A_real", "A_imag", "P", "B")}
    undecayed = {name for group in groups if group["weight_decay"] == 0 for name in group["names"]}
    assert special < undecayed and "kernel.C" not in undecayed


def test_sets_of_the_state_matrix_are_dealt_to_channels_in_turn():
    shapes = {name: tuple(tensor.shape) for name, tensor in S4(6, 8, n_ssm=3).kernel.state_dict().items()}
    assert shapes == {
        "log_dt": (6,),
        "log_A_real": (3, 4),
        "A_imag": (3, 4),
        "P": (3, 4, 2),
        "B": (3, 4, 2),
        "C": (6, 4, 2),
    }


def test_a_state_of_s4d_is_refused():
    with pytest.raises(TypeError, match="S4DState.*S4State"):
        S4(4, 8)(torch.zeros(1, 3, 4), state=S4D(4, 8).init_state(1))
    with pytest.raises(TypeError, match="S4State.*S4DState"):
        S4D(4, 8)(torch.zeros(1, 3, 4), state=S4(4, 8).init_state(1))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"d_state": 7}, ["S4", "d_state=7", "even"]),
        ({"n_ssm": 3}, ["n_ssm=3", "d_model=4"]),
        ({"n_ssm": 0}, ["n_ssm=0"]),
        ({"dt_min": 0.2}, ["dt_min=0.2", "dt_max=0.1"]),
        ({"rate": math.nan}, ["rate=nan"]),
    ],
)
def test_bad_options_are_named(options: dict, words: list[str]):
    with pytest.raises(ValueError) as error:
        S4(4, **options)
    assert all(word in str(error.value) for word in words), str(error.value)
