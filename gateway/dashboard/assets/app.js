// The module of every page in the shell: requests of forms, dialogs, keys, and updates.
import { watchCanvas } from "./canvas.js";
import { watchKeys } from "./keys.js";
import { keepAddress, reload, watch } from "./live.js";

const root = document.documentElement.dataset.root;
const COPIED_MS = 2_000;

// With `undo`, the toast has a button that calls it.
export function say(text, undo) {
  const toast = document.getElementById("toast");
  toast.textContent = inRuns(text);
  toast.hidden = false;
  clearTimeout(say.timer);
  say.withdraw?.();
  const turn = say.turn = {};
  if (undo) import("./undo.js").then(({ offer }) => { if (say.turn === turn) say.withdraw = offer(toast, undo); });
  else say.timer = setTimeout(() => { toast.hidden = true; }, 10_000);
}

// Returns what takes the request of a form back: the request of `data-undo`, with the JSON body of `data-undo-sends`.
function undoOf({ dataset: { undo, undoSends } }) {
  if (!undo) return undefined;
  const [method, path] = undo.split(" ");
  const options = undoSends ? { headers: { "Content-Type": "application/json" }, body: undoSends } : {};
  return async () => {
    try {
      const answer = await fetch(root + path, { method, ...options });
      if (!answer.ok) throw new Error((await answer.json()).error.message);
      await reload();
      count(true);
      say("Undone");
    } catch (problem) {
      say(`Not undone: ${problem.message}`);
    }
  };
}

// Pages call an execution a run, as `say_runs` does on the server.
const inRuns = (text) => text.replace(/(?<![\w:/.-])([Ee])xecution(s?)(?![\w:/-])/g, (_, first, last) => (first === "E" ? "Run" : "run") + last);

// A problem stays until it is read: it is closed by hand, or by the next act.
export function sayProblem(text) {
  const place = document.getElementById("problem");
  place.querySelector("p").textContent = inRuns(text);
  place.hidden = false;
}

function showCounts(counts) {
  for (const place of document.querySelectorAll("[data-count]")) {
    place.textContent = counts[place.dataset.count] ?? "";
    place.hidden = !place.textContent;
  }
}

// The counts of the last page are shown at once; pages of runs, which load few files, ask for no others.
function count(isChanged = false) {
  const visitor = document.querySelector("[data-visitor]")?.dataset.visitor;
  if (!visitor || !document.querySelector("[data-count]")) return;
  const kept = JSON.parse(sessionStorage.getItem("counts") ?? "{}");
  if (kept.visitor === visitor) showCounts(kept.counts);
  const key = document.querySelector(".side [aria-current]")?.dataset.key;
  if (key !== "r") import("./counts.js").then(({ refresh }) => refresh(visitor, kept, key, isChanged, showCounts));
}

function confirmed(question, verb, keeps) {
  const dialog = document.getElementById("confirm");
  document.getElementById("confirm-title").textContent = question;
  dialog.querySelector("[data-confirms]").textContent = verb;
  dialog.querySelector("[data-closes]").textContent = keeps;
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "yes"), { once: true });
  });
}

// A reviver that refuses whole numbers which the browser would round, such as long ids.
function refuseRounded(_key, value) {
  if (Number.isInteger(value) && !Number.isSafeInteger(value)) {
    throw new RangeError(`The browser would round a number, to ${value}: write it as a text, or use the API`);
  }
  return value;
}

