import { keepZoom } from "./canvas.js";

// Updates: hints of one event stream per tab make the page load itself again; the answer changes it in place.
const COALESCE_MS = 250;
// A page is loading for a fifth of the time at most: a busy server is asked less often.
const LOADING_SHARE = 5;
// A load that took minutes, such as one without a network, does not leave the page behind for longer.
const MAX_PAUSE_MS = 10_000;
const AGES_MS = 10_000;
// A server that does not answer is asked again; what is shown stays.
const RETRY_MS = 5_000;
// Refusals of an object that is gone, or not for this visitor any more: a page that says so.
const GONE = [403, 404];
const { root, tag: shownTag } = document.documentElement.dataset;
// The only policy: HTML of this server's own pages, in which Jinja2 has escaped every value.
const policy = globalThis.trustedTypes?.createPolicy("pilotflame", { createHTML: (html) => html }) ?? { createHTML: (html) => html };

let stream = null;
let timer = 0;
let isLoading = false;
let asked = null;
let loadedAt = -COALESCE_MS;
let took = 0;
// Tag of the shown page: the server sends it again only if it has changed.
let tag = shownTag;
let retry = 0;
// Time of the last answer: the age of the page.
let heard = "";

function label(state, text) {
  const live = document.querySelector(".live");
  live.dataset.state = state;
  live.firstElementChild.textContent = text;
}

function clock() {
  return `${new Date().toISOString().slice(11, 19)} UTC`;
}

// Notes an answer of the server: its time is the age of the page from now on.
function hear() {
  heard = clock();
  clearTimeout(retry);
  document.getElementById("unheard").hidden = true;
  const isLive = stream?.readyState === EventSource.OPEN;
  label(isLive ? "live" : "still", `${isLive ? "Live · " : ""}${heard}`);
}

// Says that the page gets old, and loads it again until that succeeds.
function miss(text) {
  label("lost", `Lost · ${heard}`);
  document.getElementById("unheard-title").textContent = text;
  document.getElementById("heard").textContent = heard;
  document.getElementById("unheard").hidden = false;
  clearTimeout(retry);
  retry = setTimeout(() => reload({ takesNewRows: false }), RETRY_MS);
}

// Rows of a list never move under the pointer: new ones, or another order, wait behind a button.
function holdRows(page) {
  const list = "tbody[data-newest], tbody[data-ranked]";
  const shown = document.querySelector(list);
  const loaded = page.querySelector(list);
  if (!shown || !loaded) return;
  const known = new Set([...shown.rows].map((row) => row.id));
  const added = [...loaded.rows].filter((row) => !known.has(row.id));
  const byId = new Map([...loaded.rows].map((row) => [row.id, row]));
  const kept = [...shown.rows].map((row) => row.id).filter((id) => byId.has(id));
  const isSorted = [...loaded.rows].filter((row) => known.has(row.id)).every((row, number) => row.id === kept[number]);
  if (!added.length && isSorted) return;
  loaded.replaceChildren(...[...shown.rows].map((row) => byId.get(row.id) ?? row.cloneNode(true)));
  const button = page.createElement("button");
  button.type = "button";
  button.id = "new-rows";
  button.className = "button small";
  button.dataset.showsNew = "";
  const isNew = added.length && loaded.matches("[data-newest]");
  button.textContent = isNew ? `${added.length} new` : "Sort again";
  if (isNew) button.title = "Show them";
  page.querySelector(".title").append(button);
}

// A text that is being written keeps its scroll position, and is not read out again.
const isSameText = (old, fresh) => old.matches("[data-writes]") && old.id === fresh.id;

// The address names the object that a page has chosen to show, so that an update shows the same one.
export function keepAddress() {
  const { address } = document.querySelector("main [data-address]")?.dataset ?? {};
  if (address) history.replaceState(null, "", address);
}

