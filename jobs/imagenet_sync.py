"""Synchronous training with all-reduce: the paper's ImageNet set-up (section 4), and one for two
cores.

python jobs/imagenet_sync.py --preset cifar     (on data/cifar10, see the README)
"""

from __future__ import annotations

import sys

from datapipe.config import DataConfig
from xdist import command_line
from xdist.config import CheckpointConfig, OptimizerConfig, TrainConfig
from xdist.model_config import ModelConfig

PAPER = TrainConfig(
    data=DataConfig(train="imagenet/train", evaluation="imagenet/validation"),
    strategy="all_reduce",
    loss="softmax",
    model=ModelConfig(num_classes=1000, dropout=0.5),
    optimizer=OptimizerConfig(
        name="sgd",
        learning_rate=0.045,
        momentum=0.9,
        decay_factor=0.94,
        decay_every=2,
        decay_unit="epochs",
        average_decay=0.9999,
    ),
    batch_size=60 * 32,
    num_epochs=181,
    num_workers=60,
    report_every_steps=50,
)
"""The paper's values; the L2 penalty is the network's. The paper does not give the batch size, the
number of epochs and the decay of the average: 32 images a worker, and the epochs that three days
are at the 28 steps/s of table 3, if a step is one worker's batch.
"""

CIFAR = TrainConfig(
    data=DataConfig(
        train="data/cifar10/train",
        evaluation="data/cifar10/test",
        image_size=48,
        crop_area=(0.3, 1.0),
        evaluation_crop=1.0,
        decode_threads=1,
    ),
    strategy="all_reduce",
    loss="softmax",
    model=ModelConfig(width=0.25, middle_modules=2, dropout=0.2),
    optimizer=OptimizerConfig(
        name="sgd",
        learning_rate=0.1,
        momentum=0.9,
        warmup_samples=5_000,
        decay_factor=0.9,
        decay_every=10_000,
        l2=1e-4,
        average_half_life_samples=8_000,
    ),
    checkpoint=CheckpointConfig(evaluate_every=3),
    batch_size=64,
    num_epochs=30,
)
"""Ten classes of 32-pixel photographs on two cores, in minutes."""

PRESETS = {"paper": PAPER, "cifar": CIFAR}

if __name__ == "__main__":
    sys.exit(command_line.main("imagenet_sync", PRESETS, default="cifar", description=__doc__))
