"""Mamba-2's block against transformers' and against a plain forward; names, initial values, bad input."""

import math

import pytest
import torch
import torch.nn.functional as F

from mambakit import Backbone
from mambakit.kernels import use_backend
from mambakit.kernels.testing import assert_close
from mambakit.mixers import Mamba1, Mamba2


def perturbed(mixer: Mamba2) -> Mamba2:
    """Every parameter away from its initial value, with steps large enough for the memory to show."""
    with torch.no_grad():
        for name, parameter in mixer.named_parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
            if name == "dt_bias":
                parameter.add_(3.0)
    return mixer


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize(("groups", "limit", "bias"), [(1, (0.0, math.inf), False), (2, (0.05, 0.8), True)])
def test_the_block_of_transformers(backend, groups, limit, bias):
    """Its PyTorch path with the same weights gives the same output, over several chunks and step by step."""
    pytest.importorskip("transformers", reason="the comparison needs transformers")
    from transformers import Mamba2Config
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    config = Mamba2Config(
        hidden_size=16,
        num_hidden_layers=1,
        num_heads=4,
        head_dim=8,
        state_size=6,
        n_groups=groups,
        conv_kernel=4,
        expand=2,
        chunk_size=8,
        time_step_limit=limit,
        use_bias=bias,
        vocab_size=11,
    )
    torch.manual_seed(0)
    ours = perturbed(
        Mamba2(16, d_state=6, headdim=8, ngroups=groups, dt_limit=limit, bias=bias, chunk_size=16 // groups)
    )
    theirs = Mamba2Mixer(config, layer_idx=0).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(2, 29, 16)
    with torch.no_grad(), use_backend(backend):
        want = theirs(x)
        assert_close("output", ours(x), want, 1e-5)
        assert (ours(x) - want).abs().max() < 1e-4
        _, state = ours(x[:, :20], return_state=True)
        for t in range(20, 29):
            y_t, state = ours.step(x[:, t], state)
            assert (y_t - want[:, t]).abs().max() < 1e-4, t


@pytest.mark.parametrize("norm_before_gate", [False, True])
def test_a_gated_mlp_beside_the_state_space_model(norm_before_gate):
    """in_proj's order is z0, x0, z, x, B, C, dt where d_ssm < D, and D may have an entry a channel."""
    torch.manual_seed(1)
    mixer = Mamba2(6, d_state=3, headdim=2, d_ssm=8, D_has_hdim=True, norm_before_gate=norm_before_gate)
    mixer = perturbed(mixer).double()
    x = torch.randn(1, 7, 6, dtype=torch.float64)
    z0, x0, z, xBC, dt = (x @ mixer.in_proj.weight.T).split([4, 4, 8, 14, 4], dim=-1)
    taps = mixer.conv1d.weight[:, 0]
    padded = F.pad(xBC, (0, 0, 3, 0))
    xBC = F.silu(sum(padded[:, k : k + 7] * taps[:, k] for k in range(4)) + mixer.conv1d.bias)
    dt = torch.log1p(torch.exp(dt + mixer.dt_bias))
    h, ys = torch.zeros(4, 2, 3, dtype=torch.float64), []
    for t in range(7):
        u, B, C = xBC[0, t, :8].view(4, 2), xBC[0, t, 8:11], xBC[0, t, 11:]
        decay = torch.exp(-dt[0, t] * mixer.A_log.exp())
        h = decay[:, None, None] * h + (dt[0, t][:, None] * u)[..., None] * B
        ys.append((h @ C + mixer.D.view(4, 2) * u).flatten())
    y, gate = torch.stack(ys).unsqueeze(0), F.silu(z)
    s = y if norm_before_gate else y * gate
    s = s / torch.sqrt(s.square().mean(-1, keepdim=True) + 1e-5) * mixer.norm.weight
    y = s * gate if norm_before_gate else s
    want = torch.cat([F.silu(z0) * x0, y], dim=-1) @ mixer.out_proj.weight.T
    assert_close("output", mixer(x), want)


def test_names_and_shapes_are_mamba_ssms():
    shapes = {name: tuple(t.shape) for name, t in Mamba2(32, d_state=16, headdim=8, ngroups=2).state_dict().items()}
    assert shapes == {
        "in_proj.weight": (64 + 64 + 2 * 2 * 16 + 8, 32),
        "conv1d.weight": (64 + 2 * 2 * 16, 1, 4),
        "conv1d.bias": (64 + 2 * 2 * 16,),
        "dt_bias": (8,),
        "A_log": (8,),
        "D": (8,),
        "norm.weight": (64,),
        "out_proj.weight": (32, 64),
    }


def test_initial_values():
    torch.manual_seed(0)
    mixer = Mamba2(512, headdim=8, dt_min=0.01, dt_max=0.2, A_init_range=(2.0, 5.0), conv_init=0.01)
    dt, A = F.softplus(mixer.dt_bias), mixer.A_log.exp()
    assert 0.0099 < dt.min() < 0.02 and 0.1 < dt.max() < 0.2001
    assert 2.0 <= A.min() < 2.5 and 4.5 < A.max() <= 5.0
    assert bool((mixer.D == 1).all()) and mixer.conv1d.weight.abs().max() <= 0.01


def test_padding_stands_still_whatever_the_smallest_step():
    """A lower limit of the steps must not make the memory fade over padding."""
    torch.manual_seed(0)
    mixer = Mamba2(8, d_state=4, headdim=4, dt_limit=(0.5, 1.0))
    x, mask = torch.randn(1, 9, 8), torch.arange(9).unsqueeze(0) < 4
    _, padded = mixer(x, mask=mask, return_state=True)
    _, alone = mixer(x[:, :4], return_state=True)
    assert_close("state", padded.ssm, alone.ssm)


def test_a_backbone_of_it_learns():
    """By name in the backbone: on a target that needs memory the loss falls as Mamba-1's does."""

    def losses(mixer):
        torch.manual_seed(0)
        model = Backbone(d_model=8, n_layers=1, mixer=mixer)
        optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
        x = torch.randn(8, 12, 8)
        target = F.pad(x[:, :-2], (0, 0, 2, 0))
        found = []
        for _ in range(40):
            loss = (model(x) - target).square().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            found.append(loss.item())
        return found[0], found[-1]

    before, after = losses(lambda d_model: Mamba2(d_model, d_state=8, headdim=4))
    other = losses(lambda d_model: Mamba1(d_model, d_state=8))[1]
    assert after < 0.5 * before and after < 2 * other


def test_it_goes_by_a_name_and_a_letter():
    assert isinstance(Backbone(d_model=32, n_layers=1, mixer="mamba2").layers[0].mixer, Mamba2)
    hybrid = Backbone(d_model=32, n_layers=2, pattern="2m")
    assert [type(layer.mixer) for layer in hybrid.layers] == [Mamba2, Mamba1]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"headdim": 5}, ["headdim=5", "16 channels"]),
        ({"headdim": 0}, ["headdim=0"]),
        ({"headdim": 4, "ngroups": 3}, ["ngroups=3", "4 heads"]),
        ({"headdim": 4, "d_ssm": 20}, ["d_ssm=20", "16"]),
        ({"headdim": 4, "d_ssm": 0}, ["d_ssm=0"]),
    ],
)
def test_uneven_heads_are_named(options, words):
    with pytest.raises(ValueError) as error:
        Mamba2(8, **options)
    assert all(word in str(error.value) for word in ["Mamba2", *words]), str(error.value)
