"""linear_cross_entropy: every backend against the definition, and against the two calls of PyTorch that it replaces."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mambakit.kernels.loss import chunked, linear_cross_entropy
from mambakit.kernels.testing import TOLERANCE, assert_close, poisoned_memory, random_tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ["torch", "triton"]
LABELS = torch.tensor([[3, 0, -100, 10], [4, -100, 5, 3], [9, 9, 1, 2]])


def inputs(
    vocabulary: int = 11, channels: int = 5, bias: bool = True, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    arguments = {
        "hidden": random_tensor(*LABELS.shape, channels, seed=1, dtype=dtype),
        "weight": random_tensor(vocabulary, channels, seed=2),
    }
    return arguments | ({"bias": random_tensor(vocabulary, seed=3)} if bias else {})


def gradients(arguments: dict[str, Tensor], labels: Tensor, **options: Any) -> dict[str, Tensor]:
    given = {name: value.detach().requires_grad_() for name, value in arguments.items()}
    loss = linear_cross_entropy(**given, labels=labels, **options)
    outer = random_tensor(loss.numel(), seed=7, device=loss.device.type).view(loss.shape) + 3
    found = torch.autograd.grad((loss * outer).sum(), list(given.values()))
    return {"loss": loss} | dict(zip(given, found, strict=True))


def compare(
    arguments: dict[str, Tensor], tolerance: float | None = None, labels: Tensor = LABELS, **options: Any
) -> None:
    """``backend`` on the test's device beside the reference in float64."""
    exact = {name: value.double() for name, value in arguments.items()}
    want = gradients(exact, labels, **(options | {"backend": "reference"}))
    given = {name: value.to(DEVICE) for name, value in arguments.items()}
    for name, value in gradients(given, labels.to(DEVICE), **options).items():
        assert_close(f"{options['backend']} {name}", value, want[name], tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    "options", [{}, {"label_smoothing": 0.2}, {"softcap": 1.5}, {"label_smoothing": 1.0, "softcap": 9}]
)
@pytest.mark.parametrize("bias", [False, True])
def test_every_gradient_matches_the_definition(backend: str, reduction: str, options: Any, bias: bool) -> None:
    compare(inputs(bias=bias), backend=backend, reduction=reduction, **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_chunks(backend: str, reduction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five rows a chunk, the last chunk shorter, the vocabulary longer than one tile of the kernel."""
    for limit in ("CPU_ROWS", "GPU_ROWS"):
        monkeypatch.setattr(chunked, limit, 5)
    for limit in ("CPU_ELEMENTS", "GPU_ELEMENTS"):
        monkeypatch.setattr(chunked, limit, 1)
    compare(inputs(vocabulary=5000, channels=3), backend=backend, reduction=reduction, label_smoothing=0.1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("vocabulary", [64, 4096, 8195])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_the_label_anywhere(backend: str, vocabulary: int, softcap: float | None) -> None:
    """At the ends of a tile of the kernel, in its last and partial one, before the padding of the vocabulary."""
    last = vocabulary - 1
    labels = torch.tensor([[0, 7, 8, last], [last - 1, last - 2, last - 3, -100], [last // 2, 1, 63, 62]])
    compare(inputs(vocabulary, 3), labels=labels, backend=backend, softcap=softcap)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(1,), (1, 1), ()])
def test_smallest(backend: str, shape: tuple[int, ...]) -> None:
    """One token, one channel, and a vocabulary of one, whose loss is zero."""
    arguments = {"hidden": random_tensor(*shape, 1, seed=1), "weight": random_tensor(3, 1, seed=2)}
    compare(arguments, labels=torch.full(shape, 2), backend=backend)
    one = linear_cross_entropy(arguments["hidden"], torch.ones(1, 1), torch.zeros(shape, dtype=torch.int64))
    assert one == 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(backend: str, dtype: torch.dtype) -> None:
    arguments = inputs(dtype=dtype)
    arguments["weight"] = arguments["weight"].to(dtype).float()  # so that rounding the weight is not what is compared
    compare(arguments, TOLERANCE[dtype], backend=backend)
    given = {name: value.to(DEVICE) for name, value in arguments.items()}
    found = gradients(given, LABELS.to(DEVICE), backend=backend)
    assert [found[name].dtype for name in ("loss", "hidden", "weight")] == [torch.float32, dtype, torch.float32]


def test_beside_pytorch() -> None:
    given = inputs()
    logits = F.linear(given["hidden"], given["weight"], given["bias"]).flatten(0, 1)
    for options in ({}, {"reduction": "sum"}, {"label_smoothing": 0.3}, {"ignore_index": 3}):
        labels = LABELS.masked_fill(LABELS == -100, options.get("ignore_index", -100))
        want = F.cross_entropy(logits, labels.flatten(), **options)
        assert_close(str(options), linear_cross_entropy(**given, labels=labels, **options), want)


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_all_labels_ignored(backend: str, reduction: str) -> None:
    given = {name: value.to(DEVICE) for name, value in inputs().items()}
    for name, value in gradients(
        given, torch.full_like(LABELS, -100).to(DEVICE), reduction=reduction, backend=backend
    ).items():
        assert not value.any(), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_ignored_token_may_hold_nan(backend: str) -> None:
    given = {name: value.to(DEVICE) for name, value in inputs().items()}
    want = gradients(given, LABELS.to(DEVICE), backend=backend)["loss"]
    given["hidden"][0, 2] = float("nan")
    assert torch.equal(gradients(given, LABELS.to(DEVICE), backend=backend)["loss"], want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_logits(backend: str) -> None:
    """A sum of exponentials that would overflow, and a probability that would underflow.

    The kernel works with powers of two, so a logit of 300 may come back wrong in its last place: on a GPU it does.
    """
    hidden, weight = torch.tensor([[300.0]], device=DEVICE), torch.tensor([[1.0], [-1.0]], device=DEVICE)
    for label, want in ((0, 0.0), (1, 600.0)):
        loss = linear_cross_entropy(hidden, weight, torch.tensor([label], device=DEVICE), backend=backend)
        assert abs(loss.item() - want) <= 2.0**-14


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_do_not_matter(backend: str) -> None:
    given = {name: value.to(DEVICE) for name, value in inputs().items()}
    want = linear_cross_entropy(**given, labels=LABELS.to(DEVICE), backend=backend)
    strided = {name: torch.stack([value, value], -1)[..., 0] for name, value in given.items()}
    labels = LABELS.t().contiguous().t().to(DEVICE)
    assert_close("loss", linear_cross_entropy(**strided, labels=labels, backend=backend), want)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck(backend: str, reduction: str) -> None:
    tensors = {name: value.double().requires_grad_() for name, value in inputs(4, 2).items()}
    options = {"reduction": reduction, "label_smoothing": 0.1, "softcap": 2.0, "backend": backend}

    def function(*given: Tensor) -> Tensor:
        return linear_cross_entropy(**dict(zip(tensors, given, strict=True)), labels=LABELS.clamp(max=3), **options)

    assert torch.autograd.gradcheck(function, tuple(tensors.values()))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_poison(backend: str, reduction: str) -> None:
    with poisoned_memory():
        compare(inputs(), backend=backend, reduction=reduction)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_opcheck(backend: str, reduction: str) -> None:
    given = {name: value.to(DEVICE).requires_grad_() for name, value in inputs(bias=reduction == "none").items()}
    hidden, labels = given["hidden"].detach().flatten(0, 1).requires_grad_(), LABELS.flatten().to(DEVICE)
    weight, bias = given["weight"], given.get("bias")
    forward = (hidden, weight, labels, bias, reduction != "none", reduction != "none", -100, 0.1, 2.0, backend)
    checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    checks += ("test_schema",) if backend == "torch" else ()
    torch.library.opcheck(torch.ops.mambakit.linear_cross_entropy, forward, test_utils=checks)
    saved = [None if t is None else t.detach() for t in (torch.ones(12, device=DEVICE), hidden, weight, labels, bias)]
    torch.library.opcheck(
        torch.ops.mambakit.linear_cross_entropy_backward, (*saved, -100, 0.1, None, backend), test_utils=checks
    )


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compile_without_a_break(reduction: str) -> None:
    given = {name: value.to(DEVICE).requires_grad_() for name, value in inputs().items()}

    def loss(**tensors: Tensor) -> Tensor:
        return linear_cross_entropy(**tensors, labels=LABELS.to(DEVICE), reduction=reduction).sum()

    eager = torch.autograd.grad(loss(**given), list(given.values()))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for name, got, want in zip(given, torch.autograd.grad(compiled(**given), list(given.values())), eager, strict=True):
        assert_close(name, got, want)


def test_autocast_takes_the_products_in_its_dtype() -> None:
    given = {name: value.to(DEVICE) for name, value in inputs().items()}
    with torch.autocast(DEVICE, torch.bfloat16):
        found = gradients(given, LABELS.to(DEVICE))
    want = linear_cross_entropy(given["hidden"].bfloat16(), given["weight"], LABELS.to(DEVICE), given["bias"])
    assert torch.equal(found["loss"], want)
    assert {value.dtype for value in found.values()} == {torch.float32}


def test_float16_keeps_small_gradients() -> None:
    """A mean over many tokens has gradients that float16 rounds to zero; a loss scale must still bring them back."""
    hidden = torch.full((4096, 2), 0.5, dtype=torch.float16, device=DEVICE, requires_grad=True)
    weight = torch.tensor([[0.01, 0.0], [0.0, 0.01]], device=DEVICE)
    loss = linear_cross_entropy(hidden, weight, torch.zeros(4096, dtype=torch.int64, device=DEVICE))
    (loss * 2.0**16).backward()
    want = torch.tensor([-0.005, 0.005]) * 2**16 / 4096
    assert_close("hidden", hidden.grad[7], want, 2e-3)


def test_without_gradients_nothing_is_kept() -> None:
    given = inputs()
    with torch.no_grad():
        loss = linear_cross_entropy(**given, labels=LABELS)
    outputs = torch.ops.mambakit.linear_cross_entropy(
        given["hidden"].flatten(0, 1), given["weight"], LABELS.flatten(), None, True, False, -100, 0.0, None, "torch"
    )
    assert loss.grad_fn is None and [value.numel() for value in outputs] == [1, 0, 0, 0]


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize("label", [11, -1])
def test_label_out_of_range(backend: str, label: int) -> None:
    given, labels = {name: value.to(DEVICE) for name, value in inputs().items()}, LABELS.clone().to(DEVICE)
    labels[1, 2] = label
    if DEVICE == "cpu":
        with pytest.raises(
            ValueError, match=rf"labels holds {label}, expected 0 to 10 \(weight has 11 rows\) or ignore"
        ):
            linear_cross_entropy(**given, labels=labels, backend=backend)
    elif backend != "reference":
        assert linear_cross_entropy(**given, labels=labels, backend=backend).isnan()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"hidden": torch.zeros(0, 4)}, ValueError, "hidden has shape (0, 4), expected (..., channels); every axis"),
        ({"hidden": torch.zeros(2, 4).int()}, TypeError, "hidden has dtype int32, expected one of float16"),
        ({"weight": torch.zeros(7, 5)}, ValueError, "weight has shape (7, 5), expected (vocabulary, channels=4)"),
        (
            {"labels": torch.zeros(3).long()},
            ValueError,
            "labels has shape (3,), expected hidden's without the last, (2,)",
        ),
        ({"labels": torch.zeros(2).int()}, TypeError, "labels has dtype int32, expected int64"),
        ({"labels": [0, 1]}, TypeError, "labels must be a tensor, got list"),
        ({"bias": torch.zeros(4)}, ValueError, "bias has shape (4,), expected (vocabulary=7)"),
        ({"weight": torch.zeros(7, 4, device="meta")}, ValueError, "weight is on meta, hidden is on cpu"),
        ({"reduction": "max"}, ValueError, "reduction='max' is unknown; expected one of mean, sum, none"),
        ({"label_smoothing": 1.5}, ValueError, "label_smoothing=1.5 is out of range; expected 0 to 1"),
        ({"softcap": 0.0}, ValueError, "softcap=0.0 must be positive"),
        ({"backend": "cuda"}, ValueError, "backend='cuda' is unknown"),
    ],
)
def test_messages(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"hidden": torch.zeros(2, 4), "weight": torch.zeros(7, 4), "labels": torch.zeros(2).long(), **changes}
    with pytest.raises(error, match="^linear_cross_entropy: ") as caught:
        linear_cross_entropy(**arguments)
    assert message in str(caught.value)


def test_triton_says_what_it_does_not_take() -> None:
    hidden, weight = torch.zeros(2, 4, dtype=torch.float64, device=DEVICE), torch.zeros(7, 4, device=DEVICE)
    labels = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    with pytest.raises(ValueError, match="^linear_cross_entropy: .* hidden is float64; use backend="):
        linear_cross_entropy(hidden, weight, labels, backend="triton")
