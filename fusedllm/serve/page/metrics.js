// The server's own figures, read from its Prometheus metrics while somebody looks at the page.

import { ask } from "./api.js";

const POLL_MILLISECONDS = 2000;
const SAMPLE = /^([a-zA-Z_:][\w:]*)(?:\{[^]*\})?\s+(\S+)/;

/** The samples of Prometheus' text format by name; those that differ in labels only are added up. */
export function parse(text) {
  const samples = new Map();
  for (const line of text.split("\n")) {
    const match = line.startsWith("#") ? null : SAMPLE.exec(line);
    const value = match ? Number(match[2]) : Number.NaN;
    if (Number.isFinite(value)) samples.set(match[1], (samples.get(match[1]) ?? 0) + value);
  }
  return samples;
}

/** What the page shows of them; a figure that the server does not have is null. */
export function figures(samples) {
  const get = (name) => samples.get(`fusedllm:${name}`) ?? null;
  const queries = get("prefix_cache_queries_total");
  const hits = get("prefix_cache_hits_total");
  return {
    running: get("num_requests_running"),
    waiting: get("num_requests_waiting"),
    cache: get("kv_cache_usage_perc"),
    hits: queries > 0 && hits !== null ? hits / queries : null,
  };
}

const percent = (share) => (share === null ? "–" : `${(share * 100).toFixed(share > 0 && share < 0.0995 ? 1 : 0)} %`);

function show(values) {
  const at = (id) => document.getElementById(id);
  at("running").textContent = values.running ?? "–";
  at("waiting").textContent = values.waiting ?? "–";
  for (const name of ["hits", "cache"]) {
    at(name).textContent = percent(values[name]);
    at(`${name}-gauge`).style.width = `${Math.min(Math.max(values[name] ?? 0, 0), 1) * 100}%`;
  }
}

let timer = 0;
let reading = false;

/** Reads the metrics now and every two seconds, as long as the tab is visible and the server doesn't ask for a key. */
export async function poll() {
  clearTimeout(timer);
  if (reading || document.visibilityState !== "visible") return;
  reading = true;
  try {
    show(figures(parse(await (await ask("metrics")).text())));
  } catch (error) {
    show({ running: null, waiting: null, cache: null, hits: null });
    // Asking again without another key would fail again; with one, `poll` is called again.
    if (error.status === 401 || error.status === 404) return;
  } finally {
    reading = false;
  }
  timer = setTimeout(poll, POLL_MILLISECONDS);
}

document.addEventListener("visibilitychange", poll);
