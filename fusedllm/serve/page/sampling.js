// The sampling controls: kept for this tab, and put into a request. A field left empty is left to the server.

const STORE = "fusedllm.sampling";
const NUMBERS = ["temperature", "top_p", "top_k", "max_tokens", "seed"];
const form = document.getElementById("sampling");

function showRanges() {
  for (const output of form.querySelectorAll("output")) {
    output.value = Number(form.elements[output.htmlFor.value].value).toFixed(2);
  }
}

function keep() {
  showRanges();
  const values = Object.fromEntries([...NUMBERS, "system"].map((name) => [name, form.elements[name].value]));
  try {
    sessionStorage.setItem(STORE, JSON.stringify(values));
  } catch {
    // A browser that stores nothing starts anew at a reload.
  }
}

function restore() {
  try {
    const values = JSON.parse(sessionStorage.getItem(STORE) ?? "{}");
    for (const [name, value] of Object.entries(values)) {
      if (form.elements[name]) form.elements[name].value = value;
    }
  } catch {
    // Unreadable: the defaults of the page.
  }
  showRanges();
}

/** The parameters of a request, and the system prompt; null when a field holds what it can't. */
export function sampling() {
  if (!form.checkValidity()) return null;
  const parameters = {};
  for (const name of NUMBERS) {
    const { value } = form.elements[name];
    if (value !== "") parameters[name] = Number(value);
  }
  return { parameters, system: form.elements.system.value.trim() };
}

/** Points at the field that holds what it can't. */
export function reportInvalid() {
  form.reportValidity();
}

form.addEventListener("input", keep);
form.addEventListener("reset", () => setTimeout(keep));
form.addEventListener("submit", (event) => event.preventDefault());
restore();
