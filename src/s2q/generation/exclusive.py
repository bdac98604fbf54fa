"""One thread at a time in a pipeline.

A pipeline keeps the state of its call on itself and on its components: scheduler, guider, tokenizer, caches of the VAE.
Threads that generate with the same components through s2q therefore take turns, batch by batch; threads with different
pipelines do not wait. Calls of the pipeline itself, `pipe(...)`, are not covered.
"""

import threading
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

_LOCKS: "weakref.WeakKeyDictionary[object, threading.RLock]" = weakref.WeakKeyDictionary()
_TABLE = threading.Lock()


@contextmanager
def exclusive(pipe: Any) -> Iterator[None]:
    """Wait until no other thread uses a component of a pipeline, and keep them from it meanwhile."""
    components = {id(part): part for part in pipe.components.values() if hasattr(part, "__weakref__")}
    with _TABLE:
        locks = [_LOCKS.setdefault(components[key], threading.RLock()) for key in sorted(components)]
    with ExitStack() as stack:
        for lock in locks:
            stack.enter_context(lock)
        yield
