"""The commands of those who use a swarm: generate, chat and api.

Rules of this file: as in ``app.py``, it only declares.
"""

from typing import Annotated

import typer

from ..api.config import DEFAULT_ADDRESS, ApiConfig
from . import options
from .command import command


@command(
    "generate",
    examples=[
        (
            "Go on from a text, with the swarm that a peer is in",
            'petals-node generate --bootstrap $PEER --model demo "The king"',
        ),
        (
            "The same, with the peers of the environment",
            "export PETALS_BOOTSTRAP=/ip4/203.0.113.5/tcp/31330/p2p/12D3Koo…",
            'petals-node generate "In the beginning"',
        ),
        (
            "Bolder, and the same again with the same seed",
            'petals-node generate --temperature 0.8 --seed 7 "Once upon a time"',
        ),
        (
            "Keep the text in a file, and go on with it after a crash",
            'petals-node generate --resume story "In the beginning"',
        ),
        (
            "From another program, for another program",
            'echo -n "And God said" | petals-node generate --json -',
        ),
    ],
)
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
    model: options.OriginatedModelOption = None,
    bootstrap: options.BootstrapOption = None,
    mdns: options.VisitorMdnsOption = None,
    swarm_key: options.SwarmKeyOption = None,
    allow_peers: options.AllowPeersOption = None,
    max_new_tokens: options.MaxNewTokensOption = None,
    temperature: options.TemperatureOption = None,
    top_p: options.TopPOption = None,
    top_k: options.TopKOption = None,
    repetition_penalty: options.RepetitionPenaltyOption = None,
    seed: options.SeedOption = None,
    stop: options.StopOption = None,
    dtype: options.DtypeOption = "auto",
    wire_dtype: options.WireDtypeOption = "auto",
    device: options.DeviceOption = "auto",
    patience: options.PatienceOption = None,
    resume: options.ResumeOption = None,
    json_result: Annotated[
        bool,
        typer.Option(
            "--json",
            help="End standard output with one line of JSON: text, tokens, figures.",
            rich_help_panel=options.OUTPUT,
        ),
    ] = False,
    exit_with_stdin: options.EndWithStdinOption = False,
) -> int:
    """Go on from a prompt; the text streams to standard output.

    One peer of a swarm that serves the model has to be named (--bootstrap), or found on the local network
    (--mdns). Only the model's two ends are loaded here; its blocks run on the swarm's nodes. If one of
    those goes away, others take over, and the text stays the same. Where nobody serves some blocks, it
    waits (--patience). Exit code 0: written to its end; 1: broken off; 2: what was asked for cannot be.
    """
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


@command(
    "chat",
    examples=[
        ("Talk to a model of the local network's swarm", "petals-node chat --mdns --model demo"),
        (
            "A conversation that outlives this machine's crashes",
            "petals-node chat --model bigscience/bloom-560m --resume conversation",
        ),
    ],
)
def chat_command(
    *,
    model: options.OriginatedModelOption = None,
    bootstrap: options.BootstrapOption = None,
    mdns: options.VisitorMdnsOption = None,
    swarm_key: options.SwarmKeyOption = None,
    allow_peers: options.AllowPeersOption = None,
    max_new_tokens: options.MaxNewTokensOption = None,
    temperature: options.TemperatureOption = None,
    top_p: options.TopPOption = None,
    top_k: options.TopKOption = None,
    repetition_penalty: options.RepetitionPenaltyOption = None,
    seed: options.SeedOption = None,
    stop: options.StopOption = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-tokens",
            metavar="N",
            help="Room for the whole conversation, in tokens.",
            rich_help_panel=options.TEXT,
        ),
    ] = None,
    dtype: options.DtypeOption = "auto",
    wire_dtype: options.WireDtypeOption = "auto",
    device: options.DeviceOption = "auto",
    patience: options.PatienceOption = None,
    resume: options.ResumeOption = None,
) -> int:
    """Take turns with the model; the swarm remembers the conversation between turns.

    A peer is named as for `generate`. What you type goes through the chat template of the model, if it has
    one; a model without one goes on with the text as it is. /quit or Ctrl-D ends the conversation, Ctrl-C
    breaks off. With --resume it is kept in a file, from which the same command goes on.
    """
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


@command(
    "api",
    examples=[
        (
            "Let any client of OpenAI's API use the swarm: at http://127.0.0.1:8080/v1",
            "petals-node api --model demo --bootstrap $PEER",
        ),
        (
            "For other machines, too; they need the key",
            "PETALS_API_KEY=... petals-node api --bootstrap $PEER --api 0.0.0.0:8080",
        ),
    ],
)
def api_command(
    *,
    model: options.ModelOption = "demo",
    address: Annotated[
        str,
        typer.Option(
            "--api", metavar="HOST:PORT", help="Where to listen.", rich_help_panel=options.API
        ),
    ] = DEFAULT_ADDRESS,
    api_key: options.ApiKeyOption = None,
    cors_origin: options.CorsOriginOption = None,
    api_requests: options.ApiRequestsOption = ApiConfig.max_requests,
    api_body: options.ApiBodyOption = ApiConfig.max_body_mib,
    bootstrap: options.BootstrapOption = None,
    mdns: options.VisitorMdnsOption = None,
    swarm_key: options.SwarmKeyOption = None,
    allow_peers: options.AllowPeersOption = None,
    dtype: options.DtypeOption = "auto",
    wire_dtype: options.WireDtypeOption = "auto",
    device: options.DeviceOption = "auto",
    patience: options.PatienceOption = None,
    json_lines: options.EventsOption = False,
    exit_with_stdin: options.EndWithStdinOption = False,
) -> int:
    """Serve an OpenAI-compatible API to a swarm's model, without serving blocks, until Ctrl-C.

    A peer is named as for `generate`. Programs take http://HOST:PORT/v1 as their base URL, and any key if
    there is no --api-key; people open http://HOST:PORT/ in a browser, and see the swarm and a chat;
    Prometheus reads /metrics. A node that serves blocks does the same with `petals-node run --api`.
    """
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
