"""Training as it is written down: plain operations of torch in one process, with one thread. Their
order is that of `xdist.optim`, so that a run can be compared to the bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from datapipe.batch import Batch, normalize
from tests.small_runs import weights_of
from tests.strategies import collect_gradients
from tests.xdist.updates import same_bits
from xdist import losses
from xdist.checkpoint import Checkpoint
from xdist.computation import dropout_seed
from xdist.config import OptimizerConfig, TrainConfig
from xdist.flat import FlatModel
from xdist.models.layers import BATCH_NORM_MOMENTUM
from xdist.worker import initial_model

BATCH = 4
RATE, RATE_FACTOR, RATE_SAMPLES, WARMUP_SAMPLES = 0.05, 0.8, 24, 12
L2, MOMENTUM, MEAN_SQUARE_DECAY, EPSILON = 0.01, 0.9, 0.95, 0.5
HALF_LIFE = 20
OPTIMIZER = OptimizerConfig(
    name="rmsprop",
    learning_rate=RATE,
    decay_factor=RATE_FACTOR,
    decay_every=RATE_SAMPLES,
    warmup_samples=WARMUP_SAMPLES,
    l2=L2,
    momentum=MOMENTUM,
    rmsprop_decay=MEAN_SQUARE_DECAY,
    rmsprop_epsilon=EPSILON,
    average_half_life_samples=HALF_LIFE,
)


class PlainTraining:
    """The formulas of a run, one after the other, and all that it keeps. Batches have 4 samples."""

    def __init__(self, config: TrainConfig, *, num_classes: int) -> None:
        self._seed = config.seed
        self._flat = FlatModel(initial_model(config, num_classes=num_classes).train())
        parameters = self._flat.model.parameters()
        is_kernel = [torch.full((each.numel(),), float(each.dim() > 1)) for each in parameters]
        self._l2 = torch.cat(is_kernel) * L2
        self.version = 0
        self.weights = self._flat.weights.clone()
        self.average = self.weights.clone()
        self.statistics = self._flat.statistics.clone()
        self.statistics_average = self.statistics.clone()
        self._momentum = torch.zeros_like(self.weights)
        self._mean_square = torch.ones_like(self.weights)

    def gradient(
        self, weights: Tensor, batch: Batch, *, worker: int, step: int
    ) -> tuple[Tensor, Tensor]:
        """What a worker computes: the gradient at these weights, and the statistics of its batch.
        step: the last update that it has heard of, and those of its own that it has not.
        """
        flat = self._flat
        flat.weights.copy_(weights)
        torch.manual_seed(dropout_seed(self._seed, worker, step))
        logits = flat.model(normalize(batch.images))
        loss = losses.sigmoid_cross_entropy(logits, batch.label_ids, batch.label_offsets)
        torch.autograd.backward(loss.mean())
        collect_gradients(flat)
        return flat.gradients.clone(), flat.statistics.clone()

    def apply(self, gradient: Tensor, statistics: Tensor, *, rate_divisor: int = 1) -> None:
        """The next version."""
        num_samples = BATCH * self.version
        rate = RATE * RATE_FACTOR ** (num_samples // RATE_SAMPLES)
        if num_samples < WARMUP_SAMPLES:
            rate *= num_samples / WARMUP_SAMPLES
        rate /= rate_divisor
        g = gradient + self.weights * self._l2
        self._mean_square += (g * g - self._mean_square) * (1 - MEAN_SQUARE_DECAY)
        self._momentum *= MOMENTUM
        self._momentum += (g * rate) * (self._mean_square + EPSILON).rsqrt()
        self.weights -= self._momentum
        self.statistics += (statistics - self.statistics) * BATCH_NORM_MOMENTUM
        decay = min(0.5 ** (BATCH / HALF_LIFE), (1 + self.version) / (10 + self.version))
        self.average += (self.weights - self.average) * (1 - decay)
        self.statistics_average += (self.statistics - self.statistics_average) * (1 - decay)
        self.version += 1

    def check_equals(self, saved: Checkpoint) -> None:
        assert self.weights.isfinite().all()
        assert saved.manifest.cut.step == self.version
        assert same_bits(weights_of(saved), self.weights)
        assert same_bits(weights_of(saved, "average"), self.average)
        statistics = saved.read_statistics()
        assert same_bits(statistics["statistics"], self.statistics)
        assert same_bits(statistics["statistics_average"], self.statistics_average)
