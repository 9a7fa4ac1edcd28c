"""Work done by threads ahead of the one who needs it, in order, a bounded distance ahead."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, Self, TypeVar

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


class Prefetcher(Generic[Item, Result]):
    """Pairs of an item and what `fetch` made of it, fetched by one thread while the loop trains.

    `Prefetcher(steps, lambda rows: dataset.fetch(rows))` is iterated and closed, or used in `with`.

    Args:
        ahead: how many results may lie ready; each holds the tensors of one step.
    """

    def __init__(
        self, items: Iterable[Item], fetch: Callable[[Item], Result], *, ahead: int = 2
    ) -> None:
        self.waited_seconds = 0.0
        """How long the loop has waited for data, all in all."""
        # One more than may lie ready: the thread works on it while they do.
        self._results = map_ahead(lambda item: (item, fetch(item)), items, ahead=ahead + 1)

    def __iter__(self) -> Iterator[tuple[Item, Result]]:
        return self

    def __next__(self) -> tuple[Item, Result]:
        began = time.perf_counter()
        try:
            return next(self._results)
        finally:
            self.waited_seconds += time.perf_counter() - began

    def close(self) -> None:
        """Stop the thread after the fetch it is doing."""
        self._results.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
