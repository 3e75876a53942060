"""Optimizers over flat float32 vectors, learning-rate schedule, Polyak average.

All arithmetic is elementwise, so a range of the vector may live anywhere: stepping K ranges equals
stepping the whole, to the bit. For that, and so that the compiled pass (`native_update`) agrees to
the bit, a step is a fixed sequence of single operations that a CPU rounds as IEEE 754 says. That
excludes `add(alpha=)`, `addcmul` and `lerp`, which may or may not be fused, and `sqrt`, which MKL
rounds in its own way; `rsqrt` is a root and a division. Constants are computed in double precision
and rounded to float32 once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from xdist import large_pages, native_update
from xdist.config import OptimizerConfig
from xdist.native_update import Runs
from xdist.update import Update

CPU_BLOCK = 1 << 17  # Elements: few enough for the caches, enough to hide the cost of torch's calls


class Optimizer(Protocol):
    """Steps the weights of one range; `slots`, (size,) float32 each, are all the state it has."""

    slots: dict[str, Tensor]

    def step(self, update: Update, *, num_threads: int | None = None) -> None:
        """Make the steps of an update, slots included. num_threads: of the compiled pass; None: as
        many as torch has.
        """

    def step_block(
        self, block: slice, w: Tensor, g: Tensor, scratch: Tensor, learning_rate: float | Tensor
    ) -> None:
        """Step one block of the slots with torch's operations: the weights `w` in place, by the
        gradients `g`, which hold scratch afterwards; `scratch` is of their size.
        """


class SGD:
    """SGD with momentum, as `torch.optim.SGD`, with L2 penalty.

    g += w * l2_factors; momentum *= m; momentum += g; w -= momentum * lr
    """

    def __init__(self, *, momentum: float, l2: float, l2_mask: Tensor) -> None:
        self.momentum = momentum
        self.l2_factors = l2_mask * l2
        self.slots = {"momentum": large_pages.empty_like(l2_mask).zero_()}
        self._l2_runs = Runs.of(self.l2_factors)

    def step(self, update: Update, *, num_threads: int | None = None) -> None:
        momentum = self.slots["momentum"]
        if not native_update.suits_update(update, momentum):
            step_in_blocks(self, update)
            return
        native_update.sgd(
            update,
            momentum,
            self._l2_runs,
            momentum_decay=self.momentum,
            num_threads=num_threads,
        )

    def step_block(
        self, block: slice, w: Tensor, g: Tensor, scratch: Tensor, learning_rate: float | Tensor
    ) -> None:
        momentum = self.slots["momentum"][block]
        g.add_(torch.mul(w, self.l2_factors[block], out=scratch))
        momentum.mul_(self.momentum)
        momentum.add_(g)
        w.sub_(torch.mul(momentum, learning_rate, out=scratch))


class RMSProp:
    """RMSProp in TensorFlow's form, with L2 penalty.

    Epsilon is inside the root, the mean square starts at 1, the learning rate inside the momentum
    (`tf.raw_ops.ResourceApplyRMSProp`).

    g += w * l2_factors; mean_square += (g * g - mean_square) * (1 - decay);
    momentum *= m; momentum += (g * lr) * (1 / sqrt(mean_square + epsilon)); w -= momentum
    """

    def __init__(
        self, *, momentum: float, decay: float, epsilon: float, l2: float, l2_mask: Tensor
    ) -> None:
        self.momentum = momentum
        self.decay = decay
        self.epsilon = epsilon
        self.l2_factors = l2_mask * l2
        self.slots = {
            "momentum": large_pages.empty_like(l2_mask).zero_(),
            "mean_square": large_pages.empty_like(l2_mask).fill_(1),
        }
        self._l2_runs = Runs.of(self.l2_factors)

    def step(self, update: Update, *, num_threads: int | None = None) -> None:
        momentum, mean_square = self.slots["momentum"], self.slots["mean_square"]
        if not native_update.suits_update(update, momentum, mean_square):
            step_in_blocks(self, update)
            return
        native_update.rmsprop(
            update,
            momentum,
            mean_square,
            self._l2_runs,
            momentum_decay=self.momentum,
            mean_square_share=1 - self.decay,
            epsilon=self.epsilon,
            num_threads=num_threads,
        )

    def step_block(
        self, block: slice, w: Tensor, g: Tensor, scratch: Tensor, learning_rate: float | Tensor
    ) -> None:
        momentum, mean_square = self.slots["momentum"][block], self.slots["mean_square"][block]
        g.add_(torch.mul(w, self.l2_factors[block], out=scratch))
        torch.mul(g, g, out=scratch)
        mean_square.add_(scratch.sub_(mean_square).mul_(1 - self.decay))
        g.mul_(learning_rate)
        g.mul_(torch.add(mean_square, self.epsilon, out=scratch).rsqrt_())
        momentum.mul_(self.momentum)
        momentum.add_(g)
        w.sub_(momentum)


def step_in_blocks(optimizer: Optimizer, update: Update) -> None:
    """`Optimizer.step` by torch's operations, on any device."""
    weights, new_weights = update.weights, update.new_weights
    gradients = [step.whole_gradients_on(weights.device) for step in update.steps]
    for block, scratch in _blocks(weights):
        w = new_weights[block]
        if new_weights is not weights:
            w.copy_(weights[block])
        for step, whole in zip(update.steps, gradients, strict=True):
            g = whole[block].to(weights.dtype)
            if step.scale != 1:
                g.mul_(step.scale)
            optimizer.step_block(block, w, g, scratch, step.learning_rate)
            if update.average is not None:
                fold_block(update.average[block], w, scratch, step.average_share)
        if update.bfloat16_out is not None:
            update.bfloat16_out[block].copy_(w)


