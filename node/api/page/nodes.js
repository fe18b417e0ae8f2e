// Who serves what: the model's depth as a bar, and below it each node's blocks at their place.

import { h, reconcile, setText, setVars } from "./dom.js";
import { count, figure, loadLevel, percent, plural, shortId, span } from "./format.js";

const SHOWN = 100; // Of very many nodes the others are in the bar above all the same.
const STATES = { online: "online", joining: "loading", draining: "leaving", offline: "offline" };

export function showNodes(place, sentence, { swarm, model, names }) {
  if (!model) {
    setText(sentence, "");
    place.replaceChildren(h("p", { class: "empty" }, "No node serves a model here yet."));
    return;
  }
  setText(sentence, describe(model));
  let table = place.querySelector("table");
  if (!table) place.replaceChildren((table = makeTable()));
  setVars(table, { "--blocks": model.num_blocks });
  showDepth(table.querySelector(".depth"), model);
  showAxis(table.querySelector(".axis"), model.num_blocks);
  const fastest = Math.max(...model.throughput);
  setText(table.querySelector(".scale"), fastest > 0 ? `up to ${figure(fastest)}` : "");
  reconcile(
    table.tBodies[0],
    model.peers.slice(0, SHOWN),
    (peer) => peer.peer_id,
    makeRow,
    (row, peer) => showRow(row, peer, { swarm, names, blocks: model.num_blocks }),
  );
  const more = model.peers.length - SHOWN;
  setText(table.caption, more > 0 ? `… and ${plural(more, "node")} more` : "");
  table.caption.hidden = more <= 0;
}

/** The bar in words: what somebody who does not see it wants to know, and others, too. */
function describe(model) {
  const { coverage, throughput, num_blocks: blocks } = model;
  const served = coverage.filter((times) => times > 0).length;
  if (served === 0) return `None of the ${blocks} blocks is served.`;
  if (served < blocks) return `${served} of ${blocks} blocks are served; a text needs them all.`;
  const least = Math.min(...coverage);
  const weakest = Math.min(...throughput);
  const from = throughput.indexOf(weakest);
  let to = from;
  while (to < blocks && throughput[to] === weakest) to += 1;
  const replicas = least === 1 ? "some by one node only" : `each by at least ${least} nodes`;
  const where = to - from === blocks ? "" : `; blocks ${span([from, to])} are the slowest`;
  return `All ${blocks} blocks are served, ${replicas}${where}.`;
}

// The roles keep it a table where a narrow screen makes cards of its rows.
function makeTable() {
  const heading = (text, kind) => h("th", { scope: "col", role: "columnheader", class: kind }, text);
  return h(
    "table",
    { class: "nodes", role: "table", "aria-label": "Nodes and their blocks" },
    h("caption"),
    h("colgroup", {}, ...["who", "place", "load", "number", "number", "number"].map((kind) => h("col", { class: kind }))),
    h(
      "thead",
      { role: "rowgroup" },
      h(
        "tr",
        { role: "row", class: "depth-row" },
        h(
          "th",
          { scope: "row", role: "rowheader", class: "who" },
          h("span", { class: "label" }, "tokens/s"),
          h("span", { class: "scale" }),
        ),
        h(
          "td",
          { role: "cell", class: "place" },
          h("div", { class: "depth", role: "img" }),
          h("div", { class: "axis", "aria-hidden": "true" }),
        ),
        h("td", { role: "cell", class: "legend", colspan: 4 }, makeLegend()),
      ),
      h(
        "tr",
        { role: "row", class: "headings" },
        heading("Node", "who"),
        heading("Blocks", "place"),
        heading("Load", "load"),
        heading("Sessions", "number"),
        heading("Cache used", "number"),
        heading("Tokens/s", "number"),
      ),
    ),
    h("tbody", { role: "rowgroup" }),
  );
}

function makeLegend() {
  const entry = (level, words) => h("span", {}, h("i", { "data-times": level, "aria-hidden": "true" }), words);
  return h("div", { class: "times" }, entry(0, "nobody"), entry(1, "1×"), entry(2, "2×"), entry(3, "3× or more"));
}

