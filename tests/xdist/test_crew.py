"""Who of a group is at fault, from what each is at and for how long."""

from __future__ import annotations

import time
from typing import Any

import pytest

from xdist.patient_storage import STORING_LIMIT_S
from xdist.topologies.crew import HANG_S, LEAST_PATIENCE_S, PATIENCE_BEFORE_STEPS_S, Crew, Hand
from xdist.topologies.nodes import Process
from xdist.worker_messages import Phase, Pulse

LONG_S = LEAST_PATIENCE_S + 5.0
NO_ACTOR: Any = None


def busy(number: int, phase: Phase, phase_s: float, *, step: int | None = 7) -> Hand:
    pulse = Pulse(phase, phase_s, longest_step_s=0.2)
    return Hand(number, number + 1, NO_ACTOR, "busy", step, pulse=pulse)


def idle(number: int, *, since_s: float) -> Hand:
    hand = Hand(number, number + 1, NO_ACTOR, "busy", 7)
    hand.end(7)
    hand.idle_since = time.monotonic() - since_s
    return hand


def stuck(*hands: Hand, patience_s: float | None = None, is_broken: bool = False) -> list[int]:
    """The numbers of those who are at fault."""
    crew = Crew(lambda _number, _has_state: NO_ACTOR, patience_s=patience_s, warm_up_images=[1])
    crew.longest_step_s = 0.2
    crew._hands = {hand.number: hand for hand in hands}
    return [fault.task.number for fault in crew.stuck(hands, is_broken=is_broken)]


@pytest.mark.parametrize("phase", ["data", "compute", "joining"])
def test_who_keeps_others_waiting_for_too_long_is_at_fault(phase: Phase) -> None:
    assert stuck(busy(0, phase, LONG_S), busy(1, "update", LONG_S)) == [0]
    assert stuck(busy(0, phase, LONG_S), idle(1, since_s=LONG_S)) == [0]


def test_what_nobody_waited_for_does_not_count() -> None:
    """All of them read from a storage that paused; one has got its batch a moment ago."""
    assert stuck(busy(0, "data", LONG_S), busy(1, "data", LONG_S)) == []
    assert stuck(busy(0, "data", LONG_S), busy(1, "update", 2.0)) == []
    assert stuck(busy(0, "save", HANG_S - 1), idle(1, since_s=2.0)) == []


def test_who_reads_is_ended_one_after_the_other_and_each_has_longer() -> None:
    """The storage pauses for most of them: whoever came in their place would read no sooner."""
    crew = Crew(lambda _number, _has_state: NO_ACTOR, patience_s=None, warm_up_images=[1])
    crew.longest_step_s = 0.2
    for longest_s, expected in [
        (LEAST_PATIENCE_S + 2, [1]),
        (2 * LEAST_PATIENCE_S - 1, []),
        (2 * LEAST_PATIENCE_S + 2, [1]),
        (4 * LEAST_PATIENCE_S - 1, []),
        (4 * LEAST_PATIENCE_S + 2, [1]),
        (HANG_S + 1, [1]),
    ]:
        reads = busy(0, "data", longest_s - 1), busy(1, "data", longest_s)
        hands = *reads, busy(2, "update", longest_s)
        crew._hands = {hand.number: hand for hand in hands}
        found = [fault.task.number for fault in crew.stuck(hands, is_broken=False)]
        assert found == expected


def test_who_reads_on_one_node_is_ended_together() -> None:
    hands = busy(0, "data", LONG_S), busy(1, "data", LONG_S + 1), busy(2, "data", LONG_S)
    for hand, node in zip(hands, ("a", "b", "b"), strict=True):
        hand.process = Process(node, 1, "host")
    assert stuck(*hands, busy(3, "update", LONG_S)) == [1, 2]


def stuck_alone(phase: Phase, phase_s: float, *, longest_step_s: float) -> bool:
    crew = Crew(lambda _number, _has_state: NO_ACTOR, patience_s=None, warm_up_images=[])
    crew.longest_step_s = 0.2
    pulse = Pulse(phase, phase_s, longest_step_s)
    crew._hands = {0: Hand(0, 1, NO_ACTOR, "busy", None, pulse=pulse)}
    return bool(crew.stuck_alone())


