"""The compiled pass makes torch's bits on every kind of CPU that it is compiled for."""

from __future__ import annotations

import platform
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.xdist.updates import same_bits, vectors
from xdist import optim
from xdist.optim import SGD, RMSProp
from xdist.update import Step, Update

SIZE = 5003  # Several blocks, and a rest that fills no register.
L2_STOP = 2601
L2 = 0.3
# Those of setup.py; the source is compiled for one kind of CPU instead of for all.
FLAGS = "-O3 -std=gnu11 -ffp-contract=off -fno-math-errno -fno-trapping-math -DFOR_ALL_CPUS="


@dataclass(frozen=True)
class Kind:
    """A kind of CPU, and how a program for it is compiled and run here."""

    machine: str
    cpu_flag: str
    """It has to be in /proc/cpuinfo; empty: nothing has."""
    compiler: tuple[str, ...]
    emulator: tuple[str, ...] = ()
    packages: str = "gcc"


KINDS = {
    "avx512": Kind("x86_64", "avx512f", ("gcc", "-mavx512f")),
    "avx2": Kind("x86_64", "avx2", ("gcc", "-mavx2")),
    "x86-64": Kind("x86_64", "", ("gcc",)),
    "neon": Kind(
        "",
        "",
        ("aarch64-linux-gnu-gcc", "-static"),
        ("qemu-aarch64",),
        "gcc-aarch64-linux-gnu qemu-user libc6-dev-arm64-cross",
    ),
}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_bits_are_torchs_on_every_cpu(kind: Kind, tmp_path: Path) -> None:
    skip_where_impossible(kind)
    program, source = tmp_path / "update_cases", Path(__file__).with_name("update_cases.c")
    compiler, *flags = kind.compiler
    subprocess.run(
        [compiler, *flags, *FLAGS.split(), source, "-o", program, "-lm"], check=True, timeout=50
    )
    drawn = vectors(SIZE, seed=0, has_specials=True)
    inputs = [next(drawn) for _ in range(5)]
    inputs[3].abs_()  # Mean squares.
    written = subprocess.run(
        [*kind.emulator, program],
        input=np.int64(SIZE).tobytes()
        + b"".join(vector.numpy().tobytes() for vector in inputs)
        + np.int64(L2_STOP).tobytes(),
        stdout=subprocess.PIPE,
        check=True,
        timeout=50,
    ).stdout
    for name, expected in results(*inputs):
        bits = bytearray(written[: expected.nbytes])
        assert same_bits(torch.frombuffer(bits, dtype=expected.dtype), expected), name
        written = written[expected.nbytes :]
    assert not written


def skip_where_impossible(kind: Kind) -> None:
    if kind.machine and kind.machine != platform.machine():
        pytest.skip(f"this CPU is {platform.machine()}, not {kind.machine}")
    if kind.cpu_flag not in Path("/proc/cpuinfo").read_text():
        pytest.skip(f"this CPU has no {kind.cpu_flag}")
    if not all(map(shutil.which, (kind.compiler[0], *kind.emulator))):
        pytest.skip(f"apt-get install -y {kind.packages}")


def results(
    weights: Tensor, gradients: Tensor, momentum: Tensor, mean_square: Tensor, average: Tensor
) -> Iterator[tuple[str, Tensor]]:
    """What update_cases.c writes, by torch, with what each is."""
    halves = (gradients + average).to(torch.bfloat16)
    yield "rounded", halves
    yield "residual", gradients + average - halves
    yield "rounded alone", gradients.to(torch.bfloat16)
    flags = (False, True)
    for has_out, is_apart, has_average, has_halves, is_rmsprop in product(*[flags] * 5):
        optimizer = make_optimizer(is_rmsprop)
        optimizer.slots["momentum"].copy_(momentum)
        new_mean_square = optimizer.slots.get("mean_square", mean_square.clone())
        new_mean_square.copy_(mean_square)
        first = Step(gradients.clone(), 0.3, average_share=0.7)
        pushed = halves if has_halves else gradients.clone()
        update = Update(
            weights.clone(),
            [first, Step(pushed, 0.045, scale=0.37, average_share=0.2)],
            weights_out=torch.empty(SIZE) if is_apart else None,
            bfloat16_out=torch.empty(SIZE, dtype=torch.bfloat16) if has_out else None,
            average=average.clone() if has_average else None,
        )
        optim.step_in_blocks(optimizer, update)
        case = f"{is_rmsprop=} {has_halves=} {has_average=} {is_apart=} {has_out=}"
        yield f"{case}: weights", update.new_weights
        yield f"{case}: momentum", optimizer.slots["momentum"]
        yield f"{case}: mean square", new_mean_square
        if update.average is not None:
            yield f"{case}: average", update.average
        if update.bfloat16_out is not None:
            yield f"{case}: bfloat16", update.bfloat16_out
    optim.fold_block(average, weights, torch.empty(SIZE), 0.2)
    yield "folded average", average


def make_optimizer(is_rmsprop: bool) -> SGD | RMSProp:
    mask = (torch.arange(SIZE) < L2_STOP).float()
    if not is_rmsprop:
        return SGD(momentum=0.9, l2=L2, l2_mask=mask)
    return RMSProp(momentum=0.9, decay=0.93, epsilon=1.0, l2=L2, l2_mask=mask)
