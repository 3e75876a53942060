"""python -m datapipe: make the index of existing shards, check them, see what they hold."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

from datapipe import doctor
from datapipe.errors import DataError
from datapipe.index import ShardIndex, check_finished, index_shards, list_shards
from datapipe.preview import contact_sheet
from datapipe.progress import LogToStderr, progress_bar
from datapipe.safe_text import printable
from datapipe.storage import absolute, directory_of, write_bytes
from datapipe.summary import label_names, share_with_restart_markers, summarize, summary_lines
from datapipe.table_making import MadeTable
from datapipe.verification import verify

OK, FAULTY, REFUSED, INTERRUPTED = 0, 1, 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command: 0; 1 if `verify` found faults; 2 with one line on stderr for what the user
    can mend; 130 after Ctrl-C.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[LogToStderr()])
    options = _parser().parse_args(arguments)
    commands = {
        "index": _index,
        "verify": _verify,
        "info": _info,
        "preview": _preview,
        "doctor": _doctor,
    }
    try:
        return commands[options.command](options)
    except (DataError, OSError, ValueError) as error:
        sys.stderr.write(f"error: {printable(str(error))}\n")
        return REFUSED
    except KeyboardInterrupt:
        resumes = options.command == "index"
        sys.stderr.write("interrupted" + "; the same command goes on" * resumes + "\n")
        return INTERRUPTED


def _index(options: argparse.Namespace) -> int:
    """Directories stand for the shards in them."""
    shard_urls = [shard_url for url in options.url for shard_url in list_shards(url)]
    directory = options.out or directory_of(shard_urls[0])
    check_finished(directory)
    made: Counter[bool] = Counter()

    def on_table(table: MadeTable) -> None:
        made[table.is_kept] += 1
        advance(1)

    with progress_bar("shards indexed", len(shard_urls)) as advance:
        index = index_shards(
            shard_urls,
            directory_url=directory,
            with_crc32=options.crc32,
            num_processes=options.num_processes,
            on_table=on_table,
        )
    _print(
        printable(f"{index.directory}: {index.num_samples:,} samples in {len(index.shards):,} ")
        + f"shards, {index.num_labels:,} labels; tables made: {made[False]:,}, kept: {made[True]:,}"
    )
    return OK


def _verify(options: argparse.Namespace) -> int:
    index = ShardIndex.open(absolute(options.url))
    num_faults = num_unknown = num_samples = 0
    with progress_bar("shards checked", len(index.shards)) as advance:
        for report in verify(index, is_deep=options.deep, num_processes=options.num_processes):
            for fault in report.faults:
                _print(str(fault))
            num_faults += len(report.faults)
            num_unknown += report.num_unknown_crc32
            num_samples += report.num_samples
            advance(1)
    if num_unknown:
        _print(f"{num_unknown:,} samples have no crc32; python -m datapipe index --crc32 adds it")
    _print(f"{num_samples:,} samples in {len(index.shards):,} shards: {num_faults:,} faults")
    return FAULTY if num_faults else OK


def _info(options: argparse.Namespace) -> int:
    index = ShardIndex.open(absolute(options.url))
    index.check_shards()
    with progress_bar("tables read", len(index.shards)) as advance:
        summary = summarize(index, on_table=lambda: advance(1))
    for line in summary_lines(index, summary, label_names(index)):
        _print(line)
    num_found, num_probed = share_with_restart_markers(index, seed=0)
    _print(f"restart markers in {num_found:,} of {num_probed:,} images looked at")
    return OK


def _preview(options: argparse.Namespace) -> int:
    index = ShardIndex.open(absolute(options.url))
    sheet = contact_sheet(index, label_names(index), num_images=options.num, seed=options.seed)
    write_bytes(absolute(options.out), sheet)
    _print(f"{options.out}: {min(options.num, index.num_samples):,} images")
    return OK


def _doctor(_: argparse.Namespace) -> int:
    sys.stdout.write(doctor.report())
    return OK


def _print(line: str) -> None:
    sys.stdout.write(f"{line}\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m datapipe",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_index(commands)
    _add_verify(commands)
    info = commands.add_parser("info", help="print counts, sizes and labels of a data set")
    _add_index_url(info)
    preview = commands.add_parser("preview", help="draw a contact sheet of some images")
    _add_index_url(preview)
    preview.add_argument("--out", required=True, type=_png, help="the .png to write")
    preview.add_argument("--num", type=_count, default=36, help="images; default: 36")
    preview.add_argument("--seed", type=int, default=0, help="of the choice; default: 0")
    commands.add_parser("doctor", help="say which decoder is active, and why")
    return parser


def _add_index(commands: Any) -> None:
    index = commands.add_parser(
        "index",
        help="walk existing shards and write their index",
        description="Walk existing WebDataset shards and write their index. Local shards are read "
        "by their headers, remote ones whole. Tables that are there and newer than their shards "
        "are kept, so an interrupted command goes on where it was.",
    )
    index.add_argument("url", nargs="+", help="directories of shards, or single .tar shards")
    index.add_argument("--out", help="directory of the index; default: that of the first shard")
    index.add_argument(
        "--crc32",
        action="store_true",
        help="read local shards whole too, so that changed bytes are noticed later",
    )
    _add_num_processes(index)


def _add_verify(commands: Any) -> None:
    check = commands.add_parser(
        "verify",
        help="compare shards with their index, sample by sample",
        description="Read all shards and compare them with their index: sizes, places, bytes, "
        "labels. Prints each fault as SHARD: sample KEY at byte OFFSET: REASON. Exit code 1 if "
        "there are any.",
    )
    _add_index_url(check)
    check.add_argument("--deep", action="store_true", help="decode every image as well")
    _add_num_processes(check)


def _add_index_url(command: argparse.ArgumentParser) -> None:
    command.add_argument("url", help="directory of the index, or its index.json")


def _add_num_processes(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--num-processes",
        type=_count,
        default=os.cpu_count() or 1,
        help="shards that are read at a time; default: the number of cores",
    )


def _png(text: str) -> str:
    """Else a slip of the hand might replace a shard."""
    if not text.lower().endswith(".png"):
        raise argparse.ArgumentTypeError(f"{text!r}; allowed: a name that ends in .png")
    return text


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}; allowed: 1 and more")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
