"""CudaGraphs: work of a GPU that is recorded once for each shape, and then replayed.

A replay launches hundreds of kernels at once, where the host needs some microseconds for each.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

NUM_WARM_UPS = 3  # What torch asks for: libraries choose their algorithms in the first calls.
MOST_GRAPHS = 32  # Of one worker; beyond, all are forgotten: batches must have changed their shape.


@dataclass(frozen=True)
class _Recording:
    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]
    result: Tensor


class CudaGraphs:
    """Calls a function of tensors, whose shapes alone decide what it does.

    Random numbers are those of a plain call after the same `torch.manual_seed`: torch hands the
    seed and offset of its generator to the graph at each replay. A result is valid until the next
    call.
    """

    def __init__(self, function: Callable[..., Tensor], *, accumulated: Tensor) -> None:
        """accumulated: what the function may add to. Recording leaves it as it was."""
        self._function = function
        self._accumulated = accumulated
        self._forget()

    def _forget(self) -> None:
        self._recordings: dict[Hashable, _Recording] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, *inputs: Tensor, is_first: bool) -> Tensor:
        """is_first: an argument of the function, by name; another value is another graph."""
        key = (is_first, *(tensor.shape for tensor in inputs))
        if key not in self._recordings:
            if len(self._recordings) == MOST_GRAPHS:
                self._forget()
            self._recordings[key] = self._record(inputs, is_first=is_first)
        recording = self._recordings[key]
        for place, tensor in zip(recording.inputs, inputs, strict=True):
            place.copy_(tensor)
        recording.graph.replay()
        return recording.result

    def _record(self, inputs: tuple[Tensor, ...], *, is_first: bool) -> _Recording:
        places = tuple(tensor.clone() for tensor in inputs)
        accumulated = self._accumulated.clone()
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.random.fork_rng([torch.cuda.current_device()]):
            with torch.cuda.stream(stream):
                for _ in range(NUM_WARM_UPS):
                    self._function(*places, is_first=is_first)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            # Beside this thread others go on to pin memory and NCCL's to look after its work.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                result = self._function(*places, is_first=is_first)
        self._accumulated.copy_(accumulated)
        return _Recording(graph, places, result)
