"""causal_conv1d and causal_conv1d_update: every backend against the definition, and the laws of a causal window."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mambakit.kernels.conv import causal_conv1d, causal_conv1d_update
from mambakit.kernels.dispatch import TRITON_INSTALLED, use_backend
from mambakit.kernels.testing import TOLERANCE, assert_close, poisoned_memory, random_tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The schema check compares arguments before and after, seconds each: one backend does, the schema is the same.
CHECKS = {
    "torch": ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static"),
    "triton": ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_static"),
}


def sequences(batch: int, length: int, seed: int = 9) -> Tensor:
    """(B, L) sequence numbers with short sequences, and a value that comes back."""
    changes = torch.rand(batch, length, generator=torch.Generator().manual_seed(seed)) < 0.3
    return (changes.cumsum(1) % 2).int()


def inputs(
    length: int, channels: int = 5, width: int = 4, dtype: torch.dtype = torch.float32, batch: int = 2
) -> dict[str, Tensor]:
    return {
        "x": random_tensor(batch, length, channels, seed=1, dtype=dtype, requires_grad=True),
        "weight": random_tensor(channels, width, seed=2, requires_grad=True),
        "bias": random_tensor(channels, seed=3, requires_grad=True),
        "initial_state": random_tensor(batch, channels, width - 1, seed=4, requires_grad=True),
    }


def to(arguments: dict[str, Tensor], dtype: torch.dtype, device: str = "cpu") -> dict[str, Tensor]:
    return {name: value.detach().to(device, dtype).requires_grad_() for name, value in arguments.items()}


def outputs_and_gradients(arguments: dict[str, Tensor], **options: object) -> Iterator[tuple[str, Tensor]]:
    """Output, final state, and every gradient, through both."""
    y, final_state = causal_conv1d(**arguments, return_final_state=True, **options)  # type: ignore[arg-type]
    dy = random_tensor(*y.shape, seed=7, device=y.device.type)
    dfinal = random_tensor(*final_state.shape, seed=8, device=y.device.type)
    loss = (y.double() * dy).sum() + (final_state.double() * dfinal).sum()
    yield "y", y
    yield "final_state", final_state
    yield from zip(arguments, torch.autograd.grad(loss, list(arguments.values())), strict=True)


def compare(arguments: dict[str, Tensor], backend: str, tolerance: float | None = None, **options: object) -> None:
    """``backend`` on the test's device beside the reference in float64."""
    device_options = {name: v.to(DEVICE) if isinstance(v, Tensor) else v for name, v in options.items()}
    exact = to(arguments, torch.float64)
    given = {name: value.detach().to(DEVICE).requires_grad_() for name, value in arguments.items()}
    got = outputs_and_gradients(given, backend=backend, **device_options)
    want = outputs_and_gradients(exact, backend="reference", **options)
    for (name, left), (_, right) in zip(got, want, strict=True):
        assert_close(f"{backend} {name}", left, right, tolerance)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("length", [1, 2, 33])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
def test_every_gradient_matches_the_definition(backend: str, length: int, packed: bool, reverse: bool) -> None:
    seq_idx = sequences(2, length) if packed else None
    compare(inputs(length), backend, activation="silu", seq_idx=seq_idx, reverse=reverse)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("width", [2, 3, 4])
@pytest.mark.parametrize("channels", [1, 65])
def test_widths_and_channels(backend: str, width: int, channels: int) -> None:
    compare(inputs(11, channels, width), backend, seq_idx=sequences(2, 11))


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_input_with_float32_weights(backend: str, dtype: torch.dtype) -> None:
    arguments = inputs(21, dtype=dtype)
    compare(arguments, backend, TOLERANCE[dtype], activation="swish")
    y, final_state = causal_conv1d(**to(arguments, dtype, DEVICE), return_final_state=True, backend=backend)
    assert (y.dtype, final_state.dtype) == (dtype, torch.float32)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_long_time_is_cut_into_groups(backend: str) -> None:
    compare(inputs(150, channels=3, batch=1), backend, activation="silu")


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("channels", [5, 70])
def test_tiles_that_hold_the_ends_of_several_rows(backend: str, channels: int) -> None:
    """A tile's chunks come from several rows of the batch, the last has some to spare, and sequences cross chunks."""
    compare(inputs(41, channels, batch=3), backend, activation="silu", seq_idx=sequences(3, 41), reverse=True)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("reverse", [False, True])
