// The server's API: requests with the user's key, server-sent events, and failures as the sentence the server said.

const KEY_STORE = "fusedllm.key";
let keyInMemory = null;

/** A failure in one sentence. `status` is 0 where there was no HTTP answer; `retryAfter` is in seconds, or null. */
export class ServerError extends Error {
  constructor(sentence, status = 0, retryAfter = null) {
    super(sentence);
    this.status = status;
    this.retryAfter = retryAfter;
  }
}

/** The API key of this tab, or "". */
export function apiKey() {
  if (keyInMemory === null) {
    try {
      keyInMemory = sessionStorage.getItem(KEY_STORE) ?? "";
    } catch {
      keyInMemory = "";
    }
  }
  return keyInMemory;
}

/** Keeps the key for this tab; "" forgets it. */
export function setApiKey(key) {
  keyInMemory = key;
  try {
    if (key) sessionStorage.setItem(KEY_STORE, key);
    else sessionStorage.removeItem(KEY_STORE);
  } catch {
    // A browser that stores nothing: the key lives as long as the page.
  }
}

/** A successful response of `path`, which is relative to the page, so that a prefix of a proxy is kept. */
export async function ask(path, { body, signal } = {}) {
  const headers = {};
  if (apiKey()) headers.Authorization = `Bearer ${apiKey()}`;
  if (body !== undefined) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(path, {
      method: body === undefined ? "GET" : "POST",
      body: body === undefined ? undefined : JSON.stringify(body),
      headers,
      signal,
      cache: "no-store",
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The server can't be reached; is it still running?");
  }
  if (!response.ok) throw await failure(response);
  return response;
}

async function failure(response) {
  let sentence;
  try {
    const answer = await response.json();
    sentence = answer.error?.message ?? answer.detail;
  } catch {
    // Not JSON: something between here and the server answered.
  }
  if (typeof sentence !== "string" || !sentence) sentence = `The server answered with status ${response.status}.`;
  const seconds = Number.parseInt(response.headers.get("Retry-After") ?? "", 10);
  return new ServerError(sentence, response.status, Number.isNaN(seconds) ? null : seconds);
}

/** The chunks of a streamed chat completion, until `[DONE]`; an error inside the stream is thrown. */
export async function* chat(request, signal) {
  const response = await ask("v1/chat/completions", { body: request, signal });
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    let chunk;
    try {
      chunk = JSON.parse(data);
    } catch {
      throw new ServerError("The server sent a part of the answer that is not JSON.");
    }
    if (chunk.error) throw new ServerError(String(chunk.error.message ?? "The server failed during the answer."));
    yield chunk;
  }
  throw new ServerError("The connection ended before the answer did.");
}

/** The data of each server-sent event (https://html.spec.whatwg.org/multipage/server-sent-events.html). */
export async function* events(body) {
  const reader = body.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  let data = [];
  try {
    for (;;) {
      const { done, value } = await read(reader);
      if (done) return;
      rest += decoder.decode(value, { stream: true });
      // A lone CR at the end may be half of a CRLF, so it waits for the next piece.
      const lines = rest.split(/\r\n|\n|\r(?=[^])/);
      rest = lines.pop();
      for (const line of lines) {
        if (line === "") {
          if (data.length) yield data.join("\n");
          data = [];
        } else if (line.startsWith("data:")) {
          data.push(line.slice(line[5] === " " ? 6 : 5));
        }
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

async function read(reader) {
  try {
    return await reader.read();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The connection ended before the answer did.");
  }
}
