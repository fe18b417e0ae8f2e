"""The command line: its commands, their options, and how a command's end becomes an exit code.

Rules of this file: it only declares and dispatches. Arguments are checked in ``arguments.py``; the
work is in one file per command, which is imported when its command runs, so that ``--help`` and
bad input never wait for torch.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from ...protocol.admission import AdmissionLimits
from ..api.config import DEFAULT_ADDRESS, ApiConfig
from ..config import swarm_key_from_environment
from . import failures, logs

app = typer.Typer(
    name="petals-node",
    help="Run a language model on a swarm of machines, none of which could hold it alone.",
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help answers in half the time
)


def _show_version(*, wanted: bool) -> None:
    if wanted:
        from ... import __version__

        typer.echo(f"petals-node {__version__}")
        raise typer.Exit


def _switch_debugging_on(*, wanted: bool) -> None:
    if wanted:
        os.environ[failures.DEBUG_VARIABLE] = "1"
        logs.set_up(everything=True)


DebugOption = Annotated[
    bool,
    typer.Option(
        "--debug",
        callback=lambda wanted: _switch_debugging_on(wanted=wanted),
        is_eager=True,
        help=f"Show logs and tracebacks (also {failures.DEBUG_VARIABLE}=1).",
    ),
]
ModelOption = Annotated[
    str,
    typer.Option(
        "--model",
        metavar="MODEL",
        help="demo (the small model that is built in), a folder, or a Hugging Face hub id.",
    ),
]
BootstrapOption = Annotated[
    list[str] | None,
    typer.Option(
        "--bootstrap",
        metavar="MULTIADDR",
        help="A peer of the swarm: /ip4/ADDRESS/tcp/PORT/p2p/PEER_ID. May be repeated. "
        "Default: those in $PETALS_BOOTSTRAP.",
    ),
]
MdnsOption = Annotated[
    bool | None,
    typer.Option(
        "--mdns/--no-mdns",
        help="Look for peers on the local network, and be found there. Default: if no bootstrap "
        "peer is named.",
    ),
]
SwarmKeyOption = Annotated[
    Path | None,
    typer.Option(
        "--swarm-key",
        metavar="FILE",
        help="The key that all nodes of a private swarm share; `petals-node swarm-key` makes one. "
        "Default: $PETALS_SWARM_KEY.",
    ),
]
AllowPeersOption = Annotated[
    Path | None,
    typer.Option(
        "--allow-peers",
        metavar="FILE",
        help="Have to do only with the peers in this file, one peer id a line.",
    ),
]
DataDirOption = Annotated[
    Path | None,
    typer.Option(
        "--data-dir",
        metavar="DIR",
        help="Where the node's key and state live. Default: $PETALS_DATA_DIR or the user's data "
        "directory.",
    ),
]
DtypeOption = Annotated[
    str,
    typer.Option(
        "--dtype", metavar="TYPE", help="auto, float32, bfloat16 or float16, for computing."
    ),
]
WireDtypeOption = Annotated[
    str,
    typer.Option(
        "--wire-dtype",
        metavar="TYPE",
        help="auto, float32 (exact), bfloat16, float16 or int8, for what travels between peers.",
    ),
]
DeviceOption = Annotated[
    str, typer.Option("--device", metavar="DEVICE", help="auto, cpu, cuda or cuda:N.")
]
OriginatedModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="MODEL",
        help="demo (the small model that is built in), a folder, or a Hugging Face hub id. "
        "Default: demo, or the one of the text to resume.",
    ),
]
ResumeOption = Annotated[
    Path | None,
    typer.Option(
        "--resume",
        metavar="FILE",
        help="Go on from this file, if it is there, and keep it up to date.",
    ),
]
PatienceOption = Annotated[
    float | None,
    typer.Option(
        "--patience",
        metavar="SECONDS",
        help="Wait so long while nobody can serve some blocks. Default: 120.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Write JSON to standard output.")]
MaxNewTokensOption = Annotated[
    int | None,
    typer.Option("--max-new-tokens", metavar="N", help="Stop after so many tokens."),
]
TemperatureOption = Annotated[
    float | None,
    typer.Option(
        "--temperature",
        metavar="T",
        help="0: always the likeliest token. Above: the higher, the bolder.",
    ),
]
TopPOption = Annotated[
    float | None,
    typer.Option(
        "--top-p",
        metavar="P",
        help="Sample from the likeliest tokens that have probability P together.",
    ),
]
TopKOption = Annotated[
    int | None, typer.Option("--top-k", metavar="K", help="Sample from the K likeliest tokens.")
]
RepetitionPenaltyOption = Annotated[
    float | None,
    typer.Option(
        "--repetition-penalty",
        metavar="X",
        help="Above 1: tokens that were there already become less likely.",
    ),
]
SeedOption = Annotated[
    int | None,
    typer.Option("--seed", metavar="N", help="The same seed gives the same text."),
]
StopOption = Annotated[
    list[str] | None,
    typer.Option("--stop", metavar="TEXT", help="Stop before this text. May be repeated."),
]
ApiKeyOption = Annotated[
    str | None,
    typer.Option(
        "--api-key",
        metavar="KEY",
        help="What clients of the API have to know. Default: $PETALS_API_KEY, which other users of "
        "this machine cannot see, or none.",
    ),
]
CorsOriginOption = Annotated[
    list[str] | None,
    typer.Option(
        "--cors-origin",
        metavar="ORIGIN",
        help="Let web pages from here use the API: https://HOST, or * for all. May be repeated.",
    ),
]
ApiRequestsOption = Annotated[
    int,
    typer.Option("--api-requests", metavar="N", help="Requests to the API at the same time."),
]
ApiBodyOption = Annotated[
    int, typer.Option("--api-body", metavar="MIB", help="MiB of one request to the API.")
]
EndWithStdinOption = Annotated[
    bool,
    typer.Option("--exit-with-stdin", hidden=True, help="Leave when standard input ends."),
]


@app.callback()
def _common(
    *,
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=lambda wanted: _show_version(wanted=wanted),
            is_eager=True,
            help="Show the version and exit.",
        ),
    ] = False,
    debug: DebugOption = False,
) -> None:
    del version, debug  # their callbacks have acted


@app.command("run")
def run_command(
    *,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            metavar="MODEL",
            help="What to serve: demo, a folder, or a Hugging Face hub id. Without it the node "
            "is a bootstrap peer.",
        ),
    ] = None,
    blocks: Annotated[
        str | None,
        typer.Option("--blocks", metavar="START:END", help="Serve the blocks START, …, END - 1."),
    ] = None,
    num_blocks: Annotated[
        int | None,
        typer.Option(
            "--num-blocks",
            metavar="N",
            help="Serve N blocks, where the swarm is weakest. Without this and --blocks: as many "
            "as fit the free memory.",
        ),
    ] = None,
    throughput: Annotated[
        float | None,
        typer.Option(
            "--throughput",
            metavar="N",
            help="Count as N tokens per second through one block, instead of what was measured.",
        ),
    ] = None,
    bootstrap: BootstrapOption = None,
    mdns: MdnsOption = None,
    swarm_key: SwarmKeyOption = None,
    allow_peers: AllowPeersOption = None,
    listen: Annotated[
        list[str] | None,
        typer.Option(
            "--listen",
            metavar="MULTIADDR",
            help="Listen here, for example /ip4/0.0.0.0/tcp/31330. May be repeated.",
        ),
    ] = None,
    announce: Annotated[
        list[str] | None,
        typer.Option(
            "--announce",
            metavar="MULTIADDR",
            help="Tell others to dial this address instead of those listened on, for example that "
            "of a forwarded port. May be repeated.",
        ),
    ] = None,
    reachability: Annotated[
        str,
        typer.Option(
            "--reachability",
            metavar="MODE",
            help="auto (find out), public (others can dial this node), or private (they cannot: be "
            "reached through relays).",
        ),
    ] = "auto",
    identity: Annotated[
        Path | None,
        typer.Option(
            "--identity", metavar="FILE", help="The node's private key; made if not there."
        ),
    ] = None,
    data_dir: DataDirOption = None,
    dtype: DtypeOption = "auto",
    quantization: Annotated[
        str,
        typer.Option(
            "--quantization",
            metavar="MODE",
            help="none, int8 or nf4: round the blocks' weights to 8 or 4 bits, to hold more.",
        ),
    ] = "none",
    device: DeviceOption = "auto",
    cache_tokens: Annotated[
        int | None,
        typer.Option(
            "--cache-tokens",
            metavar="N",
            help="Keep at most so many tokens of all sessions together.",
        ),
    ] = None,
    max_sessions: Annotated[
        int,
        typer.Option("--max-sessions", metavar="N", help="Sessions in all."),
    ] = AdmissionLimits.max_sessions,
    peer_sessions: Annotated[
        int,
        typer.Option("--peer-sessions", metavar="N", help="Sessions of one peer."),
    ] = AdmissionLimits.peer_sessions,
    peer_cache_share: Annotated[
        float,
        typer.Option(
            "--peer-cache-share",
            metavar="X",
            help="Share of the KV cache that one peer's sessions may reserve together, from 0 to 1.",
        ),
    ] = AdmissionLimits.peer_cache_share,
    peer_backlog: Annotated[
        int,
        typer.Option(
            "--peer-backlog",
            metavar="MIB",
            help="MiB of one peer's hidden states that wait to be computed.",
        ),
    ] = AdmissionLimits.peer_backlog,
    max_connections: Annotated[
        int,
        typer.Option("--max-connections", metavar="N", help="Connections in all."),
    ] = AdmissionLimits.max_connections,
    peer_connections: Annotated[
        int,
        typer.Option("--peer-connections", metavar="N", help="Connections of one peer."),
    ] = AdmissionLimits.peer_connections,
    peer_streams: Annotated[
        int,
        typer.Option("--peer-streams", metavar="N", help="Open streams of one peer."),
    ] = AdmissionLimits.peer_streams,
    peer_opens: Annotated[
        float,
        typer.Option(
            "--peer-opens",
            metavar="N",
            help="Streams that one peer may open in a second, for long.",
        ),
    ] = AdmissionLimits.peer_opens,
    public_name: Annotated[
        str | None,
        typer.Option("--public-name", metavar="NAME", help="What the swarm's status calls you."),
    ] = None,
    api: Annotated[
        str | None,
        typer.Option(
            "--api",
            metavar="HOST:PORT",
            help="Serve an OpenAI-compatible API here, too, for example at 127.0.0.1:8080.",
        ),
    ] = None,
    api_key: ApiKeyOption = None,
    cors_origin: CorsOriginOption = None,
    api_requests: ApiRequestsOption = ApiConfig.max_requests,
    api_body: ApiBodyOption = ApiConfig.max_body_mib,
    json_lines: Annotated[
        bool, typer.Option("--json", help="Write events to standard output, one JSON a line.")
    ] = False,
    exit_with_stdin: EndWithStdinOption = False,
    debug: DebugOption = False,
) -> int:
    """Serve a part of a model to the swarm, or be a bootstrap peer, until Ctrl-C."""
    del debug
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
        swarm_key=swarm_key or swarm_key_from_environment(),
        allow_peers=allow_peers,
        listen=arguments.listen_addresses(listen),
        announce=arguments.announced_addresses(announce),
        reachability=reachability,
        identity=identity,
        data_dir=data_dir,
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


@app.command("api")
def api_command(
    *,
    model: ModelOption = "demo",
    address: Annotated[
        str, typer.Option("--api", metavar="HOST:PORT", help="Where to listen.")
    ] = DEFAULT_ADDRESS,
    api_key: ApiKeyOption = None,
    cors_origin: CorsOriginOption = None,
    api_requests: ApiRequestsOption = ApiConfig.max_requests,
    api_body: ApiBodyOption = ApiConfig.max_body_mib,
    bootstrap: BootstrapOption = None,
    mdns: MdnsOption = None,
    swarm_key: SwarmKeyOption = None,
    allow_peers: AllowPeersOption = None,
    dtype: DtypeOption = "auto",
    wire_dtype: WireDtypeOption = "auto",
    device: DeviceOption = "auto",
    patience: PatienceOption = None,
    json_lines: Annotated[
        bool, typer.Option("--json", help="Write events to standard output, one JSON a line.")
    ] = False,
    exit_with_stdin: EndWithStdinOption = False,
    debug: DebugOption = False,
) -> int:
    """Serve an OpenAI-compatible API to a swarm's model, without serving blocks, until Ctrl-C."""
    del debug
    from . import arguments, originator, run

    return run.serve(
        originator.node_config(
            model=model,
            bootstrap=bootstrap,
            mdns=mdns,
            swarm_key=swarm_key,
            allow_peers=allow_peers,
            dtype=dtype,
            wire_dtype=wire_dtype,
            device=device,
            patience=patience,
        ),
        arguments.api_config(
            address, api_key, cors_origin, max_requests=api_requests, max_body_mib=api_body
        ),
        json_lines=json_lines,
        exit_with_stdin=exit_with_stdin,
    )


