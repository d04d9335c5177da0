"""timm knows our models whichever is imported first, and is imported by us no sooner than by somebody else."""

import subprocess
import sys
from pathlib import Path

import pytest

from mambakit import registry

ROOT = Path(__file__).resolve().parents[2]
ASKED = """
assert "vim_tiny_patch16_224" in timm.list_models("vim*"), timm.list_models("vim*")
model = timm.create_model("vim_tiny_patch16_224", img_size=16, depth=1, num_classes=2)
assert type(model).__name__ == "VisionMamba", type(model)
assert not any(type(finder).__name__ == "AfterTimm" for finder in sys.meta_path)
assert "exec_module" not in vars(timm.__spec__.loader)
"""
ORDERS = {
    "mambakit": (  # looking for timm, as libraries do, is not importing it
        "import mambakit, importlib.util; importlib.util.find_spec('timm'); assert 'timm' not in sys.modules; "
        "from timm.models import create_model; import timm"
    ),
    "timm": "import timm; assert 'mambakit' not in sys.modules; import mambakit",
    "class": "from mambakit.models.vision_mamba import VisionMamba; import timm",
}


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_timm_knows_the_models(order: str):
    code = f"import sys, warnings; warnings.simplefilter('error', UserWarning); {order}{ASKED}"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert result.returncode == 0, result.stderr


def test_a_fault_of_ours_does_not_break_timm(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(registry, "MODEL_HOMES", ("mambakit.models.nowhere", "mambakit.models.vim"))
    with pytest.warns(UserWarning, match=r"timm does not know the models of mambakit.models.nowhere: No module"):
        registry.register_models()


def test_without_timm_nothing_is_found(monkeypatch: pytest.MonkeyPatch):
    finder = registry.AfterTimm()
    monkeypatch.setattr(sys, "meta_path", [finder])
    assert finder.find_spec("timm", None) is None and finder.find_spec("torch", None) is None
