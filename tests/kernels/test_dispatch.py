"""What the dispatcher does where Triton cannot serve CUDA tensors: one warning and PyTorch, or an error by name.

Tensors "on a GPU" are fake ones here, so that every case is reached on any machine.
"""

import warnings
from collections.abc import Iterator

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mambakit import doctor
from mambakit.kernels import dispatch, rms_norm, triton_probe, tuning
from mambakit.kernels.dispatch import choose


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing probed, nothing warned of, Triton installed and not interpreted, a GPU that a kernel may run on."""
    monkeypatch.setattr(dispatch, "_probed", {})
    monkeypatch.setattr(dispatch, "_warned", set())
    monkeypatch.setattr(dispatch, "TRITON_INSTALLED", True)
    monkeypatch.setattr(dispatch, "INTERPRETED", False)
    monkeypatch.setattr(dispatch, "_may_launch", lambda: True)


@pytest.fixture
def on_gpu() -> Iterator[torch.Tensor]:
    with FakeTensorMode():
        yield torch.empty(4, device="cuda:0")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[torch.device, torch.dtype]]:
    """What the probe is asked, beside a probe that finds Triton at work in every dtype but float16."""
    calls: list[tuple[torch.device, torch.dtype]] = []

    def failure(device: torch.device, dtype: torch.dtype) -> str | None:
        calls.append((device, dtype))
        return "RuntimeError: no C compiler" if dtype == torch.float16 else None

    monkeypatch.setattr(triton_probe, "_failure", failure)  # beneath the thread, which torch.compile cannot trace
    return calls


def heard(*calls: tuple[str, torch.Tensor, str | None]) -> list[str]:
    """The warnings of these calls of ``choose`` with "auto", each of which must give "torch"."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for operator, tensor, not_in_triton in calls:
            assert choose(operator, "auto", tensor, not_in_triton).backend == "torch"
    return [str(warning.message) for warning in caught]


def test_a_working_triton_serves_and_is_probed_once_a_device_and_dtype(on_gpu, asked):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for tensor in (on_gpu, on_gpu, on_gpu.bfloat16(), on_gpu.double()):
            assert choose("selective_scan", "auto", tensor).backend == "triton"
            assert choose("selective_scan", "triton", tensor).backend == "triton"
    assert asked == [(on_gpu.device, torch.float32), (on_gpu.device, torch.bfloat16)]


def test_a_gpu_without_triton_warns_once_for_all_operators(on_gpu, asked, monkeypatch):
    monkeypatch.setattr(dispatch, "TRITON_INSTALLED", False)
    messages = heard(("selective_scan", on_gpu, None), ("rms_norm", on_gpu, None), ("rms_norm", on_gpu, None))
    assert len(messages) == 1
    assert "triton is not installed" in messages[0] and "much slower on a GPU" in messages[0]
    assert not asked
    with pytest.raises(ValueError, match="rms_norm: backend='triton' cannot serve this call: triton is not installed"):
        choose("rms_norm", "triton", on_gpu)


def test_a_triton_that_cannot_compile_for_the_device_warns_once_a_dtype(on_gpu, asked):
    other = on_gpu.half()
    messages = heard(("selective_scan", other, None), ("rms_norm", other, None), ("selective_scan", other, None))
    assert len(messages) == 1
    assert "cannot run a float16 kernel on cuda:0 (RuntimeError: no C compiler)" in messages[0]
    assert asked == [(other.device, torch.float16)]
    assert choose("selective_scan", "auto", on_gpu).backend == "triton"
    with pytest.raises(ValueError, match="no C compiler"):
        choose("selective_scan", "triton", other)
    with dispatch.use_backend("triton"), pytest.raises(ValueError, match="no C compiler"):
        choose("selective_scan", "auto", other)


def test_a_call_that_the_kernel_does_not_take_warns_once_an_operator(on_gpu, asked):
    reason = "d_state is 512, and the kernel holds at most 256 states a channel"
    messages = heard(("selective_scan", on_gpu, reason), ("selective_scan", on_gpu, reason), ("other", on_gpu, reason))
    assert [message.split(":")[0] for message in messages] == ["selective_scan", "other"]
    assert all(reason in message for message in messages)
    with pytest.raises(ValueError, match="d_state is 512"):
        choose("selective_scan", "triton", on_gpu, reason)


