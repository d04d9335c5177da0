"""Mamba-3's block against a plain restatement of the published step; names, initial values, bad input."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mambakit import Backbone
from mambakit.kernels import use_backend
from mambakit.kernels.testing import assert_close
from mambakit.mixers import Mamba3

VARIANTS = [
    {},
    {"a_activation": "softplus", "rope_fraction": 1.0, "A_floor": 0.5},
    {"ngroups": 2, "is_outproj_norm": True},
    {"is_mimo": True, "mimo_rank": 3, "ngroups": 2},
    {"is_mimo": True, "mimo_rank": 2, "rope_fraction": 1.0, "is_outproj_norm": True},
]


def perturbed(mixer: Mamba3) -> Mamba3:
    """Every parameter away from its initial value, with steps large enough for the memory to show."""
    with torch.no_grad():
        for name, parameter in mixer.named_parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
            if name == "dt_bias":
                parameter.add_(3.0)
    return mixer


def published(weights: dict[str, Tensor], x: Tensor, headdim: int, groups: int, options: dict) -> Tensor:
    """One sequence x (L, d_model) through the block, step by step and head by head, from the weights alone.

    As mamba_ssm's module and its tests' step function state it: in_proj gives z, x, B, C, dt, A, trap, angles, with B
    and C by rank, then group; the previous input enters with beta = (1 - trap) dt alpha, this one with gamma = trap dt.
    One input a step rotates neighbouring numbers, several rotate numbers N/2 apart.
    """
    heads, ranks, N = weights["B_bias"].shape
    inner, P = weights["out_proj.weight"].shape[1], headdim
    mimo = "mimo_x" in weights
    S = int(N * options.get("rope_fraction", 0.5)) // 2

    def normed(v: Tensor) -> Tensor:
        return v / (v.square().mean() + 1e-5).sqrt()

    outputs = []
    angle = torch.zeros(heads, S, dtype=x.dtype)
    state = torch.zeros(heads, P, N, dtype=x.dtype)
    last: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(heads)]
    for x_t in x:
        split = [inner, inner, ranks * groups * N, ranks * groups * N, heads, heads, heads, S]
        z, u, B, C, dt, A, trap, theta = (weights["in_proj.weight"] @ x_t).split(split)
        B, C = B.view(ranks, groups, N), C.view(ranks, groups, N)
        y_t = []
        for h in range(heads):
            step = torch.log1p(torch.exp(dt[h] + weights["dt_bias"][h]))
            if options.get("a_activation") == "softplus":
                rate = torch.log1p(torch.exp(A[h]))
            else:
                rate = 1 + A[h] if A[h] >= 0 else 1 / (1 - A[h])
            alpha = torch.exp(-step * max(rate, torch.tensor(options.get("A_floor", 1e-4))))
            share = 1 / (1 + torch.exp(-trap[h]))
            angle[h] = (angle[h] + math.pi * torch.tanh(theta) * step) % (2 * math.pi)
            group = h // (heads // groups)

            def turned(b: Tensor, h: int = h) -> Tensor:
                b = b.clone()
                for i in range(S):
                    one, two = (i, i + N // 2) if mimo else (2 * i, 2 * i + 1)
                    c, s = torch.cos(angle[h, i]), torch.sin(angle[h, i])
                    b[one], b[two] = c * b[one] - s * b[two], s * b[one] + c * b[two]
                return b

            values = []
            for r in range(ranks):
                k = turned(normed(B[r, group]) * weights["B_norm.weight"] + weights["B_bias"][h, r])
                v = u.view(heads, P)[h] * (weights["mimo_x"][h, r] if mimo else 1)
                values.append((v, k))
            new = alpha * state[h]
            for v, k in last[h]:
                new = new + (1 - share) * step * alpha * torch.outer(v, k)
            for v, k in values:
                new = new + share * step * torch.outer(v, k)
            state[h], last[h] = new, values
            total = torch.zeros(P, dtype=x.dtype)
            for r in range(ranks):
                q = turned(normed(C[r, group]) * weights["C_norm.weight"] + weights["C_bias"][h, r])
                y = new @ q + weights["D"][h] * values[r][0]
                if "norm.weight" in weights:
                    y = normed(y) * weights["norm.weight"].view(heads, P)[h]
                gate = z.view(heads, P)[h] * (weights["mimo_z"][h, r] if mimo else 1)
                total = total + F.silu(gate) * y * (weights["mimo_o"][h, r] if mimo else 1)
            y_t.append(total)
        outputs.append(weights["out_proj.weight"] @ torch.cat(y_t))
    return torch.stack(outputs)


@pytest.mark.parametrize("options", VARIANTS, ids=str)
@torch.no_grad()
def test_the_published_step(options):
    """All at once, in two pieces and step by step: the same outputs, and those of the restatement."""
    torch.manual_seed(0)
    mixer = perturbed(Mamba3(6, d_state=8, headdim=3, **options)).double()
    x = torch.randn(1, 21, 6, dtype=torch.float64)
    want = published(mixer.state_dict(), x[0], 3, options.get("ngroups", 1), options)
    for backend in ("torch", "reference"):
        with use_backend(backend):
            assert_close(backend, mixer(x)[0], want, 1e-8)
    _, state = mixer(x[:, :9], return_state=True)
    for t in range(9, 21):
        y_t, state = mixer.step(x[:, t], state)
        assert_close(f"step {t}", y_t[0], want[t], 1e-8)


def test_names_and_shapes_are_the_originals():
    """A checkpoint of mamba_ssm loads as it is: d_model 128, N 16, two heads of 128 channels, rank 4."""
    shapes = {name: tuple(p.shape) for name, p in Mamba3(128, d_state=16, headdim=128).named_parameters()}
    assert shapes == {
        "in_proj.weight": (2 * 256 + 2 * 16 + 3 * 2 + 4, 128),
        "dt_bias": (2,),
        "B_bias": (2, 1, 16),
        "C_bias": (2, 1, 16),
        "B_norm.weight": (16,),
        "C_norm.weight": (16,),
        "D": (2,),
        "out_proj.weight": (128, 256),
    }
    mimo = Mamba3(128, d_state=16, headdim=128, is_mimo=True, is_outproj_norm=True, rope_fraction=1.0)
    more = {name: tuple(p.shape) for name, p in mimo.named_parameters()}
    assert more["in_proj.weight"] == (2 * 256 + 2 * 4 * 16 + 3 * 2 + 8, 128)
    assert more["B_bias"] == more["C_bias"] == (2, 4, 16)
    assert {name: more[name] for name in more.keys() - shapes.keys()} == {
        "mimo_x": (2, 4, 128),
        "mimo_z": (2, 4, 128),
        "mimo_o": (2, 4, 128),
        "norm.weight": (256,),
    }


def test_initial_values():
    torch.manual_seed(0)
    mixer = Mamba3(64, headdim=1, d_state=4, dt_min=0.01, dt_max=0.05, dt_init_floor=0.02, is_mimo=True)
    steps = F.softplus(mixer.dt_bias)
    assert steps.min() > 0.0199 and steps.max() < 0.0501 and steps.max() > 0.045 and (steps < 0.0201).sum() > 20
    for name, value in {"B_bias": 1, "C_bias": 1, "D": 1, "mimo_x": 0.25, "mimo_z": 1, "mimo_o": 0.25}.items():
        assert bool((getattr(mixer, name) == value).all()), name
    assert mixer.D._no_weight_decay and mixer.dt_bias._no_weight_decay


def test_the_two_activations_of_A():
    """Trap 6: the same keys, another function; both at least A_floor, the heavy tail smooth where its halves meet."""
    dd_A = torch.tensor([-1e6, -3.0, -1e-9, 0.0, 2.0], dtype=torch.float64, requires_grad=True)
    heavy = Mamba3(2, d_state=4, headdim=2, A_floor=1e-4)._A(dd_A)
    assert_close("heavy", heavy, torch.tensor([-1e-4, -0.25, -1.0, -1.0, -3.0], dtype=torch.float64), 1e-8)
    (slope,) = torch.autograd.grad(heavy.sum(), dd_A)
    assert_close("slope", slope, torch.tensor([0.0, -1 / 16, -1.0, -1.0, -1.0], dtype=torch.float64), 1e-8)
    soft = Mamba3(2, d_state=4, headdim=2, A_floor=1e-4, a_activation="softplus")._A(dd_A)
    want = torch.tensor([-1e-4, -math.log1p(math.exp(-3)), -math.log(2), -math.log(2), -math.log1p(math.exp(2))])
    assert_close("soft", soft, want.double(), 1e-6)


def test_the_state_is_the_originals():
    """angle (B, H, S), ssm (B, H, P, N), k by rank with several inputs, v (B, H, P)."""
    shapes = [tuple(t.shape) for t in Mamba3(8, d_state=8, headdim=4).init_state(3).tensors()]
    assert shapes == [(3, 4, 2), (3, 4, 4, 8), (3, 4, 8), (3, 4, 4)]
    mimo = Mamba3(8, d_state=8, headdim=4, is_mimo=True, mimo_rank=2).init_state(3)
    assert tuple(mimo.k.shape) == (3, 2, 4, 8)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"headdim": 5}, ["headdim=5", "16"]),
        ({"ngroups": 3}, ["ngroups=3", "4 heads"]),
        ({"rope_fraction": 0.25}, ["rope_fraction=0.25", "0.5 or 1"]),
        ({"d_state": 2}, ["d_state=2", "0 angles"]),
        ({"d_state": 7}, ["d_state=7", "even"]),
        ({"is_mimo": True, "mimo_rank": 0}, ["mimo_rank=0"]),
        ({"a_activation": "relu"}, ["a_activation='relu'", "softplus"]),
    ],
)
def test_bad_options_are_named(options, words):
    with pytest.raises(ValueError) as error:
        Mamba3(8, **{"headdim": 4, "d_state": 8, **options})
    assert all(word in str(error.value) for word in ["Mamba3", *words]), str(error.value)


def test_the_backbone_knows_it_by_name_and_by_letter():
    backbone = Backbone(32, 2, mixer="mamba3", pattern="m3")
    assert [type(layer.mixer) for layer in backbone.layers] == [Mamba3, Mamba3]
    y = backbone(torch.randn(1, 5, 32))
    assert y.shape == (1, 5, 32) and bool(torch.isfinite(y).all())
