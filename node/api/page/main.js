// The page: what is heard of the swarm goes to its pictures, what is written goes to the chat.

import { useKey } from "./api.js";
import { startChat } from "./chat.js";
import { listen } from "./live.js";
import { showFigures, showNotice } from "./overview.js";
import { showMended } from "./mended.js";
import { showNodes } from "./nodes.js";
import { showRing } from "./ring.js";
import { lasting } from "./storage.js";
import { peerNames } from "./peers.js";

const LIVE = { connecting: "Connecting", live: "Live", lost: "Not connected", locked: "Locked" };
const THEMES = ["", "light", "dark"];
const THEME_WORDS = { "": "as the system has them", light: "light", dark: "dark" };

const byId = (id) => document.getElementById(id);

let swarm = null;
let sessions = { sessions: [], recoveries: [] };
let connection = "connecting";
let chosen = null; // The fingerprint of the model that is shown; null: this node's.

const chat = startChat({ onSession: () => draw() });

/** Of all models the one to show: what was chosen, else this node's, else the first. */
function shownModel() {
  if (!swarm) return null;
  const { models, node } = swarm;
  return (
    models.find((model) => model.fingerprint === chosen) ??
    models.find((model) => model.peers.some((peer) => peer.peer_id === node.peer_id)) ??
    models.find((model) => model.model === node.model) ??
    models[0] ??
    null
  );
}

function draw() {
  const model = shownModel();
  const names = peerNames(swarm);
  showNotice(byId("notice"), { swarm, model, connection });
  showModels(model);
  if (swarm) {
    showFigures(byId("figures"), { swarm, model, sessions: sessions.sessions });
    showNodes(byId("nodes"), byId("depth-sentence"), { swarm, model, names });
  }
  showRing(byId("ring"), byId("texts"), { swarm, sessions: sessions.sessions, own: chat.session(), names });
  showMended(byId("mended"), { recoveries: sessions.recoveries, names });
  document.body.classList.toggle("stale", connection !== "live");
}

function showModels(model) {
  const field = byId("models");
  const select = field.querySelector("select");
  const models = swarm?.models ?? [];
  field.hidden = models.length < 2;
  const wanted = models.map((each) => [each.fingerprint, `${each.model} (${each.fingerprint.slice(0, 8)})`]);
  const there = [...select.options].map((option) => [option.value, option.text]);
  if (JSON.stringify(wanted) !== JSON.stringify(there)) {
    select.replaceChildren(...wanted.map(([value, text]) => new Option(text, value)));
  }
  if (model) select.value = model.fingerprint;
  const name = swarm?.node.model ?? "";
  byId("model").textContent = name;
  document.title = name ? `${name} · petals` : "petals";
}

byId("models").addEventListener("change", (event) => {
  chosen = event.target.value;
  draw();
});

// --- the connection, and the key that it may want

const unlock = byId("unlock");

const live = listen({
  hear(kind, data) {
    if (kind === "swarm") swarm = data;
    else if (kind === "sessions") sessions = data;
    else return;
    draw();
  },
  tell(state) {
    if (state === connection && state !== "locked") return;
    connection = state;
    byId("live").dataset.state = state;
    byId("live").textContent = LIVE[state];
    if (state === "locked") askForKey();
    draw();
  },
});

function askForKey() {
  byId("unlock-problem").textContent = unlock.dataset.asked ? "That key is not the right one." : "";
  unlock.dataset.asked = "yes";
  if (!unlock.open) unlock.showModal();
}

unlock.addEventListener("close", () => {
  useKey(unlock.querySelector("[name=key]").value);
  live.resume();
});
unlock.addEventListener("cancel", (event) => event.preventDefault());
chat.onLocked(askForKey);

// --- what is seen

for (const button of document.querySelectorAll("[data-show]")) {
  button.addEventListener("click", () => {
    document.body.dataset.view = button.dataset.show;
    for (const other of document.querySelectorAll("[data-show]")) {
      other.setAttribute("aria-pressed", String(other === button));
    }
    scrollTo(0, 0);
    chat.settle();
  });
}

function setTheme(theme) {
  if (theme) document.documentElement.dataset.theme = theme;
  else delete document.documentElement.dataset.theme;
  lasting.write("theme", theme || null);
  byId("theme").setAttribute("aria-label", `Colours: ${THEME_WORDS[theme]}`);
  byId("theme").title = `Colours: ${THEME_WORDS[theme]}`;
}

byId("theme").addEventListener("click", () => {
  const now = document.documentElement.dataset.theme ?? "";
  setTheme(THEMES[(THEMES.indexOf(now) + 1) % THEMES.length]);
});
setTheme(document.documentElement.dataset.theme ?? "");
draw();
