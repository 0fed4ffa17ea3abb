// Export of a list as NDJSON: all of its pages, one object a line.
const MAX_PAGES = 1_000;

export async function save(button, root, say, sayProblem) {
  const { exports: path, list, file } = button.dataset;
  const lines = [];
  let after = "start";
  for (let number = 0; after && number < MAX_PAGES; number += 1) {
    const answer = await fetch(`${root}${path}${path.includes("?") ? "&" : "?"}limit=100&after=${encodeURIComponent(after)}`);
    const value = await answer.json();
    if (!answer.ok) {
      sayProblem(value.error.message);
      return;
    }
    lines.push(...value[list].map((one) => `${JSON.stringify(one)}\n`));
    after = value.next;
    say(`${lines.length.toLocaleString("en")} read${after ? "…" : ""}`);
  }
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob(lines, { type: "application/x-ndjson" }));
  link.download = file;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
  say(`${lines.length.toLocaleString("en")} exported${after ? ", more are in the API" : ""}`);
}
