"""The commands of those who give a machine: run, seed, drain and swarm-key.

Rules of this file: as in ``app.py``, it only declares.
"""

from pathlib import Path
from typing import Annotated

import typer

from ...protocol.admission import AdmissionLimits
from ..api.config import ApiConfig
from . import failures, options
from .command import command

BLOCKS = "What to serve"
LIMITS = "What others may have of this node"


@command(
    "run",
    examples=[
        (
            "Begin a swarm: a peer through which others join",
            "petals-node run --listen /ip4/0.0.0.0/tcp/31330",
        ),
        (
            "Serve as many blocks of a model as fit, where the swarm is weakest",
            "petals-node run --model bigscience/bloom-560m --bootstrap $PEER",
        ),
        ("A swarm of the local network, without a bootstrap peer", "petals-node run --model demo"),
        (
            "These blocks and no others, rounded to 8 bits",
            "petals-node run --model demo --blocks 0:4 --quantization int8",
        ),
        (
            "Serve blocks, and an OpenAI-compatible API for the whole model",
            "petals-node run --model demo --bootstrap $PEER --api 127.0.0.1:8080",
        ),
        (
            "Fetch the blocks' weights from peers, too: the fingerprint is all that is known",
            "petals-node run --model petals:8b51d419… --bootstrap $PEER",
        ),
        (
            "A port that the router forwards to this machine",
            "petals-node run --listen /ip4/0.0.0.0/tcp/31330 \\",
            "    --announce /ip4/203.0.113.9/tcp/31330 --reachability public",
        ),
    ],
)
def run_command(
    *,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            metavar="MODEL",
            help="What to serve: demo, a folder, a GGUF file, a Hugging Face hub id, or "
            "petals:FINGERPRINT, to be fetched from peers. Without it the node is a bootstrap peer.",
            rich_help_panel=BLOCKS,
        ),
    ] = None,
    blocks: Annotated[
        str | None,
        typer.Option(
            "--blocks",
            metavar="START:END",
            help="Serve the blocks START, …, END - 1.",
            rich_help_panel=BLOCKS,
        ),
    ] = None,
    num_blocks: Annotated[
        int | None,
        typer.Option(
            "--num-blocks",
            metavar="N",
            help="Serve N blocks, where the swarm is weakest. Without this and --blocks: as many "
            "as fit the free memory.",
            rich_help_panel=BLOCKS,
        ),
    ] = None,
    throughput: Annotated[
        float | None,
        typer.Option(
            "--throughput",
            metavar="N",
            help="Count as N tokens per second through one block, instead of what was measured.",
            rich_help_panel=BLOCKS,
        ),
    ] = None,
    public_name: options.PublicNameOption = None,
    bootstrap: options.BootstrapOption = None,
    mdns: options.MdnsOption = None,
    swarm_key: options.SwarmKeyOption = None,
    allow_peers: options.AllowPeersOption = None,
    listen: options.ListenOption = None,
    announce: options.AnnounceOption = None,
    reachability: options.ReachabilityOption = "auto",
    upnp: options.UpnpOption = True,
    identity: options.IdentityOption = None,
    data_dir: options.DataDirOption = None,
    fallback: options.FallbackOption = None,
    upload_limit: options.UploadLimitOption = None,
    max_disk_space: options.MaxDiskSpaceOption = None,
    dtype: options.DtypeOption = "auto",
    quantization: options.QuantizationOption = "none",
    device: options.DeviceOption = "auto",
    cache_tokens: Annotated[
        int | None,
        typer.Option(
            "--cache-tokens",
            metavar="N",
            help="Keep at most so many tokens of all sessions together.",
            rich_help_panel=options.COMPUTING,
        ),
    ] = None,
    max_sessions: Annotated[
        int,
        typer.Option(
            "--max-sessions",
            metavar="N",
            help="Sessions in all.",
            rich_help_panel=LIMITS,
        ),
    ] = AdmissionLimits.max_sessions,
    peer_sessions: Annotated[
        int,
        typer.Option(
            "--peer-sessions",
            metavar="N",
            help="Sessions of one peer.",
            rich_help_panel=LIMITS,
        ),
    ] = AdmissionLimits.peer_sessions,
    peer_cache_share: Annotated[
        float,
        typer.Option(
            "--peer-cache-share",
            metavar="X",
            help="Share of the KV cache that one peer's sessions may reserve together, from 0 to 1.",
            rich_help_panel=LIMITS,
        ),
    ] = AdmissionLimits.peer_cache_share,
    peer_backlog: Annotated[
        int,
        typer.Option(
            "--peer-backlog",
            metavar="MIB",
            help="MiB of one peer's hidden states that wait to be computed.",
            rich_help_panel=LIMITS,
        ),
    ] = AdmissionLimits.peer_backlog,
    max_connections: Annotated[
        int,
        typer.Option(
            "--max-connections",
            metavar="N",
            help="Connections in all.",
            rich_help_panel=LIMITS,
        ),
    ] = AdmissionLimits.max_connections,
    peer_connections: Annotated[
        int,
        typer.Option(
            "--peer-connections",
            metavar="N",
            help="Connections of one peer.",
            rich_help_panel=LIMITS,
        ),
    ] = AdmissionLimits.peer_connections,
    peer_streams: Annotated[
        int,
        typer.Option(
            "--peer-streams",
            metavar="N",
            help="Open streams of one peer.",
            rich_help_panel=LIMITS,
        ),
    ] = AdmissionLimits.peer_streams,
    peer_opens: Annotated[
        float,
        typer.Option(
            "--peer-opens",
            metavar="N",
            help="Streams that one peer may open in a second, for long.",
            rich_help_panel=LIMITS,
        ),
    ] = AdmissionLimits.peer_opens,
    api: Annotated[
        str | None,
        typer.Option(
            "--api",
            metavar="HOST:PORT",
            help="Serve an OpenAI-compatible API here, too, for example at 127.0.0.1:8080.",
            rich_help_panel=options.API,
        ),
    ] = None,
    api_key: options.ApiKeyOption = None,
    cors_origin: options.CorsOriginOption = None,
    api_requests: options.ApiRequestsOption = ApiConfig.max_requests,
    api_body: options.ApiBodyOption = ApiConfig.max_body_mib,
    json_lines: options.EventsOption = False,
    exit_with_stdin: options.EndWithStdinOption = False,
) -> int:
    """Serve a part of a model to the swarm, or be a bootstrap peer, until Ctrl-C.

    A model is a stack of blocks; a node holds some of them, and texts pass through nodes that hold all of
    them together. Without --blocks it takes those of which the swarm has least, and moves when they are
    needed elsewhere. It prints an address when it serves: that is the --bootstrap of others. Ctrl-C,
    SIGTERM or `petals-node drain`: it hands its sessions over, and is gone within five seconds.
    """
    from . import arguments, run

    exposed = None
    if api is not None:
        exposed = arguments.api_config(
            api, api_key, cors_origin, max_requests=api_requests, max_body_mib=api_body
        )
    config = run.node_config(
        model=model,
        blocks=arguments.parse_blocks(blocks),
        num_blocks=arguments.check_positive(num_blocks, "--num-blocks"),
        throughput=throughput,
        bootstrap=arguments.bootstrap_peers(bootstrap),
        mdns=mdns,
        swarm_key=swarm_key,
        allow_peers=allow_peers,
        listen=arguments.listen_addresses(listen),
        announce=arguments.announced_addresses(announce),
        reachability=reachability,
        upnp=upnp,
        identity=identity,
        data_dir=data_dir,
        fallback=fallback,
        upload_limit=upload_limit,
        max_disk_space=max_disk_space,
        dtype=dtype,
        quantization=quantization,
        device=device,
        cache_tokens=arguments.check_positive(cache_tokens, "--cache-tokens"),
        limits=arguments.admission_limits(
            max_sessions=max_sessions,
            peer_sessions=peer_sessions,
            peer_cache_share=peer_cache_share,
            peer_backlog=peer_backlog,
            max_connections=max_connections,
            peer_connections=peer_connections,
            peer_streams=peer_streams,
            peer_opens=peer_opens,
        ),
        public_name=public_name,
    )
    return run.serve(config, exposed, json_lines=json_lines, exit_with_stdin=exit_with_stdin)


