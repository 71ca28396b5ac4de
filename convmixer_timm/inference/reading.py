"""Images read ahead of the model, large files several at a time."""

import collections
import concurrent.futures
import contextlib
import functools
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

__all__ = ["readings"]

_LARGE = range(100_000, 20_000_000)  # bytes of a file whose decoding is worth a thread, and leaves memory for others
_THREADS = 4


def readings(
    load: Callable[[Any], torch.Tensor], images: Iterable[Any], ahead: bool = True
) -> Iterator[tuple[Any, Callable[[], torch.Tensor]]]:
    """Each image, in its turn, with a function of nothing that gives what `load` makes of it, or raises its error.

    Not `ahead`, an image is read when it is its turn, and the next one is asked for after that.
    """
    if not ahead:
        yield from ((image, functools.partial(load, image)) for image in images)
        return
    count = min(_THREADS, torch.get_num_threads())
    pool = concurrent.futures.ThreadPoolExecutor(count)
    waiting: collections.deque[tuple[Any, Callable[[], torch.Tensor]]] = collections.deque()
    try:
        for image in images:
            in_pool = _is_large(image)
            waiting.append((image, pool.submit(load, image).result if in_pool else functools.partial(load, image)))
            if len(waiting) > 2 * count:
                yield waiting.popleft()
        yield from waiting
    finally:
        pool.shutdown(cancel_futures=True)


def _is_large(image: Any) -> bool:
    with contextlib.suppress(OSError, ValueError):
        return isinstance(image, str | os.PathLike) and os.path.getsize(image) in _LARGE
    return False
