"""A trio program with a whole node in it: it gives blocks to the swarm while it does its own work.

    PETALS_BOOTSTRAP=/ip4/…/tcp/…/p2p/… python examples/embedded_node.py --num-blocks 3

Without PETALS_BOOTSTRAP it begins a swarm of its own, and others can join through what it prints.
"""

import argparse

import petals
import trio


async def write(node: petals.Node, prompt: str) -> None:
    generation = await node.generate(prompt, max_length=30)
    print(f"{prompt}{generation.text!r}")


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="demo")
    parser.add_argument("--num-blocks", type=int, help="as many as fit, if it is left out")
    arguments = parser.parse_args()
    config = petals.NodeConfig(
        model=arguments.model,
        num_blocks=arguments.num_blocks,
        listen=("/ip4/127.0.0.1/tcp/0",),  # /ip4/0.0.0.0/tcp/31330 for others than this machine
    )
    async with petals.Node(config) as node:
        print(f"serves blocks {node.span} of {node.model_name} at {node.multiaddrs[0]}", flush=True)
        async with trio.open_nursery() as nursery:  # its own sessions run side by side
            for prompt in ("In the beginning", "And God said", "The king"):
                nursery.start_soon(write, node, prompt)
    # behind this line it has handed its sessions over and said goodbye


trio.run(main)
