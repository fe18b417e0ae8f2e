"""The web page in a real browser, before a swarm whose nodes come and go.

Four nodes serve the demo, two of them the middle: whichever of the two a text goes through can be killed.
The tests go from a whole swarm to one that has lost nodes; what is seen on the way is what the README
shows (``PETALS_TEST_SCREENSHOTS=docs scripts/test tests/swarm/test_page.py`` takes it anew).
"""

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from petals.inference.sampling_params import SamplingParams
from petals.node.api import page_files
from support.browser import DESKTOP, PHONE, Browser, browser, needs_chromium
from support.processes import (
    CommandProcess,
    ProcessSwarm,
    ServingNode,
    run_command,
    swarm,
)
from support.reference import ReferenceModel

KEY = "a secret"
SPANS = {"willow": "0:3", "rowan": "3:6", "birch": "2:6"}
LAST = {"alder": "6:8"}
PROMPT = "In the beginning of the reign of the king"
SMALL_PHONE = (320, 640)
TALL = (1440, 1240)
"""Has room for all that the page says of a swarm of four."""
ANSWER = ".turn.assistant:not([aria-busy]) .said"

pytestmark = needs_chromium


@dataclass(frozen=True)
class Seen:
    """A swarm, and somebody who looks at it."""

    processes: ProcessSwarm
    model: ReferenceModel
    api: CommandProcess
    """Of a node that serves nothing."""
    page: str
    locked_page: str
    """Of a node that serves, and asks for a key."""
    browser: Browser
    screenshots: Path

    def status(self) -> dict[str, Any]:
        """What ``petals-node status --json`` writes now."""
        done = run_command("status", "--json", "--bootstrap", self.processes.address)
        assert done.returncode == 0, done.stderr
        told: dict[str, Any] = json.loads(done.stdout)
        return told

    def node(self, name: str) -> ServingNode:
        """The process of that public name."""
        [peer] = [p for p in self.status()["models"][0]["peers"] if p["public_name"] == name]
        return self.processes.node(peer["peer_id"])


@pytest.fixture(scope="module")
def world(demo: ReferenceModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seen]:
    wanted = os.environ.get("PETALS_TEST_SCREENSHOTS")
    with contextlib.ExitStack() as stack:
        processes = stack.enter_context(swarm(tmp_path_factory.mktemp("swarm")))
        api = stack.enter_context(
            CommandProcess(
                *("api", "--json", "--model", demo.name, "--bootstrap", processes.address),
                *("--api", "127.0.0.1:0", "--dtype", "float32"),
            )
        )
        locked = ("--api", "127.0.0.1:0", "--api-key", KEY)
        *_, last = processes.serve_named({**SPANS, **LAST}, demo.name, options=locked)
        yield Seen(
            processes,
            demo,
            api,
            str(api.event("api")["page"]),
            str(last.event("api")["page"]),
            stack.enter_context(browser(tmp_path_factory.mktemp("profile"))),
            Path(wanted) if wanted else tmp_path_factory.mktemp("screenshots"),
        )


@pytest.fixture
def seen(world: Seen) -> Iterator[Seen]:
    """The page as somebody opens it; after the test its console must have no error."""
    world.browser.look_like(DESKTOP)
    world.browser.open(world.page)
    yield world
    assert world.browser.complaints() == []


def rows(window: Browser) -> list[str]:
    """The nodes that the page shows, by peer id."""
    found: list[str] = window.run(
        "return [...document.querySelectorAll('tr[data-peer]')].map(row => row.dataset.peer)"
    )
    return found


def settle(window: Browser, **settings: object) -> None:
    """Set what texts are made with."""
    window.click("#open-settings")
    for name, value in settings.items():
        window.write(f"#settings [name={name}]", str(value))
    window.click("#settings .send")


def ask(window: Browser, text: str) -> None:
    window.write("#message", text)
    window.click("#send")


def answer(window: Browser) -> str:
    """The last one, when it is whole."""
    window.wait(lambda: window.all("#again") and window.texts(ANSWER))
    return window.texts(ANSWER)[-1]


def expected(model: ReferenceModel, text: str, params: SamplingParams) -> str:
    """What transformers alone answers."""
    token_ids = model.tokenizer(text + "\n")["input_ids"]
    told: str = model.tokenizer.decode(
        model.generate_from(token_ids, params), skip_special_tokens=True
    )
    return told


