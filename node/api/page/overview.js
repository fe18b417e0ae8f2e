// The figures on top, and what is wrong, if anything is.

import { h, reconcile, setText } from "./dom.js";
import { figure, percent, plural, span } from "./format.js";

/** The share of the time in which the nodes of a model compute, on average; null: not known yet. */
function meanLoad(model, load) {
  const shares = model.peers
    .map((peer) => load[peer.peer_id]?.busy)
    .filter((share) => share !== null && share !== undefined);
  return shares.length ? shares.reduce((sum, share) => sum + share, 0) / shares.length : null;
}

export function showFigures(list, { swarm, model, sessions }) {
  const online = model?.peers.filter((peer) => peer.state === "online").length ?? 0;
  const others = (model?.peers.length ?? 0) - online;
  const served = model?.coverage.filter((times) => times > 0).length ?? 0;
  const blocks = model?.num_blocks ?? swarm.node.num_blocks ?? 0;
  const speed = model ? Math.min(...model.throughput) : 0;
  const least = model ? Math.min(...model.coverage) : 0;
  const items = [
    {
      name: "Nodes",
      value: String(online),
      more: others ? `online, ${others} more not` : "online",
    },
    {
      name: "Blocks served",
      value: String(served),
      of: `of ${blocks}`,
      more: served < blocks ? "not the whole model" : `each at least ${least}×`,
      level: served < blocks ? "full" : null,
    },
    { name: "Speed", value: figure(speed), of: speed > 0 ? "tokens/s" : "", more: served < blocks ? "none until every block is served" : "through the slowest block" },
    { name: "Load", value: percent(model ? meanLoad(model, swarm.load) : null), more: loadWords(sessions) },
  ];
  reconcile(
    list,
    items,
    (item) => item.name,
    (item) =>
      h(
        "div",
        { class: "figure" },
        h("dt", {}, item.name),
        h("dd", {}, h("span", { class: "value" }), " ", h("span", { class: "of" })),
        h("dd", { class: "more" }),
      ),
    (box, item) => {
      box.dataset.level = item.level ?? "";
      setText(box.querySelector(".value"), item.value);
      setText(box.querySelector(".of"), item.of ?? "");
      setText(box.querySelector(".more"), item.more);
    },
  );
}

function loadWords(sessions) {
  return sessions.length ? `${plural(sessions.length, "text")} running here` : "no text running here";
}

/** What is wrong, the worst first; else nothing. */
function trouble({ swarm, model, connection }) {
  if (connection === "lost") {
    return ["The node does not answer. What you see is as it was; trying again.", null];
  }
  if (!swarm) return null;
  if (swarm.trouble) return [swarm.trouble, null];
  if (!model) {
    const name = swarm.node.model;
    return [`Nobody serves ${name} yet. Texts wait until somebody does:`, `petals-node run --model ${name} --bootstrap …`];
  }
  if (model.missing.length) {
    const spans = model.missing.map(span).join(", ");
    const command = `petals-node run --model ${model.model} --blocks ${span(model.missing[0])} --bootstrap …`;
    return [`Nobody serves blocks ${spans} of ${model.model}. Texts wait until somebody does:`, command];
  }
  return null;
}

export function showNotice(notice, state) {
  const told = trouble(state);
  notice.hidden = told === null;
  if (told === null) return notice.replaceChildren();
  const [words, command] = told;
  if (notice.dataset.told === words) return;
  notice.dataset.told = words;
  notice.replaceChildren(words, ...(command ? [h("code", {}, command)] : []));
}
