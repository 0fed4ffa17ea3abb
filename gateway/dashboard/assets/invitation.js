// Invitation: the code is in the fragment of the link, which no server log ever sees.
const root = document.documentElement.dataset.root;
const form = document.getElementById("invitation");
const problem = document.getElementById("problem");
const code = new URLSearchParams(location.hash.slice(1)).get("code") ?? "";
const roles = {
  viewer: "a viewer, who sees what is shared and changes nothing",
  member: "an editor, who builds and runs workflows",
  admin: "an admin, who sees and changes everything",
};

async function send(body, path = "/invitation") {
  problem.hidden = true;
  try {
    const answer = await fetch(root + path, {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ code, ...body }),
    });
    const value = await answer.json();
    if (answer.ok) return value;
    problem.textContent = value.error.message;
  } catch {
    problem.textContent = "The server can’t be reached.";
  }
  problem.hidden = false;
  return null;
}

async function show() {
  const found = await send({ dryRun: true });
  const terms = document.getElementById("terms");
  if (!found) {
    terms.textContent = "This link does not work.";
    form.querySelectorAll(".field, .divider, button").forEach((part) => { part.hidden = true; });
    return;
  }
  document.getElementById("organization").textContent = found.organizationName;
  terms.textContent = `You join as ${roles[found.role]}, with the address ${found.email}. No password is needed.`;
  form.querySelectorAll("button").forEach((button) => { button.disabled = false; });
  form.elements.name.focus();
}

async function accept() {
  const button = form.querySelector("[type=submit]");
  button.disabled = true;
  const accepted = await send({ name: form.elements.name.value.trim() });
  button.disabled = false;
  if (!accepted) return;
  history.replaceState(null, "", location.pathname);
  document.getElementById("new-key").textContent = accepted.key;
  document.getElementById("key-ends").textContent = accepted.keyExpiresAt.slice(0, 10);
  form.hidden = true;
  document.getElementById("accepted").hidden = false;
  document.getElementById("accepted-title").focus();
}

async function acceptByProvider() {
  const begun = await send({}, "/session/openid");
  if (begun) location.assign(begun.url);
}

// Another link that is opened in this tab changes the fragment alone.
addEventListener("hashchange", () => { if (location.hash) location.reload(); });

if (form) {
  document.getElementById("by-provider")?.addEventListener("click", acceptByProvider);
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    accept();
  });
  document.getElementById("copy-key").addEventListener("click", () => {
    const key = document.getElementById("new-key");
    getSelection().selectAllChildren(key);
    navigator.clipboard?.writeText(key.textContent);
  });
  show();
}
