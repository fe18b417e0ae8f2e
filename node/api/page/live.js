// Hears of the swarm for as long as somebody looks at the page, and comes back when it was cut off.

import { ApiError, ask, events } from "./api.js";

const SILENCE = 15_000; // The node says something every five seconds.
const RETRIES = [500, 1000, 2000, 4000, 8000];

/**
 * `hear(kind, data)` takes what is told; `tell(state)` says how the connection is: "connecting", "live",
 * "lost", "locked" (it wants a key; `resume` tries again).
 */
export function listen({ hear, tell }) {
  let controller = null;
  let failures = 0;
  let timer = null;

  async function connect() {
    clearTimeout(timer);
    const own = (controller = new AbortController());
    let silence = null;
    const still = () => {
      clearTimeout(silence);
      silence = setTimeout(() => own.abort(), SILENCE);
    };
    still();
    try {
      const response = await ask("swarm/events", { signal: own.signal });
      for await (const { kind, data } of events(response)) {
        still();
        failures = 0;
        tell("live");
        take(kind, JSON.parse(data));
      }
    } catch (error) {
      if (error instanceof ApiError && error.status === 401) {
        if (controller === own) controller = null;
        tell("locked");
        return;
      }
    } finally {
      clearTimeout(silence);
    }
    if (controller !== own) return; // Left on purpose.
    tell("lost");
    timer = setTimeout(connect, RETRIES[Math.min(failures, RETRIES.length - 1)]);
    failures += 1;
  }

  /** What goes wrong in drawing is no fault of the connection. */
  function take(kind, data) {
    try {
      hear(kind, data);
    } catch (error) {
      reportError(error);
    }
  }

  function leave() {
    const left = controller;
    controller = null;
    clearTimeout(timer);
    left?.abort();
  }

  // A page that nobody sees costs the swarm nothing.
  document.addEventListener("visibilitychange", () => {
    if (document.hidden) leave();
    else if (controller === null) connect();
  });
  tell("connecting");
  connect();
  return {
    resume() {
      leave();
      connect();
    },
  };
}
