"""An order of items that depends on nothing but the epoch, and a loader that resumes in the middle of one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, DistributedSampler


class EpochSampler(DistributedSampler):
    """Each process's share of ``order(epoch)``: process ``rank`` takes items rank, rank + num_replicas, ...

    The order is a pure function of the epoch, so every process computes the same one and any position in any epoch
    can be returned to. Being a ``DistributedSampler``, it is left as it is by Lightning, which would otherwise wrap
    it in one of its own that repeats items. Lightning calls :meth:`set_epoch`.

    Args:
        order: from the epoch (from 0) to an integer array (length,), the items in order.
        length: the items in an epoch, over all processes.
        num_replicas: number of processes.
        rank: this process, from 0.
        even: give every process the same number of items by leaving out the last few (training, where processes
            wait for each other at each step); otherwise each item is given exactly once (evaluation).

    Raises:
        ValueError: ``rank`` is not one of the ``num_replicas`` processes.
    """

    def __init__(
        self,
        order: Callable[[int], np.ndarray],
        length: int,
        *,
        num_replicas: int = 1,
        rank: int = 0,
        even: bool = True,
    ) -> None:
        super().__init__(range(length), num_replicas, rank, shuffle=False, drop_last=even)  # type: ignore[arg-type]
        self.order = order
        self.num_samples = length // num_replicas if even else len(range(rank, length, num_replicas))
        self.skip = 0

    def share(self, epoch: int) -> np.ndarray:
        """The items (num_samples,) of this process in ``epoch``."""
        return self.order(epoch)[self.rank :: self.num_replicas][: self.num_samples]

    def __iter__(self) -> Iterator[int]:
        return iter(self.share(self.epoch)[self.skip :].tolist())


class ResumableDataLoader(DataLoader):
    """A ``DataLoader`` over an :class:`EpochSampler` whose place within the epoch goes into checkpoints.

    Lightning saves :meth:`state_dict` with its fit loop and gives it to :meth:`load_state_dict` before it asks for
    the first batch. The place is counted where batches are handed out, so batches that workers have fetched ahead do
    not count.

    Args:
        *args, **kwargs: as for ``DataLoader``; ``sampler`` is an :class:`EpochSampler`.
        finished: the number of batches of this epoch that training has finished, asked when the state is saved. A
            batch that was handed out and then interrupted comes again after a resume.
    """

    def __init__(self, *args: Any, finished: Callable[[], int] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.finished = finished
        self._place = (0, 0)  # epoch, batches handed out
        self._resume: tuple[int, int] | None = None

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # This is a generator, so it looks at the sampler's epoch when the first batch is asked for. Lightning calls
        # iter() before it sets the epoch.
        if not isinstance(self.sampler, EpochSampler):  # Trainer(overfit_batches=...) puts a sequential one in
            yield from super().__iter__()
            return
        epoch = self.sampler.epoch
        resumed, skip = self._resume or (epoch, 0)
        self._resume = None
        self._place = (epoch, skip if resumed == epoch else 0)
        self.sampler.skip = self._place[1] * (self.batch_size or 1)
        for batch in super().__iter__():
            self._place = (epoch, self._place[1] + 1)
            yield batch

    def state_dict(self) -> dict[str, int]:
        """The epoch, the batches of it that are done, and what these counts depend on."""
        epoch, batches = self._resume or self._place
        if self.finished is not None:
            batches = min(batches, self.finished())
        return {"epoch": epoch, "batches": batches, **self._shape()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Begin where ``state`` was saved.

        Raises:
            ValueError: the state lies within an epoch that was cut into other batches than this one is.
        """
        if 0 < state["batches"] < state["batches_in_epoch"]:
            for name, now in self._shape().items():
                if state[name] != now:
                    raise ValueError(
                        f"the checkpoint was saved in the middle of an epoch with {name} {state[name]}, and now it is "
                        f"{now}; resume with the same data options and number of processes"
                    )
        self._resume = (state["epoch"], state["batches"])

    def _shape(self) -> dict[str, int]:
        processes = self.sampler.num_replicas if isinstance(self.sampler, EpochSampler) else 1
        return {"batch_size": self.batch_size or 1, "processes": processes, "batches_in_epoch": len(self)}
