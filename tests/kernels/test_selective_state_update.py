"""One step of the selective scan against the scan itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mambakit.kernels.scan import selective_scan, selective_state_update
from mambakit.kernels.scan.update import _update
from mambakit.kernels.testing import assert_close, poisoned_memory, random_tensor

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA"))]
BATCH, HEADS, CHANNELS, D_STATE = 3, 4, 5, 2


def arguments(heads: bool = False, number: torch.dtype = torch.float32, device: str = "cpu") -> dict:
    """Keyword arguments of ``selective_state_update`` with every optional tensor; two groups where there are heads."""
    width = (HEADS, CHANNELS) if heads else (CHANNELS,)
    groups = (2,) if heads else ()
    shapes = {"state": (BATCH, *width, D_STATE), "x": (BATCH, *width), "dt": (BATCH, *width), "A": (*width, D_STATE)}
    shapes |= {"B": (BATCH, *groups, D_STATE), "C": (BATCH, *groups, D_STATE)}
    shapes |= {"D": width, "z": (BATCH, *width), "dt_bias": width}
    real = torch.empty((), dtype=number).real.dtype
    given: dict = {}
    for seed, (name, shape) in enumerate(shapes.items()):
        dtype = number if name in ("state", "A", "B", "C") else real
        given[name] = random_tensor(*shape, seed=seed, dtype=dtype, device=device)
    given["A"] = torch.complex(-given["A"].real.exp(), given["A"].imag) if number.is_complex else -given["A"].exp()
    return given | {"dt_softplus": True}


def by_scan(given: dict) -> tuple[Tensor, Tensor]:
    """The same step as a scan of length 1, heads one by one: (out, state)."""
    if given["state"].dim() == 4:
        outs, states = [], []
        for h in range(HEADS):
            group = h * given["B"].shape[1] // HEADS
            head = {name: given[name][:, h] for name in ("state", "x", "dt", "z")}
            head |= {name: given[name][h] for name in ("A", "D", "dt_bias")}
            head |= {name: given[name][:, group] for name in ("B", "C")}
            out, state = by_scan(head | {"dt_softplus": True})
            outs.append(out)
            states.append(state)
        return torch.stack(outs, dim=1), torch.stack(states, dim=1)
    out, state = selective_scan(
        *(given[name].unsqueeze(1) for name in ("x", "dt")),
        given["A"],
        *(given[name].unsqueeze(1) for name in ("B", "C")),
        given.get("D"),
        given["z"].unsqueeze(1) if "z" in given else None,
        given.get("dt_bias"),
        given["dt_softplus"],
        initial_state=given["state"],
        return_final_state=True,
        backend="reference",
    )
    return out.squeeze(1), state


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("number", [torch.float32, torch.float64, torch.complex64])
@pytest.mark.parametrize("heads", [False, True])
@pytest.mark.parametrize("backend", ["torch", "reference", "auto"])
def test_a_step_is_a_scan_of_length_one(backend: str, heads: bool, number: torch.dtype, device: str) -> None:
    given = arguments(heads, number, device)
    want, want_state = by_scan(given)
    with poisoned_memory():
        out = selective_state_update(**given, backend=backend)
    assert_close("out", out, want)
    assert_close("state", given["state"], want_state)
    assert out.dtype == given["x"].dtype


def test_optional_arguments_are_optional() -> None:
    given = {name: value for name, value in arguments().items() if name not in ("D", "z", "dt_bias")}
    given |= {"dt_softplus": False, "dt": given["dt"].abs()}
    want, want_state = by_scan(given)
    assert_close("out", selective_state_update(**given), want)
    assert_close("state", given["state"], want_state)


def test_many_steps_are_one_scan() -> None:
    length = 70
    u, delta, z = (random_tensor(2, length, 6, seed=seed) for seed in range(3))
    B, C = (random_tensor(2, length, 4, seed=seed) for seed in (3, 4))
    A, D, bias = -random_tensor(6, 4, seed=5).exp(), random_tensor(6, seed=6), random_tensor(6, seed=7)
    want, want_state = selective_scan(u, delta, A, B, C, D, z, bias, True, return_final_state=True)
    state = torch.zeros(2, 6, 4)
    steps = [
        selective_state_update(state, u[:, t], delta[:, t], A, B[:, t], C[:, t], D, z[:, t], bias, True)
        for t in range(length)
    ]
    assert_close("out", torch.stack(steps, dim=1), want)
    assert_close("state", state, want_state)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("heads", [False, True])
def test_cache_lines_and_padding_rows(heads: bool, index_dtype: torch.dtype) -> None:
    given = arguments(heads)
    cache = random_tensor(7, *given["state"].shape[1:], seed=20)
    before = cache.clone()
    indices = torch.tensor([5, -1, 0], dtype=index_dtype)
    want, want_state = by_scan(given | {"state": cache[[5, 0, 0]].clone()})
    out = selective_state_update(**given | {"state": cache}, state_batch_indices=indices)
    assert torch.equal(out[1], torch.zeros_like(out[1]))
    assert_close("out", out[[0, 2]], want[[0, 2]])
    assert_close("used lines", cache[[5, 0]], want_state[[0, 2]])
    unused = [1, 2, 3, 4, 6]
    assert torch.equal(cache[unused], before[unused])


def test_strided_state_and_expanded_parameters() -> None:
    """As Mamba-2 calls it: one dt, A and D for all channels of a head, with stride 0; a state cut from a larger one."""
    given = arguments(heads=True)
    given |= {name: given[name][..., :1].expand(*given[name].shape) for name in ("dt", "D", "dt_bias")}
    given["A"] = given["A"][:, :1, :1].expand(HEADS, CHANNELS, D_STATE)
    whole = random_tensor(BATCH, HEADS, CHANNELS, 2 * D_STATE, seed=30)
    untouched = whole[..., 1::2].clone()
    given["state"] = whole[..., ::2]
    want, want_state = by_scan(given)
    assert_close("out", selective_state_update(**given), want)
    assert_close("state", whole[..., ::2], want_state)
    assert torch.equal(whole[..., 1::2], untouched)


def test_a_narrow_state_keeps_its_dtype() -> None:
    given = arguments()
    want, want_state = by_scan(given | {"state": given["state"].bfloat16().float()})
    state = given["state"].bfloat16()
    out = selective_state_update(**given | {"state": state})
    assert state.dtype == torch.bfloat16 and out.dtype == torch.float32
    assert_close("out", out, want)
    assert_close("state", state, want_state)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("indexed", [False, True])
def test_the_operator_passes_opcheck(indexed: bool, device: str) -> None:
    given = arguments(device=device)
    indices = torch.tensor([2, -1, 0], device=device) if indexed else None
    torch.library.opcheck(_update, (*given.values(), indices, "torch"))


def test_generation_compiles_without_a_break() -> None:
    given = arguments()

    def step(state: Tensor) -> Tensor:
        return selective_state_update(**given | {"state": state}) + 1

    torch._dynamo.reset()
    got_state, want_state = given["state"].clone(), given["state"].clone()
    assert_close("out", torch.compile(step, fullgraph=True, backend="aot_eager")(got_state), step(want_state))
    assert_close("state", got_state, want_state)


@pytest.mark.parametrize(
    ("heads", "change", "error", "message"),
    [
        (False, {"state": torch.zeros(3, 5)}, ValueError, r"state has shape \(3, 5\)"),
        (False, {"x": torch.zeros(2, 5)}, ValueError, r"x has shape \(2, 5\), expected \(batch=3, channels=5\)"),
        (False, {"dt": torch.zeros(3, 4)}, ValueError, r"dt has shape \(3, 4\)"),
        (False, {"B": torch.zeros(3, 1, 2)}, ValueError, r"B has shape \(3, 1, 2\), expected \(batch=3, d_state=2\)"),
        (True, {"C": torch.zeros(3, 3, 2)}, ValueError, "C has 3 groups, expected a divisor of the 4 heads"),
        (True, {"D": torch.zeros(4)}, ValueError, r"D has shape \(4,\), expected \(heads=4, channels=5\)"),
        (False, {"z": torch.zeros(3, 5, dtype=torch.int32)}, TypeError, "z has dtype int32"),
        (False, {"A": torch.zeros(5, 2, dtype=torch.complex64)}, TypeError, "A is complex and state is"),
        (False, {"dt_bias": torch.zeros(5, device="meta")}, ValueError, "dt_bias is on meta, x is on cpu"),
        (
            False,
            {"state_batch_indices": torch.zeros(2, dtype=torch.int32)},
            ValueError,
            "state_batch_indices has shape",
        ),
        (False, {"state_batch_indices": torch.zeros(3)}, TypeError, "state_batch_indices has dtype float32"),
        (False, {"backend": "fast"}, ValueError, "backend='fast' is unknown"),
    ],
)
def test_bad_arguments_are_named(heads: bool, change: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match="selective_state_update: .*" + message):
        selective_state_update(**arguments(heads) | change)
