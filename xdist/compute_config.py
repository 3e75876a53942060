"""ComputeConfig: how a worker computes gradients. None of it changes which samples a step has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from xdist.checks import check, check_least


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
    for itself.
    """
    channels_last: bool = False
    """Activations and kernels in channels-last memory format."""
    compile: bool = False
    """Forward and backward through torch.compile; another batch shape, as after a change of the
    number of workers, is compiled anew (not with bn_group lane).
    """
    cuda_graphs: bool = False
    """Forward and backward replayed as one CUDA graph; the all-reduce then comes after them."""
    fused_optimizer: bool = False
    """The update of the weights in one compiled pass."""

    def __post_init__(self) -> None:
        check_least(self, "compute.", accumulation_steps=1)
        is_alone = not (self.compile and self.cuda_graphs)
        allowed = "False with compute.compile, whose mode of CUDA graphs is another"
        check(is_alone, "compute.cuda_graphs", self.cuda_graphs, allowed)