export async function reload({ takesNewRows = true } = {}) {
  if (isLoading) {
    asked = { takesNewRows: takesNewRows || (asked?.takesNewRows ?? false) };
    return;
  }
  isLoading = true;
  loadedAt = performance.now();
  try {
    const answer = await fetch(location.href, { headers: tag && !takesNewRows ? { "If-None-Match": tag } : {} });
    if (answer.redirected && new URL(answer.url).pathname !== location.pathname) {
      location.assign(answer.url);
      return;
    }
    if (!answer.ok && answer.status !== 304 && !GONE.includes(answer.status)) {
      miss("The server can’t show this page now");
      return;
    }
    if (answer.status !== 304) {
      const morphing = import("./idiomorph.js");
      tag = answer.headers.get("ETag") ?? "";
      const page = new DOMParser().parseFromString(policy.createHTML(await answer.text()), "text/html");
      if (!takesNewRows) holdRows(page);
      const { Idiomorph } = await morphing;
      Idiomorph.morph(document.querySelector("main"), page.querySelector("main"), {
        ignoreActiveValue: true,
        callbacks: {
          beforeNodeMorphed: (old, fresh) =>
            !(old instanceof HTMLElement && (old.matches("form:focus-within, form[data-changed], dialog[open]") || isSameText(old, fresh))),
          beforeAttributeUpdated: (name, node) =>
            !((name === "open" && node.matches("details")) || (name === "checked" && node.matches("[data-pick]"))),
        },
      });
      keepZoom();
      keepAddress();
      document.dispatchEvent(new Event("updated"));
      document.title = page.title;
      document.querySelector(".live").dataset.topics = page.querySelector(".live")?.dataset.topics ?? "";
    }
    hear();
  } catch {
    miss("The server doesn’t answer");
  } finally {
    isLoading = false;
    took = performance.now() - loadedAt;
    const next = asked;
    asked = null;
    if (next?.takesNewRows) reload(next);
    else if (next) ask();
  }
}

// The first hint is followed at once, further ones together, so that a busy run loads four pages a second at most.
function ask() {
  clearTimeout(timer);
  const pause = Math.min(Math.max(COALESCE_MS, LOADING_SHARE * took), MAX_PAUSE_MS);
  const wait = Math.max(loadedAt + pause - performance.now(), 0);
  timer = setTimeout(() => reload({ takesNewRows: false }), wait);
}

function open() {
  const { topics } = document.querySelector(".live").dataset;
  if (stream || document.hidden || !topics) return;
  stream = new EventSource(`${root}/live?topics=${encodeURIComponent(topics)}`);
  let isBroken = false;
  stream.addEventListener("open", () => {
    // Hints of the time without a stream are lost.
    if (isBroken) ask();
    else hear();
    isBroken = false;
  });
  stream.addEventListener("hint", ask);
  stream.addEventListener("resync", ask);
  for (const name of ["token", "retry"]) {
    stream.addEventListener(name, async ({ data }) => (await import("./writing.js")).take(name, JSON.parse(data)));
  }
  stream.addEventListener("error", () => {
    label("lost", `Lost · ${heard}`);
    // A stream that was refused, or about runs that have ended, does not reconnect by itself.
    if (stream?.readyState === EventSource.CLOSED) {
      stream = null;
      reload({ takesNewRows: false }).then(() => setTimeout(open, AGES_MS));
    } else {
      isBroken = true;
      ask();
    }
  });
}

function showAges() {
  for (const time of document.querySelectorAll("time[data-age]")) {
    const seconds = Math.round((Date.now() - Date.parse(time.dateTime)) / 1000);
    const past = Math.abs(seconds);
    const text = past < 1 ? "now" : past < 60 ? `${past} s` : past < 3600 ? `${Math.floor(past / 60)} min`
      : past < 86400 ? `${Math.floor(past / 3600)} h` : `${Math.floor(past / 86400)} d`;
    time.textContent = past < 1 ? text : seconds > 0 ? `${text} ago` : `in ${text}`;
  }
}

// Parts that are shown from a time on.
function showParts() {
  for (const part of document.querySelectorAll("[data-still-from][hidden]")) {
    setTimeout(() => { part.hidden = false; }, Math.max(Date.parse(part.dataset.stillFrom) - Date.now(), 0));
  }
}

function showLocalTimes() {
  for (const time of document.querySelectorAll("time[title]:not([data-local])")) {
    time.dataset.local = "";
    time.title += ` · ${new Date(time.dateTime).toLocaleString(undefined, { timeZoneName: "short" })}`;
  }
  for (const place of document.querySelectorAll("[data-local-time]")) {
    const at = new Date(place.dataset.localTime);
    const city = Intl.DateTimeFormat().resolvedOptions().timeZone.split("/").at(-1).replaceAll("_", " ");
    const time = at.toLocaleTimeString("en-GB", { hour: "2-digit", minute: "2-digit" });
    if (at.getTimezoneOffset()) place.textContent = ` · ${time} in ${city}`;
  }
}

export function watch() {
  heard = document.querySelector(".live").textContent.trim();
  showLocalTimes();
  showParts();
  document.addEventListener("updated", showParts);
  // An update brings the titles as the server wrote them.
  document.addEventListener("updated", showLocalTimes);
  setInterval(showAges, AGES_MS);
  document.addEventListener("click", (event) => {
    if (event.target.closest("[data-shows-new]")) reload();
    else if (event.target.closest("[data-tries-again]")) reload({ takesNewRows: false });
  });
  open();
  document.addEventListener("visibilitychange", () => {
    if (document.hidden) {
      stream?.close();
      stream = null;
    } else {
      open();
      ask();
    }
  });
}
