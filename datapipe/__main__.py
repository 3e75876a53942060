"""python -m datapipe: make the index of existing shards, and say what a data set holds."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

from datapipe.errors import DataError
from datapipe.index import ShardIndex, check_finished, index_shards, list_shards
from datapipe.storage import absolute, directory_of


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0, or 2 with one line on stderr for what the user can mend."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options = _parser().parse_args(arguments)
    try:
        if options.command == "index":
            index = _make_index(options.url, options.out)
        else:
            index = ShardIndex.open(absolute(options.url[0]))
            index.check_shards()
        sys.stdout.write(_summary(index))
    except (DataError, OSError, ValueError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; the same command starts over\n")
        return 130
    return 0


def _make_index(urls: Sequence[str], out: str | None) -> ShardIndex:
    """The index of these shards, directories standing for the shards in them."""
    shard_urls = [shard_url for url in urls for shard_url in list_shards(url)]
    directory = out or directory_of(shard_urls[0])
    check_finished(directory)
    return index_shards(shard_urls, directory_url=directory)


def _summary(index: ShardIndex) -> str:
    gigabytes = sum(entry.bytes for entry in index.shards) / 1e9
    return (
        f"{index.directory}\n"
        f"  shards   {len(index.shards):,}\n"
        f"  samples  {index.num_samples:,}\n"
        f"  labels   {index.num_labels:,}\n"
        f"  size     {gigabytes:,.3f} GB\n"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m datapipe", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    index = commands.add_parser("index", help="read existing shards whole and write their index")
    index.add_argument("url", nargs="+", help="directories of shards, or single .tar shards")
    index.add_argument("--out", help="directory of the index; default: that of the first shard")
    info = commands.add_parser("info", help="check that the shards are there; print counts, sizes")
    info.add_argument("url", nargs=1, help="directory of the index")
    return parser


if __name__ == "__main__":
    sys.exit(main())