@app.command("generate")
def generate_command(
    prompt: Annotated[
        str | None,
        typer.Argument(
            metavar="PROMPT",
            help="The text to go on from; - reads it. Not needed with --resume.",
            show_default=False,
        ),
    ] = None,
    *,
    model: OriginatedModelOption = None,
    bootstrap: BootstrapOption = None,
    mdns: MdnsOption = None,
    swarm_key: SwarmKeyOption = None,
    allow_peers: AllowPeersOption = None,
    max_new_tokens: MaxNewTokensOption = None,
    temperature: TemperatureOption = None,
    top_p: TopPOption = None,
    top_k: TopKOption = None,
    repetition_penalty: RepetitionPenaltyOption = None,
    seed: SeedOption = None,
    stop: StopOption = None,
    dtype: DtypeOption = "auto",
    wire_dtype: WireDtypeOption = "auto",
    device: DeviceOption = "auto",
    patience: PatienceOption = None,
    resume: ResumeOption = None,
    json_result: Annotated[
        bool,
        typer.Option(
            "--json", help="End standard output with one line of JSON: text, tokens, figures."
        ),
    ] = False,
    exit_with_stdin: EndWithStdinOption = False,
    debug: DebugOption = False,
) -> int:
    """Go on from a prompt; the text streams to standard output."""
    del debug
    from . import generate, originator

    saved = originator.load_if_there(resume)
    generate.check_prompt(prompt, resume, saved)
    return generate.generate(
        originator.node_config(
            model=originator.chosen_model(model, saved),
            bootstrap=bootstrap,
            mdns=mdns,
            swarm_key=swarm_key,
            allow_peers=allow_peers,
            dtype=dtype,
            wire_dtype=originator.chosen_wire_dtype(wire_dtype, saved),
            device=device,
            patience=patience,
        ),
        prompt,
        originator.params_of_one_text(
            saved,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            repetition_penalty=repetition_penalty,
            seed=seed,
            stop=stop,
        ),
        file=resume,
        saved=saved,
        json_result=json_result,
        exit_with_stdin=exit_with_stdin,
    )


