"""A program that computes gives a node its own thread, and has it afterwards."""

from pathlib import Path

from petals.inference.torch_thread import TorchThread
from petals.node.config import NodeConfig
from petals.node.node import Node
from support.processes import LOOPBACK


async def test_a_thread_that_was_given_outlives_the_node(tmp_path: Path) -> None:
    config = NodeConfig(listen=(LOOPBACK,), data_dir=tmp_path, bootstrap=(), mdns=False)
    thread = TorchThread()
    for _ in range(2):
        async with Node(config, torch_thread=thread) as node:
            assert await node._in_torch_thread(lambda: 7) == 7
        assert thread.run(lambda: 8).result(10) == 8
    assert thread.shutdown()
