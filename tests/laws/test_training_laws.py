"""Gradients, optimiser groups, precision, compilation, key names: what training relies on."""

import copy

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from mambakit.kernels import use_backend
from mambakit.kernels.testing import assert_close
from mambakit.optim import SPARED_NAMES, parameter_groups


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_gradcheck(case, backend):
    """Gradients equal finite differences in float64: input, initial state, parameters, through the final state."""
    torch.manual_seed(1)
    model = case.make(2).double()
    x = torch.randn(1, 3, 2, dtype=torch.float64, requires_grad=True)
    start = model.init_state(1, dtype=torch.float64) if case.causal else None
    carried = [] if start is None else start.tensors()
    leaves = [torch.randn_like(t, dtype=torch.float64).requires_grad_() for t in carried]
    names, parameters = zip(*model.named_parameters(), strict=True)

    def function(x, *rest):
        given, weights = iter(rest[: len(leaves)]), dict(zip(names, rest[len(leaves) :], strict=True))
        if start is None:
            return torch.func.functional_call(model, weights, (x,))
        state = start.map(lambda _: next(given))
        y, end = torch.func.functional_call(model, weights, (x,), {"state": state, "return_state": True})
        return (y, *end.tensors())

    with use_backend(backend):
        assert torch.autograd.gradcheck(function, (x, *leaves, *parameters), fast_mode=True)


def test_optimiser_groups(case):
    """Every parameter is in exactly one group; A_log, D, dt bias, norms and biases are not decayed, matrices are."""
    model = case.make(8)
    groups = parameter_groups(model, weight_decay=0.1)
    decay = {name: group["weight_decay"] for group in groups for name in group["names"]}
    assert sorted(decay) == sorted(name for name, _ in model.named_parameters())
    for name, parameter in model.named_parameters():
        spared = parameter.dim() < 2 or name.split(".")[-1] in SPARED_NAMES
        spared = spared or getattr(parameter, "_optim", {}).get("weight_decay") == 0.0  # the mixer's own choice
        assert decay[name] == (0.0 if spared else 0.1), name


def test_one_step_moves_every_parameter(case):
    """Trap 1 and 2: biases included, every parameter receives a gradient."""
    torch.manual_seed(0)
    model = case.make(8)
    model(torch.randn(2, 9, 8)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and bool((parameter.grad != 0).any()), name


def test_recomputed_in_the_backward_pass(case, device):
    """Activation checkpointing gives the same gradients; what an operator kept may be read only once then."""
    torch.manual_seed(0)
    model = case.make(8).to(device)
    x = torch.randn(2, 9, 8, device=device, requires_grad=True)
    leaves = dict(model.named_parameters(), x=x)
    want = torch.autograd.grad(model(x).square().sum(), list(leaves.values()))
    got = torch.autograd.grad(checkpoint(model, x, use_reentrant=False).square().sum(), list(leaves.values()))
    for name, one, other in zip(leaves, got, want, strict=True):
        assert_close(name, one, other, 1e-5)


def test_key_round_trip(case):
    """A state_dict loads strictly into a fresh model and gives the same function."""
    torch.manual_seed(0)
    model = case.make(8)
    torch.manual_seed(1)
    other = case.make(8)
    other.load_state_dict(model.state_dict(), strict=True)
    x = torch.randn(1, 6, 8)
    assert torch.equal(other(x), model(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(case, device, dtype):
    """Mixed precision: outputs and gradients near float32's; parameters' gradients stay float32."""
    torch.manual_seed(2)
    model = case.make(16).to(device)
    x, weight = torch.randn(2, 2, 12, 16, device=device)
    want = model(x)
    (weight * want).sum().backward()
    wanted = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with torch.autocast(device, dtype=dtype):
        got = model(x)
    (weight * got.float()).sum().backward()
    # bfloat16 keeps 8 bits: 2^-8 a rounding, a dozen roundings in a chain.
    tolerance = 0.05 if dtype == torch.bfloat16 else 0.01
    assert_close("outputs", got.float(), want, tolerance)
    for (name, parameter), grad in zip(model.named_parameters(), wanted, strict=True):
        assert parameter.grad.dtype == torch.float32
        assert_close(name, parameter.grad, grad, 2 * tolerance)


def test_whole_model_in_bfloat16(case, device):
    """``model.bfloat16()`` runs, and its state stays float32; a cache, which adds nothing up, is kept as computed."""
    torch.manual_seed(2)
    model = case.make(16).to(device)
    x = torch.randn(2, 12, 16, device=device)
    want = model(x)
    found = model.bfloat16()(x.bfloat16(), return_state=case.causal)
    y, tensors = (found[0], found[1].tensors()) if case.causal else (found, [])
    assert y.dtype == torch.bfloat16
    kept = (torch.float32, torch.bfloat16) if case.grows else (torch.float32,)
    assert all(tensor.dtype in kept for tensor in tensors)
    assert_close("outputs", y.float(), want, 0.05)


def test_compile_has_no_break(case, device):
    """torch.compile(fullgraph=True) of a training step: the eager loss and gradients."""
    torch.manual_seed(3)
    model = case.make(8).to(device)
    x, weight = torch.randn(2, 2, 10, 8, device=device)
    seq_idx = torch.tensor([[0] * 4 + [1] * 6], dtype=torch.int32, device=device).expand(2, -1).contiguous()

    def loss(model, x):
        return (weight * model(x, seq_idx=seq_idx if case.packs else None)).mean()

    eager = loss(model, x)
    eager.backward()
    twin = copy.deepcopy(model)
    twin.zero_grad()
    torch._dynamo.reset()
    # On the CPU the tracing and autograd graph are what can break; inductor on the CPU is the
    # operators' own tests' business.
    compiled = torch.compile(loss, fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager")(twin, x)
    compiled.backward()
    assert_close("loss", compiled, eager, 1e-5)
    for (name, one), other in zip(twin.named_parameters(), model.parameters(), strict=True):
        assert_close(name, one.grad, other.grad, 1e-4)


@pytest.mark.usefixtures("stateful")
@torch.no_grad()
def test_compiled_step(case, device):
    """Decoding compiles too, state in and state out."""
    model = case.make(8).to(device)
    x = torch.randn(2, 3, 8, device=device)
    torch._dynamo.reset()
    step = torch.compile(model.step, fullgraph=True, backend="aot_eager")
    state, twin = model.init_state(2), model.init_state(2)
    for t in range(3):
        got, state = step(x[:, t], state)
        want, twin = model.step(x[:, t], twin)
        assert_close(f"step {t}", got, want, 1e-5)
