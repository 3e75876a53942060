"""ComputeConfig: how a worker computes gradients. None of it changes which samples a step has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from datapipe.checks import check, check_least, check_types


@dataclass(frozen=True)
class ComputeConfig:
    """How a worker computes; each option is off until it was measured where it is to be used
    (tests/benchmarks/gpu.py).
    """

    precision: Literal["float32", "bfloat16", "float64"] = "float32"
    """bfloat16: forward and backward under autocast, weights and their update in float32. float64:
    all of it, to compare runs beyond the noise of float32.
    """
    accumulation_steps: int = 1
    """Parts that a worker's batch is computed in, one after the other; batch norm sees each part
    for itself (1 with bn_group lane, whose parts are the lanes).
    """
    channels_last: bool = False
    """GPUs: activations in channels-last memory format. On CPUs they always are."""
    compile: bool = False
    """Forward and backward through torch.compile. It takes minutes, and again for another batch
    shape, as after a change of the number of workers, while the others wait: set
    cluster.collective_timeout_s (push_pull, where nobody waits: servers.lease_timeout_s). Gradients
    are sent when backward is done.
    """
    cuda_graphs: bool = False
    """GPUs: forward and backward replayed as one CUDA graph, recorded anew for another batch shape.
    Gradients are sent when backward is done.
    """
    fused_optimizer: bool = False
    """all_reduce: the update of the weights and of their average in one compiled pass; equal within
    rounding. The first update of a worker compiles, while the others wait: set
    cluster.collective_timeout_s.
    """

    def __post_init__(self) -> None:
        check_types(self, "compute.")
        check_least(self, "compute.", accumulation_steps=1)
        is_alone = not (self.compile and self.cuda_graphs)
        allowed = "False with compute.compile, whose mode of CUDA graphs is another"
        check(is_alone, "compute.cuda_graphs", self.cuda_graphs, allowed)
