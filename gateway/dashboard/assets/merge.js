// Merge of two changes of one object: after a 412, both versions are shown by path, and the visitor chooses.
const isObject = (value) => value !== null && typeof value === "object" && !Array.isArray(value);
const ABSENT = Symbol("absent");

function sorted(value) {
  if (Array.isArray(value)) return value.map(sorted);
  if (!isObject(value)) return value;
  return Object.fromEntries(Object.keys(value).sort().map((key) => [key, sorted(value[key])]));
}

function equal(one, other) {
  if (one === ABSENT || other === ABSENT) return one === other;
  return JSON.stringify(sorted(one)) === JSON.stringify(sorted(other));
}

const child = (value, key) => (isObject(value) && Object.hasOwn(value, key) ? value[key] : ABSENT);

// Returns the merged value, and adds a row for each path that differs; `chosen` names the paths of which theirs is taken.
export function merge(before, theirs, mine, chosen = new Set(), rows = [], path = "") {
  if (equal(theirs, mine)) return mine;
  if (isObject(theirs) && isObject(mine)) {
    const merged = {};
    for (const key of new Set([...Object.keys(theirs), ...Object.keys(mine)])) {
      const inner = path ? `${path}.${key}` : key;
      const value = merge(child(before, key), child(theirs, key), child(mine, key), chosen, rows, inner);
      if (value !== ABSENT) Object.defineProperty(merged, key, { value, enumerable: true, configurable: true, writable: true });
    }
    return merged;
  }
  const isConflict = !equal(before, theirs) && !equal(before, mine);
  const takesTheirs = isConflict ? chosen.has(path) : equal(before, mine);
  rows.push({ path, theirs, mine, isConflict, takesTheirs });
  return takesTheirs ? theirs : mine;
}

function cell(row, isTheirs, number) {
  const value = isTheirs ? row.theirs : row.mine;
  const place = document.createElement("td");
  const text = document.createElement("code");
  text.textContent = value === ABSENT ? "(removed)" : JSON.stringify(value, null, 1);
  if (!row.isConflict) {
    place.append(text);
    place.className = row.takesTheirs === isTheirs ? "good" : "faint";
    return place;
  }
  const label = document.createElement("label");
  const choice = document.createElement("input");
  choice.type = "radio";
  choice.dataset.path = row.path;
  choice.dataset.side = isTheirs ? "theirs" : "mine";
  choice.setAttribute("form", "none");
  choice.name = `merge-${number}`;
  choice.checked = !isTheirs;
  label.append(choice, " ", text);
  place.append(label);
  return place;
}

function make(name, attributes = {}, ...parts) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...parts);
  return made;
}

// Shows both changes in a section at the begin of the form, in place of an earlier one. An update of the page leaves the
// form alone; further input hides the section, since the choice would be about an older text.
function show(form, rows) {
  const lines = rows.map((row, number) => make("tr", {},
    make("td", { class: "mono" }, row.path || "all"), cell(row, true, number), cell(row, false, number)));
  const heads = ["Path", "Saved meanwhile", "Yours"].map((text) => make("th", { scope: "col" }, text));
  const title = `merge-title-${form.dataset.of}`;
  const section = make("section", { class: "merge", "data-merge": "", "aria-labelledby": title },
    make("p", { id: title, class: "label", tabindex: "-1" }, "Somebody has changed this since you opened it"),
    make("p", { class: "hint" }, "Both changes are kept, unless they are of the same path: then choose one."),
    make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Both versions, table" },
      make("table", { class: "inner" }, make("thead", {}, make("tr", {}, ...heads)), make("tbody", {}, ...lines))),
    make("p", { class: "line" },
      make("button", { class: "button main", type: "button", "data-merges": "" }, "Save the merge"),
      make("button", { class: "button", type: "button", "data-keeps": "" }, "Save all of mine"),
      make("button", { class: "button", type: "button", "data-discards": "" }, "Take theirs")));
  form.querySelector("[data-merge]")?.remove();
  form.prepend(section);
  form.dataset.changed = "";
  form.addEventListener("input", ({ target }) => { if (!section.contains(target)) section.remove(); });
  section.querySelector(".label").focus();
  return section;
}

