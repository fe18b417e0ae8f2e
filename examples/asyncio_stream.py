"""An asyncio program that streams several texts at once.

    PETALS_BOOTSTRAP=/ip4/…/tcp/…/p2p/… python examples/asyncio_stream.py

The node runs on trio in a thread of its own; what blocks is called in asyncio's threads.
"""

import argparse
import asyncio
from collections.abc import AsyncIterator

import petals


async def stream(client: petals.Client, prompt: str) -> AsyncIterator[str]:
    pieces = client.stream(prompt, max_new_tokens=20)
    try:
        while (piece := await asyncio.to_thread(next, pieces, None)) is not None:
            yield piece
    finally:
        await asyncio.to_thread(pieces.close)  # ends the text if somebody has left it early


async def show(client: petals.Client, number: int, prompt: str) -> None:
    text = ""
    async for piece in stream(client, prompt):
        text += piece
        print(f"{number}: {prompt}{text!r}", flush=True)


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="demo")
    arguments = parser.parse_args()
    client = await asyncio.to_thread(petals.connect, arguments.model)
    try:
        prompts = ("In the beginning", "And God said", "The king")
        await asyncio.gather(*(show(client, *numbered) for numbered in enumerate(prompts)))
    finally:
        await asyncio.to_thread(client.disconnect)


asyncio.run(main())
