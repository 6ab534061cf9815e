"""What a job reads off a server."""

from __future__ import annotations

from asyncep.client.server_facts import _threshold


def test_a_jobs_batches_are_those_of_the_router_not_its_t() -> None:
    ranks = {"0": {"threshold_flops": 10.0, "batch_flops": 80.0}, "1": {"threshold_flops": 20.0, "batch_flops": 80.0}}
    assert _threshold({"ranks": ranks}) == 80
    # A router of before has only T; none at all says nothing.
    assert _threshold({"ranks": {"0": {"threshold_flops": 10.0}}}) == 10
    assert _threshold({}) is None
