"""mamba2_inner: every backend against the operators one after another, values, gradients, states, packing, padding."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from mambakit.kernels.inner.mamba2_op import _inner, mamba2_inner
from mambakit.kernels.inner.mamba2_reference import Arguments
from mambakit.kernels.testing import assert_close, poisoned_memory, random_tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ["torch", "triton"]
OPTIONAL = ("conv_bias", "norm_weight", "out_proj_bias", "conv_state", "ssm_state")
SMALLEST: list[dict[str, Any]] = [
    {"length": 1},
    {"length": 2, "width": 2},
    {"heads": 1, "channels": 1, "states": 1, "absent": ("norm_weight",)},
]
SEQ_IDX = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2, 2], [0, 1, 1, 1, 1, 1, 1, 1, 5]], dtype=torch.int32)


def inputs(
    batch: int = 2,
    length: int = 9,
    heads: int = 4,
    channels: int = 3,
    states: int = 5,
    groups: int = 1,
    mlp: int = 0,
    width: int = 4,
    d_model: int = 5,
    wide_D: bool = False,
    absent: tuple[str, ...] = (),
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """Parameters in float32, projected in ``dtype``."""
    inner = heads * channels
    conv = inner + 2 * groups * states
    sizes: dict[str, tuple[int, ...]] = {
        "projected": (batch, length, 2 * mlp + inner + conv + heads),
        "conv_weight": (conv, width),
        "conv_bias": (conv,),
        "dt_bias": (heads,),
        "A": (heads,),
        "D": (inner if wide_D else heads,),
        "norm_weight": (inner,),
        "out_proj_weight": (d_model, mlp + inner),
        "out_proj_bias": (d_model,),
        "conv_state": (batch, conv, width - 1),
        "ssm_state": (batch, heads, channels, states),
    }
    drawn = {name: random_tensor(*size, seed=i) for i, (name, size) in enumerate(sizes.items())}
    drawn["A"] = -drawn["A"].exp()
    drawn["projected"] = drawn["projected"].to(dtype)
    return {name: tensor for name, tensor in drawn.items() if name not in absent}


def call(given: dict[str, Tensor], **options: Any) -> tuple[Tensor, Tensor]:
    return mamba2_inner(**({"conv_bias": None, "norm_weight": None} | given), **options)


def everything(given: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
    """out, final state, and the gradients of a random projection of both."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in given.items()}
    out, state = call(leaves, **options)
    weights = [random_tensor(*t.shape, seed=50, dtype=torch.float64).to(t.device, t.dtype) for t in (out, state)]
    loss = (out * weights[0]).sum() + (state * weights[1]).sum()
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    return {"out": out, "state": state} | dict(zip(leaves, gradients, strict=True))


def moved(options: dict[str, Any]) -> dict[str, Any]:
    return {name: o.to(DEVICE) if isinstance(o, Tensor) else o for name, o in options.items()}


def compare(given: dict[str, Tensor], backend: str, tolerance: float = 2e-5, **options: Any) -> None:
    """``backend`` on the test's device beside the definition in float64 on the CPU."""
    want = everything({name: tensor.double() for name, tensor in given.items()}, backend="reference", **options)
    with poisoned_memory():
        got = everything(moved(given), backend=backend, **moved(options))
    for name, value in got.items():
        if name in given:
            assert value.dtype == given[name].dtype, name
        assert_close(f"{backend} {name}", value, want[name], tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ({}, {}),
        ({"absent": OPTIONAL}, {}),
        ({"groups": 2, "absent": ("conv_state",)}, {"ngroups": 2, "dt_limit": (0.4, 1.2), "norm_before_gate": True}),
        ({"mlp": 3, "wide_D": True, "absent": ("ssm_state", "out_proj_bias")}, {"eps": 0.3, "chunk_size": 4}),
        ({"mlp": 2, "groups": 4, "absent": ("norm_weight",)}, {"ngroups": 4}),
    ],
)
def test_outputs_and_gradients(backend: str, sizes: dict[str, Any], options: dict[str, Any]) -> None:
    compare(inputs(**sizes), backend, **options)


