// Progress of bulk operations, which the server performs by itself: asked once a second for those that this page has
// begun or shows as open. The end of one is said.
const PAUSE_MS = 1_000;
const WORDS = { redrive: "redriven", replay: "replayed", purge: "discarded", cancel: "canceled", retry: "resumed" };
const followed = new Set();
let timer = 0;

async function update(id, root, reload, say) {
  const answer = await fetch(`${root}/api/v1/bulk-operations/${encodeURIComponent(id)}`);
  if (!answer.ok) return;
  const { action, status, done, refused, total, endReason } = await answer.json();
  const word = WORDS[action.split("-")[0]];
  const text = `${done} of ${total} ${word}, ${refused} refused`;
  const card = document.querySelector(`[data-operation="${CSS.escape(id)}"]`);
  if (card) {
    card.querySelector("[data-progress-text]").textContent = text;
    const bar = card.querySelector("progress");
    bar.max = total;
    bar.value = done + refused;
  }
  if (!["completed", "stopped", "failed"].includes(status)) return;
  followed.delete(id);
  await reload();
  if (endReason === "first-failed") say(`The first one did not complete: nothing else was ${word}`);
  else say(status === "completed" ? text : `${text}. ${status === "stopped" ? "Stopped" : "It ended early"}: the others stay here`);
}

async function ask(root, reload, say) {
  if (!document.hidden) {
    // An operation that could not be asked about is asked about again.
    await Promise.allSettled([...followed].map((id) => update(id, root, reload, say)));
  }
  timer = followed.size ? setTimeout(() => ask(root, reload, say), PAUSE_MS) : 0;
}

// `begun` is the id of an operation that this page has begun.
export function follow(root, reload, say, begun) {
  if (begun) followed.add(begun);
  for (const card of document.querySelectorAll("[data-operation]")) followed.add(card.dataset.operation);
  if (followed.size && !timer) timer = setTimeout(() => ask(root, reload, say), begun ? 0 : PAUSE_MS);
}
