"""The shortest program: join a swarm, write something, leave.

PETALS_BOOTSTRAP=/ip4/…/tcp/…/p2p/… python examples/script.py "In the beginning"
"""

import argparse

import petals

parser = argparse.ArgumentParser()
parser.add_argument("prompt")
parser.add_argument("--model", default="demo")
arguments = parser.parse_args()

with petals.connect(arguments.model) as client:
    handle = client.submit(arguments.prompt, max_new_tokens=30)
    for piece in handle:
        print(piece, end="", flush=True)
    result = handle.result()
    route = " → ".join(f"{hop.span} at …{hop.peer_id[-8:]}" for hop in result.route)
    print(f"\n{result.tokens_per_second:.1f} tokens/s through blocks {route}")
