// The node's HTTP API: asked with the key, answered in JSON or in events.

import { passing } from "./storage.js";

/** An answer that is no success, in the node's own words. */
export class ApiError extends Error {
  constructor(status, { message, code } = {}, retryAfter = null) {
    super(message ?? `the node answered ${status}`);
    this.status = status;
    this.code = code ?? null;
    this.retryAfter = retryAfter;
  }
}

/** Nobody answered at all. */
export class Unreachable extends Error {
  constructor() {
    super("The node does not answer. Does it still run?");
  }
}

let key = passing.read("key");

/** Use another key from now on. */
export function useKey(text) {
  key = text;
  passing.write("key", text);
}

/** Ask; raises ApiError, Unreachable, or AbortError. */
export async function ask(path, { body, signal } = {}) {
  const headers = {};
  if (key !== null) headers.Authorization = `Bearer ${key}`;
  if (body !== undefined) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(path, {
      method: body === undefined ? "GET" : "POST",
      headers,
      body: body === undefined ? undefined : JSON.stringify(body),
      signal,
      cache: "no-store",
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Unreachable();
  }
  if (response.ok) return response;
  const told = await response.json().catch(() => ({}));
  throw new ApiError(response.status, told.error, Number(response.headers.get("retry-after")) || null);
}

/** The events of an answer as they come: `{ kind, data }`, the data as text. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    while (true) {
      const { done, value } = await reader.read().catch((error) => {
        if (error.name === "AbortError") throw error;
        throw new Unreachable();
      });
      if (done) return;
      const parts = (rest + value).split("\n\n");
      rest = parts.pop();
      for (const part of parts) yield parse(part);
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

function parse(part) {
  const event = { kind: "message", data: "" };
  for (const line of part.split("\n")) {
    if (line.startsWith("event: ")) event.kind = line.slice(7);
    else if (line.startsWith("data: ")) event.data += line.slice(6);
  }
  return event;
}
