"""The epoch sampler: every process its share, and nothing twice."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mambakit.datamodules.samplers import EpochSampler


def shares(length: int, processes: int, even: bool, epoch: int = 0) -> list[list[int]]:
    samplers = [
        EpochSampler(
            lambda epoch: np.arange(length) + 100 * epoch, length, num_replicas=processes, rank=rank, even=even
        )
        for rank in range(processes)
    ]
    for sampler in samplers:
        sampler.set_epoch(epoch)
        assert len(sampler) == len(list(sampler))
    return [list(sampler) for sampler in samplers]


@given(length=st.integers(0, 40), processes=st.integers(1, 7), epoch=st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_evaluation_gives_each_item_once(length, processes, epoch):
    items = [item for share in shares(length, processes, even=False, epoch=epoch) for item in share]
    assert sorted(items) == [100 * epoch + item for item in range(length)]


@given(length=st.integers(0, 40), processes=st.integers(1, 7))
@settings(max_examples=60, deadline=None)
def test_training_gives_equal_shares_that_do_not_overlap(length, processes):
    parts = shares(length, processes, even=True)
    items = [item for share in parts for item in share]
    assert {len(share) for share in parts} == {length // processes}
    assert len(set(items)) == len(items) == length // processes * processes


def test_a_rank_that_is_none_is_refused():
    with pytest.raises(ValueError, match="rank"):
        EpochSampler(lambda epoch: np.arange(4), 4, num_replicas=2, rank=2)