@app.command("chat")
def chat_command(
    *,
    model: OriginatedModelOption = None,
    bootstrap: BootstrapOption = None,
    mdns: MdnsOption = None,
    swarm_key: SwarmKeyOption = None,
    allow_peers: AllowPeersOption = None,
    max_new_tokens: MaxNewTokensOption = None,
    temperature: TemperatureOption = None,
    top_p: TopPOption = None,
    top_k: TopKOption = None,
    repetition_penalty: RepetitionPenaltyOption = None,
    seed: SeedOption = None,
    stop: StopOption = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-tokens", metavar="N", help="Room for the whole conversation, in tokens."
        ),
    ] = None,
    dtype: DtypeOption = "auto",
    wire_dtype: WireDtypeOption = "auto",
    device: DeviceOption = "auto",
    patience: PatienceOption = None,
    resume: ResumeOption = None,
    debug: DebugOption = False,
) -> int:
    """Take turns with the model; the swarm remembers the conversation between turns."""
    del debug
    from . import arguments, chat, originator

    saved = originator.load_if_there(resume)
    return chat.chat(
        originator.node_config(
            model=originator.chosen_model(model, saved),
            bootstrap=bootstrap,
            mdns=mdns,
            swarm_key=swarm_key,
            allow_peers=allow_peers,
            dtype=dtype,
            wire_dtype=originator.chosen_wire_dtype(wire_dtype, saved),
            device=device,
            patience=patience,
        ),
        originator.params_of_next_turns(
            saved,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            repetition_penalty=repetition_penalty,
            seed=seed,
            stop=stop,
        ),
        max_tokens=arguments.check_positive(max_tokens, "--max-tokens"),
        file=resume,
        saved=saved,
    )


