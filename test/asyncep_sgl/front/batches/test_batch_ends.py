"""Every batch comes to an end that says what became of its lines: of another model, never begun, beyond a quota."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from local_api import ENDS, PATH, api, rows

from asyncep_router.keys import NOBODY, Caller, Keys
from asyncep_router.rates import Rates
from asyncep_sgl.front.batches.bounds import Bounds, Ledger, Promise
from asyncep_sgl.front.batches.disk import NoSpace
from asyncep_sgl.front.batches.lines import RequestLine
from asyncep_sgl.front.batches.records import NEED_INPUT, ApiError, BatchRecord, Status, read_order
from asyncep_sgl.front.batches.runner import BatchRunner
from asyncep_sgl.front.batches.store import BatchStore, end_in_order, open_store


async def never(path: str, body: bytes) -> tuple[int, bytes]:
    raise AssertionError("nothing is to be sent")


async def good(path: str, body: bytes) -> tuple[int, bytes]:
    return 200, b"{}"


async def order(store: BatchStore, model: str, count: int = 3, window: str = "24h") -> BatchRecord:
    async with await store.files.upload(NOBODY) as upload:
        await upload.write(rows(count))
        file = await upload.keep("rows.jsonl")
    asked = read_order({"input_file_id": file.id, "endpoint": PATH, "completion_window": window})
    return await store.add_batch(asked, model)


async def until(store: BatchStore, batch_id: str, statuses: Sequence[str] = ENDS) -> BatchRecord:
    async with asyncio.timeout(60):
        while (batch := await store.batch(batch_id)).status not in statuses:
            await asyncio.sleep(0.01)
    return batch


def lines_in(store: BatchStore, *files: str | None) -> int:
    return sum(store.files.path(file).read_bytes().count(b"\n") for file in files if file)


# --- another model ------------------------------------------------------------------------------------------------


async def into(store: BatchStore, batch: BatchRecord, status: Status) -> None:
    """A batch as a server of its model may have left it."""
    if status == "validating":
        return
    requests = [RequestLine(n, f"#{n}", 0, 1) for n in (1, 2, 3)]
    await store.read(batch.id, 100, len(requests))
    if status == "cancelling":
        await store.cancel(batch.id)
        return
    await store.accept(batch.id, requests)
    if status == "finalizing":
        await store.requests.keep(batch.id, [(n, 200, b"{}") for n in (1, 2, 3)])
        await store.finalizing(batch.id)


@pytest.mark.parametrize(
    ("status", "how"),
    [*itertools.product(NEED_INPUT, ["cancel", "window", "model"]), ("finalizing", "itself"), ("cancelling", "itself")],
)
def test_a_batch_of_another_model_ends(tmp_path: Path, status: Status, how: str) -> None:
    now = 1_000_000.0

    async def run() -> None:
        nonlocal now
        async with open_store(tmp_path, clock=lambda: now) as store:
            batch = await order(store, "theirs", window="10s")
            await into(store, batch, status)
            if how == "window":
                now += 11
            runner = BatchRunner(store, "ours", never, most=4, clock=lambda: now)
            await runner.resume()
            if status in NEED_INPUT and how != "window":
                async with asyncio.timeout(60):
                    while (why := runner.waits(batch.id)) is None:
                        await asyncio.sleep(0.01)
                assert "its model" in why
                # It shows so, and nothing of it has changed.
                assert (await store.batch(batch.id)).status == status
                with pytest.raises(ApiError, match="cancel that first"):
                    await store.files.delete(batch.input_file)
            if how == "cancel":
                await store.cancel(batch.id)
                runner.cancel(batch.id)
            if how == "model":
                await runner.close()
                runner = BatchRunner(store, "theirs", good, most=4, clock=lambda: now)
                if status == "in_progress":
                    # Its lines were made up.
                    store.files.path(batch.input_file).unlink()
                await runner.resume()
            done = await until(store, batch.id)
            expected = {"cancel": "cancelled", "window": "expired"}.get(how)
            if how == "itself":
                expected = "completed" if status == "finalizing" else "cancelled"
            elif how == "model":
                expected = "completed" if status == "validating" else "failed"
            assert done.status == expected
            in_files = lines_in(store, done.output_file, done.error_file)
            if status in ("in_progress", "finalizing") or expected == "completed":
                assert in_files == done.total == 3
            else:
                assert in_files == 0
                [error] = done.errors
                assert "none of its requests was begun" in error["message"]
            await store.files.delete(batch.input_file)
            await runner.close()

    asyncio.run(run())


def test_two_spellings_of_a_folder_are_one_model(tmp_path: Path) -> None:
    model, other = tmp_path / "model", tmp_path / "other"
    model.mkdir()
    other.mkdir()
    (tmp_path / "link").symlink_to(model)

    async def run() -> None:
        async with open_store(tmp_path / "state") as store:
            batches = [
                await order(store, str(path)) for path in (model, tmp_path / "link", f"{model}/", f"{other}/../model")
            ]
            stranger = await order(store, str(other))
            runner = BatchRunner(store, str(tmp_path / "link"), good, most=4)
            await runner.resume()
            for batch in batches:
                assert (await until(store, batch.id)).status == "completed"
            assert (await store.batch(stranger.id)).status == "validating"
            await runner.close()

    asyncio.run(run())


# --- never begun --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["cancelled", "expired"])
def test_a_batch_that_is_not_begun_says_so(tmp_path: Path, how: str) -> None:
    """It waits for space meanwhile; its lines are counted."""
    now = 1_000_000.0

    async def run() -> None:
        nonlocal now
        async with open_store(tmp_path, bounds=Bounds(file_bytes=3_500), clock=lambda: now) as store:
            async with await store.files.upload(NOBODY) as upload:
                await upload.write(b"x" * 2_500)
                await upload.keep("in the way")
            batch = await order(store, "model", window="1s" if how == "expired" else "24h")
            runner = BatchRunner(store, "model", never, most=4, clock=lambda: now)
            runner.begin(batch)
            if how == "cancelled":
                async with asyncio.timeout(60):
                    while runner.waits(batch.id) is None:
                        await asyncio.sleep(0.01)
                await store.cancel(batch.id)
                runner.cancel(batch.id)
            done = await until(store, batch.id)
            assert (done.status, done.total, done.failed) == (how, 3, 3)
            [error] = done.errors
            assert error["code"] == f"batch_{how}"
            assert "none of its requests was begun" in error["message"]
            assert ("--asyncep-file-quota" in error["message"]) == (how == "expired")
            await runner.close()

    asyncio.run(run())


def test_a_cancelled_batch_ends_where_nothing_may_be_written(tmp_path: Path) -> None:
    async def run() -> None:
        async with open_store(tmp_path) as store:
            unread, begun = await order(store, "model"), await order(store, "model")
            await into(store, begun, "in_progress")
        # What may never be used is more than there is.
        async with open_store(tmp_path, bounds=Bounds(free_bytes=2**60)) as store:
            runner = BatchRunner(store, "model", never, most=4)
            for batch, lines in ((unread, 0), (begun, 3)):
                await store.cancel(batch.id)
                runner.begin(await store.batch(batch.id))
                done = await until(store, batch.id)
                assert done.status == "cancelled"
                assert lines_in(store, done.error_file) == lines
                await store.files.delete(batch.input_file)
            await runner.close()

    asyncio.run(run())


def test_a_cancelled_batch_needs_its_input_no_more(tmp_path: Path) -> None:
    """Those of its requests that are under way are answered and kept all the same."""

    async def run() -> None:
        go = asyncio.Event()

        async def slow(path: str, body: bytes) -> tuple[int, bytes]:
            await go.wait()
            return 200, b"{}"

        async with open_store(tmp_path) as store:
            batch = await order(store, "model", count=10)
            runner = BatchRunner(store, "model", slow, most=4)
            runner.begin(batch)
            await until(store, batch.id, ["in_progress"])
            async with asyncio.timeout(60):
                while runner._turns._under_way < 4:
                    await asyncio.sleep(0.01)
            await store.cancel(batch.id)
            runner.cancel(batch.id)
            await store.files.delete(batch.input_file)
            go.set()
            done = await until(store, batch.id)
            assert done.status == "cancelled"
            assert (lines_in(store, done.output_file), lines_in(store, done.error_file)) == (4, 6)
            await runner.close()

    asyncio.run(run())


# --- ends of the server, and what is none --------------------------------------------------------------------------


def test_a_full_disk_while_a_file_is_read_is_no_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        async with open_store(tmp_path) as store:
            batch = await order(store, "model")
            read, refusals = store.read, 0

            async def full(batch_id: str, estimate: int, total: int) -> None:
                nonlocal refusals
                if refusals < 5:
                    refusals += 1
                    raise NoSpace
                await read(batch_id, estimate, total)

            monkeypatch.setattr(store, "read", full)
            runner = BatchRunner(store, "model", good, most=4)
            runner.begin(batch)
            async with asyncio.timeout(60):
                while (await store.batch(batch.id)).status not in ENDS:
                    runner.look_again()
                    await asyncio.sleep(0.01)
            done = await store.batch(batch.id)
            assert (done.status, done.readings) == ("completed", 0)
            await runner.close()

    asyncio.run(run())


def test_an_end_in_order_while_a_file_is_read_is_no_reason(tmp_path: Path) -> None:
    async def run() -> None:
        async with open_store(tmp_path) as store:
            batch = await order(store, "model")
            for _ in range(5):
                await store.reading(batch.id)
        end_in_order(tmp_path)
        async with open_store(tmp_path) as store:
            runner = BatchRunner(store, "model", good, most=4)
            await runner.resume()
            assert (await until(store, batch.id)).status == "completed"
            await runner.close()

    asyncio.run(run())


def test_a_suspect_is_tried_as_often_as_any_line(tmp_path: Path) -> None:
    """A rank that dies of something else meanwhile is no reason to fail it."""
    failures = 2

    async def moody(path: str, body: bytes) -> tuple[int, bytes]:
        nonlocal failures
        failures -= 1
        return (500, b'{"error": "a rank died"}') if failures >= 0 else (200, b"{}")

    async def run() -> None:
        async with open_store(tmp_path) as store:
            batch = await order(store, "model", count=1)
            requests = [RequestLine(1, "#0", 0, len(rows(1)))]
            await store.read(batch.id, 100, 1)
            await store.accept(batch.id, requests)
            await store.requests.take(batch.id, 1)
        async with open_store(tmp_path) as store:
            runner = BatchRunner(store, "model", moody, most=4)
            await runner.resume()
            done = await until(store, batch.id)
            assert (done.status, done.completed) == ("completed", 1)
            await runner.close()

    asyncio.run(run())


def test_a_state_that_cannot_be_used_is_gone_on_with_once_it_can(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def run() -> None:
        async with open_store(tmp_path) as store:
            batch = await order(store, "model")
        (tmp_path / "in-order").mkdir()
        async with api(tmp_path) as client:
            async with asyncio.timeout(60):
                while "not gone on with" not in caplog.text:
                    await asyncio.sleep(0.01)
            (tmp_path / "in-order").rmdir()
            assert (await client.until(batch.id))["status"] == "completed"

    asyncio.run(run())


# --- quotas and rates -----------------------------------------------------------------------------------------------

CALLERS = [Caller("ann"), Caller("bob", file_bytes=3_000), Caller("boss", admin=True), Caller("")]
STEPS = st.lists(
    st.tuples(
        st.sampled_from(CALLERS),
        st.sampled_from(["upload", "begin", "answer", "finish", "delete"]),
        st.integers(1, 4_000),
    ),
    max_size=60,
)


@given(STEPS)
def test_files_and_outputs_stay_below_the_quotas(steps: list[tuple[Caller, str, int]]) -> None:
    """Whatever is uploaded and begun in whatever order, and however much the answers turn out to be."""
    ledger, running, number = Ledger(Bounds(file_bytes=10_000)), dict[str, tuple[Caller, Promise]](), 0
    for caller, step, size in steps:
        own = next((name for name, (owner, _) in running.items() if owner == caller), None)
        if step == "upload" and ledger.beyond(caller, size) is None:
            ledger.take(caller, size)
        elif step == "begin":
            promise = Promise(caller.name, 4 * size, 2 * size, size // 2)
            if ledger.hold(caller, promise, 10**9) is None:
                assert ledger.never(caller, promise, 0) is None
                number += 1
                running[str(number)] = caller, promise
                ledger.promise(str(number), promise)
            elif ledger.never(caller, promise, 0) is None:
                # Something is there that can be deleted, cancelled or waited for.
                assert running or ledger.used.total()
        elif step == "answer" and own is not None and ledger.full(caller, size) is None:
            _, before = running[own]
            running[own] = caller, Promise(caller.name, before.disk + size, before.files + size, before.finish + size)
            ledger.promise(own, running[own][1])
        elif step == "finish" and own is not None:
            _, promise = running.pop(own)
            ledger.settle(own)
            ledger.enter(caller.name, promise.finish)
        elif step == "delete":
            ledger.give(caller.name, min(size, ledger.used[caller.name]))
        written = sum(promise.finish for _, promise in running.values())
        assert ledger.used.total() + written <= 10_000
        bobs = sum(promise.finish for owner, promise in running.values() if owner.name == "bob")
        assert ledger.used["bob"] + bobs <= 3_000


def test_who_has_uploaded_much_may_still_begin(tmp_path: Path) -> None:
    """What leaves room for others' uploads is no bound of a batch's answers."""
    ledger = Ledger(Bounds(file_bytes=10_000))
    ledger.take(Caller("ann"), 5_000)
    ledger.take(Caller("bob", file_bytes=10_000), 3_000)
    assert ledger.beyond(Caller("ann"), 1) is not None
    assert ledger.hold(Caller("ann"), Promise("ann", 2_000, 1_000, 500), 10**9) is None


def test_batches_that_wait_do_not_keep_each_other_from_beginning() -> None:
    """Their inputs stay while they wait; one of them is begun on what is certain, whatever is expected of its size."""
    ann, ledger = Caller("ann", file_bytes=1_000), Ledger(Bounds(file_bytes=10_000))
    for _ in range(4):
        ledger.take(ann, 200)
    promises = [Promise("ann", 6_000, 3_000, 20) for _ in range(4)]
    assert ledger.hold(ann, promises[0], 10**9) is None
    ledger.promise("first", promises[0])
    why = ledger.hold(ann, promises[1], 10**9)
    assert why is not None
    assert "file_bytes" in why
    ledger.settle("first")
    assert ledger.hold(ann, promises[1], 10**9) is None


def test_a_batch_that_no_quota_takes_fails_at_once(tmp_path: Path) -> None:
    async def run() -> None:
        callers = {"ann": Caller("ann", file_bytes=5_000)}
        async with api(tmp_path, callers=callers) as client:
            done = await client.until((await client.order(rows(30), "ann"))["id"], "ann")
            assert done["status"] == "failed"
            [error] = done["errors"]["data"]
            assert error["code"] == "quota_exceeded"
            assert "file_bytes" in error["message"]
            assert not client.seen

    asyncio.run(run())


def test_a_running_batch_waits_at_its_owners_quota(tmp_path: Path) -> None:
    async def large(body: dict[str, Any]) -> tuple[int, Any]:
        # Slower than what is answered is counted.
        await asyncio.sleep(0.2)
        return 200, {"twice": 2 * body["row"], "more": "y" * 5_000}

    async def run() -> None:
        callers = {"ann": Caller("ann", file_bytes=400_000)}
        async with api(tmp_path, answer=large, keys=Keys({"k": callers["ann"]}), callers=callers) as client:
            spare = (await client.upload(b"x" * 200_000, "ann")).json()["id"]
            batch = await client.order(rows(60), "ann")
            waits = await client.until(batch["id"], "ann", lambda b: b["errors"] is not None or b["status"] in ENDS)
            assert waits["status"] == "in_progress"
            assert "file_bytes" in waits["errors"]["data"][0]["message"]
            assert (await client.call("DELETE", f"/v1/files/{spare}", "ann")).status_code == 200
            done = await client.until(batch["id"], "ann")
            assert (done["status"], done["request_counts"]["completed"]) == ("completed", 60)
            store = client.batches._opened[0]  # type: ignore[index]
            assert store.ledger.used["ann"] <= 400_000

    asyncio.run(run())


def test_a_batch_that_is_cancelled_while_it_is_read_has_no_lines(tmp_path: Path) -> None:
    async def run() -> None:
        async with open_store(tmp_path) as store:
            batch = await order(store, "model")
            await store.read(batch.id, 100, 3)
            await store.cancel(batch.id)
            await store.accept(batch.id, [RequestLine(n, f"#{n}", 0, 1) for n in (1, 2, 3)])
            runner = BatchRunner(store, "model", never, most=4)
            await runner.resume()
            done = await until(store, batch.id)
            assert (done.status, done.failed, done.output_file, done.error_file) == ("cancelled", 3, None, None)
            await runner.close()

    asyncio.run(run())


def test_a_model_is_the_folder_that_it_was(tmp_path: Path) -> None:
    """A link that has been set to another folder since is another model."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "one")

    async def run() -> None:
        async with open_store(tmp_path / "state") as store:
            batch = await order(store, str(link))
            link.unlink()
            link.symlink_to(tmp_path / "two")
            runner = BatchRunner(store, str(link), never, most=4)
            await runner.resume()
            async with asyncio.timeout(60):
                while runner.waits(batch.id) is None:
                    await asyncio.sleep(0.01)
            await runner.close()
            runner = BatchRunner(store, str(tmp_path / "one"), good, most=4)
            await runner.resume()
            assert (await until(store, batch.id)).status == "completed"
            await runner.close()

    asyncio.run(run())


