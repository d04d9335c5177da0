"""S5 against its dense system run by a loop, one channel of it against S4D; another sampling rate; bad options."""

import pytest
import torch
import torch.nn.functional as F

from mambakit.kernels.testing import assert_close
from mambakit.mixers import S4D, S5
from mambakit.mixers.s4d import initial_A
from mambakit.optim import parameter_groups


@torch.no_grad()
def test_outputs_are_those_of_the_dense_system():
    """All P states, conjugates included, with matrices, an exponential and a loop; and the gate."""
    torch.manual_seed(0)
    mixer = S5(3, 8, blocks=2, rate=1.5).double()
    x = torch.randn(2, 25, 3, dtype=torch.float64)
    A = torch.complex(-mixer.log_A_real.exp(), mixer.A_imag)
    B, C = torch.view_as_complex(mixer.B), torch.view_as_complex(mixer.C)
    A, B, C = torch.cat((A, A.conj())), torch.cat((B, B.conj())), torch.cat((C, C.conj()), dim=1)
    dA = torch.linalg.matrix_exp(torch.diag(1.5 * mixer.log_dt.exp().repeat(2) * A))
    dB = torch.linalg.solve(torch.diag(A), (dA - torch.eye(8)) @ B)
    h, outputs = torch.zeros(2, 8, dtype=torch.complex128), []
    for t in range(25):
        h = h @ dA.T + x[:, t].to(h.dtype) @ dB.T
        y = h @ C.T
        assert y.imag.abs().max() < 1e-9
        outputs.append(y.real + mixer.D * x[:, t])
    g = F.gelu(torch.stack(outputs, dim=1))
    want = g * torch.sigmoid(g @ mixer.out_gate.weight.T + mixer.out_gate.bias)
    assert_close("output", mixer(x), want, 1e-7)


@torch.no_grad()
def test_one_channel_is_one_of_s4d():
    """The same A, step, B = 1 and C for a single channel: the scan's states give the convolution's output."""
    torch.manual_seed(0)
    s5, s4d = S5(1, 8).double(), S4D(1, 8).double()
    s5.log_dt.fill_(s4d.kernel.log_dt.item())
    s5.log_A_real.copy_(s4d.kernel.log_A_real[0])
    s5.A_imag.copy_(s4d.kernel.A_imag[0])
    s5.B.copy_(torch.tensor([1.0, 0.0]))
    s5.C.copy_(s4d.kernel.C)
    s5.D.copy_(s4d.D)
    s4d._mix_channels = s5._gate
    x = torch.randn(2, 100, 1, dtype=torch.float64)
    assert_close("output", s5(x), s4d(x), 1e-9)


@torch.no_grad()
def test_half_the_sampling_frequency_is_rate_two():
    """Zero-order hold is exact for a signal held over two samples: every second output is the slow one's."""
    torch.manual_seed(0)
    mixer = S5(4, 8, dt_min=0.01).double()
    slow = torch.randn(2, 40, 4, dtype=torch.float64)
    want = mixer(slow.repeat_interleave(2, dim=1))[:, 1::2]
    mixer.rate = 2.0
    assert_close("scan", mixer(slow), want, 1e-9)
    assert_close("step", mixer.step(slow[:, 0], mixer.init_state(2))[0], want[:, 0], 1e-9)


def test_initial_eigenvalues_are_those_of_the_blocks():
    mixer = S5(2, 12, blocks=3)
    A = torch.complex(-mixer.log_A_real.exp(), mixer.A_imag)
    assert_close("A", A.view(3, 2), initial_A("legs", 4).expand(3, 2), 1e-6)


def test_step_and_eigenvalues_may_learn_at_a_rate_of_their_own():
    groups = parameter_groups(S5(4, 8, lr=1e-3), weight_decay=0.1)
    special = {name for group in groups if group.get("lr") == 1e-3 for name in group["names"]}
    assert special == {"log_dt", "log_A_real", "A_imag"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"d_state": 7}, ["S5", "d_state=7", "blocks=1"]),
        ({"d_state": 8, "blocks": 3}, ["d_state=8", "blocks=3"]),
        ({"dt_min": 0.2}, ["dt_min=0.2", "dt_max=0.1"]),
        ({"rate": -1.0}, ["rate=-1.0"]),
    ],
)
def test_bad_options_are_named(options: dict, words: list[str]):
    with pytest.raises(ValueError) as error:
        S5(4, **options)
    assert all(word in str(error.value) for word in words), str(error.value)
