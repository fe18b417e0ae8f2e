// The ring that a token goes around, drawn as its time: the whole circle is one token.

import { h, reconcile, s, setText, setVars } from "./dom.js";
import { duration, figure, loadLevel, plural, span } from "./format.js";

const SIZE = 280;
const RADIUS = 116;
const LEAST = 0.03; // Of the circle: what is shorter could not be seen.
const WORDS = {
  queued: "queued",
  routing: "looking for a route",
  prefill: "reading the prompt",
  generating: "writing",
  recovering: "finding another way",
  done: "done",
  failed: "failed",
  cancelled: "stopped",
};

let last = null; // The text that was shown last: its ring stays until there is another.
let picked = null; // Which of several texts somebody wants to see.

/** `own`: the text of this page's chat, which is the one to show if nobody picked another. */
export function showRing(place, texts, { swarm, sessions, own, names }) {
  showTexts(texts, sessions, own);
  const session =
    sessions.find(({ id }) => id === picked) ?? sessions.find(({ id }) => id === own) ?? sessions.at(-1) ?? null;
  if (session?.ring.length) last = { ...session, over: false };
  else if (session && session.id !== last?.id) last = null;
  else if (last && !sessions.some(({ id }) => id === last.id)) last.over = true;
  if (!last) {
    const waits = session ? session.waiting_for ?? `A text is ${WORDS[session.state] ?? session.state} …` : null;
    showNone(place, waits);
    return;
  }
  if (!place.querySelector(".ring-of")) place.replaceChildren(makeRing());
  drawRing(place, last, { swarm, names });
}

function showNone(place, waits) {
  const words = waits ?? "No text is being written here. Send something, and its way through the nodes appears.";
  let empty = place.querySelector(".none .empty");
  if (!empty) {
    empty = h("p", { class: "empty" });
    const circle = s("svg", { viewBox: "0 0 120 120", "aria-hidden": "true", class: "ghost" }, s("circle", { cx: 60, cy: 60, r: 48 }));
    place.replaceChildren(h("div", { class: "none" }, circle, empty));
  }
  setText(empty, words);
}

function showTexts(group, sessions, own) {
  group.hidden = sessions.length < 2;
  reconcile(
    group,
    sessions,
    ({ id }) => id,
    ({ id }) => h("button", { type: "button", on: { click: () => (picked = picked === id ? null : id) } }),
    (button, { id, tokens, state }) => {
      button.dataset.state = state;
      button.setAttribute("aria-pressed", String(id === picked));
      setText(button, `${id === own ? "yours" : id.slice(0, 4)} · ${tokens}`);
      button.title = `${plural(tokens, "token")}, ${WORDS[state] ?? state}`;
    },
  );
}

function makeRing() {
  const track = s("circle", { class: "track", cx: SIZE / 2, cy: SIZE / 2, r: RADIUS });
  const runner = s("g", { class: "runner" }, s("circle", { cx: SIZE / 2, cy: SIZE / 2 - RADIUS, r: 5 }));
  const centre = s(
    "g",
    { class: "centre" },
    s("text", { class: "lap", x: SIZE / 2, y: SIZE / 2 - 2 }),
    s("text", { class: "under", x: SIZE / 2, y: SIZE / 2 + 24 }),
    s("text", { class: "under second", x: SIZE / 2, y: SIZE / 2 + 43 }),
  );
  return h(
    "div",
    { class: "ring-of" },
    s("svg", { viewBox: `0 0 ${SIZE} ${SIZE}`, role: "img" }, track, s("g", { class: "arcs" }), runner, s("g", { class: "badges" }), centre),
    h("div", { class: "ring-text" }, h("p", { class: "sentence" }), h("ol", { class: "hops" })),
  );
}

/** What a token's time goes to, in order; `share` is of the whole. */
function partsOf(session) {
  const { ring, way_back: wayBack, tokens_per_second: speed } = session;
  const known = ring.reduce((sum, hop) => sum + (hop.way ?? 0) + (hop.wait ?? 0) + (hop.compute ?? 0), wayBack ?? 0);
  const measured = ring.every((hop) => hop.compute !== null);
  const lap = Math.max(speed > 0 ? 1 / speed : 0, known);
  const here = measured ? lap - known : null;
  const parts = [];
  for (const [index, hop] of ring.entries()) {
    parts.push({ kind: "way", seconds: hop.way });
    parts.push({ kind: "wait", seconds: hop.wait, hop: index });
    parts.push({ kind: "compute", seconds: hop.compute, hop: index });
  }
  parts.push({ kind: "way", seconds: wayBack });
  parts.push({ kind: "here", seconds: here });
  for (const part of parts) {
    if (!measured) part.share = part.kind === "compute" ? 1 : part.kind === "wait" ? 0 : 0.3;
    else part.share = (part.seconds ?? 0) / (lap || 1);
  }
  for (const part of parts) if (part.kind !== "wait" || part.share > 0.005) part.share = Math.max(part.share, LEAST);
  const sum = parts.reduce((total, part) => total + part.share, 0);
  for (const part of parts) part.share /= sum;
  return { parts, lap, here, measured };
}