@pytest.mark.parametrize("rate", [0.3, 3.0])
def test_batches_are_held_to_their_owners_rate(tmp_path: Path, rate: float) -> None:
    now, most, count = 0.0, 4, 80
    rates = Rates(lambda: now)
    ann = Caller("ann", prompts_per_second=rate)

    async def run() -> None:
        nonlocal now
        async with api(tmp_path, keys=Keys({"k": ann}), rates=rates, most=most) as client:
            batch = await client.order(rows(count), "ann")
            runner = client.batches._opened[1]  # type: ignore[index]
            # Never so long that a bucket runs over, which holds what ten seconds fill.
            for wait in (0.0, 3.0, 0.5, 8.0, 8.0):
                now += wait
                async with asyncio.timeout(60):
                    while rates.debt_seconds(ann) == 0 and len(client.seen) < count:
                        runner.look_again()
                        await asyncio.sleep(0.001)
                filled = 10 * rate + rate * now
                # The last one may have brought it into debt, and may not have been seen yet.
                assert min(count, filled) - most <= len(client.seen) <= filled + 1
            now += 100 * count
            async with asyncio.timeout(60):
                while (await client.call("GET", f"/v1/batches/{batch['id']}", "ann")).json()["status"] not in ENDS:
                    runner.look_again()
                    now += 100 * count
                    await asyncio.sleep(0.001)
            assert len(client.seen) == count

    asyncio.run(run())
