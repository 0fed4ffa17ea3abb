// Choice of rows by their boxes: the forms of the bar above them act on the chosen ones.
// The boxes of a `data-picking` section carry ids; its `data-picked` bar shows once one is ticked.
function count(section) {
  const boxes = [...section.querySelectorAll("[data-pick]")];
  const ids = boxes.filter((box) => box.checked).map((box) => box.value);
  section.dataset.watched = "";
  const bar = section.querySelector("[data-picked]");
  const all = section.querySelector("[data-pick-all]");
  if (all) {
    all.checked = ids.length > 0 && ids.length === boxes.length;
    all.indeterminate = ids.length > 0 && ids.length < boxes.length;
  }
  if (!bar) return;
  bar.hidden = !ids.length;
  for (const place of bar.querySelectorAll("[data-picked-count]")) place.textContent = ids.length.toLocaleString("en");
  for (const field of bar.querySelectorAll("[data-picked-pattern]")) {
    field.pattern = String(ids.length);
    field.title = `Type ${ids.length}`;
  }
  // An empty list would select all: without a choice, the request has no filter and is refused.
  const sent = ids.length ? { filter: { [section.dataset.picking]: ids } } : {};
  for (const form of bar.querySelectorAll("form[data-picks]")) form.dataset.sends = JSON.stringify(sent);
  for (const link of bar.querySelectorAll("a[data-picked-link]")) link.href = link.dataset.pickedLink + encodeURIComponent(ids.join(","));
}

const countAll = () => document.querySelectorAll("[data-picking]").forEach(count);

function tick(section, isChecked) {
  for (const box of section.querySelectorAll("[data-pick]")) box.checked = isChecked;
  count(section);
}

export function watchSelection() {
  document.addEventListener("change", ({ target }) => {
    const section = target.closest?.("[data-picking]");
    if (!section || !target.matches("[data-pick], [data-pick-all]")) return;
    if (target.matches("[data-pick-all]")) tick(section, target.checked);
    else count(section);
  });
  document.addEventListener("click", ({ target }) => {
    const section = target.closest("[data-unpicks]")?.closest("[data-picking]");
    if (!section) return;
    tick(section, false);
    section.querySelector("[data-pick-all]")?.focus();
  });
  // An update of the page brings the bar as the server knows it, and some chosen rows may be gone.
  document.addEventListener("updated", countAll);
  countAll();
}
