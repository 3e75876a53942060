"""TrainConfig: everything that defines a run, as one frozen value that is checked when built.

A job file holds complete values of it (presets); the command line may override any field. The
resolved value is written to the run directory and into every checkpoint as JSON.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final, Literal

from datapipe.checks import (
    AUTO,
    check,
    check_least,
    check_positive,
    check_share,
    check_types,
)
from datapipe.config import DataConfig
from xdist.compute_config import ComputeConfig
from xdist.evaluation_config import EvaluationConfig
from xdist.model_config import ModelConfig
from xdist.servers_config import ServersConfig

PAPER: Final = "paper"
PAPER_L2 = {"inception_v3": 4e-5}
PAPER_L2_OTHERS = 1e-5


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer, its learning-rate schedule and the weight average. Schedules run on samples
    seen.
    """

    name: Literal["sgd", "rmsprop"] = "sgd"
    """sgd with momentum (paper: ImageNet) or rmsprop in TensorFlow's form (paper: JFT)."""
    learning_rate: float = 0.045
    """Learning rate before any decay."""
    momentum: float = 0.9
    """Momentum of either optimizer."""
    rmsprop_decay: float = 0.9
    """rmsprop: decay of the mean square."""
    rmsprop_epsilon: float = 1.0
    """rmsprop: added to the mean square, inside the root (TensorFlow's form; Google's Inception
    recipes: 1.0).
    """
    decay_factor: float = 0.94
    """The learning rate is multiplied by this at every decay."""
    decay_every: float | None = None
    """Samples, epochs or steps (decay_unit) between two decays of the learning rate; None never
    decays.
    """
    decay_unit: Literal["samples", "epochs", "steps"] = "samples"
    """What decay_every counts; a step is batch_size samples. The schedule itself runs on samples,
    so it does not depend on the number of workers.
    """
    warmup_samples: int = 0
    """The learning rate rises linearly from 0 over this many samples."""
    l2: float | Literal["paper"] = PAPER
    """L2 penalty: l2 * weight is added to the gradient; paper is 4e-5 for inception_v3 and 1e-5 for
    all others (paper, section 4.3).
    """
    l2_on: Literal["kernels", "all"] = "kernels"
    """What the L2 penalty covers: kernels (no bias, no batch norm), or all parameters."""
    clip_norm: float | None = None
    """Gradients are scaled down to this global norm, before the L2 penalty; None never does.
    """
    average_half_life_samples: int | None = None
    """Polyak average of the weights: samples after which a weight's share has halved; excludes
    average_decay.
    """
    average_decay: float | None = None
    """Polyak average of the weights: decay an update (TensorFlow's form); excludes
    average_half_life_samples.
    """

    def __post_init__(self) -> None:
        check_types(self, "optimizer.")
        prefix = "optimizer."
        check_positive(self, prefix, "learning_rate", "rmsprop_epsilon")
        check_share(self, prefix, "momentum", "rmsprop_decay", "average_decay")
        check_least(self, prefix, warmup_samples=0, average_half_life_samples=1)
        if self.decay_every is not None:
            check_positive(self, prefix, "decay_every")
        if self.clip_norm is not None:
            check_positive(self, prefix, "clip_norm")
        if self.l2 != PAPER:
            check_least(self, prefix, l2=0)
        factor = self.decay_factor
        check(0 < factor <= 1, "optimizer.decay_factor", factor, "above 0, at most 1")
        if self.average_half_life_samples is not None and self.average_decay is not None:
            raise ValueError(
                "optimizer.average_half_life_samples and optimizer.average_decay are both set; "
                "set one of them to None"
            )


