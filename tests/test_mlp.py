"""MLP, SwiGLU and mixture of experts: their equations, the routing, the balance."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mambakit import Backbone
from mambakit.kernels.testing import assert_close
from mambakit.mlp import MLP, MixtureOfExperts, SwiGLU, mlp_factory


@torch.no_grad()
def test_the_equations():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 6)
    mlp, glu = MLP(6), SwiGLU(6, d_hidden=5)
    want = F.linear(F.gelu(F.linear(x, mlp.fc1.weight, mlp.fc1.bias)), mlp.fc2.weight, mlp.fc2.bias)
    assert mlp.fc1.weight.shape == (24, 6)
    assert_close("mlp", mlp(x), want, 1e-6)
    up, gate = x @ glu.fc1.weight[:5].T, x @ glu.fc1.weight[5:].T
    assert_close("swiglu", glu(x), (up * gate * gate.sigmoid()) @ glu.fc2.weight.T, 1e-6)


@pytest.mark.parametrize(("d_model", "d_hidden"), [(8, 128), (384, 1024), (768, 2048), (160, 512)])
def test_the_default_width_of_swiglu(d_model, d_hidden):
    assert SwiGLU(d_model).fc2.weight.shape == (d_model, d_hidden)


@torch.no_grad()
@pytest.mark.parametrize("renormalize", [False, True])
def test_each_element_goes_to_its_experts(renormalize):
    torch.manual_seed(0)
    model = MixtureOfExperts(6, n_experts=4, top_k=2, d_hidden=5, renormalize=renormalize)
    x = torch.randn(2, 7, 6)
    y, _ = model(x)
    for row, out in zip(x.flatten(0, 1), y.flatten(0, 1), strict=True):
        p = (model.router.weight @ row).softmax(0)
        best = sorted(range(4), key=lambda e: -p[e])[:2]
        total = p[best].sum() if renormalize else 1.0
        want = torch.zeros(6)
        for e in best:
            up, gate = (model.experts.fc1[e] @ row).chunk(2)
            want += p[e] / total * (model.experts.fc2[e] @ (up * F.silu(gate)))
        assert_close("element", out, want, 1e-5)


def router_of(logits):
    """A mixture whose router gives element t of its input, row t of the unit matrix, the logits (T, E)."""
    model = MixtureOfExperts(*logits.shape, top_k=1, d_hidden=3)
    with torch.no_grad():
        model.router.weight.copy_(logits.T)
    return model, torch.eye(len(logits)).unsqueeze(0)


def test_the_balance_is_least_at_uniform_routing():
    uniform, x = router_of(8.0 * torch.eye(4))
    assert_close("uniform", uniform(x)[1], torch.tensor(1.0), 1e-6)
    # One expert for all: f = (1, 0, 0, 0), and its mean probability is that of one softmax.
    logits = torch.tensor([8.0, 0, 0, 0]).expand(4, 4)
    lopsided, _ = router_of(logits)
    assert_close("one for all", lopsided(x)[1], 4 * logits.softmax(1)[0, 0], 1e-6)
    for seed in range(20):
        torch.manual_seed(seed)
        model, x = router_of(3.0 * torch.randn(1, 4).expand(4, 4))
        assert model(x)[1] > 1.0


def test_the_balance_pulls_towards_uniform_routing():
    """Gradient descent on the balance alone spreads the choices of a lopsided router over all experts."""
    torch.manual_seed(0)
    model, x = router_of(0.5 * torch.randn(12, 4) + torch.tensor([1.0, 0, 0, 0]))
    before = model(x)[1].item()
    optimizer = torch.optim.Adam([model.router.weight], lr=0.1)
    for _ in range(60):
        optimizer.zero_grad()
        model(x)[1].backward()
        optimizer.step()
    after = model(x)[1].item()
    assert before > 1.2 and after < 1.1


@torch.no_grad()
def test_padding_does_not_count_in_the_balance():
    torch.manual_seed(0)
    model = MixtureOfExperts(6, n_experts=3, top_k=2, d_hidden=4)
    x = torch.randn(2, 5, 6)
    real = torch.cat([x[0, :4], x[1, :1]]).unsqueeze(0)
    assert_close("balance", model(x, torch.tensor([4, 1]))[1], model(real)[1], 1e-6)
    backbone = Backbone(6, 1, mlp=lambda d_model: model)
    mask = torch.tensor([[False, True, True, True, True], [False, False, True, False, False]])
    _, padded = backbone(x, mask=mask, return_balance=True)
    poisoned = x.masked_fill(~mask.unsqueeze(-1), 100.0)
    assert torch.equal(padded, backbone(poisoned, mask=mask, return_balance=True)[1])


def test_every_expert_has_gradients_even_unchosen():
    """A parameter without a gradient would stop distributed training."""
    model, x = router_of(torch.tensor([[8.0, 0, 0, 0]] * 4))
    model(x)[0].sum().backward()
    assert all(parameter.grad is not None for parameter in model.experts.parameters())
    assert not model.experts.fc1.grad[1:].any() and model.experts.fc1.grad[0].any()


def test_compile_has_no_break():
    """Whatever the router chooses, one graph: forward and backward as eager, with other choices in a second batch."""
    torch.manual_seed(0)
    model = MixtureOfExperts(8, n_experts=3, top_k=2, d_hidden=4)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for seed in range(2):
        x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(seed))
        gradients = []
        for function in (model, compiled):
            y, balance = function(x)
            gradients.append(torch.autograd.grad(y.square().sum() + balance, [*model.parameters()]))
        for got, want in zip(*gradients, strict=True):
            assert_close("gradient", got, want, 1e-5)


def test_gradients_in_float64():
    torch.manual_seed(0)
    model = MixtureOfExperts(3, n_experts=3, top_k=2, d_hidden=2).double()
    x = torch.randn(1, 4, 3, dtype=torch.float64, requires_grad=True)
    names, parameters = zip(*model.named_parameters(), strict=True)

    def function(x, *weights):
        return torch.func.functional_call(model, dict(zip(names, weights, strict=True)), (x,))

    assert torch.autograd.gradcheck(function, (x, *parameters))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_router_computes_in_float32(dtype):
    torch.manual_seed(0)
    model = MixtureOfExperts(16, n_experts=4, d_hidden=8)
    x = torch.randn(2, 5, 16)
    with torch.autocast("cpu", dtype=dtype):
        y, balance = model(x)
    assert y.dtype == dtype and balance.dtype == torch.float32
    assert torch.equal(balance, model(x)[1])
    assert_close("output", y.float(), model(x)[0], 0.02)
    half, half_balance = model.to(dtype)(x.to(dtype))
    assert half.dtype == dtype and half_balance.dtype == torch.float32


def jamba_layer():
    """transformers' Jamba layer of attention and experts, float32, random weights."""
    jamba = pytest.importorskip("transformers.models.jamba.modeling_jamba", reason="transformers is not installed")
    sizes = {"hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 24}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "num_hidden_layers": 2, "attn_layer_offset": 1}
    periods = {"attn_layer_period": 2, "expert_layer_period": 2, "expert_layer_offset": 1}
    config = jamba.JambaConfig(**sizes, **experts, **periods, attn_implementation="eager", vocab_size=8)
    layer = jamba.JambaAttentionDecoderLayer(config, layer_idx=1)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    return jamba, config, layer


@torch.no_grad()
def test_a_layer_of_jamba_with_experts():
    """Norms, unrotated grouped attention, experts, additions and the load-balancing loss are those of transformers."""
    from functools import partial

    from mambakit.mixers import Attention

    torch.manual_seed(0)
    jamba, config, theirs = jamba_layer()
    ours = Backbone(
        16,
        1,
        mixer=partial(Attention, n_heads=4, n_kv_heads=2, d_rotary=0),
        mlp=partial(MixtureOfExperts, n_experts=4, d_hidden=24),
        norm_eps=config.rms_norm_eps,
    )
    layer, attention = ours.layers[0], theirs.self_attn
    projections = [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]
    layer.mixer.in_proj.weight.copy_(torch.cat(projections))
    layer.mixer.out_proj.weight.copy_(attention.o_proj.weight)
    layer.norm.weight.copy_(theirs.input_layernorm.weight)
    layer.norm2.weight.copy_(theirs.pre_ff_layernorm.weight)
    experts = theirs.feed_forward.experts
    gate, up = experts.gate_up_proj.chunk(2, dim=1)
    layer.mlp.experts.fc1.copy_(torch.cat([up, gate], dim=1))
    layer.mlp.experts.fc2.copy_(experts.down_proj)
    layer.mlp.router.weight.copy_(theirs.feed_forward.router.weight)

    x, logits = torch.randn(2, 9, 16), []
    theirs.feed_forward.router.register_forward_hook(lambda module, inputs, output: logits.append(output[0]))
    want = theirs(x, attention_mask=torch.full((9, 9), -torch.inf).triu(1)[None, None])
    hidden, residual, _, balance = layer(x, None, None, None, None, False)
    assert_close("stream", hidden + residual, want, 1e-5)
    loss = jamba.load_balancing_loss_func(tuple(logits), num_experts=4, top_k=2)
    assert_close("balance", 2 * balance, loss, 1e-5)  # theirs counts the two choices of an element as two


@pytest.mark.parametrize("top_k", [0, 5])
def test_top_k_out_of_range(top_k):
    with pytest.raises(ValueError, match=f"top_k={top_k}.*n_experts=4"):
        MixtureOfExperts(8, n_experts=4, top_k=top_k)


@pytest.mark.parametrize(
    ("mlp", "error", "words"), [("swigul", ValueError, r"swigul.*did you mean swiglu\?"), (3, TypeError, "int")]
)
def test_a_wrong_mlp_is_named(mlp, error, words):
    with pytest.raises(error, match=words):
        mlp_factory(mlp)