// `data-json` fields hold JSON, `data-number` fields a number, `data-any` fields JSON or else text; `data-list` fields of
// one name become a list, the lines of a `data-lines` field become one, and `data-off` boxes are false unless checked.
// `data-in` is the path of the object that a field belongs to. `data-before` is the object that a field changes: keys
// that it lacks are sent as null, and fields of it that stand before it prevail. A name that users choose begins with a
// dot, which is left out: as `dataset` it would hide that property of its form.
function bodyOf(form, button) {
  const body = form.dataset.sends ? JSON.parse(form.dataset.sends) : {};
  if (button?.name) body[button.name] = button.value;
  for (const field of form.elements) {
    const isOff = field.type === "checkbox" && !field.checked;
    if (!field.name || field.type === "submit" || field.value === "" || (isOff && !("off" in field.dataset))) continue;
    const name = field.name.replace(/^\./, "");
    const path = field.dataset.in ? field.dataset.in.split(".") : [];
    const target = path.reduce((part, key) => (part[key] ??= {}), body);
    if ("list" in field.dataset) {
      (target[name] ??= []).push(field.value);
      continue;
    }
    if ("lines" in field.dataset) {
      target[name] = field.value.split(/[\n,]/).map((line) => line.trim()).filter(Boolean);
      continue;
    }
    const isNumber = field.type === "number" || "number" in field.dataset;
    let value = field.type === "checkbox" ? !isOff : isNumber ? Number(field.value) : field.value;
    if ("any" in field.dataset) {
      try { value = JSON.parse(field.value); } catch { /* a text */ }
    }
    if ("json" in field.dataset) {
      try {
        value = JSON.parse(field.value, refuseRounded);
      } catch (problem) {
        field.setCustomValidity(problem instanceof RangeError ? problem.message : `This is no JSON: ${problem.message}`);
        field.reportValidity();
        field.addEventListener("input", () => field.setCustomValidity(""), { once: true });
        return null;
      }
    }
    if (field.dataset.before) {
      const before = Object.keys(JSON.parse(field.dataset.before));
      value = { ...Object.fromEntries(before.map((key) => [key, null])), ...value, ...target[name] };
    }
    target[name] = value;
  }
  return body;
}

// A refusal is shown at the form, if it has a place for it.
function refuse(form, text) {
  const place = form.querySelector("[data-problem]");
  if (!place) {
    sayProblem(text);
    return;
  }
  place.textContent = inRuns(text);
  place.hidden = false;
}

async function copy(button) {
  const source = document.getElementById(button.dataset.copies);
  const words = button.querySelector("span") ?? button;
  words.dataset.was ??= words.textContent;
  try {
    await navigator.clipboard.writeText(source.textContent);
    words.textContent = "Copied";
  } catch {
    // Without HTTPS there is no clipboard: the text is selected instead.
    getSelection().selectAllChildren(source);
    words.textContent = "Press Ctrl+C";
  }
  setTimeout(() => { words.textContent = words.dataset.was; }, COPIED_MS);
}

// Shows a form that others have changed, or whose change was merged with theirs, as its object is now.
async function renew(form) {
  delete form.dataset.changed;
  document.activeElement?.blur(); // an update leaves a form with the focus alone
  await reload();
  form.reset();
  form.querySelector("[type=submit]")?.focus();
}

// With `merged`, that body is sent in place of the fields.
async function submit(form, button, merged) {
  // A button may have a request and a next page of its own.
  const { request, then } = button?.dataset.request ? button.dataset : form.dataset;
  const [method, path] = request.split(" ");
  const body = merged ?? bodyOf(form, button);
  const undo = undoOf(form); // an update of the page changes the form
  // A button that a single key has pressed asks first.
  const isByKey = "pressed" in (button?.dataset ?? {});
  if (isByKey) delete button.dataset.pressed;
  const question = isByKey ? button.dataset.asks : form.dataset.confirm;
  const verb = isByKey ? "Answer" : (button ?? form.querySelector("[type=submit]"))?.textContent.replace("…", "");
  if (body === null || (question && !(await confirmed(question, verb, form.dataset.keeps || "Go back")))) return;
  const settled = async () => {
    const { settle } = await import("./merge.js");
    await settle(form, body, root, (text) => refuse(form, text), (next) => next ? submit(form, button, next) : renew(form));
  };
  const buttons = form.querySelectorAll("button[type=submit]");
  buttons.forEach((button) => { button.disabled = true; });
  form.querySelector("[data-problem]")?.setAttribute("hidden", "");
  document.getElementById("problem").hidden = true;
  try {
    // An object of a list comes without its tag.
    if ("known" in form.dataset && !form.dataset.ifMatch) {
      await settled();
      return;
    }
    const options = { method, headers: form.dataset.ifMatch ? { "If-Match": form.dataset.ifMatch } : {} };
    if (Object.keys(body).length || form.dataset.sends) {
      options.headers["Content-Type"] = "application/json";
      options.body = JSON.stringify(body);
    }
    const answer = await fetch(root + path, options);
    const text = await answer.text();
    const value = text ? JSON.parse(text) : {};
    if (answer.status === 412) {
      await settled();
      return;
    }
    if (!answer.ok) {
      const details = (value.error.details ?? []).map((one) => one.message).filter((one) => one !== value.error.message);
      refuse(form, [value.error.message, ...details].join(" · "));
      return;
    }
    delete form.dataset.changed;
    form.closest("dialog")?.close();
    const tag = answer.headers.get("ETag");
    if (form.dataset.ifMatch && tag) form.dataset.ifMatch = tag;
    if (form.dataset.known) (await import("./merge.js")).remember(form, body);
    // A form with the focus stays as it is when the page loads itself again.
    for (const field of form.querySelectorAll("[data-before]")) field.dataset.before = field.value;
    const fill = (text, encode) => (text ?? "").replace(/\{(\w+)\}/g, (_, name) => encode(value[name] ?? ""));
    const next = fill(then, encodeURIComponent);
    if (next) location.assign(next);
    else {
      // The page goes on with its next object.
      if (form.dataset.next) history.replaceState(null, "", form.dataset.next);
      await (merged || "renews" in form.dataset ? renew(form) : reload());
      count(true);
    }
    const isBlocked = form.dataset.says?.startsWith("Saved") && document.querySelector("[data-blocks]");
    const says = isBlocked ? "Saved. It cannot run until its errors are fixed" : form.dataset.says;
    if (says) say(fill(says, String), undo);
    if (path.endsWith("/bulk-operations")) followOperations(value.id);
    if (form.dataset.result) (await import("./phases.js")).show(document.getElementById(form.dataset.result), value);
    if (form.dataset.shows) {
      const shown = form.dataset.shows.split(".").reduce((part, name) => part[name], value);
      document.getElementById("shown-value").textContent = shown;
      const { proof, proves } = form.dataset;
      document.querySelector("#shown-proof > p").textContent = proves;
      document.getElementById("shown-command").textContent = (proof ?? "").replace("{shown}", () => shown);
      document.getElementById("shown-proof").hidden = !proof;
      document.getElementById("shown").showModal();
    }
  } catch {
    sayProblem("The server didn’t answer: the change may have been made, or not. Look at the page before you try again.");
  } finally {
    buttons.forEach((button) => { button.disabled = false; });
  }
}