// A form of an object edits one part of it. `data-known` is that part as the page has it: a field of many keys, `config`
// of the node `data-node` or else `data-field`, of which null removes a key; the field `data-part`, which a request sets
// as a whole; or some fields. Of the field `data-opaque`, such as a fingerprint, it sends something that is not shown.
function partOf({ dataset: { node, field, part, known } }, answer) {
  if (node) return answer.nodes.find((one) => one.id === node)?.config;
  if (field ?? part) return answer[field ?? part];
  return Object.fromEntries(Object.keys(JSON.parse(known)).map((key) => [key, answer[key] ?? null]));
}

// Returns the part as the form would leave it.
function mineOf({ dataset: { node, field, part, known, opaque } }, body) {
  if (part) return body;
  const before = JSON.parse(known);
  if (opaque) return { ...before, [opaque]: "yours, not shown" };
  const name = node ? "config" : field;
  if (!name) return { ...before, ...body };
  return Object.fromEntries(Object.entries({ ...before, ...body[name] }).filter(([, value]) => value !== null));
}

// Returns the body that changes `theirs` into `merged`; null if nothing is left to change.
function bodyFor({ dataset: { node, field, part, opaque } }, theirs, merged, body) {
  if (equal(theirs, merged)) return null;
  if (part) return merged;
  if (opaque) return equal(theirs[opaque], merged[opaque]) ? null : body;
  const changed = Object.entries(merged).filter(([key, value]) => !equal(child(theirs, key), value));
  const removed = Object.keys(theirs).filter((key) => !Object.hasOwn(merged, key)).map((key) => [key, null]);
  const patch = Object.fromEntries([...changed, ...removed]);
  const name = node ? "config" : field;
  return name ? { [name]: patch } : patch;
}

// Notes that the object is as the form has left it.
export function remember(form, body) {
  form.dataset.known = JSON.stringify(mineOf(form, body));
}

// Called after a refusal because of another change, and before a request of a form that has no `If-Match` yet; `send` sends a body of the form, and none leaves the object as it
// is. A change of another part is no conflict: the form is sent again at once. Otherwise both versions are shown, and
// the visitor chooses: theirs, their own, or some paths of each.
export async function settle(form, body, root, refuse, send) {
  const answer = await fetch(root + form.dataset.of, { headers: { Accept: "application/json" } });
  const tag = answer.headers.get("ETag");
  const isGone = answer.status === 404;
  if (!isGone && !(answer.ok && tag)) {
    refuse(`The present state could not be read (status ${answer.status}): your change is not saved yet. Try again.`);
    return;
  }
  const theirs = isGone ? undefined : partOf(form, await answer.json());
  if (theirs === undefined) {
    refuse("Somebody has removed it: your change cannot be saved.");
    return;
  }
  const before = JSON.parse(form.dataset.known);
  const mine = mineOf(form, body);
  const choose = (value) => {
    form.dataset.ifMatch = tag;
    form.dataset.known = JSON.stringify(theirs);
    form.querySelector("[data-merge]")?.remove();
    send(bodyFor(form, theirs, value, body));
  };
  if (equal(before, theirs)) {
    form.dataset.ifMatch = tag;
    await send(body);
    return;
  }
  const rows = [];
  merge(before, theirs, mine, new Set(), rows);
  const section = show(form, rows);
  section.querySelector("[data-merges]").onclick = () => {
    const chosen = [...section.querySelectorAll("[data-side=theirs]:checked")].map((one) => one.dataset.path);
    choose(merge(before, theirs, mine, new Set(chosen)));
  };
  section.querySelector("[data-keeps]").onclick = () => choose(mine);
  section.querySelector("[data-discards]").onclick = () => choose(theirs);
}
