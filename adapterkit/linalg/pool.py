"""Many small factorisations at once, each on one thread.

Several threads inside one small factorisation mostly wait for each other, and the order in which they
add up changes the last digits. A pool over the matrices is faster, and gives the same result whatever
the number of its threads.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


@contextmanager
def one_thread() -> Iterator[int]:
    """Every operation on one thread; yields how many there were."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)


def on_one_thread(function: Callable[[Item], Result]) -> Callable[[Item], Result]:
    """The function, its small multiplications on one thread wherever it is called from."""

    @functools.wraps(function)
    def alone(item: Item) -> Result:
        with one_thread():
            return function(item)

    return alone


def each(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    finished: Callable[[int], None] | None = None,
) -> list[Result]:
    """function of every item, in their order, as many at once as torch has threads.

    finished: told how many are done, from the caller's thread.  The first item to fail, in order, is
    the one whose error is raised; what has not begun by then never does.
    """

    def without_gradients(item: Item) -> Result:
        with torch.no_grad():
            return function(item)

    results: list[Result] = []
    with one_thread() as threads, ThreadPoolExecutor(max(1, threads)) as pool:
        futures = [pool.submit(without_gradients, item) for item in items]
        try:
            for future in futures:
                results.append(future.result())
                if finished is not None:
                    finished(len(results))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return results
