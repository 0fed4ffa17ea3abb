// Keys: single letters work outside of fields; rows are the links with `data-row`, and `data-press` names the key of a
// button.
let waitsForPage = false;

function move(step) {
  const rows = [...document.querySelectorAll("[data-row]")];
  const here = rows.indexOf(document.activeElement);
  const next = rows[here < 0 ? (step > 0 ? 0 : rows.length - 1) : here + step];
  next?.focus();
}

function nextFailure() {
  const rows = [...document.querySelectorAll("[data-failed]")];
  const here = rows.indexOf(document.activeElement);
  (rows[here + 1] ?? rows[0])?.focus();
}

function moveTab(step) {
  const tabs = [...document.querySelectorAll("[data-tab]")];
  tabs[tabs.findIndex((tab) => tab.hasAttribute("aria-current")) + step]?.click();
}

// Leads to the form that runs the workflow of the chosen row.
function run() {
  const row = document.activeElement.closest("[data-runs]");
  if (row) location.assign(row.dataset.runs);
}

function press(key) {
  const button = document.querySelector(`main [data-press="${CSS.escape(key)}"]`);
  if (!button) return false;
  button.dataset.pressed = "";
  button.click();
  return true;
}

export function watchKeys() {
  document.addEventListener("keydown", (event) => {
    const isTyping = event.target.matches("input, textarea, select, [contenteditable]");
    if (isTyping || event.ctrlKey || event.metaKey || event.altKey || document.querySelector("dialog[open]")) return;
    if (waitsForPage) {
      waitsForPage = false;
      document.querySelector(`.side [data-key="${CSS.escape(event.key)}"]`)?.click();
      return;
    }
    const actions = {
      "?": () => document.getElementById("keys").showModal(),
      "/": () => document.getElementById("search").focus(),
      "c": () => document.getElementById("curl").showModal(),
      "g": () => { waitsForPage = true; },
      "j": () => move(1),
      "k": () => move(-1),
      "n": nextFailure,
      "[": () => moveTab(-1),
      "]": () => moveTab(1),
      "f": () => document.getElementById("find")?.focus(),
      "r": run,
      ".": () => document.querySelector("[data-shows-new]")?.click(),
    };
    if (Object.hasOwn(actions, event.key)) {
      event.preventDefault();
      actions[event.key]();
    } else if (press(event.key)) event.preventDefault();
  });
}
