// The panel of figures and settings: beside the conversation, or over it on a narrow screen.

const NARROW = window.matchMedia("(max-width: 62rem)");
const opener = document.getElementById("open-panel");
const covered = document.querySelectorAll("main, .dock");

/** Whether it lies over the conversation. */
export function panelIsOpen() {
  return document.body.classList.contains("panel-open");
}

function show(open) {
  document.body.classList.toggle("panel-open", open);
  opener.setAttribute("aria-expanded", String(open));
  for (const part of covered) part.inert = open;
}

/** Makes sure that its fields can be seen. */
export function revealPanel() {
  if (NARROW.matches) show(true);
}

/** Uncovers the conversation; `refocus` puts the keyboard back where it opened the panel. */
export function closePanel(refocus = false) {
  show(false);
  if (refocus) opener.focus();
}

opener.addEventListener("click", () => show(!panelIsOpen()));
NARROW.addEventListener("change", () => show(false));