def test_a_sequence_that_holds_nan_spoils_no_other_gradient(backend: str, reverse: bool) -> None:
    length, bad = 40, slice(15, 18)
    x, weight = random_tensor(1, length, 3, seed=1, device=DEVICE), random_tensor(3, 4, seed=2, device=DEVICE)
    seq_idx = torch.zeros(1, length, dtype=torch.int32, device=DEVICE)
    seq_idx[:, bad] = 1
    x[:, bad] = 0
    dy = random_tensor(1, length, 3, seed=3, device=DEVICE)

    def gradient(given: Tensor) -> Tensor:
        given = given.clone().requires_grad_()
        y = causal_conv1d(given, weight, None, "silu", seq_idx=seq_idx, reverse=reverse, backend=backend)
        return torch.autograd.grad(y, given, dy)[0]

    want = gradient(x)
    x[:, bad] = float("nan")
    got = gradient(x)
    assert got[:, bad].isnan().any()
    for part in (slice(0, bad.start), slice(bad.stop, length)):
        assert_close("dx", got[:, part], want[:, part])


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_the_gradient_goes_into_half_of_a_wider_tensor(backend: str) -> None:
    """As the fused block asks it: that of x beside that of z, with no copy after."""
    if backend == "triton":
        from mambakit.kernels.conv import triton_launch as implementation
    else:
        from mambakit.kernels.conv import chunked as implementation  # type: ignore[no-redef]
    x, dout = (random_tensor(2, 9, 6, seed=seed, device=DEVICE) for seed in (1, 2))
    weight = random_tensor(6, 4, seed=3, device=DEVICE)
    whole = torch.full((2, 9, 12), 7.0, device=DEVICE)
    given = (dout, x, weight, None, None, None, True, False)
    dx = implementation.backward(*given, dx=whole[..., :6])[0]
    assert dx.data_ptr() == whole.data_ptr() and (whole[..., 6:] == 7).all()
    assert torch.equal(dx, implementation.backward(*given)[0])


@pytest.mark.skipif(not TRITON_INSTALLED, reason="triton is not installed")
@pytest.mark.parametrize("batch", [1, 8, 128])
@pytest.mark.parametrize("length", [1, 2, 31, 197, 2048, 65536])
@pytest.mark.parametrize("channels", [1, 77, 384, 2048])
@pytest.mark.parametrize(("vector", "ahead"), [(8, 0), (4, 3)])
def test_tiling_by_triton(batch: int, length: int, channels: int, vector: int, ahead: int) -> None:
    """Every step lies in one chunk, every chunk in one tile, and what a walk repeats or leaves idle stays small."""
    from mambakit.kernels.conv.triton_launch import tiling

    cut = tiling(batch, length, channels, vector, 4, 64, 32, ahead)
    assert (cut.steps + ahead) % cut.unroll == 0
    assert cut.steps * cut.chunks >= length > cut.steps * (cut.chunks - 1)
    assert cut.total == batch * cut.chunks
    assert cut.tiles * cut.rows >= cut.total > (cut.tiles - 1) * cut.rows
    assert cut.programs * cut.channels >= channels * cut.tiles
    assert cut.steps * cut.chunks < length + cut.unroll * cut.chunks
    assert cut.chunks == 1 or 2 * (cut.steps + cut.unroll) > 32 - ahead