async function followOperations(begun) {
  if (begun || document.querySelector("[data-operation]")) (await import("./bulk.js")).follow(root, reload, say, begun);
}

document.addEventListener("submit", (event) => {
  // A button with an address of its own shows a preview on the page there.
  if (event.target.dataset.request && !event.submitter?.hasAttribute("formaction")) {
    event.preventDefault();
    submit(event.target, event.submitter);
  }
});
// An update of the page keeps what a visitor has typed.
document.addEventListener("input", (event) => {
  if (event.target.form?.dataset.request) event.target.form.dataset.changed = "";
});
// The choice of a `data-at-once` form is sent without a button.
document.addEventListener("change", (event) => {
  if (event.target.form && "atOnce" in event.target.form.dataset) event.target.form.requestSubmit();
});
// A file fills the text field that `data-fills` names, or becomes a workflow by `data-imports`.
document.addEventListener("change", async (event) => {
  const file = event.target.dataset?.fills ? event.target.files[0] : null;
  if (file) document.getElementById(event.target.dataset.fills).value = await file.text();
  const brought = "imports" in (event.target.dataset ?? {}) ? event.target.files[0] : null;
  if (brought) {
    event.target.value = ""; // so that the same file, corrected, can be chosen again
    document.getElementById("problem").hidden = true;
    (await import("./imports.js")).create(brought, root, sayProblem);
  }
});
document.addEventListener("pointerover", async (event) => {
  if (event.target.closest("[data-brush]")) (await import("./brush.js")).watch(root);
});
document.addEventListener("click", async (event) => {
  const button = event.target.closest("[data-exports]");
  if (button) (await import("./exports.js")).save(button, root, say, sayProblem);
});
document.addEventListener("click", (event) => {
  const button = event.target.closest("[data-opens], [data-closes], [data-confirms], [data-copies], [data-dismisses]");
  if (!button) return;
  if (button.dataset.copies) copy(button);
  else if ("dismisses" in button.dataset) document.getElementById("problem").hidden = true;
  else if (button.dataset.opens) document.getElementById(button.dataset.opens).showModal();
  else button.closest("dialog").close("confirms" in button.dataset ? "yes" : "");
});

keepAddress();
watchKeys();
watchCanvas();
watch();
followOperations();
document.addEventListener("updated", () => followOperations());
if (document.querySelector("[data-picking]")) import("./selection.js").then(({ watchSelection }) => watchSelection());
count();
