// Counts in the navigation: questions and dead letters, asked at most once a minute by all pages of a tab.
const FRESH_MS = 60_000;
const DELAY_MS = 1_000;
const ALWAYS = new Set(["a", "d"]);

const root = document.documentElement.dataset.root;
const text = (count, isMore) => (count ? `${count.toLocaleString("en")}${isMore ? "+" : ""}` : "");

async function read(path) {
  const answer = await fetch(root + path);
  return answer.ok ? answer.json() : {};
}

// `kept` are the counts of the last page, `key` is that of the open page.
export async function refresh(visitor, kept, key, isChanged, show) {
  if (kept.visitor === visitor && Date.now() - kept.at < FRESH_MS && !ALWAYS.has(key) && !isChanged) return;
  // The page comes first, and a visitor who goes on at once asks for nothing.
  if (!isChanged) await new Promise((resolve) => { setTimeout(resolve, DELAY_MS); });
  try {
    const [why, dead] = await Promise.all([read("/api/v1/why"), read("/api/v1/dead-letters/groups")]);
    const questions = (why.reasons ?? []).find((one) => one.code === "awaiting-input");
    const counts = {
      approvals: text(questions?.count, questions?.countIsLowerBound),
      "dead-letters": text(dead.count),
    };
    sessionStorage.setItem("counts", JSON.stringify({ visitor, at: Date.now(), counts }));
    show(counts);
  } catch { /* the counts of a minute ago stay */ }
}
