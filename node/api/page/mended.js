// Hops that this node's texts have lost, and who came instead, the newest first.

import { h, reconcile, setText } from "./dom.js";
import { clock, duration, span } from "./format.js";

const PEER_ID = /12D3KooW\w{40,}/g;

export function showMended(list, { recoveries, names }) {
  const items = recoveries.length ? [...recoveries].reverse() : [null];
  reconcile(list, items, keyOf, makeItem, (item, recovery) => {
    if (recovery !== null) showItem(item, recovery, names);
  });
}

function keyOf(recovery) {
  return recovery === null ? "none" : `${recovery.at} ${recovery.lost.peer_id}`;
}

function makeItem(recovery) {
  if (recovery === null) return h("li", { class: "empty" }, "No text from here has lost a node.");
  return h("li", {}, h("time"), h("p", { class: "what" }), h("p", { class: "why" }));
}

function showItem(item, { at, lost, reason, replaced_by: by, pause }, names) {
  item.dataset.state = pause === null ? "open" : "over";
  const time = item.querySelector("time");
  time.dateTime = new Date(at * 1000).toISOString();
  setText(time, clock(at));
  const what = `${names(lost.peer_id)} with blocks ${span(lost.blocks)} was lost; `;
  const whom = by.length ? by.map((hop) => `${names(hop.peer_id)} (${span(hop.blocks)})`).join(", ") : null;
  let then = "looking for another";
  if (whom !== null) then = `${whom} ${by.length > 1 ? "catch" : "catches"} up`;
  if (pause !== null) then = `${whom} took over after ${duration(pause)}`;
  setText(item.querySelector(".what"), `${what}${then}.`);
  setText(item.querySelector(".why"), reason.replace(PEER_ID, names));
}