def test_the_page_shows_what_status_says(seen: Seen) -> None:
    window = seen.browser
    window.wait(lambda: window.text("#live") == "Live" and len(rows(window)) == 4)
    status = seen.status()
    assert httpx.get(seen.page + "swarm").json() == status

    [model] = status["models"]
    times = window.run(
        "return [...document.querySelectorAll('.depth > span')].map(s => [s.dataset.times, s.title])"
    )
    assert [int(shown) for shown, _ in times] == [min(count, 3) for count in model["coverage"]]
    for (_, title), count in zip(times, model["coverage"], strict=True):
        assert f": {count} node" in title
    assert rows(window) == [peer["peer_id"] for peer in model["peers"]]
    assert window.texts(".strip .span") == ["{}:{}".format(*p["blocks"]) for p in model["peers"]]
    assert window.texts("tbody .name") == [peer["public_name"] for peer in model["peers"]]
    assert window.text("#figures .value") == "4"
    assert window.text("#depth-sentence").startswith("All 8 blocks are served")
    assert window.text("#notice") == ""


def test_an_answer_is_what_transformers_says_and_its_ring_is_shown(seen: Seen) -> None:
    window = seen.browser
    params = SamplingParams(max_new_tokens=300)
    settle(window, temperature=0, max_tokens=300)
    ask(window, PROMPT)
    window.wait(lambda: len(window.all(".hops li")) == 4)  # three hops, and this node
    assert window.texts(".hops .blocks")[0].startswith("0:")
    assert answer(window) == expected(seen.model, PROMPT, params).strip()
    assert "tokens/s" in window.text(".turn.assistant .note")
    window.wait(lambda: "The last text" in window.text(".ring .sentence"))
    # Their names come with the next look at the swarm.
    window.wait(lambda: set(window.texts(".hops .name")[:3]) <= {*SPANS, *LAST})


def test_it_is_seen_at_work(seen: Seen) -> None:
    window = seen.browser
    settle(window, temperature=0.7, max_tokens=1900, seed=4)
    ask(window, PROMPT)
    window.wait(lambda: "compute –" not in window.text(".hops") and window.all(".hops li"))
    window.wait(lambda: len(window.text(".turn.assistant .said")) > 200)
    window.look_like(TALL)
    window.screenshot(seen.screenshots / "page-desktop.png")
    window.look_like(PHONE, dark=True)
    window.screenshot(seen.screenshots / "page-phone-swarm.png", sharp=2)
    window.click("[data-show=chat]")
    window.screenshot(seen.screenshots / "page-phone-chat.png", sharp=2)
    window.click("#stop")
    assert answer(window)


def test_a_text_can_be_stopped_and_made_anew(seen: Seen) -> None:
    window = seen.browser
    settle(window, temperature=0.7, max_tokens=1900, seed=4)
    ask(window, PROMPT)
    window.wait(lambda: window.text(".turn.assistant .said"))
    window.click("#stop")
    assert answer(window)
    assert window.text(".turn.assistant .note").startswith("Stopped.")
    window.wait(lambda: "\npetals_generations 0.0\n" in httpx.get(seen.page + "metrics").text)

    settle(window, temperature=0, max_tokens=12)
    window.click("#again")
    window.wait(lambda: window.text(".turn.assistant .note").startswith("12 tokens"))
    assert answer(window) == expected(seen.model, PROMPT, SamplingParams(max_new_tokens=12)).strip()
    assert len(window.all(".turn")) == 2

    window.reload()
    assert len(window.texts(".turn")) == 2, "what was said stays in the tab"
    window.click("#anew")
    assert window.all(".welcome")


def test_what_cannot_be_is_said_in_the_nodes_words(seen: Seen) -> None:
    window = seen.browser
    settle(window, max_tokens=100_000)
    ask(window, PROMPT)
    window.wait(lambda: "shorten one of the two" in window.text(".turn .problem"))
    settle(window, max_tokens=3, temperature=0)
    window.click("#again")
    assert answer(window)
    assert not window.all(".turn .problem")
    refused = [told for told in window.complaints() if "400" not in told]
    assert refused == []