@dataclass(frozen=True)
class CheckpointConfig:
    """When the run is saved and scored, and what is kept."""

    every_samples: int | None = None
    """Samples between two checkpoints; None saves once an epoch. The end is always saved."""
    keep: int = 3
    """Newest checkpoints that are kept."""
    keep_best: int = 1
    """Checkpoints with the best scores that are kept besides."""
    keep_every: int | None = None
    """Every n-th checkpoint is kept for good; None keeps none of them for that. One is kept, too,
    in whose directory there is a file `pinned`.
    """
    evaluate_every: int = 1
    """Every n-th checkpoint is scored on the evaluation shards; the last one always is. 0 scores
    the last only.
    """
    final_save_s: float = 30.0
    """How long a run that is told to end (Ctrl-C, SIGTERM), or cannot go on, may take to save what
    it has trained; a second signal ends it at once. 0 always does, with the last checkpoint.
    """
    max_age_s: float = 3600.0
    """How long a run goes on when its checkpoints cannot be written, counted from the first one
    that could not; then it ends, rather than train unsaved.
    """

    def __post_init__(self) -> None:
        check_types(self, "checkpoint.")
        check_positive(self, "checkpoint.", "max_age_s")
        check_least(self, "checkpoint.", every_samples=1, keep=1, keep_best=0, keep_every=1)
        check_least(self, "checkpoint.", evaluate_every=0)
        check_least(self, "checkpoint.", final_save_s=0)


TrackerName = Literal["tensorboard", "wandb", "mlflow"]


@dataclass(frozen=True)
class ClusterConfig:
    """What a worker and a server ask of the cluster."""

    cpus_per_worker: float = 1.0
    """CPUs a worker reserves; it computes with that many threads."""
    placement: Literal["PACK", "SPREAD"] = "PACK"
    """Whether the workers that start together share few nodes or are spread over many."""
    gpus_per_worker: int | Literal["auto"] = AUTO
    """GPUs a worker reserves; auto is 1 where the cluster has GPUs as the run starts, else 0. Where
    they come later (autoscaler), give 1, and a wait_s in which a node starts.
    """
    cpus_per_server: float = 0.0
    """push_pull: CPUs a parameter server reserves, and computes with; 0 lets it share the cores of
    the workers, up to four of them at a time.
    """
    gpus_per_server: int = 0
    """push_pull: GPUs a parameter server reserves. On the first one it keeps its range, which is
    updated there in one compiled pass.
    """
    fork_actors: bool = True
    """Whether an actor is a copy of a process of its node that has imported torch and Ray: it is
    there in one second instead of four. False starts each anew.
    """
    wait_s: float = 60.0
    """Seconds to wait for room in the cluster before giving up."""
    min_world_size: int = 1
    """all_reduce: workers below which training waits for replacements, up to wait_s."""
    max_world_size: int | None = None
    """Workers that the run grows to when nodes join; None: num_workers, as it is at the start. If
    set, the autoscaler is asked for so many, and for the spares.
    """
    num_spares: int = 0
    """all_reduce: workers that wait, warm, to take the place of a lost one."""
    collective_timeout_s: float | None = None
    """all_reduce: after so long without an answer, or with others waiting for it, a worker counts
    as lost, and a link as down; None: the larger of 10 s and five of the longest steps. Where all
    hang, after ten times as long (None: 600 s); where nobody answers, as on a machine that is slow,
    after a minute at least.
    """
    max_recoveries: int = 10
    """Faults within recovery_window_s that are recovered from before the run ends with an error."""
    recovery_window_s: float = 600.0
    """The time that max_recoveries is about."""

    def __post_init__(self) -> None:
        check_types(self, "cluster.")
        check_least(self, "cluster.", cpus_per_worker=LEAST_CPUS)
        check_least(self, "cluster.", gpus_per_worker=0, cpus_per_server=0, gpus_per_server=0)
        check_least(self, "cluster.", max_recoveries=0, min_world_size=1, num_spares=0, wait_s=0)
        check_positive(self, "cluster.", "recovery_window_s")
        check_least(self, "cluster.", collective_timeout_s=1)
        for name in ("collective_timeout_s", "wait_s"):
            seconds = getattr(self, name)
            is_short = seconds is None or seconds <= LONGEST_TIMEOUT_S
            allowed = f"at most {LONGEST_TIMEOUT_S:g}, a week"
            check(is_short, f"cluster.{name}", seconds, allowed)
        if self.max_world_size is not None:
            allowed = f"at least min_world_size, which is {self.min_world_size}"
            is_order = self.max_world_size >= self.min_world_size
            check(is_order, "cluster.max_world_size", self.max_world_size, allowed)


LEAST_CPUS: Final = 0.0001
"""Ray counts no smaller parts."""
LONGEST_TIMEOUT_S: Final = 604_800
LARGEST_SEED: Final = 2**63 - 1
PROFILED_STEPS: Final = 8
"""Steps of a worker after which its profile is complete: three to warm up, five that count."""


