// The chat: what was said, and the answer as it comes, with stop and regenerate.

import { ApiError, ask, events, Unreachable } from "./api.js";
import { h, setText } from "./dom.js";
import { duration, figure, plural } from "./format.js";
import { requestFor, startSettings } from "./settings.js";
import { passing } from "./storage.js";

const OPENERS = ["In the beginning", "Once upon a time", "The sea was calm, and"];
const NEAR = 80; // Pixels from the end at which the log still follows the text.

/** `onSession()` is called when the answer belongs to another text of the node; `session()` names it. */
export function startChat({ onSession }) {
  const log = document.getElementById("log");
  const composer = document.getElementById("composer");
  const field = document.getElementById("message");
  const send = document.getElementById("send");
  const stop = document.getElementById("stop");
  const turns = passing.read("turns", []); // { role, content, note?, problem? }
  let running = null; // { controller, session }
  let locked = () => {};

  startSettings();

  // --- what is seen

  function drawAll() {
    log.replaceChildren(...turns.map(drawTurn));
    if (!turns.length) log.append(drawWelcome());
    drawActions();
    follow(true);
  }

  function drawWelcome() {
    return h(
      "div",
      { class: "welcome" },
      h("p", {}, "Write to a model that runs on the nodes you see. Every token goes once around them."),
      h(
        "p",
        { class: "openers" },
        ...OPENERS.map((text) => h("button", { type: "button", class: "quiet", on: { click: () => say(text) } }, text)),
      ),
    );
  }

  function drawTurn(turn) {
    const said = h("div", { class: "said" });
    said.append(document.createTextNode(turn.content));
    return h(
      "article",
      { class: `turn ${turn.role}`, "aria-label": turn.role === "user" ? "You" : "The model" },
      said,
      turn.problem ? h("p", { class: "problem" }, turn.problem) : null,
      turn.note ? h("p", { class: "note" }, turn.note) : null,
    );
  }

  /** Below the last answer. */
  function drawActions() {
    log.querySelector(".actions")?.remove();
    const last = turns.at(-1);
    if (!last || running) return;
    const again = last.problem || last.role === "user" ? "Try again" : "Regenerate";
    const buttons = [h("button", { type: "button", class: "quiet", id: "again", on: { click: regenerate } }, again)];
    if (last.role === "assistant" && last.content && navigator.clipboard) {
      buttons.push(h("button", { type: "button", class: "quiet", on: { click: copyLast } }, "Copy"));
    }
    log.append(h("div", { class: "actions" }, ...buttons));
  }

  async function copyLast(event) {
    await navigator.clipboard.writeText(turns.at(-1).content);
    setText(event.target, "Copied");
  }

  function follow(always = false) {
    if (always || log.scrollHeight - log.scrollTop - log.clientHeight < NEAR) log.scrollTop = log.scrollHeight;
  }

  function showRunning() {
    send.hidden = running !== null;
    stop.hidden = running === null;
    composer.classList.toggle("running", running !== null);
  }

  // --- what is done

  function say(text) {
    if (running || !text.trim()) return;
    turns.push({ role: "user", content: text });
    drawAll();
    answer();
  }

  function regenerate() {
    if (running) return;
    while (turns.at(-1)?.role === "assistant") turns.pop();
    drawAll();
    answer();
  }

  async function answer() {
    const messages = turns.filter(({ content }) => content).map(({ role, content }) => ({ role, content }));
    const turn = { role: "assistant", content: "" };
    turns.push(turn);
    const article = drawTurn(turn);
    article.setAttribute("aria-busy", "true");
    log.append(article);
    const own = (running = { controller: new AbortController(), session: null });
    drawActions();
    showRunning();
    follow(true);
    const words = article.querySelector(".said").firstChild;
    const times = { asked: performance.now(), first: null, last: null, pieces: 0, tokens: null };
    try {
      const model = await modelName(own.controller.signal);
      const body = { ...requestFor(messages), model, stream: true, stream_options: { include_usage: true } };
      const response = await ask("v1/chat/completions", { body, signal: own.controller.signal });
      for await (const { data } of events(response)) {
        if (data !== "[DONE]") take(JSON.parse(data));
      }
      if (times.tokens === null) throw new Unreachable();
      turn.note = noteOf(times);
    } catch (error) {
      if (error.name === "AbortError") turn.note = `Stopped. ${noteOf(times)}`;
      else turn.problem = problemOf(error);
      if (error instanceof ApiError && error.status === 401) locked();
    }

    function take(told) {
      if (told.error) throw new ApiError(500, told.error);
      const session = told.id.slice(told.id.indexOf("-") + 1);
      if (own.session !== session) {
        own.session = session;
        onSession();
      }
      if (told.usage) times.tokens = told.usage.completion_tokens;
      const piece = told.choices[0]?.delta.content;
      if (!piece) return;
      times.last = performance.now();
      times.first ??= times.last;
      times.pieces += 1;
      turn.content += piece;
      words.appendData(piece);
      follow();
    }

    running = null;
    if (!turn.content && !turn.problem) turns.pop();
    article.remove();
    if (turns.includes(turn)) {
      const whole = drawTurn(turn);
      log.append(whole);
    }
    passing.write("turns", turns);
    drawActions();
    showRunning();
    follow();
  }

  field.addEventListener("keydown", (event) => {
    const typing = event.isComposing || matchMedia("(pointer: coarse)").matches;
    if (event.key !== "Enter" || event.shiftKey || typing) return;
    event.preventDefault();
    composer.requestSubmit();
  });
  composer.addEventListener("submit", (event) => {
    event.preventDefault();
    if (running) return;
    const text = field.value;
    field.value = "";
    say(text);
  });
  stop.addEventListener("click", () => running?.controller.abort());
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && !document.querySelector("dialog[open]")) running?.controller.abort();
  });
  document.getElementById("anew").addEventListener("click", () => {
    running?.controller.abort();
    turns.length = 0;
    passing.write("turns", null);
    drawAll();
    field.focus();
  });
  drawAll();

  return {
    session: () => running?.session ?? null,
    settle: () => follow(true),
    onLocked: (act) => (locked = act),
  };
}

let known = null;

async function modelName(signal) {
  known ??= (await (await ask("v1/models", { signal })).json()).data[0].id;
  return known;
}

function noteOf({ asked, first, last, pieces, tokens }) {
  if (first === null) return "";
  const many = tokens ?? pieces;
  const parts = [plural(many, "token")];
  if (many > 1 && last > first) parts.push(`${figure(((many - 1) * 1000) / (last - first))} tokens/s`);
  parts.push(`the first after ${duration((first - asked) / 1000)}`);
  return parts.join(" · ");
}

function problemOf(error) {
  if (error instanceof ApiError && error.retryAfter) {
    return `${error.message} (Likely to work in ${plural(error.retryAfter, "second")}.)`;
  }
  return error.message;
}
