"""A cache that is bounded by the size of what it holds."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Any


class ByteCache:
    """The most recently used values, as many as fit into a number of bytes, one at least. Safe to use from threads."""

    def __init__(self, max_bytes: int) -> None:
        self._max, self._held = max_bytes, 0
        self._values: OrderedDict[Any, tuple[Any, int]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Any) -> Any:
        """The value, or None where it is not (or no longer) held."""
        with self._lock:
            if key not in self._values:
                return None
            self._values.move_to_end(key)
            return self._values[key][0]

    def put(self, key: Any, value: Any, size_bytes: int) -> None:
        """Hold a value; the ones not used for longest make room."""
        with self._lock:
            self._held += size_bytes - self._values.pop(key, (None, 0))[1]
            self._values[key] = (value, size_bytes)
            while self._held > self._max and len(self._values) > 1:
                self._held -= self._values.popitem(last=False)[1][1]
