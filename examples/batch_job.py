"""Many prompts, one a line of a file; results as JSON lines, and a progress bar.

    PETALS_BOOTSTRAP=/ip4/…/tcp/…/p2p/… python examples/batch_job.py prompts.txt results.jsonl

Several are under way at once, which hops run together. One that fails is reported, and the others go
on; those that are in the results already are left out, so the job can be started again.
"""

import argparse
import json
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import petals
from rich.console import Console
from rich.progress import Progress

parser = argparse.ArgumentParser()
parser.add_argument("prompts", type=Path)
parser.add_argument("results", type=Path)
parser.add_argument("--model", default="demo")
parser.add_argument("--at-once", type=int, default=8)
parser.add_argument("--max-new-tokens", type=int, default=20)
arguments = parser.parse_args()

done = set()
if arguments.results.exists():
    done = {json.loads(line)["prompt"] for line in arguments.results.read_text().splitlines()}
lines = dict.fromkeys(arguments.prompts.read_text().splitlines())
wanted = [line for line in lines if line and line not in done]

with (
    petals.connect(arguments.model) as client,
    Progress(console=Console(stderr=True)) as progress,
    arguments.results.open("a") as results,
    ThreadPoolExecutor(arguments.at_once) as pool,
):
    task = progress.add_task("texts", total=len(wanted))
    running = {
        pool.submit(client.generate, prompt, max_new_tokens=arguments.max_new_tokens): prompt
        for prompt in wanted
    }
    failed = 0
    for future in as_completed(running):
        prompt = running[future]
        try:
            text = future.result()
        except petals.PetalsError as error:
            failed += 1
            progress.console.print(f"{prompt!r} failed: {error}", markup=False)
        else:
            print(json.dumps({"prompt": prompt, "text": text}), file=results, flush=True)
        progress.advance(task)

print(f"{len(wanted) - failed} written, {failed} failed, {len(done)} were there already")
if failed:
    raise SystemExit(1)