@app.command("status")
def status_command(
    *,
    model: Annotated[
        str | None,
        typer.Option(
            "--model", metavar="MODEL", help="Show only this model: demo, a folder, or a hub id."
        ),
    ] = None,
    bootstrap: BootstrapOption = None,
    mdns: MdnsOption = None,
    swarm_key: SwarmKeyOption = None,
    allow_peers: AllowPeersOption = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="Go on showing what changes, until Ctrl-C.")
    ] = False,
    json_result: JsonOption = False,
    exit_with_stdin: EndWithStdinOption = False,
    debug: DebugOption = False,
) -> int:
    """Show which blocks are served how often, by whom, how fast, and in which state."""
    del debug
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


@app.command("drain")
def drain_command(*, data_dir: DataDirOption = None, debug: DebugOption = False) -> int:
    """Let the node that runs here hand its sessions over to others, and leave the swarm."""
    del debug
    from . import drain

    return drain.drain(data_dir)


@app.command("swarm-key")
def swarm_key_command(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Where to write it.")],
    *,
    debug: DebugOption = False,
) -> int:
    """Make the key of a private swarm, for all of its nodes to share (--swarm-key)."""
    del debug
    from .. import private

    private.make_swarm_key(file)
    typer.echo(f"Wrote {file}: give it to those whom you trust, over a safe way, and no one else.")
    return failures.OK


