// Shows openapi.json with Swagger UI. Requests go to the server of this page alone.
"use strict";

const SERVER = new URL("../..", location.href).href.replace(/\/$/, "");

// Swagger UI itself searches the names of tags; this searches operations, by every word of the phrase.
function filterOperations(taggedOperations, phrase) {
  const words = phrase.toLowerCase().split(/\s+/).filter(Boolean);
  const matches = (tag, entry) => {
    const operation = entry.get("operation");
    const fields = ["operationId", "summary", "description"].map((name) => operation.get(name) || "");
    const text = [tag, entry.get("method"), entry.get("path"), ...fields].join("\n").toLowerCase();
    return words.every((word) => text.includes(word));
  };
  return taggedOperations
    .map((group, tag) => group.update("operations", (entries) => entries.filter((entry) => matches(tag, entry))))
    .filter((group) => group.get("operations").size > 0);
}

// Swagger UI has no option for the name of its search field, and renders the field anew.
function nameSearchField() {
  const field = document.querySelector(".operation-filter-input");
  if (!field || field.placeholder === "Search operations") return;
  field.placeholder = "Search operations";
  field.setAttribute("aria-label", "Search operations");
}

async function show() {
  const viewer = document.getElementById("viewer");
  new MutationObserver(nameSearchField).observe(viewer, { childList: true, subtree: true });
  const answer = await fetch("../../openapi.json");
  const spec = await answer.json();
  spec.servers = [{ url: SERVER }];
  SwaggerUIBundle({
    spec,
    dom_id: "#viewer",
    deepLinking: true,
    docExpansion: "list",
    filter: true,
    plugins: [{ fn: { opsFilter: filterOperations } }],
    validatorUrl: null,
  });
}

document.documentElement.classList.toggle("dark-mode", matchMedia("(prefers-color-scheme: dark)").matches);
show();