@pytest.mark.parametrize("programs", [1, 1000])
@pytest.mark.parametrize("at_once", [1, 4])
def test_gradients_of_b_and_c_are_written_where_the_convolution_reads(
    programs: int, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By one program for all heads of a group, or by several whose sums are added; heads at once or one by one."""
    from mambakit.kernels.duality import triton_backward

    monkeypatch.setattr(triton_backward, "PROGRAMS", programs)
    monkeypatch.setattr(triton_backward, "heads_at_once", lambda heads, share, most: at_once)
    compare(inputs(absent=OPTIONAL), "triton")


@pytest.mark.parametrize("backend", BACKENDS)
def test_packing_and_padding(backend: str) -> None:
    """A change of seq_idx resets convolution and state; padding leaves the state alone, in its gradient as well."""
    compare(inputs(), backend, seq_idx=SEQ_IDX)
    # What stands at padding means nothing, so it takes no part in the comparison.
    given, options = inputs(), {"dt_limit": (0.2, 3.0)}
    short = {n: t[1:, :4] if n == "projected" else t[1:] if "state" in n else t for n, t in given.items()}
    here, lengths = moved(given), torch.tensor([9, 4], device=DEVICE)
    out, state = call(here, lengths=lengths, backend=backend, **options)
    want_out, want_state = call(short, backend="reference", **options)
    assert_close("out", out[1:, :4], want_out, 2e-5)
    assert_close("state", state[1:], want_state, 2e-5)
    leaf = here["projected"].clone().requires_grad_()
    call(here | {"projected": leaf}, lengths=lengths, backend=backend, **options)[1].sum().backward()
    assert leaf.grad is not None and bool((leaf.grad[1, 4:] == 0).all()) and bool((leaf.grad[1, :4] != 0).any())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sizes", SMALLEST)
def test_smallest(backend: str, sizes: dict[str, Any]) -> None:
    compare(inputs(**sizes), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_one_output_is_used(backend: str) -> None:
    given = {name: tensor.requires_grad_() for name, tensor in moved(inputs()).items()}
    wanted = [given[name] for name in ("projected", "A", "dt_bias")]
    for i in range(2):
        got, want = (torch.autograd.grad(call(given, backend=b)[i].sum(), wanted) for b in (backend, "reference"))
        for one, other in zip(got, want, strict=True):
            assert_close(f"output {i}", one, other, 2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16(backend: str) -> None:
    """Products in bfloat16, parameters and their gradients in float32."""
    given = inputs(channels=8, d_model=8, absent=("out_proj_bias", "conv_state", "ssm_state"), dtype=torch.bfloat16)
    compare(given, backend, tolerance=0.03)


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"heads": 1, "channels": 130}, "130 channels"),
        ({"states": 257}, "257 states"),
        ({"dtype": torch.float64}, "float64"),
        ({"heads": 128, "channels": 65, "length": 1}, "8320 channels"),
    ],
)
def test_what_the_kernels_do_not_take_is_said(sizes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call(moved(inputs(**sizes)), backend="triton")


def test_autocast_decides_the_dtype() -> None:
    for backend in ("reference", "torch"):
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            out, state = call(moved(inputs()), backend=backend)
        assert out.dtype == torch.bfloat16 and state.dtype == torch.float32


def test_gradcheck() -> None:
    given = inputs(1, 4, 2, 2, 2, 2, 1, 3, 2)
    leaves = {n: t.double().requires_grad_() for n, t in given.items()}

    def function(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return call(dict(zip(leaves, tensors, strict=True)), ngroups=2, dt_limit=(0.3, 0.9), backend="torch")

    assert torch.autograd.gradcheck(function, list(leaves.values()), fast_mode=True)


@pytest.mark.parametrize("absent", [(), OPTIONAL])
def test_operator(absent: tuple[str, ...]) -> None:
    given = inputs(absent=absent)
    tensors = [given[name].requires_grad_() if name in given else None for name in Arguments._fields[:-2]]
    options = (1, 0.0, math.inf, 1e-5, False, 4, "torch")
    torch.library.opcheck(_inner, (*tensors, SEQ_IDX, torch.tensor([9, 4]), *options))


def test_keeps_little_for_the_backward() -> None:
    """Through Triton, beside the arguments, y alone: nothing as wide as the convolution, no second one as wide as y."""
    given = {name: t.requires_grad_() for name, t in moved(inputs(2, 64, 2, 16, 4)).items()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call(given, backend="triton")
    mine = {pointer: n for pointer, n in kept.items() if pointer not in {t.data_ptr() for t in given.values()}}
    assert sorted(mine.values())[-2:] == [2 * 64, 2 * 64 * 32], "the norm's rstd and y"


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("projected", lambda t: t[..., 1:], ["projected", "37", "22", "4 heads"]),
        ("conv_weight", lambda t: t.repeat(1, 2), ["conv_weight", "width 8"]),
        ("conv_weight", lambda t: t[1:], ["conv_weight", "21"]),
        ("norm_weight", lambda t: t[1:], ["norm_weight", "11", "12"]),
        ("D", lambda t: t[1:], ["D", "3", "12"]),
        ("out_proj_bias", lambda t: t[1:], ["out_proj_bias", "5"]),
        ("ssm_state", lambda t: t[1:], ["ssm_state", "batch=2"]),
        ("conv_state", lambda t: t[..., 1:], ["conv_state", "width_less_1=3"]),
        ("dt_bias", lambda t: t.long(), ["dt_bias", "int64", "float32"]),
    ],
)
def test_bad_input_is_named(name: str, change: Any, words: list[str]) -> None:
    given = inputs()
    with pytest.raises((ValueError, TypeError)) as error:
        call(given | {name: change(given[name])})
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ngroups": 3}, ["ngroups=3", "4 heads"]),
        ({"dt_limit": (2.0, 1.0)}, ["dt_limit", "(2.0, 1.0)"]),
        ({"chunk_size": 0}, ["chunk_size"]),
        ({"lengths": torch.tensor([9])}, ["lengths", "batch=2"]),
        ({"lengths": torch.tensor([9.0, 4.0])}, ["lengths", "int64"]),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises((ValueError, TypeError)) as error:
        call(inputs(), **options)
    assert all(word in str(error.value) for word in words), str(error.value)
