// Canvas of a graph: arrows follow its edges, one card is in the tab order, and the overview leads to any place.
function cardsOf(map) {
  return new Map([...map.querySelectorAll("[data-card]")].map((card) => [card.dataset.card, card]));
}

function centerOf(card) {
  const box = card.getBoundingClientRect();
  return { x: box.x + box.width / 2, y: box.y + box.height / 2 };
}

// The nearest of several cards, seen from one; beyond the direction of the arrow a distance counts four times.
function nearest(card, others, isVertical) {
  const from = centerOf(card);
  const distance = (other) => {
    const to = centerOf(other);
    const [along, aside] = isVertical ? [to.y - from.y, to.x - from.x] : [to.x - from.x, to.y - from.y];
    return Math.abs(along) + 4 * Math.abs(aside);
  };
  return others.reduce((best, other) => (best && distance(best) <= distance(other) ? best : other), undefined);
}

function next(card, key) {
  const cards = cardsOf(card.closest("[data-map]"));
  const all = [...cards.values()].filter((other) => other !== card);
  const from = centerOf(card);
  if (key === "ArrowRight") {
    const targets = card.dataset.to.split(" ").map((id) => cards.get(id)).filter(Boolean);
    return nearest(card, targets, false);
  }
  if (key === "ArrowLeft") {
    const sources = all.filter((other) => other.dataset.to.split(" ").includes(card.dataset.card));
    return nearest(card, sources, false);
  }
  const sign = key === "ArrowDown" ? 1 : -1;
  return nearest(card, all.filter((other) => (centerOf(other).y - from.y) * sign > 4), true);
}

function focus(card) {
  for (const other of card.closest("[data-map]").querySelectorAll("[data-card]")) other.setAttribute("tabindex", "-1");
  card.setAttribute("tabindex", "0");
  card.focus({ preventScroll: true });
  card.scrollIntoView({ block: "nearest", inline: "nearest" });
}

// The factor of the map stays for the pages of one path, in this tab.
const ZOOMS = [0.25, 0.35, 0.5, 0.7, 0.85, 1, 1.25, 1.5, 2];
const place = () => `zoom:${location.pathname}`;

function keptZoom() {
  return Number(sessionStorage.getItem(place())) || undefined;
}

// The factor of the drawing in sight: a map is fitted until a factor is chosen.
function shownZoom(drawing) {
  return drawing.getBoundingClientRect().width / drawing.viewBox.baseVal.width;
}

function sayZoom(factor) {
  document.querySelector("[data-zoom=whole]").textContent = `${Math.round(factor * 100)} %`;
}

// Sets the factor of the map; the middle of the view and the height of the frame stay.
function zoom(factor) {
  const map = document.querySelector("[data-map]");
  const drawing = map?.querySelector("svg");
  if (!drawing) return;
  const { width, height } = drawing.viewBox.baseVal;
  const before = shownZoom(drawing);
  const middle = { x: map.scrollLeft + map.clientWidth / 2, y: map.scrollTop + map.clientHeight / 2 };
  if (factor !== 1) map.style.height = `${map.offsetHeight}px`;
  drawing.classList.remove("fits");
  drawing.setAttribute("width", Math.round(width * factor));
  drawing.setAttribute("height", Math.round(height * factor));
  map.scrollTo(middle.x * factor / before - map.clientWidth / 2, middle.y * factor / before - map.clientHeight / 2);
  sayZoom(factor);
  sessionStorage.setItem(place(), factor);
}

function step(how) {
  const map = document.querySelector("[data-map]");
  if (!map) return;
  const drawing = map.querySelector("svg");
  const { width, height } = drawing.viewBox.baseVal;
  const now = shownZoom(drawing);
  if (how === "in") zoom(ZOOMS.find((one) => one > now * 1.05) ?? now);
  else if (how === "out") zoom(ZOOMS.findLast((one) => one < now / 1.05) ?? now);
  else if (how === "fit") zoom(Math.max(Math.min((map.clientWidth - 4) / width, map.clientHeight / height, 1), ZOOMS[0]));
  else zoom(1);
}

// An update of the page draws the map as at first.
export function keepZoom() {
  const drawing = document.querySelector("[data-map] > svg");
  if (drawing && keptZoom()) zoom(keptZoom());
  else if (drawing) sayZoom(shownZoom(drawing));
}

const ZOOM_KEYS = { "+": "in", "=": "in", "-": "out", 0: "whole" };

export function watchCanvas() {
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || !event.target.closest?.("[data-map]")) return;
    if (event.key in ZOOM_KEYS) step(ZOOM_KEYS[event.key]);
  });
  document.addEventListener("keydown", (event) => {
    if (!event.key.startsWith("Arrow") || event.ctrlKey || event.metaKey || event.altKey) return;
    const card = event.target.closest?.("[data-card]");
    const found = card ? next(card, event.key) : undefined;
    if (card) event.preventDefault();
    if (found) focus(found);
  });
  document.addEventListener("click", (event) => {
    const button = event.target.closest?.("[data-zoom]");
    if (button) step(button.dataset.zoom);
  });
  keepZoom();
  document.addEventListener("click", (event) => {
    const overview = event.target.closest?.("[data-overview]");
    if (!overview) return;
    const box = overview.getBoundingClientRect();
    const at = [(event.clientX - box.x) / box.width * 1004 - 2, (event.clientY - box.y) / box.height * 204 - 2];
    const address = new URL(overview.dataset.overview, location.href);
    address.searchParams.set("at", at.map((one) => Math.max(Math.round(one), 0)).join(","));
    location.assign(address);
  });
  // The selected card, the focus of a large graph, or the first failed card is in sight.
  const map = document.querySelector("[data-map]");
  const card = map?.querySelector("[aria-current]") ?? map?.querySelector("[data-focus]") ?? map?.querySelector("[data-failed]");
  if (!card) return;
  const { x, y } = centerOf(card);
  const box = map.getBoundingClientRect();
  map.scrollTo(x - box.x - box.width / 2, y - box.y - box.height / 2);
}
