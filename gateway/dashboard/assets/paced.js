// Redrive or replay of many dead letters at a pace: the first one alone if wanted, then some each second, with progress and a stop.
// It goes on while the page is open; what is left stays in the list.
const AT_ONCE = 200;
const post = async (address, body) => {
  const answer = await fetch(address, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) });
  const value = await answer.json();
  if (!answer.ok) throw new Error(value.error.message);
  return value;
};

async function endsWell(root, id) {
  for (;;) {
    const answer = await fetch(`${root}/api/v1/executions/${encodeURIComponent(id)}/progress?wait=30`);
    if (!answer.ok) return false;
    const { status } = await answer.json();
    if (["completed", "failed", "stopped", "cancelled"].includes(status)) return status === "completed";
  }
}

// Returns how it ended, as a sentence.
export async function run(form, root) {
  const address = root + form.dataset.request.split(" ")[1];
  const sends = JSON.parse(form.dataset.sends);
  const [bar, said, stop] = ["progress", "[data-progress-text]", "[data-stops]"].map((one) => form.querySelector(one));
  const { done: word } = form.querySelector("[data-progress]").dataset;
  const confirm = [...form.querySelectorAll("[name=confirm]:checked")].map((box) => box.value);
  // The pace may change while it works.
  const pace = () => Number(form.querySelector("[data-rate]").value);
  let isStopped = false;
  let done = 0;
  const refused = new Set();
  const count = () => `${done} of ${bar.max} ${word}, ${refused.size} refused`;
  const show = (more = "") => {
    bar.value = done + refused.size;
    said.textContent = count() + more;
  };
  const take = async (limit) => {
    // Refused ones stay in the list, the oldest first: each step meets them again before others.
    const answer = await post(address, { ...sends, ...(confirm.length && { confirm }), limit: Math.min(limit + refused.size, AT_ONCE) });
    // A redrive and a replay count alike by other names.
    const started = answer.redriven ?? answer.affected;
    done += started;
    for (const id of answer.errors ? Object.keys(answer.errors) : answer.refused.map((one) => one.executionId)) refused.add(id);
    show();
    return { started, ids: answer.newExecutionIds ?? answer.executionIds, remaining: answer.remaining };
  };
  form.dataset.changed = "";
  form.querySelector("[data-progress]").hidden = false;
  stop.hidden = false;
  stop.onclick = () => { isStopped = true; };
  try {
    if (form.querySelector("[data-first]").checked) {
      const { ids } = await take(1);
      show(": it runs");
      if (!ids.length || !(await endsWell(root, ids[0]))) {
        return `The first one did not complete: nothing else was ${word}`;
      }
    }
    while (!isStopped) {
      const started = performance.now();
      const each = pace();
      const answer = await take(each);
      if (!answer.started || !answer.remaining) break;
      if (each < AT_ONCE) await new Promise((resolve) => { setTimeout(resolve, Math.max(1_000 - (performance.now() - started), 0)); });
    }
    return count() + (isStopped ? ". Stopped: the others stay here" : "");
  } catch (problem) {
    return `${count()}. ${problem.message}`;
  } finally {
    stop.hidden = true;
  }
}
