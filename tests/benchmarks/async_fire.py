"""What the lines of a run under fire tell: how soon it went on, and whether an update was lost or
made twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tests.benchmarks.async_log import Line

Key = tuple[str, int, int]


@dataclass(frozen=True)
class End:
    """What a run has come to."""

    version: int
    num_places: int
    """That are done, of the whole run."""
    fewest_applied: int
    """Updates in the weights, where they are fewest."""
    most_applied: int


@dataclass(frozen=True)
class Recovery:
    """What followed a strike."""

    who: str
    seconds: float | None
    """To the next update that is committed: any that was asked for after the strike, or, where a
    worker was struck, that of its replacement. None if there was none.
    """


def recoveries(lines: Sequence[Line]) -> list[Recovery]:
    """One for each strike. lines: in the order of time."""
    sent_at = {_key(line): line.time for line in lines if line.event == "sent"}
    committed = [line for line in lines if line.event == "committed"]
    found = []
    for strike in (line for line in lines if line.event == "strike"):
        veterans = {(line.who, line.process) for line in lines if line.time <= strike.time}
        after = (
            line.time
            for line in committed
            if sent_at[_key(line)] > strike.time
            and (not strike.who.startswith("worker") or line.who == strike.who)
            and (line.who != strike.who or (line.who, line.process) not in veterans)
        )
        first = min(after, default=None)
        found.append(Recovery(strike.who, None if first is None else first - strike.time))
    return found


def lost_and_double(lines: Iterable[Line], end: End, *, num_samples: int) -> tuple[int, int]:
    """Updates that were lost, and made twice, by the end of a run. num_samples: of an epoch.

    Lost: those that a worker saw committed and that the run went back behind, those that the
    weights lack, and places that count as done and that nobody has pushed. Double: those whose
    places were done before, those that are in the weights once more, and versions that no push
    explains. A push whose worker, or whose servers, were killed before it had the answer may have
    been committed or not.
    """
    committed, unanswered = [], {}
    for line in lines:
        if line.event == "sent":
            unanswered[_key(line)] = line
        elif line.event == "committed":
            committed.append(line)
            del unanswered[_key(line)]
    lasting = {line.version: line for line in committed if line.version <= end.version}
    done: set[int] = set()
    num_repeated = 0
    for line in lasting.values():
        places = _places(line, num_samples)
        num_repeated += not done.isdisjoint(places)
        done |= places
    open_places = set[int]().union(*(_places(line, num_samples) for line in unanswered.values()))
    num_unpushed = len(set(range(end.num_places)) - done - open_places)
    num_unexplained = max(0, end.version - len(lasting) - len(unanswered))
    num_undone = len(committed) - len(lasting)
    num_lost = num_undone + max(0, end.version - end.fewest_applied) + num_unpushed
    num_double = num_repeated + max(0, end.most_applied - end.version) + num_unexplained
    return num_lost, num_double


def _key(line: Line) -> Key:
    return line.who, line.process, line.number


def _places(line: Line, num_samples: int) -> set[int]:
    """Counted from the start of training."""
    places: set[int] = set()
    for span in line.spans:
        first = span.epoch * num_samples
        places.update(range(first + span.start, first + span.stop))
    return places
