"""The vectorised selective scan and its operator against the definition, and the laws every scan obeys."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mambakit.kernels.scan import chunked, selective_scan
from mambakit.kernels.scan import lanes as lanes_module
from mambakit.kernels.scan.op import _scan, _scan_backward
from mambakit.kernels.scan.reference import FORWARD, HALF, direction_of
from mambakit.kernels.testing import assert_close, poisoned_memory, random_tensor, scan_arguments

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA"))]
DIFFERENTIABLE = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")
FORMS = ("per step", "2 groups", "constant")


def results(given: dict, backend: str, tensors: tuple[str, ...] = DIFFERENTIABLE) -> dict[str, Tensor]:
    """Outputs, and gradients of a fixed random functional of both of them, by name."""
    given = {name: value.detach().clone() if isinstance(value, Tensor) else value for name, value in given.items()}
    leaves = [name for name in tensors if name in given]
    for name in leaves:
        given[name].requires_grad_()
    out, final_state = selective_scan(**given, backend=backend)
    weights = [
        random_tensor(*y.shape, seed=50 + i, dtype=y.dtype, device=y.device) for i, y in enumerate((out, final_state))
    ]
    gradients = torch.autograd.grad((out, final_state), [given[name] for name in leaves], weights)
    return {"out": out, "final_state": final_state} | dict(zip(leaves, gradients, strict=True))


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float | None = None) -> None:
    assert got.keys() == want.keys()
    for name in want:
        assert got[name].dtype == want[name].dtype, name
        assert_close(name, got[name], want[name], tolerance)


@pytest.fixture
def many_lanes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small test shapes take the way of long sequences with few channels: several lanes."""
    monkeypatch.setattr(lanes_module, "SMALL_STEP", 10**9)
    monkeypatch.setattr(lanes_module, "LANED_STEP", 10**9)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 3),
    length=st.sampled_from([1, 2, 15, 16, 17, 32, 49]),
    channels=st.sampled_from([2, 6]),
    d_state=st.integers(1, 4),
    B=st.sampled_from(FORMS),
    C=st.sampled_from(FORMS),
    complex_A=st.booleans(),
    optional=st.booleans(),
    packed=st.booleans(),
    reverse=st.sampled_from([False, True, "half"]),
    lanes=st.integers(1, 4),
    row_groups=st.booleans(),
)
def test_outputs_and_gradients_are_those_of_the_definition(lanes: int, row_groups: bool, **options) -> None:
    given = scan_arguments(**options)
    state = options["batch"] * options["channels"] * options["d_state"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lanes_module, "SMALL_STEP", 0 if lanes == 1 else state + 1)
        patch.setattr(lanes_module, "LANED_STEP", lanes * state)
        if row_groups:
            patch.setattr(lanes_module, "TILE", 1)
        assert_same(results(given, "torch"), results(given, "reference"))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("complex_A", [False, True])
