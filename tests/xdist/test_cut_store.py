"""Cuts that are saved late, again, twice or never."""

from __future__ import annotations

import asyncio
from functools import partial
from pathlib import Path

import pytest

from tests.local_servers import Worker, check, gradients_of, servers_of, settled
from xdist import patient_storage
from xdist.checkpoint import STATISTICS_PART


def test_a_cut_that_could_not_be_written_is_saved_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patient_storage, "STORING_LIMIT_S", 0.0)

    async def scenario() -> None:
        servers = servers_of(tmp_path, num_servers=1, save_every=1)
        await servers.begin()
        worker = await Worker.registered(servers, 0)
        await worker.push(gradients_of(servers, 1)[0])
        (tmp_path / "no-directory").touch()
        refused = await servers.lead.save(1, str(tmp_path / "no-directory" / "cut"))
        assert "cannot be written" in str(refused.unsaved)
        assert not refused.parts
        await worker.push(gradients_of(servers, 1)[0])
        await servers.lead.save(2, str(tmp_path / "next"))
        await servers.begin()  # A term that knows nothing of the cut.
        saved = await servers.lead.save(1, str(tmp_path / "cut"))
        assert [part.file.split("-")[0] for part in saved.parts] == ["range", STATISTICS_PART]

    check(scenario)


def test_a_cut_of_a_term_that_ended_before_it_was_saved_is_not_kept(tmp_path: Path) -> None:
    async def scenario() -> None:
        servers = servers_of(tmp_path, num_servers=2, save_every=1)
        await servers.begin()
        worker = await Worker.registered(servers, 0)
        await worker.push(gradients_of(servers, 1)[0])
        stores = [each.server._cuts for each in servers.primaries]
        for store in stores:
            await store._changes.until(partial(store.__contains__, 1))
        await servers.begin()
        worker = await Worker.registered(servers, 0)
        await worker.push(gradients_of(servers, 1)[0])
        for each in servers.primaries:
            await each.server.save(2, str(tmp_path / "cut"))
        assert not any(1 in store for store in stores)

    check(scenario)


def test_a_cut_that_is_dropped_is_not_kept_and_the_next_one_is(tmp_path: Path) -> None:
    async def scenario() -> None:
        servers = servers_of(tmp_path, num_servers=2, save_every=1)
        await servers.begin()
        worker = await Worker.registered(servers, 0)
        behind = servers.primaries[1].server
        await behind.drop_cut(1, servers.term)  # It has not come to it yet.
        await worker.push(gradients_of(servers, 1)[0])
        stores = [each.server._cuts for each in servers.primaries]
        await stores[0]._changes.until(partial(stores[0].__contains__, 1))
        await servers.primaries[0].server.drop_cut(1, servers.term)
        await worker.push(gradients_of(servers, 1)[0])
        for each in servers.primaries:
            assert (await each.server.save(2, str(tmp_path / "cut"))).parts
        assert not any(1 in store for store in stores)

    check(scenario)


def test_what_was_dropped_in_one_term_is_kept_in_the_next(tmp_path: Path) -> None:
    async def scenario() -> None:
        servers = servers_of(tmp_path, num_servers=2, save_every=1)
        await servers.begin()
        for each in servers.primaries:
            await each.server.drop_cut(1, servers.term)
        await servers.begin()
        worker = await Worker.registered(servers, 0)
        await worker.push(gradients_of(servers, 1)[0])
        for each in servers.primaries:
            assert (await each.server.save(1, str(tmp_path / "cut"))).parts

    check(scenario)


def test_a_cut_that_is_being_saved_when_a_term_begins_is_saved_once(tmp_path: Path) -> None:
    """Nothing was committed after it, so that the new term begins with the same cut."""

    async def scenario() -> None:
        servers = servers_of(tmp_path, num_servers=2, save_every=1)
        await servers.begin()
        for number in range(2):
            await servers.replicate(number)
        await (await Worker.registered(servers, 0)).push(gradients_of(servers, 1)[0])
        survivor, url = servers.primaries[1].server, str(tmp_path / "cut")
        cut = await servers.lead.next_cut(0)
        assert cut is not None
        first = asyncio.ensure_future(survivor.save(cut.step, url))
        await settled()
        await servers.fail_over(0)
        await servers.begin()
        again = await servers.lead.next_cut(0)
        assert again is not None
        assert again.step == cut.step
        assert await survivor.save(again.step, url) == await first
        assert (await survivor.save(again.step, url)).parts == (await first).parts
        led = await servers.lead.save(again.step, url)
        assert any(part.is_statistics for part in led.parts)

    check(scenario)


def test_a_cut_whose_commit_was_lost_on_its_way_is_saved(tmp_path: Path) -> None:
    async def scenario() -> None:
        servers = servers_of(tmp_path, num_servers=2, save_every=1)
        await servers.begin()
        workers = [await Worker.registered(servers, number) for number in range(2)]
        await settled()
        other = servers.primaries[1]
        other.held_back = []
        pushes = [
            servers.pushing(await worker.described(), gradients)
            for worker, gradients in zip(workers, gradients_of(servers, 2), strict=True)
        ]
        await servers.lead.pull(2)
        cut = await servers.lead.next_cut(0)
        assert cut is not None
        save = asyncio.ensure_future(other.server.save(cut.step, str(tmp_path / "cut")))
        await settled()
        other.forget_held_back()
        await servers.begin()
        assert (await save).parts
        for push in pushes:
            push.cancel()

    check(scenario)
