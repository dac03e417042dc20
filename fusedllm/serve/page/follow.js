// The page follows the answer while the reader stands at its end, and lets go as soon as they scroll up.

// A fraction of a pixel is no distance, and neither is a line's worth of rounding.
const NEAR_PIXELS = 4;

const latest = document.getElementById("latest");
let following = true;
let before = window.scrollY;

function distance() {
  return document.documentElement.scrollHeight - window.innerHeight - window.scrollY;
}

/** Goes to the end of the conversation, and follows it from now on. */
export function showEnd() {
  following = true;
  window.scrollTo({ top: document.documentElement.scrollHeight, behavior: "instant" });
  before = window.scrollY;
}

/** The conversation grew: goes to its end if the reader was there. */
export function follow() {
  if (following) showEnd();
  latest.hidden = distance() <= NEAR_PIXELS;
}

document.addEventListener(
  "scroll",
  () => {
    // The page only ever scrolls down by itself, so up is the reader; unless the text became shorter.
    if (window.scrollY < before || distance() <= NEAR_PIXELS) following = distance() <= NEAR_PIXELS;
    before = window.scrollY;
    latest.hidden = distance() <= NEAR_PIXELS;
  },
  { passive: true },
);
// The log grows, the dock grows with the message, the window turns.
const observer = new ResizeObserver(follow);
for (const part of document.querySelectorAll("#log, .dock")) observer.observe(part);
latest.addEventListener("click", () => {
  showEnd();
  document.getElementById("message").focus();
});
