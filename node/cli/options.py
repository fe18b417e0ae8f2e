"""The options that more than one command has, and the panels that a command's help shows them in."""

from pathlib import Path
from typing import Annotated

import typer

from ..config import DTYPES, QUANTIZATIONS, WIRE_DTYPES
from ..reachability import REACHABILITIES

MODEL = "The model"
SWARM = "The swarm"
REACHED = "How others reach this node"
TEXT = "The text"
COMPUTING = "How to compute"
WEIGHTS = "Weights from peers, and to them"
FILES = "Files"
OUTPUT = "Output"
API = "The HTTP API"

ModelOption = Annotated[
    str,
    typer.Option(
        "--model",
        metavar="MODEL",
        help="demo (the small model that is built in), a folder, a GGUF file, a Hugging Face hub id, "
        "or petals:FINGERPRINT, to be fetched from peers.",
        rich_help_panel=MODEL,
    ),
]
BootstrapOption = Annotated[
    list[str] | None,
    typer.Option(
        "--bootstrap",
        metavar="MULTIADDR",
        help="A peer of the swarm: /ip4/ADDRESS/tcp/PORT/p2p/PEER_ID, as a node prints it when it "
        "starts. May be repeated.",
        rich_help_panel=SWARM,
    ),
]
MdnsOption = Annotated[
    bool | None,
    typer.Option(
        "--mdns/--no-mdns",
        help="Look for peers on the local network, and be found there. Default: if no bootstrap "
        "peer is named.",
        rich_help_panel=SWARM,
    ),
]
VisitorMdnsOption = Annotated[
    bool | None,
    typer.Option(
        "--mdns/--no-mdns",
        help="Look for peers on the local network, too.",
        rich_help_panel=SWARM,
    ),
]
SwarmKeyOption = Annotated[
    Path | None,
    typer.Option(
        "--swarm-key",
        metavar="FILE",
        help="The key that all nodes of a private swarm share; `petals-node swarm-key` makes one.",
        rich_help_panel=SWARM,
    ),
]
AllowPeersOption = Annotated[
    Path | None,
    typer.Option(
        "--allow-peers",
        metavar="FILE",
        help="Have to do only with the peers in this file, one peer id a line.",
        rich_help_panel=SWARM,
    ),
]
DataDirOption = Annotated[
    Path | None,
    typer.Option(
        "--data-dir",
        metavar="DIR",
        help="Where the node's key and state live. Default: in the user's data directory.",
        rich_help_panel=FILES,
    ),
]
DtypeOption = Annotated[
    str,
    typer.Option(
        "--dtype",
        metavar="TYPE",
        help="auto (the fastest that does not round the model's weights), float32, bfloat16 or "
        "float16, for computing.",
        autocompletion=lambda: list(DTYPES),
        rich_help_panel=COMPUTING,
    ),
]
WireDtypeOption = Annotated[
    str,
    typer.Option(
        "--wire-dtype",
        metavar="TYPE",
        help="auto, float32 (exact), bfloat16, float16 or int8, for what travels between peers.",
        autocompletion=lambda: list(WIRE_DTYPES),
        rich_help_panel=COMPUTING,
    ),
]
DeviceOption = Annotated[
    str,
    typer.Option(
        "--device",
        metavar="DEVICE",
        help="auto (a GPU, if torch can use one), cpu, cuda or cuda:N.",
        autocompletion=lambda: ["auto", "cpu", "cuda"],
        rich_help_panel=COMPUTING,
    ),
]
OriginatedModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="MODEL",
        help="demo (the small model that is built in), a folder, a GGUF file, a Hugging Face hub id, "
        "or petals:FINGERPRINT. Default: demo, or the one of the text to resume.",
        rich_help_panel=MODEL,
    ),
]
ResumeOption = Annotated[
    Path | None,
    typer.Option(
        "--resume",
        metavar="FILE",
        help="Go on from this file, if it is there, and keep it up to date.",
        rich_help_panel=FILES,
    ),
]
PatienceOption = Annotated[
    float | None,
    typer.Option(
        "--patience",
        metavar="SECONDS",
        help="Wait so long while nobody can serve some blocks. Default: 120.",
        rich_help_panel=SWARM,
    ),
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Write JSON to standard output.", rich_help_panel=OUTPUT)
]
MaxNewTokensOption = Annotated[
    int | None,
    typer.Option(
        "--max-new-tokens",
        metavar="N",
        help="Stop after so many tokens. Default: 128.",
        rich_help_panel=TEXT,
    ),
]
TemperatureOption = Annotated[
    float | None,
    typer.Option(
        "--temperature",
        metavar="T",
        help="0 (the default): always the likeliest token. Above: the higher, the bolder.",
        rich_help_panel=TEXT,
    ),
]
TopPOption = Annotated[
    float | None,
    typer.Option(
        "--top-p",
        metavar="P",
        help="Sample from the likeliest tokens that have probability P together. Default: 1, all.",
        rich_help_panel=TEXT,
    ),
]
TopKOption = Annotated[
    int | None,
    typer.Option(
        "--top-k",
        metavar="K",
        help="Sample from the K likeliest tokens. Default: 0, all.",
        rich_help_panel=TEXT,
    ),
]
RepetitionPenaltyOption = Annotated[
    float | None,
    typer.Option(
        "--repetition-penalty",
        metavar="X",
        help="Above 1: tokens that were there already become less likely. Default: 1.",
        rich_help_panel=TEXT,
    ),
]
SeedOption = Annotated[
    int | None,
    typer.Option(
        "--seed",
        metavar="N",
        help="The same seed gives the same text. Without one, each is another.",
        rich_help_panel=TEXT,
    ),
]
StopOption = Annotated[
    list[str] | None,
    typer.Option(
        "--stop",
        metavar="TEXT",
        help="Stop before this text. May be repeated.",
        rich_help_panel=TEXT,
    ),
]
ApiKeyOption = Annotated[
    str | None,
    typer.Option(
        "--api-key",
        metavar="KEY",
        help="What clients of the API have to know. In the environment or in the file of settings, "
        "other users of this machine cannot see it.",
        rich_help_panel=API,
    ),
]
CorsOriginOption = Annotated[
    list[str] | None,
    typer.Option(
        "--cors-origin",
        metavar="ORIGIN",
        help="Let web pages from here use the API: https://HOST, or * for all. May be repeated.",
        rich_help_panel=API,
    ),
]
ApiRequestsOption = Annotated[
    int,
    typer.Option(
        "--api-requests",
        metavar="N",
        help="Requests to the API at the same time.",
        rich_help_panel=API,
    ),
]
ApiBodyOption = Annotated[
    int,
    typer.Option(
        "--api-body", metavar="MIB", help="MiB of one request to the API.", rich_help_panel=API
    ),
]
EventsOption = Annotated[
    bool,
    typer.Option(
        "--json",
        help="Write events to standard output, one JSON a line.",
        rich_help_panel=OUTPUT,
    ),
]
ListenOption = Annotated[
    list[str] | None,
    typer.Option(
        "--listen",
        metavar="MULTIADDR",
        help="Listen here, for example /ip4/0.0.0.0/tcp/31330. May be repeated.",
        rich_help_panel=REACHED,
    ),
]
AnnounceOption = Annotated[
    list[str] | None,
    typer.Option(
        "--announce",
        metavar="MULTIADDR",
        help="Tell others to dial this address instead of those listened on, for example that "
        "of a forwarded port. May be repeated.",
        rich_help_panel=REACHED,
    ),
]
ReachabilityOption = Annotated[
    str,
    typer.Option(
        "--reachability",
        metavar="MODE",
        help="auto (find out), public (others can dial this node), or private (they cannot: be "
        "reached through relays).",
        rich_help_panel=REACHED,
        autocompletion=lambda: list(REACHABILITIES),
    ),
]
QuantizationOption = Annotated[
    str,
    typer.Option(
        "--quantization",
        metavar="MODE",
        help="none, int8 or nf4: round the blocks' weights to 8 or 4 bits, to hold more.",
        rich_help_panel=COMPUTING,
        autocompletion=lambda: list(QUANTIZATIONS),
    ),
]
IdentityOption = Annotated[
    Path | None,
    typer.Option(
        "--identity",
        metavar="FILE",
        help="The node's private key; made if not there.",
        rich_help_panel=FILES,
    ),
]
UpnpOption = Annotated[
    bool,
    typer.Option(
        "--upnp/--no-upnp",
        help="Ask the router to forward the port, unless --reachability or --announce says how "
        "others reach this node.",
        rich_help_panel=REACHED,
    ),
]
PublicNameOption = Annotated[
    str | None,
    typer.Option(
        "--public-name",
        metavar="NAME",
        help="What the swarm's status calls you.",
        rich_help_panel=SWARM,
    ),
]
FallbackOption = Annotated[
    str | None,
    typer.Option(
        "--fallback",
        metavar="MODEL",
        help="A folder, GGUF file or hub id for what no peer gives of a model of petals:FINGERPRINT.",
        rich_help_panel=WEIGHTS,
    ),
]
UploadLimitOption = Annotated[
    float | None,
    typer.Option(
        "--upload-limit",
        metavar="MIB",
        help="Give others at most so many MiB of weights a second. Default: as fast as it goes, and "
        "slower while sessions compute.",
        rich_help_panel=WEIGHTS,
    ),
]
MaxDiskSpaceOption = Annotated[
    float | None,
    typer.Option(
        "--max-disk-space",
        metavar="GIB",
        help="Keep at most so many GiB of weights that were fetched from peers.",
        rich_help_panel=WEIGHTS,
    ),
]
EndWithStdinOption = Annotated[
    bool,
    typer.Option("--exit-with-stdin", hidden=True, help="Leave when standard input ends."),
]
