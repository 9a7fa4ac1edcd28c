"""Work done by threads ahead of the one who needs it, in order, a bounded distance ahead."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_ahead(
    work: Callable[[Item], Result], items: Iterable[Item], *, threads: int = 1, ahead: int = 2
) -> Generator[Result]:
    """`work` of each item, in order, at most `ahead` of them in work or waiting to be taken.

    An error of `work` is raised where its result would have come. Closing the generator, or an
    error, stops the threads after what they are doing. `items` is iterated in the caller's thread.
    """
    pending: deque[Future[Result]] = deque()
    pool = ThreadPoolExecutor(threads, thread_name_prefix="prefetch")
    try:
        for item in items:
            pending.append(pool.submit(work, item))
            if len(pending) >= ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
