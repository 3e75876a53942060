"""The compiled pass makes the bits of torch's operations."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.xdist.updates import make_rmsprop, make_sgd, same_bits, vectors
from xdist import native_update, optim
from xdist.chunks import CHUNK
from xdist.native_update import Runs
from xdist.optim import Optimizer
from xdist.update import Parts, Step, Update

pytestmark = pytest.mark.skipif(
    not native_update.is_available(),
    reason="native/update.c is not built; pip install . builds it where there is a compiler",
)
properties = settings(derandomize=True, deadline=None, max_examples=100)
makes = pytest.mark.parametrize("make", [make_sgd, make_rmsprop])
Make = Callable[[Tensor, float], Optimizer]
NUM_STEPS = 3
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Case:
    """What updates have."""

    size: int
    offset: int = 0
    """Ranges begin anywhere in a vector."""
    l2: float = 0.3
    scale: float = 1.0
    num_steps: int = 1
    has_bfloat16_gradients: bool = False
    has_average: bool = True
    is_apart: bool = False
    """New weights go to another vector."""
    has_bfloat16_out: bool = False
    has_specials: bool = False


cases = st.builds(
    Case,
    size=st.sampled_from([0, 1, 2, 15, 16, 17, 33]) | st.integers(0, 300),
    offset=st.integers(0, 5),
    l2=st.sampled_from([0.0, 1e-5, 0.3]),
    scale=st.sampled_from([1.0, 0.37]),
    num_steps=st.integers(1, 3),
    has_bfloat16_gradients=st.booleans(),
    has_average=st.booleans(),
    is_apart=st.booleans(),
    has_bfloat16_out=st.booleans(),
    has_specials=st.booleans(),
)


class Range:
    """The optimizer of a case, and the vectors of its updates."""

    def __init__(self, make: Make, case: Case) -> None:
        self._case = case
        self._drawn = vectors(
            case.size + case.offset, seed=case.size, has_specials=case.has_specials
        )
        self._spare = self._draw()
        self.weights = self._draw()
        self.average = self._draw()
        self.bfloat16 = torch.zeros(case.size + case.offset, dtype=torch.bfloat16)[case.offset :]
        self.optimizer = make((self._draw() > 0).float(), case.l2)

    def _draw(self) -> Tensor:
        return next(self._drawn)[self._case.offset :]

    def next_update(self, number: int) -> Update:
        case, weights = self._case, self.weights
        if case.is_apart:
            self.weights, self._spare = self._spare, weights
        return Update(
            weights,
            [self._next_step(0.94**number * 0.9**step) for step in range(case.num_steps)],
            weights_out=self.weights if case.is_apart else None,
            bfloat16_out=self.bfloat16 if case.has_bfloat16_out else None,
            average=self.average if case.has_average else None,
        )

    def _next_step(self, decay: float) -> Step:
        gradients = self._draw()
        if self._case.has_bfloat16_gradients:
            gradients = gradients.to(torch.bfloat16)
        return Step(gradients, 0.045 * decay, scale=self._case.scale, average_share=0.3 * decay)

    def vectors(self) -> dict[str, Tensor]:
        own = {"weights": self.weights, "spare": self._spare, "average": self.average}
        return own | {"bfloat16": self.bfloat16} | self.optimizer.slots


def check(make: Make, case: Case, *, num_threads: int = 1) -> None:
    ours, theirs = Range(make, case), Range(make, case)
    for step in range(NUM_STEPS):
        update = ours.next_update(step)
        assert native_update.suits_update(update, *ours.optimizer.slots.values())
        ours.optimizer.step(update, num_threads=num_threads)
        optim.step_in_blocks(theirs.optimizer, theirs.next_update(step))
        found = ours.vectors()
        for name, expected in theirs.vectors().items():
            assert same_bits(found[name], expected), name


@makes
@properties
@given(cases)
def test_updates_are_equal_to_the_bit(make: Make, case: Case) -> None:
    check(make, case)


@makes
@pytest.mark.parametrize("num_threads", [1, 3])
def test_many_blocks_and_threads_change_nothing(make: Make, num_threads: int) -> None:
    case = Case(size=2 * CHUNK + 5, num_steps=2, is_apart=True, has_bfloat16_out=True)
    check(make, case, num_threads=num_threads)


def test_long_runs_of_the_penalty_are_equal_to_the_bit() -> None:
    ours, theirs = Range(make_sgd, case := Case(size=3 * CHUNK)), Range(make_sgd, case)
    edges = torch.tensor([0, 100, CHUNK, 2 * CHUNK + 1])
    mask = (torch.bucketize(torch.arange(case.size), edges, right=True) % 2).float()
    for side in (ours, theirs):
        side.optimizer = make_sgd(mask, 0.3)
    ours.optimizer.step(ours.next_update(0))
    optim.step_in_blocks(theirs.optimizer, theirs.next_update(0))
    assert torch.equal(ours.weights, theirs.weights)


@properties
@given(st.lists(st.sampled_from([0.0, 0.5]), max_size=20))
def test_runs_tell_the_whole_vector(elements: list[float]) -> None:
    runs = Runs.of(torch.tensor(elements))
    lengths = runs.stops.diff(prepend=torch.tensor([0]))
    assert torch.repeat_interleave(runs.values, lengths).tolist() == elements
    assert (runs.values.diff() != 0).all()


@properties
@given(st.integers(1, 300), st.floats(0, 1))
def test_averages_are_equal_to_the_bit(size: int, share: float) -> None:
    drawn = vectors(size, seed=size, has_specials=True)
    average, values = next(drawn), next(drawn)
    other = average.clone()
    optim.fold_block(other, values, torch.empty_like(other), share)
    optim.fold(average, values, share=share)
    assert same_bits(average, other)


@properties
@given(
    st.sampled_from([0, 1, 17, 4096, 3 * CHUNK]),
    st.integers(0, 40),
    st.integers(0, 20),
    st.integers(0, 20),
)
def test_copies_are_whole_wherever_they_begin(size: int, more: int, start: int, out: int) -> None:
    size += more
    values = torch.arange(start + size, dtype=torch.float32)[start:]
    copy = torch.full((out + size + 1,), -1.0)
    native_update.copy(values, copy[out:-1])
    assert torch.equal(copy[out:-1], values)
    assert copy[:out].eq(-1).all()
    assert copy[-1] == -1


def test_gradients_are_only_read() -> None:
    updates = Range(make_rmsprop, Case(size=40, scale=0.5))
    update = updates.next_update(0)
    [step] = update.steps
    before = step.whole_gradients_on(CPU).clone()
    updates.optimizer.step(update)
    assert torch.equal(step.whole_gradients_on(CPU), before)


@makes
@pytest.mark.parametrize("has_bfloat16_gradients", [False, True])
def test_gradients_in_parts_are_those_of_the_whole(
    make: Make, has_bfloat16_gradients: bool
) -> None:
    """Cut elsewhere in each step, and where threads change."""
    size = CHUNK + 100
    case = Case(size, num_steps=2, has_bfloat16_gradients=has_bfloat16_gradients)
    ours, theirs = Range(make, case), Range(make, case)
    update = ours.next_update(0)
    cuts = ([0, 17, CHUNK - 3, size], [0, 18, CHUNK, CHUNK + 1, size])
    steps = [
        replace(step, gradients=in_parts(step.whole_gradients_on(CPU), *where))
        for step, where in zip(update.steps, cuts, strict=True)
    ]
    update = replace(update, steps=steps)
    assert native_update.suits_update(update, *ours.optimizer.slots.values())
    ours.optimizer.step(update, num_threads=2)
    theirs.optimizer.step(theirs.next_update(0))
    by_torch = Range(make, case)
    whole = by_torch.next_update(0)
    optim.step_in_blocks(by_torch.optimizer, replace(whole, steps=steps))
    for other in (theirs, by_torch):
        for name, vector in other.vectors().items():
            assert torch.equal(ours.vectors()[name], vector), name


def in_parts(vector: Tensor, *bounds: int) -> Parts:
    """Copies that lie apart, in no order."""
    parts = [(start, vector[start:stop].clone()) for start, stop in itertools.pairwise(bounds)]
    return Parts(dict(reversed(parts)))


def test_other_vectors_are_left_to_torch() -> None:
    vector = torch.zeros(6)
    assert native_update.suits(vector, None)
    assert not native_update.suits(vector, vector.double())
    assert not native_update.suits(vector[::2])
    step = Step(vector.bfloat16(), 0.1)
    update = Update(vector, [step, Step(vector, 0.1)], bfloat16_out=vector.bfloat16())
    assert native_update.suits_update(update, vector)
    assert not native_update.suits_update(update, vector.double())
    assert not native_update.suits_update(replace(update, steps=[step, Step(vector.half(), 0.1)]))
    assert not native_update.suits_update(replace(update, bfloat16_out=vector))
    weights = torch.ones(4, dtype=torch.float64)
    make_sgd(torch.ones(4, dtype=torch.float64), 0.0).step(
        Update(weights, [Step(torch.ones(4, dtype=torch.float64), 0.5)])
    )
    assert weights.tolist() == [0.5] * 4
