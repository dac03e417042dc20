// How one turn of the conversation looks: who speaks, the text, how fast it came, what went wrong, what can be done.

import { render } from "./markdown.js";
import { duration, speed } from "./timing.js";

const COPIED_MILLISECONDS = 1500;
const canCopy = Boolean(navigator.clipboard?.writeText);

function element(tag, className, text = "") {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text) node.textContent = text;
  return node;
}

function button(label, action) {
  const node = element("button", "quiet small", label);
  node.type = "button";
  node.addEventListener("click", action);
  return node;
}

/** Copies `text()` and says so on the button. */
async function copy(node, text) {
  try {
    await navigator.clipboard.writeText(text());
    node.textContent = "Copied";
  } catch {
    node.textContent = "Not allowed";
  }
  setTimeout(() => (node.textContent = "Copy"), COPIED_MILLISECONDS);
}

/** The view of a message of the user. */
export function userTurn(text) {
  const article = element("article", "turn user");
  article.append(element("h2", "who", "You"), element("div", "said", text));
  return article;
}

/** The view of an answer while it comes and afterwards. */
export class AnswerTurn {
  #body = element("div", "answer");
  #foot = element("footer", "meta");
  #figures = element("span", "measured");
  #problem = element("p", "problem");
  #retry;
  #copy;
  #text = "";
  #frame = 0;

  constructor(name, onRetry) {
    this.node = element("article", "turn assistant busy");
    this.node.setAttribute("aria-busy", "true");
    this.#retry = button("Try again", onRetry);
    this.#copy = button("Copy", () => copy(this.#copy, () => this.#text));
    this.#copy.hidden = this.#retry.hidden = true;
    this.#problem.setAttribute("role", "alert");
    this.#problem.hidden = true;
    const actions = element("span", "actions");
    actions.append(this.#copy, this.#retry);
    this.#foot.append(this.#figures, actions);
    this.node.append(element("h2", "who", name), this.#body, this.#problem, this.#foot);
    this.#body.addEventListener("click", ({ target }) => {
      const pressed = target.closest(".copy-code");
      if (pressed) copy(pressed, () => pressed.closest(".code").querySelector("code").textContent);
    });
  }

  /** Shows the text so far, at most once a frame; `drawn` is called after it. */
  update(text, watch, drawn) {
    this.#text = text;
    if (this.#frame) return;
    this.#frame = requestAnimationFrame(() => {
      this.#frame = 0;
      this.#draw(watch);
      drawn();
    });
  }

  /** The answer is over: whole, or with a `note` why not. */
  finish(watch, note = "") {
    cancelAnimationFrame(this.#frame);
    this.#draw(watch, note);
    this.node.classList.remove("busy");
    this.node.removeAttribute("aria-busy");
    this.#copy.hidden = !canCopy || !this.#text;
    this.#retry.hidden = false;
  }

  /** The answer failed: the server's sentence, and when it wants to be asked again. */
  fail(error) {
    const when = error.retryAfter === null ? "" : ` It asks to wait ${error.retryAfter} s before the next try.`;
    this.#problem.textContent = error.message + when;
    this.#problem.hidden = false;
    this.node.classList.add("failed");
  }

  /** Only the last answer can be asked for again. */
  settle() {
    this.#retry.remove();
    this.#foot.hidden = !this.#text;
  }

  #draw(watch, note = "") {
    render(this.#body, this.#text);
    const parts = [];
    const about = watch.exact ? "" : "≈ ";
    if (watch.rate !== null) parts.push(`${about}${speed(watch.rate)} tokens/s`);
    if (watch.firstToken !== null) {
      parts.push(`${duration(watch.firstToken).join(" ")} to first token`);
      parts.push(`${about}${watch.tokens} ${watch.tokens === 1 ? "token" : "tokens"}`);
    }
    if (watch.cached) parts.push(`${watch.cached} of ${watch.prompt} prompt tokens cached`);
    if (note) parts.push(note);
    this.#figures.replaceChildren(...parts.map((part) => element("span", "", part)));
  }
}
