// How fast an answer comes, measured where it is read: in this page, the network's way included.

// Of English text under LLaMA's vocabulary; the first answer whose tokens the server counted replaces it.
let charactersPerToken = 4.2;

// Less than this between the first and the last piece is one burst, and tells nothing of a speed.
const BURST_MILLISECONDS = 20;

/** Time to the first token and tokens per second of one answer. */
export class Stopwatch {
  #sent = performance.now();
  #first = null;
  #last = null;
  #firstCharacters = 0;
  #characters = 0;
  #tokens = null;

  /** Text arrived. */
  add(text) {
    this.#last = performance.now();
    if (this.#first === null) {
      this.#first = this.#last;
      this.#firstCharacters = text.length;
    }
    this.#characters += text.length;
  }

  /** The server counted the answer's tokens. */
  count(tokens) {
    this.#tokens = tokens;
    if (tokens > 0 && this.#characters > 0) charactersPerToken = this.#characters / tokens;
  }

  /** Seconds until the first text, or null. */
  get firstToken() {
    return this.#first === null ? null : (this.#first - this.#sent) / 1000;
  }

  /** Tokens so far; an estimate from the text's length until the server has counted (`exact`). */
  get tokens() {
    return this.#tokens ?? Math.round(this.#characters / charactersPerToken);
  }

  /** Whether `tokens` is the server's count. */
  get exact() {
    return this.#tokens !== null;
  }

  /** Tokens per second after the first piece of text, which took its own time; null while all came at once. */
  get rate() {
    if (this.#first === null || this.#last - this.#first < BURST_MILLISECONDS) return null;
    const share = 1 - this.#firstCharacters / this.#characters;
    return (this.tokens * share * 1000) / (this.#last - this.#first);
  }
}

/** Seconds as a person reads them: `[number, unit]`. */
export function duration(seconds) {
  return seconds < 0.9995 ? [(seconds * 1000).toFixed(0), "ms"] : [seconds.toFixed(seconds < 10 ? 2 : 1), "s"];
}

/** A rate with three figures. */
export function speed(rate) {
  return rate < 9.995 ? rate.toFixed(1) : rate.toFixed(0);
}
