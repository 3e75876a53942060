"""Files that are read, with anything in them: what uses them gets a value, or one message."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from datapipe.config import DataConfig
from datapipe.errors import DataError
from datapipe.index import ShardIndex
from datapipe.json_text import parse_json
from datapipe.label_map import LabelMap
from datapipe.labels import Label, read_labels
from datapipe.manifest import Manifest, ShardEntries, ShardEntry
from datapipe.sources import list_images
from datapipe.storage import write_bytes
from datapipe.writer import RawImage, write_shards
from tests.mutations import damaged, foreign_json, foreign_lines
from tests.xdist.test_checkpoint import save
from xdist import checkpoint, invocation
from xdist.checkpoint import BEST, MANIFEST, Checkpoint
from xdist.config import TrainConfig
from xdist.errors import UserError
from xdist.label_space import read_class_weights
from xdist.model_config import ModelConfig
from xdist.report import page, read_run
from xdist.retention import read_scores
from xdist.run_directory import CONFIG, METRICS, OWNER, QUARANTINE, RunDirectory
from xdist.scoring import skipped_samples
from xdist.stored_config import stored_config
from xdist.weight_files import MODEL_KEY, read_file

RUN = TrainConfig(
    data=DataConfig(train="somewhere"),
    strategy="all_reduce",
    loss="softmax",
    batch_size=8,
    num_epochs=1,
)
MODEL = ModelConfig(num_classes=5, width=0.1, middle_modules=1)
LABELS = (Label(0, "cat", 0.5), Label(1, "dog", 0.25))
MESSAGES = (DataError, UserError)
"""Errors that are told in a line, with exit code 2."""
PLACE = {"time": 1.5, "host": "a", "step": 3, "samples": 24}


@dataclass(frozen=True)
class Kind:
    """A kind of file."""

    name: str
    """Of the file, in its directory."""
    payload: bytes
    """Of a good one."""
    read: Callable[[Path], object]
    """What is done with it."""
    foreign: Callable[[bytes], st.SearchStrategy[bytes]]
    around: Callable[[Path], object] = Path.exists
    """Makes what lies beside it."""


def as_json(value: object) -> bytes:
    return json.dumps(value).encode()


def as_lines(*values: object) -> bytes:
    return b"".join(as_json(value) + b"\n" for value in values)


def resume(directory: Path) -> None:
    with RunDirectory(str(directory), RUN) as run:
        run.records()
        run.quarantine([])


def draw(directory: Path) -> None:
    with RunDirectory(str(directory), RUN) as run:
        run.sync()


def read_config(directory: Path) -> None:
    arguments, code = ["--config", str(directory / CONFIG)], 2
    try:
        invocation.parse({"all": RUN}, default="all", description="", arguments=arguments)
    except SystemExit as error:
        code = int(error.code or 0)
    assert code == 2


def owned(directory: Path) -> None:
    url = f"memory://{directory.name}"
    with RunDirectory(url, RUN) as run:
        write_bytes(f"{url}/{OWNER}", (directory / OWNER).read_bytes())
        run.check_owned()


def packed(directory: Path) -> None:
    images = [RawImage(bytes(100), "jpg", (), f"i-{number}.jpg") for number in range(2)]
    write_shards(
        images,
        directory=str(directory / "set"),
        labels=LABELS,
        prefix="set",
        samples_per_shard=2,
        shard_bytes=None,
    )


def skip(directory: Path) -> None:
    skipped_samples(str(directory / "skip.txt"), ShardIndex.open(str(directory / "set")))


def report(directory: Path) -> None:
    page({"run": read_run(str(directory))})


def read_stored(directory: Path) -> None:
    """A manifest whose own SHA-256 fits: somebody has written it so."""
    found = Checkpoint.open(str(directory))
    found.verify()
    stored_config(found)


def begun(directory: Path) -> None:
    (directory / CONFIG).write_bytes(as_json(RUN.to_json()))
    (directory / METRICS).touch()


def weights_file(said: str) -> bytes:
    tensors = {"fc.weight": torch.ones(2, 3), "fc.bias": torch.ones(2)}
    return safetensors.torch.save(tensors, {MODEL_KEY: said})


def with_said(payload: bytes) -> st.SearchStrategy[bytes]:
    """The same tensors, of a network that is something else."""
    said = as_json(asdict(MODEL))
    return damaged(payload) | foreign_json(said).map(
        lambda text: weights_file(text.decode(errors="replace"))
    )


def table_of_images(form: str) -> bytes:
    rows = [("a.jpg", "cat dog"), ("b.jpg", "dog")]
    if form == "csv":
        file = io.StringIO()
        csv.writer(file).writerows([("path", "labels"), *rows])
        return file.getvalue().encode()
    sink = pa.BufferOutputStream()
    paths, labels = zip(*rows, strict=True)
    pq.write_table(pa.table({"path": paths, "labels": labels}), sink)
    return bytes(sink.getvalue().to_pybytes())


def class_weights(name: str) -> Callable[[Path], object]:
    return lambda directory: read_class_weights(str(directory / name), LABELS, num_classes=3)


MANIFEST_OF_SHARDS = Manifest(
    ShardEntries.of([ShardEntry("a-00000.tar", "a-00000.parquet", 3, 4096, "ab")]), 2
)
TRAINED = {"kind": "train", "loss": 0.5, "samples_per_s": 9.5, "num_workers": 2, **PLACE}
RECORDS = as_lines(
    {"kind": "start", **PLACE},
    TRAINED,
    {"kind": "evaluation", "weights": "raw", "scores": {"top1": 0.5}, **PLACE},
    {"kind": "group", "num_workers": 2, **PLACE},
    {"kind": "recovery", "cause": "worker 1 lost", "reason": "why", **PLACE},
    {**TRAINED, "step": 6, "samples": 48},
)
KINDS = {
    "labels": Kind(
        "labels.json",
        as_json([asdict(label) for label in LABELS]),
        lambda directory: read_labels(str(directory / "labels.json")),
        foreign_json,
    ),
    "label map": Kind(
        "map.json",
        as_json({"labels_of_class": {"a": ["cat", 3], "b": []}, "names": {"cat": "x", "3": "y"}}),
        lambda directory: LabelMap.read(directory / "map.json"),
        foreign_json,
    ),
    "shards": Kind(
        "index.json",
        MANIFEST_OF_SHARDS.to_bytes(),
        lambda directory: ShardIndex.open(str(directory)),
        foreign_json,
    ),
    "class weights": Kind(
        "w.json", as_json({"cat": 0.5, "dog": 1}), class_weights("w.json"), foreign_json
    ),
    "class weights of a table": Kind(
        "w.csv", b"label,weight\ncat,0.5\n1,2\n", class_weights("w.csv"), damaged
    ),
    "images in CSV": Kind(
        "i.csv", table_of_images("csv"), lambda where: list_images(where / "i.csv"), damaged
    ),
    "images in Parquet": Kind(
        "i.parquet", table_of_images("parquet"), lambda where: list_images(where / "i.parquet"),
        damaged,
    ),
    "owner": Kind(OWNER, as_json({"token": "a", "host": "b", "process": 3}), owned, foreign_json),
    "samples to skip": Kind("skip.txt", b"i-0\n293\n", skip, damaged, packed),
    "configuration": Kind(CONFIG, as_json(RUN.to_json()), read_config, foreign_json),
    "configuration of what is resumed": Kind(CONFIG, as_json(RUN.to_json()), resume, foreign_json),
    "records": Kind(METRICS, RECORDS, draw, foreign_lines, begun),
    "records in a report": Kind(METRICS, RECORDS, report, foreign_lines, begun),
    "configuration in a report": Kind(
        CONFIG, as_json(RUN.to_json()), report, foreign_json,
        lambda directory: (directory / METRICS).write_bytes(RECORDS),
    ),
    "bad samples": Kind(
        QUARANTINE,
        as_lines(*({"shard": "a", "key": "b", "offset": i, "reason": "c"} for i in range(2))),
        resume,
        foreign_lines,
        begun,
    ),
    "scores": Kind(
        "scores.json",
        as_json({"raw": {"top1": 0.5}, "average": {"top1": 0.75}}),
        lambda directory: read_scores(str(directory)),
        foreign_json,
    ),
    "best": Kind(
        BEST,
        as_json({"checkpoint": "step-000000000003", "measure": "top1", "score": 0.5}),
        lambda directory: checkpoint.find(f"{directory}/best"),
        foreign_json,
        lambda directory: save(directory, step=3),
    ),
    "weights": Kind(
        "w.safetensors",
        weights_file(json.dumps(asdict(MODEL))),
        lambda directory: read_file(str(directory / "w.safetensors"), model=None),
        with_said,
    ),
    "options of a network": Kind(
        CONFIG,
        as_json({"model": asdict(MODEL)}),
        lambda directory: read_file(
            str(directory / "w.safetensors"), model=str(directory / CONFIG)
        ),
        foreign_json,
        lambda directory: (directory / "w.safetensors").write_bytes(weights_file("{}")),
    ),
}  # fmt: skip


DRAWN = ("records", "records in a report", "configuration in a report")
"""Of which each takes half a second."""


@pytest.mark.parametrize("what", sorted(KINDS.keys() - set(DRAWN)))
@settings(derandomize=True, deadline=None, max_examples=60)
@given(data=st.data())
def test_whatever_is_in_a_file_there_is_a_value_or_a_message(
    tmp_path_factory: pytest.TempPathFactory, what: str, data: st.DataObject
) -> None:
    check(KINDS[what], data, tmp_path_factory)


@pytest.mark.parametrize("what", DRAWN)
@settings(derandomize=True, deadline=None, max_examples=10)
@given(data=st.data())
def test_whatever_is_in_a_file_something_is_drawn_or_a_message(
    tmp_path_factory: pytest.TempPathFactory, what: str, data: st.DataObject
) -> None:
    check(KINDS[what], data, tmp_path_factory)


def check(kind: Kind, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    directory = tmp_path_factory.mktemp("files")
    kind.around(directory)
    (directory / kind.name).write_bytes(data.draw(kind.foreign(kind.payload)))
    with suppress(*MESSAGES):
        kind.read(directory)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(data=st.data())
def test_whatever_a_manifest_says_under_a_sum_that_fits(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    saved = save(tmp_path_factory.mktemp("run"), step=3)
    manifest = replace(saved.manifest, config=RUN.to_json())
    body = {name: value for name, value in manifest.to_json().items() if name != "sha256"}
    text = data.draw(foreign_json(as_json({**body, "created": 1.0})))
    try:
        foreign = parse_json(text)
    except ValueError:
        return
    if isinstance(foreign, dict):
        signed = {**foreign, "sha256": checkpoint._sha256_of(foreign)}
        Path(saved.url, MANIFEST).write_bytes(as_json(signed))
    with suppress(*MESSAGES):
        read_stored(Path(saved.url))
