"""The commands of those who look: demo, status, doctor; and reference, which the demo compares with.

Rules of this file: as in ``app.py``, it only declares.
"""

from typing import Annotated

import typer

from ..config import NodeConfig
from . import options
from .command import Examination, command, settings_file, settings_trouble


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
    """Show a whole swarm on this machine, and check its text against transformers'.

    It starts a bootstrap peer, some nodes that serve a part of the model each, and one that writes a text
    with them; then transformers alone writes it, too. The model is built in: nothing is downloaded,
    nothing is set up, and nothing is left. Exit code 0: the two texts are the same; 1: they are not.
    """
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
    mdns: options.VisitorMdnsOption = None,
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
    """Show which blocks are served how often, by whom, how fast, and in which state.

    One peer of the swarm has to be named (--bootstrap), or found on the local network (--mdns). Of each
    model there are two lines over its blocks (how many nodes serve each, and how many tokens a second they
    put through it), and a table of the nodes. Blocks that nobody serves stop all texts: they are named
    first, and whoever runs `petals-node run --blocks` with them mends that.
    """
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


@command(
    "doctor",
    examples=[
        ("Would a node work on this machine?", "petals-node doctor"),
        (
            "And join this swarm, and serve this model?",
            "petals-node doctor --bootstrap $PEER --model demo",
        ),
        (
            "For programs: only what has to be mended",
            "petals-node doctor --json \\",
            "    | jq '.findings[] | select(.state == \"bad\")'",
        ),
    ],
    cls=Examination,
)
def doctor_command(
    ctx: typer.Context,
    *,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            metavar="MODEL",
            help="Say what would be served of it: demo, a folder, a GGUF file, or a Hugging Face hub id.",
            rich_help_panel=options.MODEL,
        ),
    ] = None,
    bootstrap: options.BootstrapOption = None,
    mdns: options.MdnsOption = None,
    swarm_key: options.SwarmKeyOption = None,
    allow_peers: options.AllowPeersOption = None,
    listen: options.ListenOption = None,
    announce: options.AnnounceOption = None,
    reachability: options.ReachabilityOption = "auto",
    data_dir: options.DataDirOption = None,
    dtype: options.DtypeOption = "auto",
    quantization: options.QuantizationOption = "none",
    device: options.DeviceOption = "auto",
    json_result: options.JsonOption = False,
) -> int:
    """Find out what keeps a node from working here, and say what to do about it.

    It takes the options of `run`, and its settings from the environment and the file; with peers to
    ask, it joins for a moment. Exit code 0: a node would work; 1: there is something to mend.
    """
    from . import arguments, doctor, run

    def make_config() -> NodeConfig:
        return run.node_config(
            model=model,
            blocks=None,
            num_blocks=None,
            bootstrap=arguments.bootstrap_peers(bootstrap),
            mdns=mdns,
            swarm_key=swarm_key,
            allow_peers=allow_peers,
            listen=arguments.listen_addresses(listen),
            announce=arguments.announced_addresses(announce),
            reachability=reachability,
            data_dir=data_dir,
            dtype=dtype,
            quantization=quantization,
            device=device,
        )

    return doctor.doctor(
        settings_file(ctx), settings_trouble(ctx), make_config, json_result=json_result
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