def test_float32_on_each_device(device: str, complex_A: bool) -> None:
    given = scan_arguments(2, 300, 16, 4, complex_A=complex_A, packed=True, dtype=torch.float32, device=device)
    assert_same(results(given, "torch"), results(given, "reference"), 2e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("device", DEVICES)
def test_narrow_inputs_are_computed_in_float32(device: str, dtype: torch.dtype) -> None:
    """As autocast mixes them: narrow activations beside float32 parameters."""
    given = scan_arguments(dtype=torch.float32, device=device)
    for name in ("u", "z", "B", "C"):
        given[name] = given[name].to(dtype)
    got = results(given, "torch")
    assert got["out"].dtype == got["u"].dtype == got["B"].dtype == dtype
    assert got["final_state"].dtype == got["delta"].dtype == torch.float32
    wide = {name: value.float() if name in ("u", "z", "B", "C") else value for name, value in given.items()}
    exact = selective_scan(**wide, backend="reference")
    assert_close("final_state", got["final_state"], exact[1])
    assert_close("out", got["out"], exact[0].to(dtype))


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("device", DEVICES)
def test_autocast_changes_no_bit(device: str, backend: str) -> None:
    """States are float32 whatever surrounds the call: autocast would narrow the products with B and C."""
    given = scan_arguments(dtype=torch.float32, device=device)
    want = results(given, backend)
    with torch.autocast(device, dtype=torch.bfloat16):
        got = results(given, backend)
    for name in want:
        assert torch.equal(got[name], want[name]), name


@pytest.mark.parametrize("complex_A", [False, True])
@pytest.mark.parametrize("lanes", [False, True])
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_gradcheck_through_initial_and_final_state(
    backend: str, lanes: bool, complex_A: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if lanes:
        monkeypatch.setattr(lanes_module, "SMALL_STEP", 10**9)
    given = scan_arguments(1, 18 if lanes else 5, 2, 2, "2 groups", "per step", complex_A=complex_A, packed=True)

    def function(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return selective_scan(**given | dict(zip(DIFFERENTIABLE, tensors, strict=True)), backend=backend)

    assert torch.autograd.gradcheck(function, [given[name].requires_grad_() for name in DIFFERENTIABLE], fast_mode=True)


def test_the_definition_has_second_derivatives() -> None:
    given = scan_arguments(1, 3, 2, 2)

    def function(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return selective_scan(**given | dict(zip(DIFFERENTIABLE, tensors, strict=True)), backend="reference")

    inputs = [given[name].requires_grad_() for name in DIFFERENTIABLE]
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("complex_A", [False, True])
@pytest.mark.parametrize("optional", [False, True])
@pytest.mark.parametrize("device", DEVICES)
def test_operators_pass_opcheck(device: str, optional: bool, complex_A: bool) -> None:
    direction = HALF if optional else FORWARD
    given = scan_arguments(
        1, 4, 2, 2, optional=optional, packed=optional, complex_A=complex_A, dtype=torch.float32, device=device
    )
    tensors = [given.get(name) for name in DIFFERENTIABLE]
    options = (given.get("seq_idx"), True, direction, "torch")
    out, _, checkpoints = _scan(*tensors, *options)
    backward = (out, given.get("initial_state"), *tensors, given.get("seq_idx"), checkpoints, True, direction, "torch")
    torch.library.opcheck(_scan_backward, backward)
    for tensor in tensors:
        if tensor is not None:
            tensor.requires_grad_()
    torch.library.opcheck(_scan, (*tensors, *options))


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_training_step_compiles_without_a_break(compiler: str) -> None:
    given = scan_arguments(dtype=torch.float32)

    def loss(u: Tensor, A: Tensor) -> Tensor:
        out, final_state = selective_scan(**given | {"u": u.sin(), "A": A})
        return out.square().mean() + final_state.sum()

    def step(function) -> list[Tensor]:
        leaves = [given[name].clone().requires_grad_() for name in ("u", "A")]
        value = function(*leaves)
        return [value, *torch.autograd.grad(value, leaves)]

    torch._dynamo.reset()
    for got, want in zip(step(torch.compile(loss, fullgraph=True, backend=compiler)), step(loss), strict=True):
        assert_close(compiler, got, want)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("cuts", [[1], [20], [1, 2, 17], [16]])
def test_split_law(backend: str, reverse: bool, cuts: list[int]) -> None:
    """A sequence in pieces, the state handed on, is the whole sequence: outputs, and all gradients."""
    given = scan_arguments(packed=True, reverse=reverse)
    given["seq_idx"].zero_()
    whole = results(given, backend)

    leaves = {name: given[name].clone().requires_grad_() for name in DIFFERENTIABLE}
    bounds = [0, *cuts, 21]
    pieces = [slice(a, b) for a, b in zip(bounds, bounds[1:], strict=False)]
    state, outs = leaves["initial_state"], {}
    for piece in reversed(pieces) if reverse else pieces:
        part = {name: leaves[name][:, piece] for name in ("u", "delta", "B", "C", "z")}
        part |= {name: leaves[name] for name in ("A", "D", "delta_bias")} | {"initial_state": state}
        out, state = selective_scan(
            **part, delta_softplus=True, reverse=reverse, return_final_state=True, backend=backend
        )
        outs[piece.start] = out
    out = torch.cat([outs[start] for start in sorted(outs)], dim=1)
    weights = [random_tensor(*y.shape, seed=50 + i, dtype=y.dtype) for i, y in enumerate((out, state))]
    gradients = torch.autograd.grad((out, state), list(leaves.values()), weights)
    assert_same({"out": out, "final_state": state} | dict(zip(leaves, gradients, strict=True)), whole)


@pytest.mark.parametrize("lanes", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
def test_packing_law(reverse: bool, lanes: bool, request: pytest.FixtureRequest) -> None:
    """Sequences packed end to end under ``seq_idx`` are those sequences alone: outputs, and all gradients."""
    if lanes:
        request.getfixturevalue("many_lanes")
    lengths = [1, 17, 5, 30, 1, 9]
    given = scan_arguments(1, sum(lengths), optional=True, reverse=reverse)
    given["seq_idx"] = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).unsqueeze(0)
    packed = results(given, "torch")

    leaves = {name: given[name].clone().requires_grad_() for name in DIFFERENTIABLE}
    outs, start = [], 0
    first = len(lengths) - 1 if reverse else 0  # the one that meets the initial state
    final_state = None
    for i, length in enumerate(lengths):
        part = {name: leaves[name][:, start : start + length] for name in ("u", "delta", "B", "C", "z")}
        part |= {name: leaves[name] for name in ("A", "D", "delta_bias")}
        part |= {"initial_state": leaves["initial_state"] if i == first else None}
        out, state = selective_scan(
            **part, delta_softplus=True, reverse=reverse, return_final_state=True, backend="reference"
        )
        outs.append(out)
        if i == len(lengths) - 1 - first:
            final_state = state
        start += length
    out = torch.cat(outs, dim=1)
    weights = [random_tensor(*y.shape, seed=50 + i, dtype=y.dtype) for i, y in enumerate((out, final_state))]
    gradients = torch.autograd.grad((out, final_state), list(leaves.values()), weights)
    assert_same(packed, {"out": out, "final_state": final_state} | dict(zip(leaves, gradients, strict=True)))


@pytest.mark.parametrize("lanes", [False, True])
@pytest.mark.parametrize("reverse", [False, True, "half"])
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_a_reset_clears_any_state(
    backend: str, reverse: bool | str, lanes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NaN and infinity stay in their own sequence, in the forward and in the backward: no 0 * inf at its ends."""
    monkeypatch.setattr(lanes_module, "SMALL_STEP", 10**9 if lanes else 0)
    given = scan_arguments(1, 60, reverse=reverse)
    given["seq_idx"] = torch.zeros(1, 60, dtype=torch.int32)
    given["seq_idx"][:, 16:45] = 1
    spoiled = dict(given, u=given["u"].clone())
    spoiled["u"][:, 20:40] = torch.inf
    found = []
    for options, weight in ((given, 1.0), (spoiled, torch.nan)):
        leaves = {name: options[name].clone().requires_grad_() for name in ("u", "delta", "B", "C", "z")}
        leaves["initial_state"] = options["initial_state"].clone().requires_grad_()
        out, final_state = selective_scan(**options | leaves, backend=backend)
        dout = torch.ones_like(out)
        dout[:, 30:33] = weight
        gradients = torch.autograd.grad((out, final_state), list(leaves.values()), (dout, torch.ones_like(final_state)))
        found.append({"out": out, "final_state": final_state} | dict(zip(leaves, gradients, strict=True)))
    assert not torch.isfinite(found[1]["out"]).all()
    healthy = [*range(16), *range(45, 60)]
    for name, want in found[0].items():
        keep = slice(None) if name.endswith("state") else healthy
        assert_close(name, found[1][name][:, keep], want[:, keep])


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("form", ["per step", "4 groups", "constant"])
def test_half_law(backend: str, form: str) -> None:
    """Each half of the channels is a call of its own in its own direction: outputs, and all gradients."""
    given = scan_arguments(channels=8, B=form, C="per step", packed=True, reverse="half")
    whole = results(given, backend)
    leaves = {name: given[name].clone().requires_grad_() for name in DIFFERENTIABLE}
    outputs = []
    for half, reverse in ((slice(0, 4), False), (slice(4, 8), True)):
        part = {name: leaves[name][..., half] for name in ("u", "delta", "z", "D", "delta_bias")}
        part |= {"A": leaves["A"][half], "C": leaves["C"], "initial_state": leaves["initial_state"][:, half]}
        B = leaves["B"]
        if form == "constant":
            B = B[half]
        elif form == "4 groups":
            B = B[:, :, half.start // 2 : half.stop // 2]
        outputs.append(selective_scan(**given | part | {"B": B, "reverse": reverse}, backend="reference"))
    out = torch.cat([out for out, _ in outputs], dim=2)
    final_state = torch.cat([state for _, state in outputs], dim=1)
    weights = [random_tensor(*y.shape, seed=50 + i, dtype=y.dtype) for i, y in enumerate((out, final_state))]
    gradients = torch.autograd.grad((out, final_state), list(leaves.values()), weights)
    assert_same(whole, {"out": out, "final_state": final_state} | dict(zip(leaves, gradients, strict=True)))


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_reverse_law(backend: str) -> None:
    given = scan_arguments(packed=True, reverse=True)
    flipped = {name: given[name].flip(1) for name in ("u", "delta", "B", "C", "z", "seq_idx")}
    out, final_state = selective_scan(**given | flipped | {"reverse": False}, backend=backend)
    got, got_state = selective_scan(**given, backend=backend)
    assert_close("out", got, out.flip(1))
    assert_close("final_state", got_state, final_state)


def test_a_long_sequence_of_few_channels() -> None:
    given = scan_arguments(1, 5000, 4, 2, dtype=torch.float64)
    assert_same(results(given, "torch"), results(given, "reference"))


@pytest.mark.parametrize("reverse", [False, True])
def test_padding_law(reverse: bool) -> None:
    """Behind a raw step of -1e4 an element neither reads nor writes the state, and gradients stay finite."""
    given = scan_arguments(reverse=reverse, dtype=torch.float32)
    want = results(given, "torch")
    padded = dict(given)
    for name in ("u", "delta", "B", "C", "z"):
        value = -1e4 if name == "delta" else 3.0
        padding = torch.full((2, 11, *given[name].shape[2:]), value)
        padded[name] = torch.cat((given[name][:, :8], padding, given[name][:, 8:]), dim=1)
    got = results(padded, "torch")
    real = torch.cat((torch.arange(8), torch.arange(19, 32)))
    out, final_state = selective_scan(**padded, backend="torch")
    assert_close("out", out[:, real], want["out"])
    assert_close("final_state", final_state, want["final_state"])
    assert torch.equal(got["delta"][:, 8:19], torch.zeros(2, 11, 6))
    for name, gradient in got.items():
        assert torch.isfinite(gradient).all(), name


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("lanes", [False, True])
def test_steps_of_any_size_stay_finite(backend: str, lanes: bool, request: pytest.FixtureRequest) -> None:
    """Decays of exactly 0 and exactly 1, side by side: nothing divides by them."""
    if lanes:
        request.getfixturevalue("many_lanes")
    given = scan_arguments(1, 48, dtype=torch.float32)
    given["delta"][:, ::3] = 1e5
    given["delta"][:, 1::3] = -1e4
    got = results(given, backend)
    for name, value in got.items():
        assert torch.isfinite(value).all(), name
    assert_close("out", got["out"], selective_scan(**given, backend="reference")[0])


@pytest.mark.parametrize("complex_A", [False, True])
@pytest.mark.parametrize("lanes", [False, True])
def test_every_element_is_written(complex_A: bool, lanes: bool, request: pytest.FixtureRequest) -> None:
    if lanes:
        request.getfixturevalue("many_lanes")
    given = scan_arguments(3, 35, complex_A=complex_A, B="2 groups", C="constant")
    want = results(given, "torch")
    with poisoned_memory():
        assert_same(results(given, "torch"), want)


def test_strided_and_expanded_inputs_and_no_mutation() -> None:
    given = scan_arguments(packed=True)
    strided = dict(given)
    for name, value in given.items():
        if isinstance(value, Tensor) and name != "seq_idx":
            strided[name] = torch.stack((value, value.neg()), dim=-1)[..., 0]
            assert not strided[name].is_contiguous()
    before = {name: value.clone() for name, value in strided.items() if isinstance(value, Tensor)}
    out, final_state = selective_scan(**strided, backend="torch")
    want = selective_scan(**given, backend="torch")
    assert_close("out", out, want[0])
    assert_close("final_state", final_state, want[1])
    assert all(torch.equal(strided[name], value) for name, value in before.items())

    given["u"] = given["u"][:1, :1].expand(2, 21, 6)
    given["initial_state"] = given["initial_state"][:1].expand(2, 6, 3)
    leaves = [given["u"][:1, :1].clone().requires_grad_(), given["initial_state"][:1].clone().requires_grad_()]
    expanded = {"u": leaves[0].expand(2, 21, 6), "initial_state": leaves[1].expand(2, 6, 3)}
    out, final_state = selective_scan(**given | expanded, backend="torch")
    gradients = torch.autograd.grad(out.sum() + final_state.sum(), leaves)  # the sums' gradients are expanded, too
    out, final_state = selective_scan(**given | expanded, backend="reference")
    for got, wanted in zip(gradients, torch.autograd.grad(out.sum() + final_state.sum(), leaves), strict=True):
        assert_close("gradient", got, wanted)


@pytest.mark.parametrize("reverse", [False, "half"])
def test_the_backward_hands_out_its_own_output_again(reverse: bool | str) -> None:
    """For blocks that keep less than the output; everything else is as without."""
    given = scan_arguments(packed=True, reverse=reverse)
    tensors = [given[name] for name in (*DIFFERENTIABLE, "seq_idx")]
    out, _, checkpoints = chunked.scan_forward(*tensors, True, direction_of(reverse))
    rest = (torch.ones_like(out), None, *tensors, checkpoints, True, direction_of(reverse))
    *gradients, again = chunked.scan_backward(*rest, recompute_out=True)
    assert torch.equal(again, out)
    for got, want in zip(gradients, chunked.scan_backward(*rest), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("which", [0, 1])
def test_gradients_of_one_output_alone(which: int) -> None:
    given = scan_arguments()
    want = selective_scan(**given | {"u": given["u"].requires_grad_()}, backend="reference")[which]
    got = selective_scan(**given, backend="torch")[which]
    wanted = torch.autograd.grad(want.square().sum(), given["u"])[0]
    assert_close("u", torch.autograd.grad(got.square().sum(), given["u"])[0], wanted)


def test_saved_memory_is_inputs_and_one_state_a_chunk() -> None:
    given = scan_arguments(2, 160, 6, 4, dtype=torch.float32)
    saved = {}
    given["u"].requires_grad_()

    def keep(tensor: Tensor) -> Tensor:
        saved[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        selective_scan(**given, backend="torch")
    inputs = sum(given[name].numel() for name in DIFFERENTIABLE)
    assert sum(saved.values()) == inputs + 2 * (160 // lanes_module.CHUNK) * 6 * 4
