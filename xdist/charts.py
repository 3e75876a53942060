"""The curves of runs, drawn from the records of metrics.jsonl: of one, and of several together.

Drawing uses no display and no state shared between figures, so any thread may do it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

Record = dict[str, Any]
Draw = Callable[[Axes, list[Record]], None]

BLUE, ORANGE, GREEN, VIOLET, RED, GREY = (  # Okabe and Ito's: apart for colour-blind readers too.
    "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#777777",
)  # fmt: skip
SCORE_COLORS = (BLUE, GREEN, VIOLET)
RUN_COLORS = (BLUE, ORANGE, GREEN, VIOLET, RED, GREY)
SMOOTHING_REACH = 10  # Records to either side; fewer in a short run.
PREVALENCE = "_prevalence"


def draw_curves(records: Sequence[Record], file: str | Path | IO[bytes]) -> None:
    """Write a PNG: loss, scores, throughput and, of an asynchronous run, staleness against samples.

    Where a run went back to a checkpoint, what it then did again replaces what it had done before.
    """
    standing = standing_records(records)
    training = [record for record in standing if record["kind"] == "train"]
    evaluations = [record for record in standing if record["kind"] == "evaluation"]
    staleness = [record for record in training if record.get("staleness_mean") is not None]
    panels: list[tuple[Draw, list[Record]]] = [(_draw_loss, training), (_draw_throughput, training)]
    if evaluations:
        panels.insert(1, (_draw_scores, evaluations))
    if staleness:
        panels.append((_draw_staleness, staleness))
    figure = Figure(figsize=(9, 0.5 + 2.1 * len(panels)), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes: list[Axes] = list(figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0])
    for panel, (draw, chosen) in zip(axes, panels, strict=True):
        draw(panel, chosen)
    _mark_recoveries(axes, records)
    for panel in axes:
        _finish(panel)
    figure.align_ylabels(axes)
    axes[-1].set_xlabel("samples")
    axes[-1].xaxis.set_major_formatter(EngFormatter(sep=""))
    figure.savefig(file, format="png")


def standing_records(records: Iterable[Record]) -> list[Record]:
    """The records of what was not done again: where a run starts or recovers, later samples are
    void.
    """
    kept: list[Record] = []
    for record in records:
        if record["kind"] in ("start", "recovery"):
            kept = [earlier for earlier in kept if earlier["samples"] <= record["samples"]]
        kept.append(record)
    return kept


def smoothed(values: Sequence[float], reach: int) -> list[float]:
    """Centred means over `reach` values to either side; towards the ends over fewer."""
    means = []
    for i in range(len(values)):
        near = min(reach, i, len(values) - 1 - i)
        means.append(sum(values[i - near : i + near + 1]) / (2 * near + 1))
    return means


def _draw_loss(panel: Axes, training: list[Record]) -> None:
    """Pale: the records; strong: smoothed."""
    panel.set_ylabel("training loss")
    training = [record for record in training if record["loss"] is not None]
    losses = [record["loss"] for record in training]
    reach = min(SMOOTHING_REACH, len(losses) // 20)
    samples = _samples(training)
    panel.plot(samples, losses, color=BLUE, alpha=0.25, linewidth=1)
    panel.plot(samples, smoothed(losses, reach), color=BLUE, linewidth=2, **_marker(training))


def _draw_throughput(panel: Axes, training: list[Record]) -> None:
    panel.set_ylabel("samples / s")
    throughput = [record["samples_per_s"] for record in training]
    panel.plot(_samples(training), throughput, color=GREEN, linewidth=1.5, **_marker(training))
    _start_at_zero(panel)


def _draw_scores(panel: Axes, evaluations: list[Record]) -> None:
    """Solid for the averaged weights, dashed for the raw ones, dotted for the prevalence."""
    panel.set_ylabel("score")
    names = {name: None for record in evaluations for name in record["scores"]}  # in order
    plain = [name for name in names if not name.endswith(PREVALENCE)]
    for name, color in zip(plain, SCORE_COLORS * len(plain), strict=False):
        for weights, line, face in (("average", "-", color), ("raw", "--", "white")):
            chosen = [
                record
                for record in evaluations
                if record["weights"] == weights and name in record["scores"]
            ]
            if not chosen:
                continue
            values = [record["scores"][name] for record in chosen]
            label = f"{name}, {weights} weights: {values[-1]:.3f}"
            panel.plot(
                _samples(chosen), values, line, color=color, marker="o", markersize=5,
                markerfacecolor=face, linewidth=2, label=label,
            )  # fmt: skip
    for name in names:
        if name.endswith(PREVALENCE):
            level = [record["scores"][name] for record in evaluations if name in record["scores"]]
            label = f"a constant scorer: {level[-1]:.3f}"
            panel.axhline(level[-1], color=GREY, linestyle=":", linewidth=1.5, label=label)
    _start_at_zero(panel)


def _draw_staleness(panel: Axes, records: list[Record]) -> None:
    panel.set_ylabel("staleness, updates")
    samples = _samples(records)
    mean = [record["staleness_mean"] for record in records]
    largest = [
        record["staleness_mean"] if record["staleness_max"] is None else record["staleness_max"]
        for record in records
    ]
    panel.fill_between(samples, largest, color=ORANGE, alpha=0.2, linewidth=0, label="largest")
    panel.plot(samples, mean, color=ORANGE, linewidth=2, label="mean", **_marker(records))
    _start_at_zero(panel)
    panel.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))


def _mark_recoveries(axes: list[Axes], records: Sequence[Record]) -> None:
    """A line through all panels; its label, in the first one, tells how many there were."""
    recoveries = [record["samples"] for record in records if record["kind"] == "recovery"]
    for i, samples in enumerate(recoveries):
        for panel in axes:
            panel.axvline(samples, color=RED, linestyle="--", linewidth=1.2, zorder=1)
        if i == 0:
            noun = "recovery" if len(recoveries) == 1 else "recoveries"
            axes[0].plot([], [], color=RED, linestyle="--", label=f"{len(recoveries)} {noun}")


ChartName = Literal["loss", "score", "throughput", "data wait", "staleness"]
CHARTS: tuple[ChartName, ...] = ("loss", "score", "throughput", "data wait", "staleness")


def draw_together(
    runs: Mapping[str, Sequence[Record]],
    chart: ChartName,
    file: str | Path | IO[bytes],
    *,
    form: Literal["png", "svg"],
) -> bool:
    """Write one chart of several runs, by their names, with what has happened to each marked on its
    curve; False, and nothing is written, where none of them has such a curve.
    """
    curves = {name: _curve(standing_records(records), chart) for name, records in runs.items()}
    if not any(curves.values()):
        return False
    figure = Figure(figsize=(9, 3.4), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    panel: Axes = figure.subplots()
    for number, (name, points) in enumerate(curves.items()):
        color = RUN_COLORS[number % len(RUN_COLORS)]
        _draw_of_run(panel, name, points, runs[name], color=color, is_smooth=chart == "loss")
    panel.set_ylabel(UNITS[chart])
    panel.set_xlabel("samples")
    panel.xaxis.set_major_formatter(EngFormatter(sep=""))
    if chart != "loss":
        _start_at_zero(panel)
    _finish(panel)
    figure.savefig(file, format=form)
    return True


UNITS: Mapping[ChartName, str] = {
    "loss": "training loss",
    "score": "score",
    "throughput": "samples / s",
    "data wait": "share of a step",
    "staleness": "staleness, updates",
}
EVENTS = {"recovery": ("x", "recovery", "recoveries"), "start": ("^", "resume", "resumes")}
"""Kind of a record -> how it is marked, and called."""


def _curve(records: Sequence[Record], chart: ChartName) -> list[tuple[int, float]]:
    """Points of samples and values."""
    training = [record for record in records if record["kind"] == "train"]
    if chart == "score":
        scored = [record for record in records if record["kind"] == "evaluation"]
        best = [each for each in scored if each["weights"] == "average"] or scored
        return [
            (each["samples"], next(iter(each["scores"].values())))
            for each in best
            if each["scores"]
        ]
    if chart == "data wait":
        timed = [record for record in training if record.get("step_s")]
        return [(each["samples"], each.get("data_wait_s", 0) / each["step_s"]) for each in timed]
    field = {"loss": "loss", "throughput": "samples_per_s", "staleness": "staleness_mean"}[chart]
    return [
        (record["samples"], record[field]) for record in training if record.get(field) is not None
    ]


def _draw_of_run(
    panel: Axes,
    name: str,
    points: Sequence[tuple[int, float]],
    records: Sequence[Record],
    *,
    color: str,
    is_smooth: bool,
) -> None:
    """The curve of a run, and its events on it."""
    if not points:
        return
    samples, values = [x for x, _ in points], [y for _, y in points]
    if is_smooth:
        values = smoothed(values, min(SMOOTHING_REACH, len(values) // 20))
    panel.plot(samples, values, color=color, linewidth=1.8, label=name, **_marker(points))
    for kind, (mark, one, many) in EVENTS.items():
        places = event_places(records, kind)
        if places:
            heights = np.interp(places, samples, values)
            label = f"  {len(places)} {one if len(places) == 1 else many}"
            panel.plot(places, heights, mark, color=color, markersize=8, label=label)


def event_places(records: Sequence[Record], kind: str) -> list[int]:
    """The samples at which it happened; the first start is none."""
    places = [record["samples"] for record in records if record["kind"] == kind]
    return places[1:] if kind == "start" else places


def _start_at_zero(panel: Axes) -> None:
    top = panel.dataLim.y1
    panel.set_ylim(0, 1.08 * top if 0 < top < math.inf else 1)


def _finish(panel: Axes) -> None:
    panel.grid(alpha=0.3)
    panel.spines[["top", "right"]].set_visible(False)
    if panel.get_legend_handles_labels()[0]:
        panel.legend(loc="best", fontsize="small", frameon=True, framealpha=0.85)


def _samples(records: list[Record]) -> list[int]:
    return [record["samples"] for record in records]


def _marker(points: Sequence[object]) -> dict[str, Any]:
    return {"marker": "o", "markersize": 4} if len(points) < 10 else {}
