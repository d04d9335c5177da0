"""Two processes with half a batch each take the step of one process with the whole batch (law 14)."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from mambakit import Backbone, LanguageModel
from mambakit.kernels.testing import assert_close


def make():
    torch.manual_seed(0)
    return LanguageModel(11, Backbone(8, 2))


def data():
    return torch.randint(11, (4, 9), generator=torch.Generator().manual_seed(1))


def worker(rank, port, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    model = make()
    wrapped = DistributedDataParallel(model)
    ids = data()[2 * rank : 2 * rank + 2]
    logits = wrapped(ids[:, :-1])
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
    torch.save({name: p.grad for name, p in model.named_parameters()}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_average_to_one(tmp_path):
    store = dist.TCPStore("127.0.0.1", 0, is_master=True)
    port = store.port
    del store
    mp.spawn(worker, args=(port, str(tmp_path)), nprocs=2)
    model, ids = make(), data()
    model.loss(ids[:, :-1], ids[:, 1:]).backward()
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for name, parameter in model.named_parameters():
        assert torch.equal(first[name], second[name])
        assert_close(name, first[name], parameter.grad, 1e-5)