@pytest.mark.skipif(not TRITON_INSTALLED, reason="triton is not installed")
@pytest.mark.parametrize("bias", [False, True])
def test_partial_sums_of_many_tiles_by_triton(bias: bool) -> None:
    from mambakit.kernels.conv.triton_backward import sum_partials

    channels, width, count = 9, 4, 150
    partials = random_tensor(count, channels * (width + bias), seed=1, device=DEVICE)
    dweight = torch.full((channels, width), float("nan"), device=DEVICE)
    dbias = torch.full((channels,), float("nan"), device=DEVICE) if bias else None
    sum_partials[(2,)](partials, dweight, dbias, count, channels, W=width, BP=64, BC=32)
    assert_close("dweight", dweight.flatten(), partials.sum(0)[: channels * width])
    if dbias is not None:
        assert_close("dbias", dbias, partials.sum(0)[channels * width :])


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_without_bias_and_state(backend: str) -> None:
    arguments = inputs(9)
    del arguments["bias"], arguments["initial_state"]
    compare(arguments, backend, activation="silu")
    x, weight = arguments["x"].detach(), arguments["weight"].detach()
    want = F.conv1d(x.transpose(1, 2), weight[:, None], padding=3, groups=5)[..., :9].transpose(1, 2)
    assert_close("y", causal_conv1d(x.to(DEVICE), weight.to(DEVICE), backend=backend), want)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_strides_do_not_matter(backend: str) -> None:
    x, weight = random_tensor(2, 9, 12, seed=1, device=DEVICE), random_tensor(6, 4, seed=2, device=DEVICE)
    state = random_tensor(3, 6, 2, seed=3, device=DEVICE).transpose(0, 2)
    for view in (x[..., :6], x[:, :, ::2], x[..., :6].transpose(0, 1).contiguous().transpose(0, 1)):
        got = causal_conv1d(view, weight.t().contiguous().t(), initial_state=state, backend=backend)
        want = causal_conv1d(view.contiguous(), weight, initial_state=state.contiguous(), backend="reference")
        assert_close("y", got, want)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_split_law(backend: str, reverse: bool, packed: bool) -> None:
    """Cut anywhere, carry the state over: nothing changes. A sequence that ends at the cut is cut by the caller."""
    length, weight = 8, random_tensor(5, 4, seed=2, device=DEVICE)
    x = random_tensor(2, length, 5, seed=1, device=DEVICE)
    seq_idx = sequences(2, length).to(DEVICE) if packed else None
    options = {"activation": "silu", "reverse": reverse, "return_final_state": True, "backend": backend}
    whole, final = causal_conv1d(x, weight, seq_idx=seq_idx, **options)
    for cut in range(1, length):
        if packed and (seq_idx[:, cut] != seq_idx[:, cut - 1]).any():
            continue
        parts = [slice(0, cut), slice(cut, length)]
        state, pieces = None, {}
        for part in reversed(parts) if reverse else parts:
            part_idx = None if seq_idx is None else seq_idx[:, part]
            pieces[part.start], state = causal_conv1d(
                x[:, part], weight, initial_state=state, seq_idx=part_idx, **options
            )
        assert_close("y", torch.cat([pieces[0], pieces[cut]], dim=1), whole)
        assert_close("final state", state, final)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("reverse", [False, True])
def test_packing_law(backend: str, reverse: bool) -> None:
    """Sequences packed into one row equal the same sequences on their own, even beside one that holds NaN."""
    lengths, weight = (3, 1, 6, 2), random_tensor(5, 4, seed=2, device=DEVICE)
    x = random_tensor(1, sum(lengths), 5, seed=1, device=DEVICE)
    x[:, 3] = float("nan")
    seq_idx = torch.repeat_interleave(torch.tensor([4, 7, 4, 0]), torch.tensor(lengths))[None].to(DEVICE)
    packed = causal_conv1d(x, weight, seq_idx=seq_idx, reverse=reverse, backend=backend)
    for single, part in zip(x.split(lengths, 1), packed.split(lengths, 1), strict=True):
        if not single.isnan().any():
            assert_close("y", part, causal_conv1d(single, weight, reverse=reverse, backend=backend))


@pytest.mark.parametrize("backend", ["torch", "triton", "reference"])
def test_reverse_law(backend: str) -> None:
    given = {name: value.detach().to(DEVICE) for name, value in inputs(7).items()}
    seq_idx = sequences(2, 7).to(DEVICE)
    y, state = causal_conv1d(**given, seq_idx=seq_idx, reverse=True, return_final_state=True, backend=backend)
    given["x"] = given["x"].flip(1)
    want, want_state = causal_conv1d(**given, seq_idx=seq_idx.flip(1), return_final_state=True, backend=backend)
    assert_close("y", y, want.flip(1))
    assert_close("final state", state, want_state)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("length", [2, 5])
