"""Training steps on one GPU in each way that `compute` offers: what each is worth.

python -m tests.benchmarks.gpu

A step is the real one but for other ranks: `Computation`, scaling, optimizer, average, statistics.
Images are made up, on the host, in pinned memory. It needs torch and numpy alone. Its last line is
one JSON object: the device, and for each way and batch size images a second, peak memory in MB, and
milliseconds of the parts of a step, or the error that it ended with. Parts are measured in other
steps than speed, as the host waits for the GPU after each of them.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from datapipe.batch import Batch, normalize
from datapipe.config import DataConfig
from xdist.computation import Computation, Nobody, dropout_seed
from xdist.compute_config import ComputeConfig
from xdist.config import OptimizerConfig, TrainConfig
from xdist.determinism import compute_deterministically
from xdist.flat import FlatModel
from xdist.model_config import ModelConfig
from xdist.state import STATISTICS, WEIGHTS, RangeState, StatisticsState
from xdist.step_phases import Nobody as NoObserver
from xdist.step_phases import StepClock, StepObserver
from xdist.strategies.summed import StopVotes, apply_summed
from xdist.worker import initial_model

NUM_CLASSES = 1000
NUM_WARM_UPS = 5


@dataclass(frozen=True)
class Way:
    """One way to compute."""

    compute: ComputeConfig = field(default_factory=ComputeConfig)
    clip_norm: float | None = None
    deterministic: bool = False


BF16_LAST = ComputeConfig(precision="bfloat16", channels_last=True)
WAYS = {
    "default": Way(),
    "channels_last": Way(ComputeConfig(channels_last=True)),
    "bfloat16": Way(ComputeConfig(precision="bfloat16")),
    "compile": Way(ComputeConfig(compile=True)),
    "cuda_graphs": Way(ComputeConfig(cuda_graphs=True)),
    "accumulation": Way(ComputeConfig(accumulation_steps=2)),
    "fused_optimizer": Way(ComputeConfig(fused_optimizer=True)),
    "clip_norm": Way(clip_norm=1.0),
    "bfloat16_last": Way(BF16_LAST),
    "bfloat16_last_graphs": Way(replace(BF16_LAST, cuda_graphs=True)),
    "bfloat16_last_compile": Way(replace(BF16_LAST, compile=True)),
    "bfloat16_last_graphs_fused": Way(replace(BF16_LAST, cuda_graphs=True, fused_optimizer=True)),
    "bfloat16_last_compile_fused": Way(replace(BF16_LAST, compile=True, fused_optimizer=True)),
    # The last one: there is no way back in one process.
    "deterministic": Way(deterministic=True),
}


@dataclass(frozen=True)
class Result:
    """What was measured of a way."""

    way: str
    batch_size: int
    images_s: float
    peak_mb: float
    normalize_ms: float
    phases_ms: dict[str, float]
    warm_up_s: float

    def line(self) -> str:
        phases = "  ".join(f"{name} {value:.1f}" for name, value in self.phases_ms.items())
        return (
            f"{self.way:<28}{self.batch_size:>6}{self.images_s:>10.1f}{self.peak_mb:>10.0f}"
            f"{self.warm_up_s:>9.1f}  normalize {self.normalize_ms:.2f}  {phases}"
        )


@dataclass(frozen=True)
class Failure:
    """What a way ended with."""

    way: str
    batch_size: int
    error: str

    def line(self) -> str:
        return f"{self.way:<28}{self.batch_size:>6}  {self.error}"


class Stepper:
    """Makes steps of the paper's network, as one rank alone does."""

    def __init__(
        self, way: Way, arguments: argparse.Namespace, *, batch_size: int, observer: StepObserver
    ) -> None:
        self._config = TrainConfig(
            data=DataConfig(train="-", image_size=arguments.image_size),
            strategy="all_reduce",
            loss="softmax",
            model=ModelConfig(dropout=0.5, width=arguments.width),
            optimizer=OptimizerConfig(clip_norm=way.clip_norm, average_decay=0.9999),
            batch_size=batch_size,
            num_epochs=1,
            compute=way.compute,
        ).resolved(1)
        self._observer = observer
        optimizer = self._config.optimizer
        model = initial_model(self._config, num_classes=NUM_CLASSES).to(arguments.device)
        self._flat = flat = FlatModel(model.train())
        self._computation = Computation(self._config, flat, observer=observer)
        self._votes = StopVotes()
        self._state = RangeState.from_tensors(
            {WEIGHTS: flat.weights},
            config=optimizer,
            start=0,
            stop=len(flat.weights),
            l2_mask=flat.layout.l2_mask(optimizer.l2_on).to(flat.weights),
            is_fused=way.compute.fused_optimizer,
        )
        self._statistics = StatisticsState.from_tensors(
            {STATISTICS: flat.statistics.clone()},
            config=optimizer,
            momentum=flat.layout.statistics_momentum,
        )
        self._num_steps = 0

    def step(self, batch: Batch) -> None:
        """One update; the host goes on before the GPU has made it."""
        self._num_steps += 1
        sums = self._computation.compute(
            batch,
            seeds=(dropout_seed(0, 0, self._num_steps),),
            divisor=batch.num_samples,
            listener=Nobody(),
        )
        self._observer.enter("optimizer")
        self._votes.read(sums.stop_votes)
        apply_summed(
            self._flat,
            sums,
            self._state,
            self._statistics,
            divisor=batch.num_samples,
            clip_norm=self._config.optimizer.clip_norm,
            learning_rate=0.01,
            average_decay=0.99,
        )
        self._observer.enter("other")


