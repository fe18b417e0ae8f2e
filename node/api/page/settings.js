// How texts are made: kept in this browser, sent with each request.

import { lasting } from "./storage.js";

const FIRST = {
  system: "",
  temperature: 0.7,
  top_p: 0.95,
  max_tokens: 200,
  seed: null,
  frequency_penalty: 0,
  presence_penalty: 0,
  stop: "",
};

let current = { ...FIRST, ...lasting.read("settings", {}) };

/** The fields of a request for an answer to `messages`. */
export function requestFor(messages) {
  const { system, stop, ...numbers } = current;
  const fields = Object.fromEntries(Object.entries(numbers).filter(([, value]) => value !== null));
  if (stop) fields.stop = [stop];
  return { ...fields, messages: system ? [{ role: "system", content: system }, ...messages] : messages };
}

export function startSettings() {
  const dialog = document.getElementById("settings");
  const form = dialog.querySelector("form");

  function fill() {
    for (const [name, value] of Object.entries(current)) form.elements[name].value = value ?? "";
  }

  function keep() {
    for (const [name, first] of Object.entries(FIRST)) {
      const field = form.elements[name];
      if (!field.validity.valid) continue;
      if (typeof first === "string") current[name] = field.value;
      else current[name] = field.value === "" ? (name === "seed" || name === "max_tokens" ? null : first) : field.valueAsNumber;
    }
    lasting.write("settings", current);
  }

  document.getElementById("open-settings").addEventListener("click", () => {
    fill();
    dialog.showModal();
  });
  document.getElementById("reset-settings").addEventListener("click", () => {
    current = { ...FIRST };
    fill();
  });
  dialog.addEventListener("close", keep);
  dialog.addEventListener("click", (event) => {
    if (event.target === dialog) dialog.close(); // beside it
  });
}
