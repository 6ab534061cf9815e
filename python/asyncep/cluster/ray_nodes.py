"""Nodes as Ray actors: one for each host, with a server of its own there.

The actors keep nothing: rows, journal and output are the driver's, which writes each row once whatever happens to a
node (`jobs/journal.py`). So no file system is shared, and a lost node costs what it had under way. Ray places the
actors, one a host, starts a lost one again where there is room, and carries probes and answers. Ray Data is not used
for the rows: it would write the output from many hosts, and each row once after a kill needs one that writes.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Sequence
from typing import Any, TypeVar

from asyncep.client.errors import OptionError, RejectedError, ServerError
from asyncep.client.generate import GenerateClient
from asyncep.client.probes import Probe, Reading
from asyncep.client.scorer import Scorer
from asyncep.client.server_facts import ServerFacts, ask_server
from asyncep.client.tokens import tokens_for
from asyncep.cluster.nodes import NodeLostError, Nodes, joint_facts
from asyncep.local_server import local_server
from asyncep.tasks.session import Session
from asyncep_router.keys import key_from

T = TypeVar("T")
_LOOK_SECONDS = 2.0
# A node whose server ends again and again is given up.
_MOST_RESTARTS = 8


class NodeServer:
    """The actor: a server on its host and a client to it.

    Args:
        model: checkpoint folder, at the same path on every host, or hub name.
        arguments: flags of ``asyncep serve``.
    """

    def __init__(self, model: str, arguments: Sequence[str]) -> None:
        self._stack = contextlib.ExitStack()
        url = self._stack.enter_context(local_server(model, arguments))
        self._client = GenerateClient(url, api_key=key_from(None, "ASYNCEP_API_KEY"))
        self._opened = False

    async def _open(self) -> GenerateClient:
        if not self._opened:
            self._opened = True
            await self._client.__aenter__()
        return self._client

    async def facts(self) -> ServerFacts:
        """See `ask_server`."""
        return await ask_server(await self._open())

    async def answer(self, probes: Sequence[Probe], rank: int | None) -> list[Reading]:
        """See `GenerateClient.answer`."""
        return await (await self._open()).answer(probes, rank)

    async def get(self, path: str) -> Any:
        """See `GenerateClient.get`."""
        return await (await self._open()).get(path)

    async def post(self, path: str, body: dict[str, Any]) -> Any:
        """See `GenerateClient.post`."""
        return await (await self._open()).post(path, body)

    def stop(self) -> None:
        """Ends the server in order."""
        self._stack.close()


class RayNode:
    """One actor, as a `nodes.Node`."""

    def __init__(self, actor: Any, name: str) -> None:
        self.name = name
        self._actor = actor
        self._ending = False

    async def facts(self) -> ServerFacts:
        """What its server says of itself; waits until it is up."""
        return await self._hear(self._actor.facts.remote())

    async def answer(self, probes: Sequence[Probe], rank: int | None = None) -> list[Reading]:
        """See `nodes.Node`."""
        return await self._hear(self._actor.answer.remote(list(probes), rank))

    async def get(self, path: str) -> Any:
        """See `nodes.Node`."""
        return await self._hear(self._actor.get.remote(path))

    async def post(self, path: str, body: dict[str, Any]) -> Any:
        """See `nodes.Node`."""
        return await self._hear(self._actor.post.remote(path, body))

    async def back(self) -> None:
        """See `nodes.Node`. Ray starts the actor again by itself; whether it has can only be asked."""
        from ray.exceptions import ActorDiedError, RayError

        while True:
            try:
                await self._actor.get.remote("/model_info")
                self._ending = False
                return
            except ActorDiedError as error:
                raise NodeLostError(str(error).splitlines()[0]) from error
            except (RayError, ServerError):
                await asyncio.sleep(_LOOK_SECONDS)

    async def stop(self) -> None:
        """Ends server and actor; a lost one has nothing to end."""
        import ray
        from ray.exceptions import RayError

        with contextlib.suppress(RayError, TimeoutError):
            await asyncio.wait_for(_awaited(self._actor.stop.remote()), 60)
        ray.kill(self._actor)

    async def _hear(self, answer: Awaitable[T]) -> T:
        import ray
        from ray.exceptions import RayActorError

        try:
            return await answer
        except RejectedError:
            raise
        except RayActorError as error:
            raise NodeLostError(str(error).splitlines()[0]) from error
        except ServerError as error:
            # Its server has ended or hangs: the actor starts anew, with another. Once, however many hear of it.
            if not self._ending:
                self._ending = True
                ray.kill(self._actor, no_restart=False)
            raise NodeLostError(str(error).splitlines()[-1]) from error


@contextlib.asynccontextmanager
async def open_ray_session(
    address: str, model: str, *, nodes: int | None = None, arguments: Sequence[str] = ()
) -> AsyncIterator[Session]:
    """A session whose ranks are on the hosts of a Ray cluster; `asyncep.jobs.run.run_job` takes it as any other.

    Args:
        address: of the cluster, such as ``10.0.0.1:6379``; ``auto`` for the one this host belongs to.
        model: checkpoint folder, at the same path on every host, or hub name.
        nodes: hosts to use; all with CPUs by default.
        arguments: flags of ``asyncep serve`` on each.

    Raises:
        OptionError: no Ray here, no such cluster, or fewer hosts than asked for.
        ServerError: a server did not start.
    """
    ray = _ray()
    if address.startswith("ray://"):
        raise OptionError(f"--ray-address {address}: run the command on a host of the cluster, and give HOST:PORT")
    try:
        ray.init(address=address, log_to_driver=False, logging_level="warning")
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise OptionError(f"--ray-address {address}: no cluster there: {str(error).splitlines()[0]}") from error
    try:
        async with contextlib.AsyncExitStack() as stack:
            group = await _place(ray, model, nodes, arguments, stack)
            try:
                facts = await asyncio.gather(*(node.facts() for node in group))
            except NodeLostError as error:
                raise ServerError(f"a node's server did not start: {error}") from error
            joint = joint_facts(facts)
            joined = Nodes(group, facts)
            stack.push_async_callback(joined.close)
            tokens = await tokens_for(joined, joint.tokenizer)
            async with Scorer(joined, joint) as scorer:
                yield Session(scorer, tokens, joined)
    finally:
        ray.shutdown()


async def _place(
    ray: Any, model: str, wanted: int | None, arguments: Sequence[str], stack: contextlib.AsyncExitStack
) -> list[RayNode]:
    """An actor on each of so many hosts, with all CPUs that every one of them has."""
    from ray.util.placement_group import placement_group, remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    cpus = sorted(
        (int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]),
        reverse=True,
    )
    cpus = [count for count in cpus if count > 0]
    count = wanted if wanted is not None else len(cpus)
    if not 0 < count <= len(cpus):
        raise OptionError(f"--ray-nodes {count}: the cluster has {len(cpus)} host(s) with CPUs")
    group = placement_group([{"CPU": cpus[count - 1]}] * count, strategy="STRICT_SPREAD")
    stack.callback(remove_placement_group, group)
    try:
        await asyncio.wait_for(_awaited(group.ready()), 60)
    except TimeoutError:
        raise OptionError(
            f"--ray-nodes {count}: the hosts' CPUs are in use by other work; wait for it or use fewer"
        ) from None
    kind = ray.remote(NodeServer)
    nodes = []
    for number in range(count):
        actor = kind.options(
            num_cpus=cpus[count - 1],
            max_restarts=_MOST_RESTARTS,
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=number),
        ).remote(model, list(arguments))
        nodes.append(RayNode(actor, f"node {number}"))
        stack.push_async_callback(nodes[-1].stop)
    return nodes


async def _awaited(reference: Awaitable[T]) -> T:
    """A reference of Ray's as a coroutine, which is what `asyncio.wait_for` can cancel."""
    return await reference


def _ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise OptionError("--ray-address: Ray is not installed; pip install 'asyncep-sgl[ray]'") from error
    return ray
