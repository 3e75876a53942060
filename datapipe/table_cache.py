"""TableCache: the tables of the shards in use, each read once however many threads ask for it."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future

from datapipe.table import ShardTable


class TableCache:
    """Keeps the tables that were asked for last. For use by several threads."""

    def __init__(self, read: Callable[[int], ShardTable], *, max_tables: int) -> None:
        """read: the table of the shard of that number."""
        self._read = read
        self._max_tables = max_tables
        self._tables: OrderedDict[int, Future[ShardTable]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, shard: int) -> ShardTable:
        """Errors: those of `read`; the next call tries anew."""
        with self._lock:
            table = self._tables.get(shard)
            is_new = table is None
            if table is None:
                table = self._tables[shard] = Future()
                if len(self._tables) > self._max_tables:
                    self._tables.popitem(last=False)
            else:
                self._tables.move_to_end(shard)
        if is_new:
            self._fill(shard, table)
        return table.result()

    def _fill(self, shard: int, table: Future[ShardTable]) -> None:
        try:
            table.set_result(self._read(shard))
        except BaseException as error:  # noqa: BLE001 - every thread that waits raises it
            with self._lock:
                self._tables.pop(shard, None)
            table.set_exception(error)
