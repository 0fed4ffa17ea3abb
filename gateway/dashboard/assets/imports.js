// Import of a file as a new workflow: a definition in JSON, or a document that was exported.
export async function create(file, root, sayProblem) {
  let content;
  try {
    content = JSON.parse(await file.text());
  } catch (problem) {
    sayProblem(`${file.name} is no JSON: ${problem.message}. Files in YAML are imported by pilotflame apply.`);
    return;
  }
  const isDocument = content?.format !== undefined;
  try {
    const answer = await fetch(`${root}/api/v1/workflows${isDocument ? "/import" : ""}`, {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(isDocument ? { document: content, references: {} } : content),
    });
    const value = await answer.json();
    if (answer.ok) location.assign(`${root}/dashboard/workflows/${encodeURIComponent(value.workflowId)}`);
    else sayProblem([value.error.message, ...(value.error.details ?? []).map((one) => `${one.path}: ${one.message}`)].join(" · "));
  } catch {
    sayProblem("The server can’t be reached. Nothing was created.");
  }
}
