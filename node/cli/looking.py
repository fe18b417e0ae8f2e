"""The commands of those who look: demo, status, doctor; and reference, which the demo compares with.

Rules of this file: as in ``app.py``, it only declares.
"""

from typing import Annotated

import typer

from . import options
from .command import command


@command(
    "demo",
    examples=[
        ("See it work, in a minute", "petals-node demo"),
        (
            "A text of your own, over four processes",
            'petals-node demo --nodes 4 --prompt "And God said"',
        ),
    ],
)
def demo_command(
    *,
    prompt: Annotated[
        str,
        typer.Option(
            "--prompt", metavar="TEXT", help="The text to go on from.", rich_help_panel=options.TEXT
        ),
    ] = "In the beginning",
    max_new_tokens: Annotated[
        int,
        typer.Option(
            "--max-new-tokens",
            metavar="N",
            help="How many tokens to generate.",
            rich_help_panel=options.TEXT,
        ),
    ] = 60,
    nodes: Annotated[
        int,
        typer.Option(
            "--nodes",
            metavar="N",
            help="How many processes serve the model.",
            rich_help_panel=options.SWARM,
        ),
    ] = 3,
    model: options.ModelOption = "demo",
) -> int:
    """Show a whole swarm on this machine, and check its text against transformers'."""
    from . import demo

    return demo.demo(prompt=prompt, max_new_tokens=max_new_tokens, nodes=nodes, model=model)


@command(
    "status",
    examples=[
        ("Look once", "petals-node status --bootstrap $PEER"),
        (
            "Go on looking at one model, on the local network",
            "petals-node status --mdns --model demo --watch",
        ),
        (
            "For programs: which blocks nobody serves",
            'petals-node status --json | jq ".models[].missing"',
        ),
    ],
)
def status_command(
    *,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            metavar="MODEL",
            help="Show only this model: demo, a folder, or a hub id.",
            rich_help_panel=options.MODEL,
        ),
    ] = None,
    bootstrap: options.BootstrapOption = None,
    mdns: options.MdnsOption = None,
    swarm_key: options.SwarmKeyOption = None,
    allow_peers: options.AllowPeersOption = None,
    watch: Annotated[
        bool,
        typer.Option(
            "--watch",
            help="Go on showing what changes, until Ctrl-C.",
            rich_help_panel=options.OUTPUT,
        ),
    ] = False,
    json_result: options.JsonOption = False,
    exit_with_stdin: options.EndWithStdinOption = False,
) -> int:
    """Show which blocks are served how often, by whom, how fast, and in which state."""
    from . import originator, status

    return status.status(
        originator.node_config(
            model=None,
            bootstrap=bootstrap,
            mdns=mdns,
            swarm_key=swarm_key,
            allow_peers=allow_peers,
        ),
        model=model,
        json_result=json_result,
        watch=watch,
        exit_with_stdin=exit_with_stdin,
    )


@command("reference")
def reference_command(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT")],
    *,
    model: options.ModelOption = "demo",
    max_new_tokens: options.MaxNewTokensOption = None,
    repetition_penalty: options.RepetitionPenaltyOption = None,
    exit_with_stdin: options.EndWithStdinOption = False,
) -> int:
    """Generate greedily with transformers alone, in this process, to compare with."""
    from . import reference

    return reference.reference(
        model,
        prompt,
        max_new_tokens=max_new_tokens,
        repetition_penalty=repetition_penalty,
        exit_with_stdin=exit_with_stdin,
    )