function showDepth(bar, model) {
  const fastest = Math.max(...model.throughput, 1e-9);
  bar.setAttribute("aria-label", describe(model));
  reconcile(
    bar,
    model.coverage.map((times, block) => ({ times, block, speed: model.throughput[block] })),
    ({ block }) => block,
    () => h("span", {}, h("i")),
    (cell, { times, block, speed }) => {
      cell.dataset.times = Math.min(times, 3);
      setVars(cell, { "--height": speed / fastest });
      const by = times === 0 ? "nobody serves it" : `${plural(times, "node")}, ${figure(speed)} tokens/s`;
      cell.title = `Block ${block}: ${by}`;
    },
  );
}

/** A number every few blocks, so that they do not touch. */
function showAxis(axis, blocks) {
  const every = [1, 2, 4, 8, 16, 32, 64].find((step) => blocks / step <= 12) ?? 128;
  const ticks = [];
  for (let block = 0; block < blocks; block += every) ticks.push(block);
  reconcile(
    axis,
    ticks,
    (block) => block,
    (block) => h("span", { vars: { "--block": block } }, String(block)),
    () => {},
  );
}

function makeRow() {
  const cell = (kind, label, ...inside) =>
    h("td", { role: "cell", class: kind, "data-label": label }, ...inside);
  return h(
    "tr",
    { role: "row" },
    h(
      "th",
      { scope: "row", role: "rowheader", class: "who" },
      h("span", { class: "name" }),
      h("span", { class: "facts" }),
    ),
    cell("place", null, h("div", { class: "strip" }, h("span", { class: "span" }, h("b")))),
    cell("load", "Load", h("span", { class: "meter" }), h("span", { class: "value" })),
    cell("number sessions", "Sessions", h("span", { class: "value" })),
    cell("number cache", "Cache used", h("span", { class: "value" })),
    cell("number speed", "Tokens/s", h("span", { class: "value" })),
  );
}

function showRow(row, peer, { swarm, names, blocks }) {
  const load = swarm.load[peer.peer_id];
  const silent = load === null;
  row.dataset.state = silent ? "silent" : peer.state;
  row.dataset.peer = peer.peer_id;
  row.querySelector(".who").title = peer.peer_id;
  setText(row.querySelector(".name"), names(peer.peer_id));
  setText(row.querySelector(".facts"), facts(peer, { silent, here: peer.peer_id === swarm.node.peer_id }));

  const strip = row.querySelector(".strip .span");
  strip.hidden = peer.blocks === null;
  if (peer.blocks) {
    setVars(strip, { "--start": peer.blocks[0], "--end": peer.blocks[1] });
    setText(strip.firstElementChild, span(peer.blocks));
    strip.dataset.label = labelPlace(peer.blocks, blocks);
    strip.title = `Blocks ${span(peer.blocks)}`;
  }
  const busy = load?.busy ?? null;
  row.dataset.load = loadLevel(busy);
  setVars(row.querySelector(".meter"), { "--share": busy ?? 0 });
  setText(row.querySelector(".load .value"), percent(busy));
  setText(row.querySelector(".sessions .value"), silent ? "–" : String(peer.sessions));
  const total = load?.cache_tokens_total;
  const used = total ? percent(1 - peer.cache_tokens_left / total) : "–";
  setText(row.querySelector(".cache .value"), used);
  row.querySelector(".cache").title = `Room for ${count(peer.cache_tokens_left)} more tokens`;
  setText(row.querySelector(".speed .value"), figure(speedOf(peer)));
  row.querySelector(".speed").title = `${figure(peer.decode_speed)} through one block, prompts at ${figure(peer.prefill_speed)}`;
}

/** Where there is room for the words: in the span, or beside it. */
function labelPlace([start, end], blocks) {
  if ((end - start) / blocks > 0.12) return "in";
  return end / blocks < 0.8 ? "after" : "before";
}

/** Tokens per second through all the blocks that a node serves. */
function speedOf(peer) {
  return peer.blocks ? peer.decode_speed / (peer.blocks[1] - peer.blocks[0]) : 0;
}

function facts(peer, { silent, here }) {
  const words = [silent ? "does not answer" : STATES[peer.state] ?? peer.state];
  if (here) words.push("this node");
  if (peer.public_name) words.push(shortId(peer.peer_id));
  words.push(peer.dtype);
  if (peer.reachability !== "direct") words.push(peer.reachability === "none" ? "no address" : peer.reachability);
  return words.join(" · ");
}
