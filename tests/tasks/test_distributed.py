"""Two processes with half a batch each take the step of one process with the whole batch (law 14)."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from mambakit import Backbone, LanguageModel
from mambakit.kernels.testing import assert_close


def make():
    torch.manual_seed(0)
    return LanguageModel(11, Backbone(8, 2))


def data():
    return torch.randint(11, (4, 9), generator=torch.Generator().manual_seed(1))


def work(folder):
    """One of two processes: the gradients of its half of the batch, averaged by DistributedDataParallel."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    model = make()
    wrapped = DistributedDataParallel(model)
    ids = data()[2 * rank : 2 * rank + 2]
    logits = wrapped(ids[:, :-1])
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
    torch.save({name: p.grad for name, p in model.named_parameters()}, Path(folder, f"{rank}.pt"))
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_average_to_one(tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run = subprocess.run([*launcher, __file__, str(tmp_path)], capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr
    model, ids = make(), data()
    model.loss(ids[:, :-1], ids[:, 1:]).backward()
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for name, parameter in model.named_parameters():
        assert torch.equal(first[name], second[name])
        assert_close(name, first[name], parameter.grad, 1e-5)


if __name__ == "__main__":
    work(sys.argv[1])
