"""Of two equal nodes the near one is used: real processes, one of them behind a line that delays.

Only what is dialled goes through the line. The originator cannot be dialled, so its way to the far node
is long; two nodes may have met by the other's dialling, and be near.
"""

import trio
from petals.inference.sampling_params import SamplingParams
from petals.node.node import Node
from support.processes import DEADLINE, ProcessSwarm, ServingNode, originating
from support.proxies import proxies
from support.reference import ReferenceModel

DELAY = 0.15
"""Seconds in each direction: far more than the nodes' speeds differ by on a busy machine."""
SHORT = SamplingParams(max_new_tokens=4)


async def announced_round_trips(asker: Node, node: ServingNode, *others: str) -> dict[str, float]:
    """What a node says of the ways to others, once it knows them all."""
    with trio.fail_after(DEADLINE):
        while True:
            said, _ = await asker.describe(node.peer_id, [node.multiaddr])
            assert said is not None
            if said.round_trips.keys() >= set(others):
                return dict(said.round_trips)
            await trio.sleep(0.2)


async def test_nodes_announce_round_trips_and_routes_take_the_near_one(
    demo: ReferenceModel, tmp_swarm: ProcessSwarm
) -> None:
    async with proxies("4:8", delay=DELAY) as behind:

        def serve() -> tuple[ServingNode, ...]:
            return (
                *tmp_swarm.serve(demo.name, "0:4", "4:8"),
                *tmp_swarm.serve_behind(behind, demo.name),
            )

        first, near, far = await trio.to_thread.run_sync(serve)
        async with originating(tmp_swarm, demo.name) as node:
            ways = await announced_round_trips(node, first, near.peer_id, far.peer_id)
            assert set(ways) == {near.peer_id, far.peer_id}
            assert 0 < ways[near.peer_id] < DELAY

            await node.generate("In the beginning", SHORT)  # from now on it measures for itself
            with trio.fail_after(DEADLINE):
                while node._round_trips().get(far.peer_id, 0.0) < 2 * DELAY:  # noqa: ASYNC110
                    await trio.sleep(0.2)
            for _ in range(3):
                generation = await node.generate("In the beginning", SHORT)
                route = [hop.peer_id for hop in generation.route]
                assert route == [first.peer_id, near.peer_id]
