// Sign-in: the key, or the code in the fragment of a link, which no server log ever sees.
const root = document.documentElement.dataset.root;
const form = document.getElementById("sign-in");
const problem = document.getElementById("problem");

function wanted() {
  const next = new URLSearchParams(location.search).get("next") ?? "";
  const own = `${root}/dashboard`;
  const target = next.startsWith("/dashboard") ? root + next : own;
  return new URL(target, location.origin).origin === location.origin ? target : own;
}

async function signIn(body) {
  problem.hidden = true;
  try {
    const answer = await fetch(`${root}/session`, {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(body),
    });
    if (answer.ok) {
      location.replace(wanted());
      return;
    }
    problem.textContent = (await answer.json()).error.message;
  } catch {
    problem.textContent = "The server can’t be reached.";
  }
  problem.hidden = false;
}

// A link with another code that is opened in this tab changes the fragment alone.
addEventListener("hashchange", () => { if (location.hash) location.reload(); });

if (form) {
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    signIn({ key: form.elements.key.value.trim() });
  });
  const code = new URLSearchParams(location.hash.slice(1)).get("code");
  if (code) {
    history.replaceState(null, "", location.pathname + location.search);
    signIn({ code });
  } else {
    form.elements.key.focus();
  }
}
