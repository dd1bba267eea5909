// Requests to the server. A newer request of the same kind replaces an older one, whose answer is dropped.

import { t, translated } from "./words.js";

/** An error that the server explains, or that it can't be reached (`isOffline`). */
export class RequestFailed extends Error {
  constructor(message, hint = "", isOffline = false) {
    super(message);
    this.hint = hint;
    this.isOffline = isOffline;
  }
}

async function request(path, body, signal) {
  const options = body === undefined
    ? { signal }
    : { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), signal };
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    throw error.name === "AbortError" ? error : new RequestFailed(t("offline"), "", true);
  }
  if (response.ok) return response;
  const { error, hint } = await response.json().catch(() => ({}));
  throw new RequestFailed(translated(error ?? `HTTP ${response.status}`), translated(hint ?? ""));
}

export async function get(path) {
  return (await request(path)).json();
}

export async function post(path, body, signal) {
  const response = await request(path, body, signal);
  try {
    return await response.json();
  } catch (error) {
    throw error.name === "AbortError" ? error : new RequestFailed(t("offline"), "", true);
  }
}

/** Send a request and call a function with each line of the answer. */
export async function stream(path, body, signal, onLine) {
  const response = await request(path, body, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    let chunk;
    try {
      chunk = await reader.read();
    } catch (error) {
      throw error.name === "AbortError" ? error : new RequestFailed(t("offline"), "", true);
    }
    if (chunk.done) return;
    const lines = (rest + chunk.value).split("\n");
    rest = lines.pop();
    lines.forEach((line) => onLine(JSON.parse(line)));
  }
}

/** Runs the newest of several jobs: a new one aborts the one before it, after a delay in which more may come. */
export class Latest {
  #controller = null;
  #timer = 0;

  constructor(onError) {
    this.onError = onError;
  }

  /** Run `job(signal)` after a delay in milliseconds. */
  start(job, delay = 0) {
    this.stop();
    const controller = new AbortController();
    this.#controller = controller;
    this.#timer = setTimeout(async () => {
      try {
        await job(controller.signal);
      } catch (error) {
        if (!controller.signal.aborted) this.onError(error);
      }
    }, delay);
  }

  /** Abort the job. */
  stop() {
    clearTimeout(this.#timer);
    this.#controller?.abort();
  }
}
