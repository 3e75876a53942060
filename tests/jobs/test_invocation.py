"""Where a run gets its configuration from, and what it begins with."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from imagenet_sync import PRESETS

from tests.jobs.small_jobs import data_options, main
from tests.small_runs import saved_step
from xdist import command_line
from xdist.invocation import Invocation, parse


def parsed(*arguments: str) -> Invocation:
    return parse(PRESETS, default="cifar", description="", arguments=arguments)


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    options = [*arguments, "--print-config"]
    assert (
        command_line.main("job", PRESETS, default="cifar", description="", arguments=options) == 0
    )
    return capsys.readouterr().out


def test_what_is_printed_is_taken_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--preset", "paper", "--batch-size", "120", "--evaluation.measures", "map"]
    text = printed(capsys, *options)
    file = tmp_path / "mine.json"
    file.write_text(text)
    assert parsed("--config", str(file)).run == parsed(*options).run
    other = parsed("--config", str(file), "--batch-size", "240").run
    assert other == replace(parsed(*options).run, batch_size=240)


def test_a_run_directory_is_replayed_in_another(tmp_path: Path) -> None:
    config = replace(PRESETS["paper"], run_dir=str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(config.to_json()))
    assert parsed("--config", str(tmp_path)).run == replace(config, run_dir=None)


NO_FIELD = json.dumps({**PRESETS["cifar"].to_json(), "batch_sice": 4})
NO_VALUE = json.dumps({**PRESETS["cifar"].to_json(), "batch_size": -4})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "neither a file nor a run directory with a config.json"),
        ("[1, 2]", "is not the configuration of a run"),
        ("{", "is not the configuration of a run"),
        ('{"batch_size": 4}', "is not the configuration of a run"),
        (NO_FIELD, "unknown fields batch_sice"),
        (NO_VALUE, "batch_size is -4; allowed: at least 1"),
    ],
)
def test_what_is_no_configuration_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str | None, said: str
) -> None:
    file = tmp_path / "config.json"
    if text is not None:
        file.write_text(text)
    refused(["--config", str(file)], said, capsys)


def test_options_that_contradict_each_other_or_are_unknown_are_refused(
    capsys: pytest.CaptureFixture[str],
) -> None:
    both = ["--config", "run", "--preset", "paper"]
    refused(both, "--preset and --config both pick all values", capsys)
    refused(["--batch-sice", "4"], "--batch-size", capsys)
    refused(["--preset", "papper"], "choose from", capsys)


def refused(arguments: Sequence[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parsed(*arguments)
    assert caught.value.code == 2
    captured = capsys.readouterr()
    text = captured.err + captured.out
    assert said in text
    assert "Traceback" not in text


@pytest.mark.ray
@pytest.mark.timeout(180)
@pytest.mark.usefixtures("cluster")
def test_a_run_begins_with_a_checkpoint_of_another_or_over_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [*data_options(tmp_path), "--data.evaluation", "None"]
    first, second = tmp_path / "first", tmp_path / "second"
    assert main([*options, "--max-steps", "2", "--run-dir", str(first)]) == 0
    resumed = [*options, "--max-steps", "4", "--resume", str(first), "--run-dir", str(second)]
    assert main(resumed) == 0
    assert "run resumed step=2" in (second / "log.txt").read_text()
    assert [saved_step(run_dir) for run_dir in (first, second)] == [2, 4]
    again = [*options, "--max-steps", "3", "--run-dir", str(first), "--no-resume"]
    assert main(again) == 0
    assert [saved_step(run_dir) for run_dir in (first, tmp_path / "first-2")] == [2, 3]
    capsys.readouterr()
    assert main([*resumed[:-1], str(tmp_path / "third"), "--resume", str(tmp_path / "no")]) == 2
    assert "neither a checkpoint nor a run directory" in capsys.readouterr().err


@pytest.mark.ray
@pytest.mark.timeout(180)
@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("job", ["imagenet_sync", "jft_async"])
def test_a_dry_run_says_what_the_run_would_take_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], job: str
) -> None:
    options = [*data_options(tmp_path), "--run-dir", str(tmp_path / "run")]
    before = sorted(tmp_path.iterdir())
    assert main([*options, "--dry-run"], job=job) == 0
    told = capsys.readouterr().err
    assert "this run would take" in told
    for word in ("samples/s", "memory of a worker", "a checkpoint"):
        assert word in told
    assert sorted(tmp_path.iterdir()) == before


def test_a_dry_run_that_can_leave_nothing_there_says_so_in_a_line(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    arguments = ["--dry-run", "--run-dir", "foo://bucket/run"]
    code = command_line.main("job", PRESETS, default="cifar", description="", arguments=arguments)
    assert code == 2
    assert "foo://bucket/run" in caplog.text
    assert "Traceback" not in capsys.readouterr().err


def test_lines_that_a_full_disk_refuses_are_left_out_of_the_log(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    log_file = command_line.LogFile("/dev/full")
    logger = logging.getLogger("full")
    logger.addHandler(log_file)
    try:
        logger.warning("one")
        logger.warning("two")
    finally:
        logger.removeHandler(log_file)
        log_file.close()
    assert caplog.text.count("/dev/full lacks lines") == 1
    assert capsys.readouterr().err == ""