@dataclass(frozen=True)
class TrainConfig:
    """A whole run."""

    data: DataConfig
    """Samples and batches."""
    strategy: Literal["all_reduce", "push_pull"]
    """all_reduce: synchronous workers; push_pull: asynchronous workers and parameter servers."""
    loss: Literal["softmax", "sigmoid"]
    """softmax cross-entropy (one label an image) or sigmoid cross-entropy summed over classes (many
    labels).
    """
    batch_size: int
    """Samples behind one update of the weights: all workers together (all_reduce), or one push
    (push_pull).
    """
    num_epochs: int
    """Passes over the training shards."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The network."""
    label_smoothing: float = 0.0
    """softmax: share of the target that is spread evenly over all classes (Inception V3's recipe:
    0.1).
    """
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimizer, schedule and weight average."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """When the run is saved and scored."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """Scoring."""
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    """How gradients are computed."""
    servers: ServersConfig = field(default_factory=ServersConfig)
    """push_pull: the parameter servers."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """Resources, and what is done when they are lost."""
    num_workers: int | Literal["auto"] = AUTO
    """Training workers; auto takes what the cluster has: one a GPU, or one per cpus_per_worker."""
    num_servers: int | Literal["auto"] = AUTO
    """push_pull: parameter servers; auto is 1 for every 8 workers, at least 2. all_reduce has
    none.
    """
    num_lanes: int | None = None
    """all_reduce: parts that an epoch is dealt in; divides batch_size. None: about 4 for each of
    the most workers there may be. A step has the same samples where this number is the same.
    """
    bn_group: Literal["rank", "lane"] = "rank"
    """all_reduce: whose samples batch norm takes its statistics of. rank: a worker's, so that
    numbers depend on the number of workers; lane: each lane's, so that they depend on num_lanes.
    """
    on_resize: Literal["keep_global_batch", "keep_worker_batch"] = "keep_global_batch"
    """all_reduce: what stays when workers come or go. keep_global_batch: the samples of every step;
    keep_worker_batch: samples a worker, with batch_size for the most workers there may be, and the
    learning rate in proportion to the samples of a step.
    """
    compress_gradients: Literal["none", "bfloat16"] = "none"
    """all_reduce: what gradients are sent as; they are summed as it, too."""
    max_steps: int | None = None
    """Ends the run, if num_epochs are not over before: after max_steps updates (all_reduce), or
    after max_steps * batch_size samples (push_pull).
    """
    report_every_steps: int = 20
    """Steps a worker makes between two reports."""
    seed: int = 0
    """Of weights, sample order, augmentation and dropout."""
    deterministic: bool = False
    """Only operations that give the same bits each time; two synchronous runs on the same number of
    equal machines are then equal to the bit, on GPUs too. Not so where one of them was disturbed: a
    lost or added worker changes the order of sums. Nor with push_pull and several workers, whose
    pushes come in any order.
    """
    profile: bool = False
    """Write a trace of steps 4 to 8 of the first worker, and a table of where their time goes, to
    profile/ in the run directory. Those steps are slower for it.
    """
    trackers: tuple[TrackerName, ...] = ("tensorboard",)
    """Who is told of the run's progress besides metrics.jsonl; wandb and mlflow are to be installed
    (pip install '.[wandb]').
    """
    run_dir: str | None = None
    """Directory or URL of the run; None is ~/xdist-runs/<job>-<hash of this config>. The same
    command resumes there.
    """

    def __post_init__(self) -> None:
        check_types(self, "")
        check_least(self, "", num_workers=1, num_servers=1, num_lanes=1, batch_size=1)
        check_least(self, "", num_epochs=1, max_steps=1, report_every_steps=1, seed=0)
        check(self.seed <= LARGEST_SEED, "seed", self.seed, f"at most {LARGEST_SEED}")
        check_share(self, "", "label_smoothing")
        allowed = "0 with the sigmoid loss"
        is_smooth = self.loss == "softmax" or self.label_smoothing == 0
        check(is_smooth, "label_smoothing", self.label_smoothing, allowed)
        self._check_compute()
        if self.strategy == "push_pull":
            self._check_push_pull()
        else:
            self._check_all_reduce()

    def _check_compute(self) -> None:
        compute = self.compute
        has_gpus = self.cluster.gpus_per_worker != 0
        allowed = "False with cluster.gpus_per_worker 0"
        check(has_gpus or not compute.cuda_graphs, "compute.cuda_graphs", True, allowed)
        is_exact = compute.precision == "float64"
        allowed = "'none' with compute.precision float64"
        sent_as = self.compress_gradients
        check(not is_exact or sent_as == "none", "compress_gradients", sent_as, allowed)
        is_long = self.max_steps is None or self.max_steps >= PROFILED_STEPS
        allowed = f"False with max_steps below {PROFILED_STEPS}, before which no trace is complete"
        check(is_long or not self.profile, "profile", self.profile, allowed)

    def _check_push_pull(self) -> None:
        precision = self.compute.precision
        allowed = "float32 or bfloat16 with strategy push_pull, whose servers keep float32"
        check(precision != "float64", "compute.precision", precision, allowed)
        for name in ("compile", "cuda_graphs") if self.servers.factors else ():
            allowed = "False with servers.factors, which are taken out of the network's layers"
            is_on = getattr(self.compute, name)
            check(not is_on, f"compute.{name}", is_on, allowed)
        first, workers = self.servers.commit_first, self.num_workers
        if first is not None:
            allowed = f"at most num_workers, which is {workers}"
            check(workers == AUTO or first <= workers, "servers.commit_first", first, allowed)
            clips = self.optimizer.clip_norm
            allowed = "None with servers.commit_first, whose updates are means of several pushes"
            check(clips is None, "optimizer.clip_norm", clips, allowed)

    def _check_all_reduce(self) -> None:
        lanes, batch = self.num_lanes, self.batch_size
        allowed = f"a divisor of batch_size, which is {batch}"
        check(lanes is None or batch % lanes == 0, "num_lanes", lanes, allowed)
        if isinstance(self.num_workers, int):
            allowed = f"at least num_workers, which is {self.num_workers}: a sample for each"
            check(batch >= self.num_workers, "batch_size", batch, allowed)
            self._check_world_size(self.num_workers)
        allowed = "1 with bn_group lane: each lane is a part of its own"
        steps = self.compute.accumulation_steps
        is_one = self.bn_group == "rank" or steps == 1
        check(is_one, "compute.accumulation_steps", steps, allowed)

    def _check_world_size(self, num_workers: int) -> None:
        least, most = self.cluster.min_world_size, self.cluster.max_world_size
        allowed = f"at most num_workers, which is {num_workers}"
        check(least <= num_workers, "cluster.min_world_size", least, allowed)
        allowed = f"at least num_workers, which is {num_workers}"
        check(most is None or most >= num_workers, "cluster.max_world_size", most, allowed)

    def num_places(self, num_samples: int) -> int:
        """Samples that the whole run goes through, on a training set of `num_samples`."""
        whole = self.num_epochs * num_samples
        return whole if self.max_steps is None else min(whole, self.max_steps * self.batch_size)

    def num_steps(self, num_samples: int) -> int:
        """Synchronous steps, or batches, that these are."""
        most = self.num_epochs * math.ceil(num_samples / self.batch_size)
        return most if self.max_steps is None else min(most, self.max_steps)

    def resolved(self, epoch_samples: int) -> TrainConfig:
        """This configuration on a training set of so many samples: the L2 penalty as a number, the
        decay in samples.
        """
        optimizer = self.optimizer
        units = {"samples": 1, "epochs": epoch_samples, "steps": self.batch_size}
        decay_every = optimizer.decay_every
        if decay_every is not None:
            decay_every = max(1, round(decay_every * units[optimizer.decay_unit]))
        l2 = optimizer.l2
        if isinstance(l2, str):
            l2 = PAPER_L2.get(self.model.name, PAPER_L2_OTHERS)
        optimizer = replace(optimizer, l2=l2, decay_every=decay_every, decay_unit="samples")
        return replace(self, optimizer=optimizer)

    def to_json(self) -> dict[str, Any]:
        """The plain values, for JSON."""
        return asdict(self)
