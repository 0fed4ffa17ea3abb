// Texts that models are writing, by the events `token` and `retry` of the stream of hints. They are shown as text alone, in the
// places that the page of the run has for them, and the page replaces them with what is stored.
const KEPT_TEXTS = 50;
const KEPT_CHARACTERS = 20_000;
const STRIP_CHARACTERS = 120;
const REASONS = { "worker-lost": "its worker was lost", interrupted: "it was interrupted" };
// The newest text of each node and iteration, the last changed one last.
const texts = new Map();
let isPlanned = false;

const keyOf = (nodeId, iteration) => JSON.stringify([nodeId, iteration]);
const sayAgain = ({ reason }) => `Begun again, since ${REASONS[reason] ?? `the call failed: ${reason}`}`;

// Returns the end of a text that is as long as it may be, without half a character.
const cut = (text) => (text.length > KEPT_CHARACTERS ? text.slice(-KEPT_CHARACTERS).replace(/^[\udc00-\udfff]/, "") : text);

export function take(name, event) {
  const { nodeId, number, attempt, offset, text, reason } = event;
  const key = keyOf(nodeId, event.iteration);
  const known = texts.get(key);
  const isSame = known?.number === number;
  let next = { nodeId, number, attempt, text: "", reason: isSame ? known.reason : "" };
  if (name === "retry") next.reason = reason;
  else if (offset === 0) next.text = cut(text);
  else if (isSame && known.attempt === attempt) next = { ...known, text: cut(known.text + text) };
  else return; // its beginning was missed
  texts.delete(key);
  texts.set(key, next);
  if (texts.size > KEPT_TEXTS) texts.delete(texts.keys().next().value);
  if (!isPlanned) requestAnimationFrame(paint);
  isPlanned = true;
}

function write(place, text) {
  if (place.textContent !== text) place.textContent = text;
}

function paint() {
  isPlanned = false;
  for (const place of document.querySelectorAll("[data-writes]")) {
    const found = texts.get(keyOf(place.dataset.writes, place.dataset.iteration));
    if (!found || found.number < Number(place.dataset.from)) continue;
    // The region is read out: it changes with the state of the text, not with each part.
    write(place.querySelector("[role=status]"), found.reason ? sayAgain(found) : "Writing");
    const body = place.querySelector("pre");
    const isAtEnd = body.scrollTop + body.clientHeight > body.scrollHeight - 8;
    write(body, found.text);
    if (isAtEnd) body.scrollTop = body.scrollHeight;
  }
  for (const strip of document.querySelectorAll("[data-strip]")) {
    const { strip: nodeId, from } = strip.dataset;
    const found = [...texts.values()].findLast((one) => one.nodeId === nodeId && one.number >= Number(from));
    if (!found) continue;
    strip.className = "strip"; // its end is shown
    write(strip.firstElementChild, found.text.slice(-STRIP_CHARACTERS).replace(/\s+/g, " ") || sayAgain(found));
  }
}

document.addEventListener("updated", paint);
