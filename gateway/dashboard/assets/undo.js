// Button of a toast that takes back what was done: for ten seconds, longer while the pointer or the focus is on it.
const SHOWN_MS = 10_000;

// Returns what withdraws the offer.
export function offer(toast, undo) {
  const button = document.createElement("button");
  button.type = "button";
  button.className = "button small";
  button.append("Undo ", Object.assign(document.createElement("kbd"), { textContent: "z" }));
  toast.append(" ", button);
  let timer = 0;
  const hold = () => clearTimeout(timer);
  const wait = () => {
    hold();
    timer = setTimeout(() => { toast.hidden = true; withdraw(); }, SHOWN_MS);
  };
  const key = (event) => {
    const isTyping = event.target.closest?.("input, textarea, select, [contenteditable]");
    if (event.key === "z" && !isTyping && !event.ctrlKey && !event.metaKey && !event.altKey) button.click();
  };
  const listening = new AbortController();
  const { signal } = listening;
  const withdraw = () => { hold(); listening.abort(); };
  for (const name of ["pointerenter", "focusin"]) toast.addEventListener(name, hold, { signal });
  for (const name of ["pointerleave", "focusout"]) toast.addEventListener(name, wait, { signal });
  document.addEventListener("keydown", key, { signal });
  button.addEventListener("click", () => { withdraw(); undo(); }, { signal });
  wait();
  return withdraw;
}
