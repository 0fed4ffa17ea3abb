// Result of a connection test by phase, with times.
const NAMES = { dns: "Name and address", tcp: "Connection", tls: "TLS", auth: "Login", query: "Request" };

function part(name, text, className = "") {
  const made = document.createElement(name);
  made.className = className;
  made.textContent = text;
  return made;
}

export function show(place, result) {
  const list = part("dl", "", "pairs");
  for (const { phase, ok, durationMs } of result.phases) {
    const value = part("dd", `${durationMs.toLocaleString("en")} ms`);
    if (!ok) value.prepend(part("b", "Failed", "state bad"), " after ");
    list.append(part("dt", NAMES[phase] ?? phase), value);
  }
  const sentence = part("p", ` ${result.message} (${result.durationMs.toLocaleString("en")} ms)`, "lines");
  sentence.prepend(part("b", result.ok ? "Works." : "Failed.", `state ${result.ok ? "good" : "bad"}`));
  place.replaceChildren(sentence, list);
}
