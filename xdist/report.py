"""Report: one or several runs as one page of HTML that needs nothing else.

Whatever a run says of itself (names, paths, causes) is text to the page, never markup.
"""

from __future__ import annotations

import base64
import io
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from datapipe.errors import DataError
from datapipe.json_text import parse_json
from datapipe.storage import read_bytes
from xdist import charts
from xdist.charts import CHARTS, standing_records
from xdist.errors import UserError
from xdist.run_directory import CONFIG, DRAWN_RECORDS, METRICS, fields_of
from xdist.run_records import parsed, thinned, whole

MOST_EVENTS = 200
"""Of a run, that are listed."""
STYLE = """
:root { color-scheme: light; --ink: #1b1f24; --pale: #667080; --line: #dfe3e8; }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: #fff; margin: 2rem auto;
       max-width: 62rem; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--line);
         vertical-align: top; }
td { overflow-wrap: anywhere; }
th { color: var(--pale); font-weight: 600; }
img { width: 100%; height: auto; }
footer { color: var(--pale); margin-top: 3rem; }
"""


@dataclass(frozen=True)
class RunStory:
    """What is known of a run."""

    name: str
    url: str
    config: Mapping[str, Any]
    """`section.field` -> value."""
    records: Sequence[dict[str, Any]]

    @property
    def standing(self) -> list[dict[str, Any]]:
        """Without what was done again."""
        return standing_records(self.records)

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        return [record for record in self.standing if record["kind"] == kind]


def read_run(url: str) -> RunStory:
    """A run directory, of a run that is under way or over. Raises `UserError`, `UnreadableUrl`."""
    try:
        config = parse_json(read_bytes(f"{url}/{CONFIG}"))
        lines = read_bytes(f"{url}/{METRICS}").decode(errors="replace").splitlines()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"{url} is no run directory: it has no {CONFIG} and {METRICS}") from error
    except (ValueError, DataError) as error:
        raise UserError(f"{url} cannot be read: {error}") from error
    every = 1 + len(lines) // DRAWN_RECORDS
    lines = [*thinned(lines[:-1], every=every), *lines[-1:]]
    records = whole(parsed(lines))
    if not isinstance(config, dict) or not records:
        raise UserError(f"{url}: the run has not begun")
    return RunStory(url.rstrip("/").rsplit("/", 1)[-1], url, fields_of(config), records)


def distinct(stories: Sequence[RunStory]) -> dict[str, RunStory]:
    """By names that differ."""
    names = [story.name for story in stories]
    return {story.name if names.count(story.name) == 1 else story.url: story for story in stories}


def page(runs: Mapping[str, RunStory]) -> str:
    """The page: what the runs are and came to, their curves, and what happened to them."""
    title = next(iter(runs)) if len(runs) == 1 else f"{len(runs)} runs"
    made = time.strftime("%Y-%m-%d %H:%M:%S %Z")
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title>",
            f"<style>{STYLE}</style></head><body>",
            f"<h1>{escape(title)}</h1>",
            _table(("", *runs), _facts(runs)),
            *_pictures(runs),
            *_differences(runs),
            *(line for name, story in runs.items() for line in _events(name, story)),
            f"<footer>made {escape(made)}</footer>",
            "</body></html>",
        ]
    )


def _number(value: float | None, form: str = ",.0f") -> str:
    return "" if value is None else format(value, form)


def _last(story: RunStory, kind: str, field: str) -> Any:
    found = [record[field] for record in story.of_kind(kind) if record.get(field) is not None]
    return found[-1] if found else None


def _scores(story: RunStory) -> str:
    """The last ones of each kind of weights."""
    last = {record["weights"]: record["scores"] for record in story.of_kind("evaluation")}
    return "; ".join(
        f"{name} {value:.4f} ({weights})"
        for weights, scores in last.items()
        for name, value in scores.items()
        if not name.endswith(charts.PREVALENCE)
    )


def _hours(story: RunStory) -> str:
    """That its processes ran, from the first record of each to its last."""
    seconds, before = 0.0, None
    for record in story.records:
        if record["kind"] != "start" and before is not None:
            seconds += record["time"] - before
        before = record["time"]
    return f"{seconds / 3600:.2f}"


FACTS: tuple[tuple[str, Callable[[RunStory], str]], ...] = (
    ("strategy", lambda story: str(story.config.get("strategy", ""))),
    ("network", lambda story: str(story.config.get("model.name", ""))),
    ("workers", lambda story: _number(_last(story, "train", "num_workers"))),
    ("updates", lambda story: _number(_last(story, "train", "step"))),
    ("samples", lambda story: _number(_last(story, "train", "samples"))),
    ("hours", _hours),
    ("loss", lambda story: _number(_last(story, "train", "loss"), ".4f")),
    ("scores", _scores),
    ("recoveries", lambda story: str(len(charts.event_places(story.records, "recovery")))),
    ("resumes", lambda story: str(len(charts.event_places(story.records, "start")))),
)


def _facts(runs: Mapping[str, RunStory]) -> Iterable[Sequence[str]]:
    for name, fact in FACTS:
        yield (name, *(fact(story) for story in runs.values()))


def _pictures(runs: Mapping[str, RunStory]) -> Iterable[str]:
    records = {name: story.records for name, story in runs.items()}
    for chart in CHARTS:
        file = io.BytesIO()
        if charts.draw_together(records, chart, file, form="svg"):
            source = base64.b64encode(file.getvalue()).decode()
            yield f"<h2>{chart.capitalize()}</h2>"
            yield f'<img alt="{chart}" src="data:image/svg+xml;base64,{source}">'


def _differences(runs: Mapping[str, RunStory]) -> Iterable[str]:
    """Fields in which the runs are not the same."""
    fields = sorted({field for story in runs.values() for field in story.config})
    rows = [
        (field, *(json.dumps(story.config.get(field)) for story in runs.values()))
        for field in fields
        if len({json.dumps(story.config.get(field)) for story in runs.values()}) > 1
    ]
    if rows:
        yield "<h2>In which they differ</h2>"
        yield _table(("field", *runs), rows)


def _events(name: str, story: RunStory) -> Iterable[str]:
    """What happened to a run, but for its training."""
    found = [
        (
            time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record["time"])),
            f"{record['samples']:,}",
            *_told(record),
        )
        for record in story.records
        if record["kind"] in ("start", "group", "recovery")
    ]
    yield f"<h2>What happened to {escape(name)}</h2>"
    if len(found) > MOST_EVENTS:
        yield f"<p>The last {MOST_EVENTS} of {len(found)}.</p>"
    yield _table(("when", "samples", "what", "why"), found[-MOST_EVENTS:])


def _told(record: Mapping[str, Any]) -> tuple[str, str]:
    match record["kind"]:
        case "start":
            return "begins" if record["samples"] == 0 else "goes on", ""
        case "group":
            return f"{record['num_workers']} workers train", ""
        case _:
            return record["cause"], str(record.get("reason") or "").partition("\n")[0]


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(text)}</th>" for text in heads)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(text)}</td>" for text in row) + "</tr>" for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