function drawRing(place, session, { swarm, names }) {
  const { parts, lap, here, measured } = partsOf(session);
  const busyOf = (index) => swarm?.load[session.ring[index].peer_id]?.busy ?? null;
  const arcs = [];
  const badges = [{ key: "here", at: 0, text: "" }];
  let at = 0;
  for (const [index, part] of parts.entries()) {
    const end = at + part.share;
    arcs.push({ ...part, key: `${index}${part.kind}`, from: at, to: end, load: part.hop === undefined ? "" : loadLevel(busyOf(part.hop)) });
    if (part.kind === "compute") badges.push({ key: `hop${part.hop}`, at: (at + end) / 2, text: String(part.hop + 1) });
    at = end;
  }
  const whole = place.querySelector(".ring-of");
  whole.dataset.state = session.over ? "over" : session.state;
  const svg = place.querySelector("svg");
  reconcile(
    svg.querySelector(".arcs"),
    arcs,
    (arc) => arc.key,
    () => s("path"),
    (path, arc) => {
      path.setAttribute("class", arc.kind);
      path.dataset.load = arc.load;
      path.setAttribute("d", arcPath(arc.from, arc.to));
    },
  );
  reconcile(
    svg.querySelector(".badges"),
    badges,
    (badge) => badge.key,
    (badge) => s("g", { class: badge.key === "here" ? "badge own" : "badge" }, s("circle", { r: 12 }), s("text", { dy: "0.36em" })),
    (group, badge) => {
      const [x, y] = point(badge.at);
      group.setAttribute("transform", `translate(${x.toFixed(1)} ${y.toFixed(1)})`);
      setText(group.querySelector("text"), badge.text);
    },
  );
  const [big, under, second] = svg.querySelectorAll(".centre text");
  setText(big, lap > 0 ? duration(lap) : "…");
  setText(under, "a token");
  setText(second, lap > 0 ? `${figure(session.tokens_per_second)} tokens/s` : "");
  const told = sentenceOf(session, measured);
  svg.setAttribute("aria-label", told);
  setText(place.querySelector(".sentence"), told);
  showHops(place.querySelector(".hops"), session, { lap, here, names, busyOf });
}

function sentenceOf(session, measured) {
  const { tokens, ring, recoveries, state } = session;
  const route = `${plural(tokens, "token")} through ${plural(ring.length, "node")}`;
  if (session.over) return `The last text: ${route}.`;
  if (session.waiting_for) return session.waiting_for;
  const mended = recoveries ? `, mended ${recoveries === 1 ? "once" : `${recoveries} times`}` : "";
  return `${route}${mended}; ${WORDS[state] ?? state}${measured ? "" : ", its times come soon"}.`;
}

function showHops(list, session, { lap, here, names, busyOf }) {
  const rows = session.ring.map((hop, index) => ({ ...hop, index }));
  const back = { index: "here", way: session.way_back, wait: null, compute: here };
  reconcile(
    list,
    [...rows, back],
    ({ index }) => index,
    ({ index }) =>
      h(
        "li",
        { class: index === "here" ? "own" : "" },
        h("span", { class: "badge" }, index === "here" ? "" : String(index + 1)),
        h("span", { class: "name" }),
        h("span", { class: "blocks" }),
        h("span", { class: "times" }),
        h("span", { class: "bar", "aria-hidden": "true" }, h("i", { class: "way" }), h("i", { class: "wait" }), h("i", { class: "compute" })),
      ),
    (row, hop) => {
      const own = hop.index === "here";
      row.dataset.load = own ? "" : loadLevel(busyOf(hop.index));
      setText(row.querySelector(".name"), own ? "this node" : names(hop.peer_id));
      setText(row.querySelector(".blocks"), own ? "first and last layer" : span(hop.blocks));
      const times = [`way ${duration(hop.way)}`];
      if (hop.wait !== null && hop.wait > 0.00005) times.push(`wait ${duration(hop.wait)}`);
      times.push(`${own ? "rest" : "compute"} ${duration(hop.compute)}`);
      setText(row.querySelector(".times"), times.join(" · "));
      for (const kind of ["way", "wait", "compute"]) {
        setVars(row.querySelector(`i.${kind}`), { "--share": lap > 0 ? (hop[kind] ?? 0) / lap : 0 });
      }
    },
  );
}

/** A place on the circle; 0 is on top, 1 once around. */
function point(share) {
  const angle = (share - 0.25) * 2 * Math.PI;
  return [SIZE / 2 + RADIUS * Math.cos(angle), SIZE / 2 + RADIUS * Math.sin(angle)];
}

function arcPath(from, to) {
  const [x, y] = point(from);
  const [u, v] = point(Math.min(to, from + 0.9999));
  return `M${x.toFixed(2)} ${y.toFixed(2)}A${RADIUS} ${RADIUS} 0 ${to - from > 0.5 ? 1 : 0} 1 ${u.toFixed(2)} ${v.toFixed(2)}`;
}
