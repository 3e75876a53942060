"""How the plan of a synchronous run is dealt to its workers, and where its segments end."""

from __future__ import annotations

import logging

from xdist import sizing
from xdist.segments import Dealer, SegmentRules
from xdist.topologies import RunPlan

logger = logging.getLogger(__name__)


def dealer_of(plan: RunPlan) -> Dealer:
    """Deals the lanes of the plan."""
    config = plan.config
    num_lanes = sizing.num_lanes(config, num_workers=plan.most_workers)
    efficiency = num_lanes / (plan.num_workers * -(-num_lanes // plan.num_workers))
    logger.info("lanes dealt lanes=%d efficiency=%.2f", num_lanes, efficiency)
    return Dealer(
        num_samples=plan.order.num_samples,
        num_lanes=num_lanes,
        samples_per_lane=config.batch_size // num_lanes,
        most_workers=plan.most_workers,
        keeps_worker_batch=config.on_resize == "keep_worker_batch",
    )


def rules_of(plan: RunPlan) -> SegmentRules:
    """Where the plan says that workers report and save."""
    config = plan.config
    return SegmentRules(
        config.num_epochs, config.max_steps, config.report_every_steps, plan.save_every_samples
    )