@app.command("demo")
def demo_command(
    *,
    prompt: Annotated[
        str, typer.Option("--prompt", metavar="TEXT", help="The text to go on from.")
    ] = "In the beginning",
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", metavar="N", help="How many tokens to generate.")
    ] = 60,
    nodes: Annotated[
        int, typer.Option("--nodes", metavar="N", help="How many processes serve the model.")
    ] = 3,
    model: ModelOption = "demo",
    debug: DebugOption = False,
) -> int:
    """Show a whole swarm on this machine, and check its text against transformers'."""
    del debug
    from . import demo

    return demo.demo(prompt=prompt, max_new_tokens=max_new_tokens, nodes=nodes, model=model)


@app.command("reference", hidden=True)
def reference_command(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT")],
    *,
    model: ModelOption = "demo",
    max_new_tokens: MaxNewTokensOption = None,
    repetition_penalty: RepetitionPenaltyOption = None,
    exit_with_stdin: EndWithStdinOption = False,
    debug: DebugOption = False,
) -> int:
    """Generate greedily with transformers alone, in this process, to compare with."""
    del debug
    from . import reference

    return reference.reference(
        model,
        prompt,
        max_new_tokens=max_new_tokens,
        repetition_penalty=repetition_penalty,
        exit_with_stdin=exit_with_stdin,
    )


def run_command_line(argv: Sequence[str]) -> int:
    """Run one command and return the exit code of the process; never raises, never a traceback.

    With --debug the traceback is shown as well.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that cannot show a token's letters
    try:
        result = app(list(argv) or ["--help"], prog_name="petals-node", standalone_mode=False)
    except typer.TyperException as error:
        return _complain(error.exit_code, f"{error.format_message()} (--help shows the options)")
    except BaseException as error:  # noqa: BLE001 - the last border: everything becomes a line
        if failures.is_broken_pipe(error):
            # Say nothing more, also not when the interpreter flushes at its end.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return failures.FAILED
        if failures.debugging():
            sys.stderr.write(failures.traceback_of(error))
        return _complain(*failures.explain(error))
    return result if isinstance(result, int) else failures.OK


def _complain(code: int, line: str) -> int:
    sys.stdout.flush()
    typer.echo(f"petals-node: {line}", err=True)
    return code
