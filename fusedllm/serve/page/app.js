// The chat page: a conversation with the model, one answer at a time.

import { apiKey, ask, chat, ServerError, setApiKey } from "./api.js";
import { follow, showEnd } from "./follow.js";
import { poll } from "./metrics.js";
import { closePanel, panelIsOpen, revealPanel } from "./panel.js";
import { reportInvalid, sampling } from "./sampling.js";
import { duration, speed, Stopwatch } from "./timing.js";
import { AnswerTurn, userTurn } from "./turns.js";

const at = (id) => document.getElementById(id);
const message = at("message");
const log = at("log");

const TOUCH = window.matchMedia("(pointer: coarse)");
const NOTES = { length: "ended at the limit of tokens", deadline: "ended at the server's deadline" };

let model = "";
// {role, content, node} of each turn; an answer also has its `view`.
let conversation = [];
// The AbortController of the answer that is coming, or null.
let answering = null;

// ---- The conversation -------------------------------------------------------------------------------------------

/** The messages of a request. What was never answered is joined: many templates take no two turns of one role. */
function messages(system) {
  const found = system ? [{ role: "system", content: system }] : [];
  for (const { role, content } of conversation) {
    const last = found.at(-1);
    if (!content.trim()) continue;
    if (last?.role === role) last.content += `\n\n${content}`;
    else found.push({ role, content });
  }
  return found;
}

function push(turn) {
  conversation.at(-1)?.view?.settle();
  conversation.push(turn);
  log.append(turn.node);
  at("welcome").hidden = true;
  at("new").disabled = false;
}

async function send(text) {
  if (answering || !text.trim()) return;
  if (!sampling()) return invalidSampling();
  push({ role: "user", content: text, node: userTurn(text) });
  message.value = "";
  await answer();
}

async function retry() {
  if (answering || conversation.at(-1)?.role !== "assistant") return;
  if (!sampling()) return invalidSampling();
  conversation.pop().node.remove();
  message.focus();
  await answer();
}

async function answer() {
  const { parameters, system } = sampling();
  const request = { model, messages: messages(system), ...parameters, stream: true };
  request.stream_options = { include_usage: true };
  const controller = new AbortController();
  const watch = new Stopwatch();
  const view = new AnswerTurn(model || "Model", retry);
  const turn = { role: "assistant", content: "", node: view.node, view };
  push(turn);
  start(controller);
  showEnd();
  let note = "";
  try {
    if (!model) request.model = await readModel();
    for await (const chunk of chat(request, controller.signal)) {
      const [choice] = chunk.choices ?? [];
      const piece = choice?.delta?.content;
      if (chunk.usage) count(watch, chunk.usage);
      if (choice?.finish_reason) note = NOTES[choice.finish_reason] ?? "";
      if (!piece) continue;
      // Now the server's figures have this request in them.
      if (!turn.content) poll();
      watch.add(piece);
      turn.content += piece;
      view.update(turn.content, watch, () => {
        showFigures(watch);
        follow();
      });
    }
    say("The answer is complete.");
  } catch (error) {
    if (controller.signal.aborted) {
      note = "stopped";
      say("Stopped.");
    } else {
      // Anything but a failure of the server is a mistake of this page, and belongs into the console too.
      if (!(error instanceof ServerError)) console.error(error);
      view.fail(error instanceof ServerError ? error : new ServerError("This page failed to show the answer."));
      if (error.status === 401) askForKey(error);
    }
  }
  view.finish(watch, note);
  // Otherwise a new conversation has begun.
  if (conversation.at(-1) === turn) showFigures(watch);
  follow();
  end();
}

function count(watch, usage) {
  watch.count(usage.completion_tokens);
  watch.prompt = usage.prompt_tokens;
  watch.cached = usage.prompt_tokens_details?.cached_tokens ?? 0;
}