def test_gradcheck(backend: str, reverse: bool, length: int) -> None:
    arguments = to(inputs(length, channels=2, width=4), torch.float64)

    def function(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        named = dict(zip(arguments, tensors, strict=True))
        options = {"seq_idx": sequences(2, length), "reverse": reverse, "backend": backend}
        return causal_conv1d(**named, activation="silu", return_final_state=True, **options)

    assert torch.autograd.gradcheck(function, tuple(arguments.values()))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_poison(backend: str) -> None:
    """Every element of every output is written."""
    with poisoned_memory():
        compare(inputs(18, channels=3), backend, activation="silu")
        state = torch.zeros(2, 3, 3, device=DEVICE)
        y = causal_conv1d_update(
            torch.ones(2, 3, 2, device=DEVICE), state, torch.ones(3, 4, device=DEVICE), backend=backend
        )
    assert y.tolist() == [[[1.0, 2.0]] * 3] * 2


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("optional", [False, True])
def test_opcheck(backend: str, optional: bool) -> None:
    arguments = {name: value.detach().to(DEVICE).requires_grad_() for name, value in inputs(3, batch=1).items()}
    extra = [arguments["bias"], arguments["initial_state"], sequences(1, 3).to(DEVICE)] if optional else [None] * 3
    x, weight = arguments["x"], arguments["weight"]
    torch.library.opcheck(
        torch.ops.mambakit.causal_conv1d, (x, weight, *extra, True, False, backend), test_utils=CHECKS[backend]
    )
    detached = [None if tensor is None else tensor.detach() for tensor in (x, x, weight, *extra)]
    torch.library.opcheck(
        torch.ops.mambakit.causal_conv1d_backward, (*detached, True, False, backend), test_utils=CHECKS[backend]
    )
    state = torch.zeros(2, 5, 3, device=DEVICE)
    counts = torch.tensor([3, 5], device=DEVICE) if optional else None
    lines = torch.tensor([1, -1], device=DEVICE) if optional else None
    step = (torch.ones(2, 5, 1, device=DEVICE), state, weight.detach(), None, True, counts, lines, backend)
    torch.library.opcheck(torch.ops.mambakit.causal_conv1d_update, step, test_utils=CHECKS[backend])


def test_compile_without_a_break() -> None:
    arguments = {name: value.detach().to(DEVICE).requires_grad_() for name, value in inputs(6).items()}

    def loss(**given: Tensor) -> Tensor:
        y, state = causal_conv1d(**given, activation="silu", seq_idx=sequence, return_final_state=True)
        return y.square().sum() + state.sum()

    sequence = sequences(2, 6).to(DEVICE)
    eager = torch.autograd.grad(loss(**arguments), list(arguments.values()))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for name, got, want in zip(
        arguments, torch.autograd.grad(compiled(**arguments), list(arguments.values())), eager, strict=True
    ):
        assert_close(name, got, want)


def test_autocast_leaves_the_dtypes_alone() -> None:
    given = {
        name: value.detach().to(DEVICE).requires_grad_() for name, value in inputs(6, dtype=torch.bfloat16).items()
    }
    plain = causal_conv1d(**given)
    with torch.autocast(DEVICE, torch.bfloat16):
        cast = causal_conv1d(**given)
        cast.float().sum().backward()
    assert cast.dtype == torch.bfloat16 and torch.equal(plain, cast)
    assert given["weight"].grad.dtype == torch.float32


@pytest.mark.parametrize("backend", ["torch", "triton", "reference"])
@pytest.mark.parametrize("ring", [False, True])
@pytest.mark.parametrize("steps", [1, 3, 7])
def test_update_equals_the_whole(backend: str, ring: bool, steps: int) -> None:
    """64 elements, ``steps`` at a time, equal one call; the state is a row of the past or a ring."""
    length = 64 // steps * steps if backend == "torch" else 3 * steps
    x, weight = random_tensor(2, length, 5, seed=1, device=DEVICE), random_tensor(5, 4, seed=2, device=DEVICE)
    bias = random_tensor(5, seed=3, device=DEVICE)
    whole = causal_conv1d(x, weight, bias, "silu", backend=backend)
    state = torch.zeros(2, 5, 5 if ring else 3, device=DEVICE)
    for t in range(0, length, steps):
        seen = torch.full((2,), t, dtype=torch.int32, device=DEVICE) if ring else None
        part = x[:, t : t + steps].transpose(1, 2)
        y = causal_conv1d_update(part, state, weight, bias, "silu", seen, backend=backend)
        assert_close(f"y from {t}", y.transpose(1, 2), whole[:, t : t + steps])


def test_update_continues_a_whole_call() -> None:
    x, weight = random_tensor(2, 9, 5, seed=1, device=DEVICE), random_tensor(5, 4, seed=2, device=DEVICE)
    whole = causal_conv1d(x, weight)
    _, state = causal_conv1d(x[:, :8], weight, return_final_state=True)
    assert_close("y", causal_conv1d_update(x[:, 8], state, weight), whole[:, 8])
    assert_close("state", state, x[:, -3:].transpose(1, 2))


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(("ring", "steps", "columns"), list(itertools.product([False, True], [1, 2, 6], [3, 5])))
def test_update_state_lines(backend: str, ring: bool, steps: int, columns: int) -> None:
    """Rows pick their line of the state; a padding row gives zero and leaves every line as it was."""
    lines = torch.tensor([4, -1, 0], dtype=torch.int32, device=DEVICE)
    seen = torch.tensor([1, 5, 9], device=DEVICE) if ring else None
    x, weight = random_tensor(3, 5, steps, seed=1, device=DEVICE), random_tensor(5, 4, seed=2, device=DEVICE)
    storage = random_tensor(6, columns, 5, seed=3, dtype=torch.float16, device=DEVICE)
    got_state, want_state = storage.clone().transpose(1, 2), storage.clone().transpose(1, 2)
    got = causal_conv1d_update(x, got_state, weight, None, None, seen, lines, backend=backend)
    want = causal_conv1d_update(x, want_state, weight, None, None, seen, lines, backend="reference")
    assert_close("y", got, want)
    assert torch.equal(got_state, want_state)
    assert not got[1].any() and torch.equal(got_state[[1, 2, 3, 5]], storage.transpose(1, 2)[[1, 2, 3, 5]])


@pytest.mark.skipif(DEVICE == "cpu", reason="needs 10 GB of device memory")
@pytest.mark.gpu
def test_offsets_past_2_to_the_31() -> None:
    x = torch.zeros(1, 2**21 + 64, 1024, dtype=torch.bfloat16, device=DEVICE)
    x[:, -8:] = random_tensor(1, 8, 1024, seed=1, dtype=torch.bfloat16, device=DEVICE)
    weight = random_tensor(1024, 4, seed=2, device=DEVICE)
    assert_close("y", causal_conv1d(x, weight)[:, -8:], causal_conv1d(x[:, -12:], weight)[:, -8:])


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.zeros(2, 0, 5)}, ValueError, "x has shape (2, 0, 5), expected (batch, length, channels); every"),
        ({"x": torch.zeros(2, 5)}, ValueError, "x has shape (2, 5), expected (batch, length, channels)"),
        ({"x": torch.zeros(2, 6, 5).int()}, TypeError, "x has dtype int32, expected one of float16"),
        ({"weight": torch.zeros(4, 4)}, ValueError, "weight has shape (4, 4), expected (channels=5, width)"),
        ({"weight": torch.zeros(5, 5)}, ValueError, "weight has width 5 (its axis 1), expected one of 2, 3, 4"),
        ({"bias": torch.zeros(4)}, ValueError, "bias has shape (4,), expected (channels=5)"),
        ({"activation": "gelu"}, ValueError, "activation='gelu' is unknown; expected None, 'silu' or 'swish'"),
        ({"initial_state": torch.zeros(2, 5, 4)}, ValueError, "expected (batch=2, channels=5, width_less_1=3)"),
        ({"seq_idx": torch.zeros(2, 6)}, TypeError, "seq_idx has dtype float32, expected one of int32, int64"),
        ({"seq_idx": torch.zeros(1, 6).int()}, ValueError, "seq_idx has shape (1, 6), expected (batch=2, length=6)"),
        ({"backend": "cuda"}, ValueError, "backend='cuda' is unknown"),
        ({"weight": torch.zeros(5, 4, device="meta")}, ValueError, "weight is on meta, x is on cpu"),
    ],
)
def test_messages(changes: dict[str, object], error: type[Exception], message: str) -> None:
    arguments = {"x": torch.zeros(2, 6, 5), "weight": torch.zeros(5, 4), **changes}
    with pytest.raises(error, match="^causal_conv1d: ") as caught:
        causal_conv1d(**arguments)  # type: ignore[arg-type]
    assert message in str(caught.value)