def test_who_waits_for_nobody_may_compile_before_its_first_step_and_storage_may_pause() -> None:
    assert stuck_alone("compute", LONG_S, longest_step_s=0.2)
    assert not stuck_alone("compute", LONG_S, longest_step_s=0.0)
    assert stuck_alone("compute", HANG_S + 1, longest_step_s=0.0)
    assert not stuck_alone("data", LONG_S, longest_step_s=0.2)
    assert stuck_alone("data", HANG_S + 1, longest_step_s=0.2)
    assert not stuck_alone("update", HANG_S + 1, longest_step_s=0.2)


def test_who_has_a_place_and_never_answers_is_at_fault_in_the_end() -> None:
    crew = Crew(lambda _number, _has_state: NO_ACTOR, patience_s=None, warm_up_images=[])
    hand = Hand(0, 1, NO_ACTOR, "starting", None)
    crew._hands = {0: hand}
    assert crew.unheard(lambda _number: True) == []
    assert hand.placed is not None
    hand.placed -= PATIENCE_BEFORE_STEPS_S + 1
    assert [fault.task.number for fault in crew.unheard(lambda _number: True)] == [0]
    assert crew.unheard(lambda _number: False) == []
    assert hand.placed is None  # It has lost its place, and begins to wait anew.


def test_all_who_hang_are_at_fault_in_the_end() -> None:
    assert stuck(busy(0, "save", HANG_S + 1), busy(1, "compute", HANG_S + 1)) == [0, 1]
    assert stuck(busy(0, "data", HANG_S + 1), busy(1, "update", 2.0)) == [0]
    assert stuck(busy(0, "compute", HANG_S + 1)) == [0]
    assert stuck(busy(0, "compute", 21.0), patience_s=2.0) == [0]
    assert stuck(busy(0, "compute", 19.0), patience_s=2.0) == []


def test_who_never_begins_with_what_it_was_told_is_at_fault_in_the_end() -> None:
    """What a worker did not do before, as a spare, does not count."""
    hand = busy(0, "idle", 10 * HANG_S)
    hand.busy_since = time.monotonic()
    assert stuck(hand) == []
    hand.busy_since -= HANG_S + 1
    assert stuck(hand) == [0]


def test_a_slow_storage_is_waited_for_longer_also_where_the_user_says_how_long() -> None:
    """Then as long as it is tried again."""
    hands = busy(0, "save", LONG_S), idle(1, since_s=LONG_S)
    assert stuck(*hands) == []
    assert stuck(*hands, patience_s=LEAST_PATIENCE_S) == []
    longer_s = 2 * STORING_LIMIT_S + 1
    hands = busy(0, "save", longer_s), idle(1, since_s=longer_s)
    assert stuck(*hands, patience_s=LEAST_PATIENCE_S) == [0]
    assert stuck(busy(0, "save", 1000.0), idle(1, since_s=1000.0)) == [0]


def test_who_waits_in_an_update_is_at_fault_only_when_somebody_says_that_a_peer_is_lost() -> None:
    hands = busy(0, "update", LONG_S + 5), idle(1, since_s=LONG_S + 5)
    assert stuck(*hands) == []
    assert stuck(*hands, is_broken=True) == [0]


def test_who_gave_up_waiting_has_waited_since_it_began_to() -> None:
    """It waits for another one, in vain, and is told to leave, or leaves by itself."""
    hand = busy(1, "update", LONG_S)
    hand.end(7)
    assert stuck(busy(0, "data", LONG_S), hand, is_broken=True) == [0]


def test_the_only_one_with_the_state_has_time_to_send_it() -> None:
    newcomers = [busy(number, "update", LONG_S, step=None) for number in (1, 2)]
    assert stuck(busy(0, "joining", LONG_S), *newcomers) == []


def test_who_has_just_started_is_not_judged_by_what_its_start_took() -> None:
    old = idle(0, since_s=LONG_S)
    new = busy(1, "starting", LONG_S, step=None)
    new.state = "starting"
    crew = Crew(lambda _number, _has_state: NO_ACTOR, patience_s=None, warm_up_images=[1])
    crew.longest_step_s = 0.2
    crew._hands = {0: old, 1: new}
    crew.started(new, Process("node", 1, "host"))
    new.begin()
    assert crew.stuck([old, new], is_broken=False) == []