function start(controller) {
  // One answer at a time: `send` and `retry` wait for `end`.
  answering = controller;
  at("send").hidden = true;
  at("stop").hidden = false;
  log.setAttribute("aria-busy", "true");
  showFigures(null);
  say("The model answers.");
  poll();
}

function end() {
  answering = null;
  at("send").hidden = false;
  at("stop").hidden = true;
  log.removeAttribute("aria-busy");
  writable();
  poll();
}

function stop() {
  // The button is about to go; who pressed it wants to write next.
  if (document.activeElement === at("stop")) message.focus();
  answering?.abort();
}

function startOver() {
  stop();
  conversation = [];
  log.replaceChildren();
  at("welcome").hidden = false;
  at("new").disabled = true;
  showFigures(null);
  closePanel();
  say("A new conversation.");
  message.focus();
}

// ---- What is shown ----------------------------------------------------------------------------------------------

function say(sentence) {
  at("status").textContent = sentence;
}

function showFigures(watch) {
  const rate = watch?.rate ?? null;
  const first = watch?.firstToken ?? null;
  const [value, unit] = first === null ? ["–", "ms"] : duration(first);
  at("rate").textContent = rate === null ? "–" : `${watch.exact ? "" : "≈ "}${speed(rate)}`;
  at("first-token").textContent = value;
  at("first-token-unit").textContent = unit;
}

function writable() {
  at("send").disabled = !message.value.trim();
}

async function readModel() {
  const { data } = await (await ask("v1/models")).json();
  const [card] = data;
  if (!card) throw new ServerError("The server has no model.");
  model = card.id;
  at("key-form").hidden = true;
  at("model").textContent = model;
  if (card.max_model_len) at("model").title = `A context of ${card.max_model_len.toLocaleString("en")} tokens`;
  document.title = `${model} · fusedllm`;
  return model;
}

// ---- The API key ------------------------------------------------------------------------------------------------

function askForKey(error) {
  at("key-label").textContent = apiKey() ? error.message : "This server asks for an API key.";
  at("key-form").hidden = false;
  at("key").focus();
  at("key").select();
}

async function useKey(event) {
  event.preventDefault();
  const key = at("key").value.trim();
  // A header can't carry anything else.
  if (!/^[\x21-\x7e]+$/.test(key)) {
    at("key-label").textContent = "An API key has letters, digits and punctuation only.";
    return;
  }
  setApiKey(key);
  at("key").value = "";
  at("key-form").hidden = true;
  at("forget-key").hidden = false;
  message.focus();
  await begin();
  // What the server refused for want of a key is asked again.
  if (at("key-form").hidden && conversation.at(-1)?.view?.node.classList.contains("failed")) await retry();
}

async function begin() {
  try {
    await readModel();
    poll();
  } catch (error) {
    at("model").textContent = "No model";
    if (error.status === 401) askForKey(error);
    else say(error.message);
  }
}

function invalidSampling() {
  revealPanel();
  reportInvalid();
}

// ---- What the user does -----------------------------------------------------------------------------------------

at("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  const { value } = message;
  // On a touch screen that would open the keyboard over the answer.
  if (!TOUCH.matches) message.focus();
  send(value);
  writable();
});
message.addEventListener("input", writable);
message.addEventListener("keydown", (event) => {
  // Enter also ends the choice of a character in an input method.
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  at("composer").requestSubmit();
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || event.isComposing) return;
  if (answering) stop();
  else if (panelIsOpen()) closePanel(true);
});
at("stop").addEventListener("click", stop);
at("new").addEventListener("click", startOver);
at("key-form").addEventListener("submit", useKey);
at("forget-key").addEventListener("click", () => {
  setApiKey("");
  at("forget-key").hidden = true;
  say("The API key is forgotten.");
});
at("suggestions").addEventListener("click", ({ target }) => {
  if (!target.matches("button")) return;
  message.focus();
  send(target.textContent);
});

at("forget-key").hidden = !apiKey();
if (!TOUCH.matches) message.focus();
begin();