def batches(size: int, side: int, *, pin: bool) -> Iterator[Batch]:
    """Without end; a few different ones, in turn."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(3):
        shape = (size, side, side, 3)
        images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        made.append(
            Batch(
                images=images.pin_memory() if pin else images,
                label_ids=torch.randint(0, NUM_CLASSES, (size,), generator=generator),
                label_offsets=torch.arange(size + 1),
                sample_weights=torch.ones(size),
                sample_ids=torch.arange(size),
                spans=(),
                segment_sizes=(size,),
                num_samples=size,
                corrupt=(),
            )
        )
    while True:
        yield from made


def measured(name: str, way: Way, arguments: argparse.Namespace, *, batch_size: int) -> Result:
    """Speed, and then the parts of the same steps again."""
    if way.deterministic:
        compute_deterministically()
    device = torch.device(arguments.device)
    is_cuda = device.type == "cuda"
    source = batches(batch_size, arguments.image_size, pin=is_cuda)
    if is_cuda:
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    stepper = Stepper(way, arguments, batch_size=batch_size, observer=NoObserver())
    seconds_of(stepper, source, NUM_WARM_UPS, device)
    warm_up_s = time.perf_counter() - started
    seconds = seconds_of(stepper, source, arguments.steps, device)
    peak = torch.cuda.max_memory_allocated() if is_cuda else 0
    del stepper
    clock = StepClock(device)
    stepper = Stepper(way, arguments, batch_size=batch_size, observer=clock)
    seconds_of(stepper, source, NUM_WARM_UPS, device)
    for _ in range(arguments.steps):
        clock.enter("data")
        batch = next(source)
        clock.enter("other")
        stepper.step(batch)
        clock.end_step()
    return Result(
        way=name,
        batch_size=batch_size,
        images_s=arguments.steps * batch_size / seconds,
        peak_mb=peak / 1e6,
        normalize_ms=normalize_ms(next(source).images.to(device), arguments.steps),
        phases_ms={str(phase): value for phase, value in clock.times().milliseconds().items()},
        warm_up_s=warm_up_s,
    )


def seconds_of(
    stepper: Stepper, source: Iterator[Batch], num_steps: int, device: torch.device
) -> float:
    wait_for(device)
    started = time.perf_counter()
    for _ in range(num_steps):
        stepper.step(next(source))
    wait_for(device)
    return time.perf_counter() - started


def normalize_ms(images: Tensor, rounds: int) -> float:
    pixels = normalize(images)
    wait_for(images.device)
    started = time.perf_counter()
    for _ in range(rounds):
        normalize(images, out=pixels)
    wait_for(images.device)
    return 1000 * (time.perf_counter() - started) / rounds


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def cleared() -> None:
    """Give back what the way before held."""
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--image-size", type=int, default=299)
    parser.add_argument("--batch-size", type=int, nargs="+", default=[32, 128])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--width", type=float, default=1.0, help="of the network")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    return parser.parse_args(words)


def main(arguments: argparse.Namespace) -> None:
    is_cuda = arguments.device == "cuda"
    if is_cuda and not torch.cuda.is_available():
        sys.exit("there is no GPU here; --device cpu shows that everything runs")
    results: list[Result | Failure] = []
    head = f"{'way':<28}{'batch':>6}{'images/s':>10}{'peak MB':>10}{'start s':>9}  ms of a step"
    sys.stderr.write(head + "\n")
    for name in arguments.ways:
        way = WAYS[name]
        if way.compute.cuda_graphs and not is_cuda:
            continue
        for batch_size in arguments.batch_size:
            result: Result | Failure
            try:
                result = measured(name, way, arguments, batch_size=batch_size)
            except (RuntimeError, NotImplementedError) as error:  # Out of memory is one, too.
                result = Failure(name, batch_size, str(error).partition("\n")[0][:100])
            cleared()
            results.append(result)
            sys.stderr.write(result.line() + "\n")
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if is_cuda else "cpu",
        "torch": torch.__version__,
        "convolutions_in_tf32": torch.backends.cudnn.allow_tf32,
        "image_size": arguments.image_size,
        "results": [asdict(result) for result in results],
    }
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(parse())
