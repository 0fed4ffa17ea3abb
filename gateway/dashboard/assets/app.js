// The module of every page in the shell: requests of forms, dialogs, keys, and updates.
import { watchKeys } from "./keys.js";
import { reload, watch } from "./live.js";

const root = document.documentElement.dataset.root;

export function say(text) {
  const toast = document.getElementById("toast");
  toast.textContent = text;
  toast.hidden = false;
  clearTimeout(say.timer);
  say.timer = setTimeout(() => { toast.hidden = true; }, 10_000);
}

function confirmed(question) {
  const dialog = document.getElementById("confirm");
  document.getElementById("confirm-title").textContent = question;
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "yes"), { once: true });
  });
}

// `data-json` fields hold JSON, `data-number` fields a number; checked `data-list` boxes of one name become a list.
function bodyOf(form, button) {
  const body = form.dataset.sends ? JSON.parse(form.dataset.sends) : {};
  if (button?.name) body[button.name] = button.value;
  for (const field of form.elements) {
    if (!field.name || field.type === "submit" || field.value === "" || (field.type === "checkbox" && !field.checked)) continue;
    if ("list" in field.dataset) {
      (body[field.name] ??= []).push(field.value);
      continue;
    }
    const isNumber = field.type === "number" || "number" in field.dataset;
    let value = field.type === "checkbox" ? true : isNumber ? Number(field.value) : field.value;
    if ("json" in field.dataset) {
      try {
        value = JSON.parse(field.value);
      } catch (problem) {
        field.setCustomValidity(`This is no JSON: ${problem.message}`);
        field.reportValidity();
        field.addEventListener("input", () => field.setCustomValidity(""), { once: true });
        return null;
      }
    }
    const target = field.dataset.in ? (body[field.dataset.in] ??= {}) : body;
    target[field.name] = value;
  }
  return body;
}

async function submit(form, button) {
  const [method, path] = form.dataset.request.split(" ");
  const body = bodyOf(form, button);
  if (body === null || (form.dataset.confirm && !(await confirmed(form.dataset.confirm)))) return;
  const buttons = form.querySelectorAll("button[type=submit]");
  buttons.forEach((button) => { button.disabled = true; });
  try {
    const options = { method, headers: {} };
    if (Object.keys(body).length || form.dataset.sends) {
      options.headers["Content-Type"] = "application/json";
      options.body = JSON.stringify(body);
    }
    const answer = await fetch(root + path, options);
    const text = await answer.text();
    const value = text ? JSON.parse(text) : {};
    if (!answer.ok) {
      const details = (value.error.details ?? []).map((one) => one.message).filter((one) => one !== value.error.message);
      say([value.error.message, ...details].join(" · "));
      return;
    }
    form.closest("dialog")?.close();
    const fill = (text, encode) => (text ?? "").replace(/\{(\w+)\}/g, (_, name) => encode(value[name] ?? ""));
    const next = fill(form.dataset.then, encodeURIComponent);
    if (next) location.assign(next);
    else await reload();
    if (form.dataset.says) say(fill(form.dataset.says, String));
    if (form.dataset.shows) {
      document.getElementById("shown-value").textContent = value[form.dataset.shows];
      document.getElementById("shown").showModal();
    }
  } catch {
    say("The server can’t be reached. Nothing was changed.");
  } finally {
    buttons.forEach((button) => { button.disabled = false; });
  }
}

document.addEventListener("submit", (event) => {
  if (event.target.dataset.request) {
    event.preventDefault();
    submit(event.target, event.submitter);
  }
});
document.addEventListener("click", (event) => {
  const button = event.target.closest("[data-opens], [data-closes], [data-confirms]");
  if (!button) return;
  if (button.dataset.opens) document.getElementById(button.dataset.opens).showModal();
  else button.closest("dialog").close("confirms" in button.dataset ? "yes" : "");
});

watchKeys();
watch();