def test_triton_says_what_it_does_not_take() -> None:
    x, weight = torch.zeros(2, 6, 5, dtype=torch.float64, device=DEVICE), torch.zeros(5, 4, device=DEVICE)
    with pytest.raises(ValueError, match="^causal_conv1d: .* x is float64; use backend='auto'"):
        causal_conv1d(x, weight, backend="triton")


def test_update_messages() -> None:
    x, weight = torch.zeros(2, 5), torch.zeros(5, 4)
    with pytest.raises(ValueError, match="conv_state has 2 columns, expected at least width - 1 = 3"):
        causal_conv1d_update(x, torch.zeros(2, 5, 2), weight)
    with pytest.raises(
        ValueError, match=r"conv_state has shape \(3, 5, 3\), expected \(batch=2, channels=5, state_len\)"
    ):
        causal_conv1d_update(x, torch.zeros(3, 5, 3), weight)
    with pytest.raises(TypeError, match="cache_seqlens has dtype float32"):
        causal_conv1d_update(x, torch.zeros(2, 5, 3), weight, cache_seqlens=torch.zeros(2))


def test_use_backend_reaches_the_operator() -> None:
    with use_backend("reference"):
        y = causal_conv1d(torch.ones(1, 2, 1, requires_grad=True), torch.ones(1, 2))
    assert "mambakit" not in y.grad_fn.name()  # plain operations, differentiated by autograd