def test_nothing_comes_from_elsewhere_and_no_name_is_missing(seen: Seen) -> None:
    window = seen.browser
    window.wait(lambda: len(rows(window)) == 4)
    loaded = window.run("return performance.getEntriesByType('resource').map(e => e.name)")
    assert len(loaded) > 10
    assert all(url.startswith(seen.page) for url in loaded)
    assert all(window.names_of_controls())
    window.click("#open-settings")
    assert all(window.names_of_controls())
    for path in ("", "page/main.js"):
        response = httpx.get(seen.page + path)
        for name, value in page_files.HEADERS.items():
            assert response.headers[name] == value
        again = httpx.get(seen.page + path, headers={"If-None-Match": response.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
    assert "unsafe" not in page_files.HEADERS["content-security-policy"]


@pytest.mark.parametrize("size", [SMALL_PHONE, PHONE, (768, 1024), (1000, 700)])
def test_it_fits_a_narrow_screen(seen: Seen, size: tuple[int, int]) -> None:
    window = seen.browser
    window.look_like(size)
    window.wait(lambda: len(rows(window)) == 4)
    for view in ("swarm", "chat"):
        if size[0] < 900:
            window.click(f"[data-show={view}]")
        wide: int = window.run("return document.documentElement.scrollWidth")
        assert wide <= size[0], view


def test_colours_are_kept(seen: Seen) -> None:
    window = seen.browser
    ground = "return getComputedStyle(document.documentElement).backgroundColor"
    light = window.run(ground)
    window.click("#theme")
    assert window.run(ground) == light
    window.click("#theme")
    dark = window.run(ground)
    assert dark != light
    window.reload()
    assert window.run(ground) == dark


def test_a_key_is_asked_for(seen: Seen) -> None:
    window = seen.browser
    window.open(seen.locked_page)
    for given in ("another", KEY):
        window.wait(lambda: window.all("#unlock[open]"))
        window.write("#unlock [name=key]", given)
        window.click("#unlock .send")
    window.wait(lambda: window.text("#live") == "Live" and len(rows(window)) == 4)
    assert any("this node" in facts for facts in window.texts("tbody .facts"))
    settle(window, max_tokens=3, temperature=0)
    ask(window, PROMPT)
    assert answer(window)
    assert [told for told in window.complaints() if "401" not in told] == []


def test_a_killed_node_is_told_at_once_and_the_text_goes_on(seen: Seen) -> None:
    window = seen.browser
    nodes = {name: seen.node(name) for name in ("rowan", "birch")}  # while nothing hurries
    settle(window, temperature=0, max_tokens=600)
    ask(window, PROMPT)
    window.wait(lambda: len(window.text(".turn.assistant .said")) > 100)
    [middle] = window.wait(lambda: {*window.texts(".hops .name")} & {*nodes})
    node = nodes.pop(middle)
    node.process.kill()
    [other] = nodes

    window.wait(lambda: middle in window.text(".mended .what"))
    window.wait(lambda: "took over after" in window.text(".mended .what"))
    assert other in window.text(".mended .what")
    window.wait(lambda: window.all(f"tr[data-peer='{node.peer_id}'][data-state=silent]"))
    window.look_like(TALL, dark=True)
    window.screenshot(seen.screenshots / "page-recovery.png")
    params = SamplingParams(max_new_tokens=600)
    assert answer(window) == expected(seen.model, PROMPT, params).strip()


def test_who_does_not_come_back_disappears_and_what_is_missing_then_is_told(seen: Seen) -> None:
    window = seen.browser
    seen.node("alder").process.kill()
    window.wait(lambda: "Nobody serves blocks 6:8 of demo" in window.text("#notice"))
    assert "petals-node run --model demo --blocks 6:8" in window.text("#notice code")
    window.wait(lambda: len(rows(window)) == 2)
    [model] = seen.status()["models"]
    assert [peer["peer_id"] for peer in model["peers"]] == rows(window)
    shown = [cell.get_attribute("data-times") for cell in window.all(".depth > span")]
    assert [int(times or -1) for times in shown] == model["coverage"]
    assert shown[6:] == ["0", "0"]


def test_a_node_that_has_gone_is_missed(world: Seen) -> None:
    window = world.browser
    window.look_like(DESKTOP)
    window.open(world.page)
    window.wait(lambda: window.text("#live") == "Live")
    world.api.process.kill()
    window.wait(lambda: window.text("#live") == "Not connected")
    assert "does not answer" in window.text("#notice")
    settle(window, max_tokens=3)
    ask(window, PROMPT)
    window.wait(lambda: "does not answer" in window.text(".turn .problem"))