def test_neither_a_cpu_nor_a_backend_asked_for_by_name_warns(on_gpu, asked, monkeypatch):
    monkeypatch.setattr(dispatch, "TRITON_INSTALLED", False)
    assert heard(("rms_norm", torch.empty(4), None)) == []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose("rms_norm", "torch", on_gpu).backend == "torch"
        with dispatch.use_backend("reference"):
            assert choose("rms_norm", "auto", on_gpu).backend == "reference"
    assert not asked


def test_nothing_is_probed_where_nothing_may_be_launched(on_gpu, asked, monkeypatch):
    monkeypatch.setattr(dispatch, "_may_launch", lambda: False)
    assert choose("rms_norm", "auto", on_gpu).backend == "triton"
    assert not asked and not dispatch._probed


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_choice_stays_in_one_graph_and_warns_while_compiling(asked, dtype):
    graphs = []

    def note(graph: torch.fx.GraphModule, _: list) -> torch.fx.GraphModule:
        graphs.append([node.target.__name__ for node in graph.graph.nodes if node.op == "call_function"])
        return graph

    @torch.compile(fullgraph=True, backend=note)
    def double_or_square(x: torch.Tensor) -> torch.Tensor:
        return x + x if choose("rms_norm", "auto", x).backend == "triton" else x * x

    torch.compiler.reset()
    with FakeTensorMode(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        double_or_square(torch.empty(4, device="cuda:0", dtype=dtype))
    assert graphs == [["mul"] if dtype == torch.float16 else ["add"]]
    assert len(asked) == 1
    assert ["no C compiler" in str(warning.message) for warning in caught if warning.category is UserWarning] == (
        [True] if dtype == torch.float16 else []
    )


def test_a_device_that_fails_the_probe_is_told_of_in_one_line():
    if torch.cuda.is_available():
        assert triton_probe.failure(torch.device("cuda", 0), torch.float32) is None
    absent = triton_probe.failure(torch.device("cuda", torch.cuda.device_count()), torch.float32)
    assert absent is not None and "\n" not in absent and "Error" in absent


def test_the_probe_sees_no_mode_of_its_caller(monkeypatch):
    seen = []
    monkeypatch.setattr(triton_probe, "_failure", lambda *_: seen.append(type(torch.empty(1))))
    with FakeTensorMode():
        assert triton_probe.failure(torch.device("cuda", 0), torch.float32) is None
    assert seen == [torch.Tensor]


def test_an_operator_falls_back_and_is_right(monkeypatch):
    """Through a public function, with a device type of "cuda" that only the dispatcher believes in."""
    monkeypatch.setattr(dispatch, "TRITON_INSTALLED", False)
    with FakeTensorMode(), pytest.warns(UserWarning, match="triton is not installed"):
        x, weight = torch.empty(2, 3, device="cuda:0"), torch.empty(3, device="cuda:0")
        assert rms_norm(x, weight).shape == (2, 3)
    with pytest.raises(ValueError, match="rms_norm: backend='triton' cannot serve"):
        rms_norm(torch.ones(2, 3), torch.ones(3), backend="triton")


def test_doctor_tells_of_the_probe(asked, monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "INTERPRETED", False)
    monkeypatch.setattr(doctor, "device_names", lambda: ["cpu", "cuda:0"])
    monkeypatch.setattr(tuning, "cache_file", lambda device: tmp_path / "gpu.json")
    lines = doctor.triton_state()
    assert lines[0] == "cuda:0: a test kernel ran in float32, bfloat16"
    assert lines[1].startswith("cuda:0: no kernels: Triton cannot run a float16 kernel on cuda:0 (RuntimeError: no C")
    assert lines[2] == "cuda:0: each kernel's rule decides, none tuned"
    (tmp_path / "gpu.json").write_text('{"[]": [1]}')
    assert "has kept 1 configurations" in doctor.triton_state()[2]
