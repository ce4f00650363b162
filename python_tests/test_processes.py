"""A call among threads and processes: no thread but the pool's, and what a fork may still do."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import needs_native, run_alone
from torch.utils.data import DataLoader, Dataset

import groupconv_ext as gc
from groupconv_ext import Partition

pytestmark = needs_native


def large_call() -> Callable[[], torch.Tensor]:
    """Large enough to be shared between threads."""
    partition = Partition.random(64, 64, 4, seed=0)
    x = (torch.arange(64 * 40 * 40) % 13 - 6.0).view(1, 64, 40, 40)
    weight = (torch.arange(partition.entries * 9) % 5 - 2.0).view(-1, 3, 3)
    return lambda: gc.conv2d(x, weight, partition=partition, padding=1, backend="native")


TASKS = Path("/proc/self/task")


def tasks() -> int:
    """Threads of this process, whoever started them; where nobody counts them, always as many."""
    return len(list(TASKS.iterdir())) if TASKS.exists() else 0


def check_no_thread_but_the_pools() -> None:
    """Who calls has as many helpers as for PyTorch's own operations, and no others."""
    call, matrix = large_call(), torch.randn(512, 512)
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        matrix @ matrix
        matrix.add(1)  # the pool is there
        before = tasks()
        for _ in range(3):
            call()
        assert tasks() == before, f"{count} threads"
    torch.set_num_threads(1)
    before, most = tasks(), []

    def work() -> None:
        torch.set_num_threads(1)  # as whoever computes in threads of his own does
        call()
        most.append(tasks())

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert max(most) <= before + len(workers)


def test_no_thread_but_those_of_the_pool() -> None:
    run_alone(__file__)


def test_a_child_forked_after_use_computes() -> None:
    call = large_call()
    expected = call().tolist()
    child = os.fork()
    if child == 0:  # where nothing but our own operation may be called that uses threads
        signal.alarm(60)
        os._exit(0 if call().tolist() == expected else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert call().tolist() == expected, "and the parent still does"


class Images(Dataset):
    """Preprocessed by a convolution, in the worker."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> torch.Tensor:
        before = tasks()
        image = large_call()()[0, index]
        assert tasks() == before, "a worker computes on the one thread that it has"
        return image


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_in_the_workers_of_a_loader(method: str) -> None:
    expected = large_call()()[0, :6]
    context = multiprocessing.get_context(method)
    loader = DataLoader(Images(), 3, num_workers=2, multiprocessing_context=context, timeout=60)
    assert torch.equal(torch.cat(list(loader)), expected)


if __name__ == "__main__":
    check_no_thread_but_the_pools()