@command(
    "seed",
    examples=[
        (
            "Publish a model that is on no hub; it prints what others need",
            "petals-node seed --model ./my-model --listen /ip4/0.0.0.0/tcp/31330",
        ),
        (
            "The same in a swarm that is there, and leave room on the line",
            "petals-node seed --model ./my-model --bootstrap $PEER --upload-limit 5",
        ),
    ],
)
def seed_command(
    *,
    model: Annotated[
        str,
        typer.Option(
            "--model",
            metavar="MODEL",
            help="What to give: a folder, a GGUF file, a Hugging Face hub id, demo, or "
            "petals:FINGERPRINT, to be fetched first.",
            rich_help_panel=options.MODEL,
        ),
    ],
    public_name: options.PublicNameOption = None,
    bootstrap: options.BootstrapOption = None,
    mdns: options.MdnsOption = None,
    swarm_key: options.SwarmKeyOption = None,
    allow_peers: options.AllowPeersOption = None,
    listen: options.ListenOption = None,
    announce: options.AnnounceOption = None,
    reachability: options.ReachabilityOption = "auto",
    upnp: options.UpnpOption = True,
    identity: options.IdentityOption = None,
    data_dir: options.DataDirOption = None,
    fallback: options.FallbackOption = None,
    upload_limit: options.UploadLimitOption = None,
    max_disk_space: options.MaxDiskSpaceOption = None,
    json_lines: options.EventsOption = False,
    exit_with_stdin: options.EndWithStdinOption = False,
) -> int:
    """Give a model to whoever knows its fingerprint, without serving blocks, until Ctrl-C.

    It reads all of the model once, and then says under which fingerprint others get it, config and
    tokenizer included: with `--model petals:FINGERPRINT` in place of a folder. It needs no memory for
    the model, and nobody needs it any more once others have every piece.
    """
    from . import arguments, run

    config = run.node_config(
        model=model,
        blocks=None,
        num_blocks=None,
        seed=True,
        bootstrap=arguments.bootstrap_peers(bootstrap),
        mdns=mdns,
        swarm_key=swarm_key,
        allow_peers=allow_peers,
        listen=arguments.listen_addresses(listen),
        announce=arguments.announced_addresses(announce),
        reachability=reachability,
        upnp=upnp,
        identity=identity,
        data_dir=data_dir,
        fallback=fallback,
        upload_limit=upload_limit,
        max_disk_space=max_disk_space,
        public_name=public_name,
    )
    return run.serve(config, json_lines=json_lines, exit_with_stdin=exit_with_stdin)


@command(
    "drain",
    examples=[
        ("End the node that was started here", "petals-node drain"),
        (
            "End one that has a data directory of its own",
            "petals-node drain --data-dir /var/lib/petals-node",
        ),
    ],
)
def drain_command(*, data_dir: options.DataDirOption = None) -> int:
    """Let the node that runs here hand its sessions over to others, and leave the swarm.

    The node is found by its data directory. This waits until it has gone, and changes no text: those that
    run through it go on through others.
    """
    from . import drain

    return drain.drain(data_dir)


@command(
    "swarm-key",
    examples=[
        (
            "Make a key, and a swarm that only those can join who have it",
            "petals-node swarm-key swarm.key",
            "petals-node run --swarm-key swarm.key --listen /ip4/0.0.0.0/tcp/31330",
        ),
    ],
)
def swarm_key_command(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Where to write it.")],
) -> int:
    """Make the key of a private swarm, for all of its nodes to share (--swarm-key).

    Who does not have the same key cannot connect to any of its nodes, whether to give or to use.
    A file that is there already is not replaced.
    """
    from .. import private

    private.make_swarm_key(file)
    typer.echo(f"Wrote {file}: give it to those whom you trust, over a safe way, and no one else.")
    return failures.OK