def make_optimizer(config: OptimizerConfig, *, size: int, l2_mask: Tensor) -> Optimizer:
    """The optimizer of one range of weights, on the device of `l2_mask`: (size,), 0 or 1."""
    assert l2_mask.shape == (size,)
    assert not isinstance(config.l2, str), "TrainConfig.resolved gives the number"
    if config.name == "sgd":
        return SGD(momentum=config.momentum, l2=config.l2, l2_mask=l2_mask)
    return RMSProp(
        momentum=config.momentum,
        decay=config.rmsprop_decay,
        epsilon=config.rmsprop_epsilon,
        l2=config.l2,
        l2_mask=l2_mask,
    )


def learning_rate(config: OptimizerConfig, samples: int) -> float:
    """The learning rate after `samples` samples: a staircase, under a linear warm-up."""
    rate = config.learning_rate
    if config.decay_every is not None:
        assert config.decay_unit == "samples", "TrainConfig.resolved converts the others"
        rate *= config.decay_factor ** int(samples // config.decay_every)
    if samples < config.warmup_samples:
        rate *= samples / config.warmup_samples
    return rate


def clip_scale(config: OptimizerConfig, norm: float) -> float:
    """What a gradient of this norm is multiplied by, so that its norm is at most `clip_norm`."""
    return 1.0 if config.clip_norm is None else config.clip_norm / max(norm, config.clip_norm)


def average_decay(config: OptimizerConfig, *, num_samples: int, num_updates: int) -> float:
    """What the Polyak average keeps of itself at an update, which `num_updates` others came before.

    `num_samples`: samples behind this update. Half-life: 0.5 ** (num_samples / half-life); decay:
    that decay. Either is bounded by (1 + n) / (10 + n), as in
    `tf.train.ExponentialMovingAverage(num_updates=n)`, so that the first weights are soon
    forgotten. Without an average it is 0: the average is the weights.
    """
    if config.average_half_life_samples is not None:
        decay = math.pow(0.5, num_samples / config.average_half_life_samples)
    elif config.average_decay is not None:
        decay = config.average_decay
    else:
        return 0.0
    return min(decay, (1 + num_updates) / (10 + num_updates))


def fold(average: Tensor, values: Tensor, *, share: float) -> None:
    """Move `average` towards `values` by `share`, in place: average += (values - average) * share.

    The Polyak average takes share = 1 - decay; running batch-norm statistics take share = momentum.
    """
    if native_update.suits(average, values):
        native_update.fold(average, values, share=share)
        return
    for block, scratch in _blocks(average):
        fold_block(average[block], values[block], scratch, share)


def fold_block(average: Tensor, values: Tensor, scratch: Tensor, share: float | Tensor) -> None:
    """`fold` for one block; `scratch` is of its size."""
    torch.sub(values, average, out=scratch)
    average.add_(scratch.mul_(share))


def _blocks(vector: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Slices that cover `vector`, each with scratch; one slice on an accelerator."""
    size = len(vector)
    length = min(CPU_BLOCK, size) if vector.device.type == "cpu" else size
    scratch = vector.new_empty(length)
    for start in range(0, size, max(length, 1)):
        stop = min(start + length, size)
        yield slice(start, stop), scratch[: stop - start]
