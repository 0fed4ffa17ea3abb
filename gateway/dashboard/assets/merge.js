// Merge of two changes of one config: after a 412, both versions are shown by path, and the visitor chooses.
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

function show(section, rows) {
  section.querySelector("tbody").replaceChildren(...rows.map((row, number) => {
    const line = document.createElement("tr");
    const name = document.createElement("td");
    name.className = "mono";
    name.textContent = row.path || "all";
    line.append(name, cell(row, true, number), cell(row, false, number));
    return line;
  }));
  section.hidden = false;
  section.querySelector("h3").focus();
}

// Lets a form be sent again that has no config to merge, on the state that its object has now. Returns true if it may be
// sent at once: the config that it knows (`data-known`) of its node (`data-node`) is as it was, something else has changed.
export async function renew(form, root) {
  const answer = await fetch(root + form.dataset.of, { headers: { Accept: "application/json" } });
  form.dataset.ifMatch = answer.headers.get("ETag") ?? "";
  const { node, known } = form.dataset;
  if (!known || !answer.ok) return false;
  const config = (await answer.json()).nodes.find((one) => one.id === node)?.config ?? null;
  form.dataset.known = JSON.stringify(config);
  return equal(JSON.parse(known), config);
}

// Called after a refusal because of another change. Returns true if the form may be sent again at once: the other change
// was of something else. Otherwise both versions are shown, and a button sends the merge.
export async function resolve(form, root, say, send) {
  const answer = await fetch(root + form.dataset.of, { headers: { Accept: "application/json" } });
  const node = answer.ok ? (await answer.json()).nodes.find((one) => one.id === form.dataset.node) : undefined;
  if (!node) {
    say("Somebody has removed this node: your change cannot be saved.");
    return false;
  }
  const field = form.querySelector("[data-before]");
  const before = JSON.parse(field.dataset.before);
  const [theirs, mine] = [node.config, JSON.parse(field.value)];
  form.dataset.ifMatch = answer.headers.get("ETag");
  field.dataset.before = JSON.stringify(theirs);
  if (equal(before, theirs)) return true;
  const rows = [];
  merge(before, theirs, mine, new Set(), rows);
  const section = form.querySelector("[data-merge]");
  show(section, rows);
  section.querySelector("[data-merges]").onclick = () => {
    const chosen = [...section.querySelectorAll("[data-side=theirs]:checked")].map((one) => one.dataset.path);
    field.value = JSON.stringify(merge(before, theirs, mine, new Set(chosen)), null, 2);
    section.hidden = true;
    send();
  };
  section.querySelector("[data-discards]").onclick = () => {
    field.value = JSON.stringify(theirs, null, 2);
    section.hidden = true;
    delete form.dataset.changed;
  };
  return false;
}
