"""ServersConfig: how gradients go to the parameter servers, and what these make of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from datapipe.checks import check, check_least, check_positive, check_types


@dataclass(frozen=True)
class ServersConfig:
    """push_pull: the parameter servers. With the defaults one worker trains exactly as without
    servers; with `overlap`, `factors` or a `wire` of bfloat16 it does not.
    """

    replicas: Literal[0, 1] = 0
    """Copies of each server, on other nodes where there are any. With 1, a lost server loses
    nothing; with 0, the run goes back to its last checkpoint.
    """
    shared_memory: bool = True
    """Gradients and weights pass through shared memory between a worker and a server that can map
    each other's, being on one node; False: through Ray's object store everywhere.
    """
    wire: Literal["float32", "bfloat16"] = "float32"
    """What gradients and weights are sent as. The servers keep float32."""
    error_feedback: bool = False
    """What rounding a gradient to bfloat16 leaves is added to the worker's next one (Seide et al.
    2014). What a push took of it that is dropped is lost with it.
    """
    factors: bool = False
    """The gradient of a linear layer goes to servers elsewhere as the factors that it is the
    product of, inputs and output gradients of a batch, where the server multiplies these sooner
    than the bytes would come that are not sent: in small batches, of large layers.
    """
    link_gbits: float = 10.0
    """Gigabits a second that come to a server from other machines, for `factors` to be chosen
    by.
    """
    overlap: int = 0
    """Pushes that a worker need not see through before it computes the next gradient, on weights
    that may lack them. Where it shares memory with its servers it has the newest weights that are
    there, so that also one worker alone is not reproducible.
    """
    max_clock_lead: int | None = None
    """Pushes that a worker may be ahead of the slowest one (stale synchronous parallel, Ho et al.
    2013), and `overlap` more; None: any number.
    """
    scale_by_staleness: bool = False
    """The learning rate of a push is divided by its staleness, where that is above 1 (Zhang et al.
    2015).
    """
    commit_first: int | None = None
    """Synchronous training with backup workers (Chen et al. 2016): an update is the mean of the
    first so many pushes of its version; those that come later are dropped, and their samples dealt
    again. None: each push is an update.
    """
    start_over_steps: int = 0
    """Updates over which the workers begin, one after the other; 0: all at once."""
    lease_timeout_s: float | None = None
    """After so long without an answer, or in one computation, a worker loses what it had leased and
    is replaced; None: the larger of 10 s and five of the longest steps. It may take ten times as
    long (None: 600 s) to get a batch, as storage may pause, and 600 s for its first step; it may
    wait for servers as long as these are there.
    """

    def __post_init__(self) -> None:
        check_types(self, "servers.")
        prefix = "servers."
        check_least(self, prefix, overlap=0, start_over_steps=0, lease_timeout_s=1)
        check_least(self, prefix, max_clock_lead=1, commit_first=1)
        check_positive(self, prefix, "link_gbits")
        allowed = "False with servers.wire float32, which rounds nothing"
        is_rounded = self.wire == "bfloat16"
        feeds_back = self.error_feedback
        check(is_rounded or not feeds_back, "servers.error_feedback", feeds_back, allowed)
        allowed = "False with servers.error_feedback, as what factors leave is not known"
        check(not (feeds_back and self.factors), "servers.factors", True, allowed)
        if self.commit_first is not None:
            allowed = "with servers.commit_first, whose pushes are all of one version"
            check(self.overlap == 0, "servers.overlap", self.overlap, f"0 {allowed}")
            check(not feeds_back, "servers.error_feedback", feeds_back, f"False {allowed}")
            lead = self.max_clock_lead
            check(lead is None, "servers.max_clock_lead", lead, f"None {allowed}")
            scales = self.scale_by_staleness
            check(not scales, "servers.scale_by_staleness", scales, f"False {allowed}")
