"""Which of many files there are, by few listings."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

from datapipe.errors import UnreadableUrl
from datapipe.storage import WEB_URLS, directory_of, exists, sizes_in

NUM_ASKED_AT_ONCE = 16


def sizes_listed(directory: str) -> dict[str, int | None]:
    """`sizes_in`; nothing where a web server does not list, as few do."""
    try:
        return sizes_in(directory)
    except UnreadableUrl:
        if not directory.startswith(WEB_URLS):
            raise
        return {}


def listed_sizes(urls: Iterable[str]) -> dict[str, int | None]:
    """The files among these that listings name, with their sizes as `sizes_in` has them.

    One listing a directory; none where a web server does not list.
    """
    urls = list(urls)
    sizes = {directory: sizes_listed(directory) for directory in set(map(directory_of, urls))}
    places = [(url, directory_of(url), url.rpartition("/")[2]) for url in urls]
    return {url: sizes[where][name] for url, where, name in places if name in sizes[where]}


def without_unlisted(urls: Sequence[str]) -> list[str]:
    """The files that no listing named, without those that a web server has all the same."""
    with ThreadPoolExecutor(NUM_ASKED_AT_ONCE) as pool:
        there = pool.map(lambda url: url.startswith(WEB_URLS) and exists(url), urls)
        return [url for url, is_there in zip(urls, there, strict=True) if not is_there]
