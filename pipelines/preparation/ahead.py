"""Work done in threads a little ahead of its reader, results in order."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

T = TypeVar("T")
S = TypeVar("S")


def futures_ahead(
    pool: ThreadPoolExecutor, action: Callable[[S], T], values: Iterable[S], depth: int = 8
) -> "Iterator[Future[T]]":
    """Futures of `action(value)` in order, `depth` of them running ahead of the reader."""
    rest = iter(values)
    pending = deque(pool.submit(action, value) for value in islice(rest, depth))
    while pending:
        yield pending.popleft()
        pending.extend(pool.submit(action, value) for value in islice(rest, 1))


def mapped_ahead(action: Callable[[S], T], values: Iterable[S], *, num_threads: int) -> Iterator[T]:
    """`map` in threads: results in order, at most 2 x `num_threads` of them waiting."""
    with ThreadPoolExecutor(num_threads) as pool:
        try:
            for future in futures_ahead(pool, action, values, depth=2 * num_threads):
                yield future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
