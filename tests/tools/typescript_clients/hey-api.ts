// Create a workflow, execute it, poll it until it ends, and read a refusal, with the client of @hey-api/openapi-ts.

import assert from "node:assert/strict";
import { executeStart, executionsProgress, executionsShow, workflowsCreate } from "./hey-api/index.js";
import type { Progress } from "./hey-api/index.js";
import { createClient } from "./hey-api/client/index.js";

const [url, key] = process.argv.slice(2);
assert(url && key);
const client = createClient({ baseUrl: url, auth: key });

const made = await workflowsCreate({
  client,
  body: {
    name: "Greeting",
    status: "active",
    nodes: [
      { id: "start", nodeId: "rest-api" },
      { id: "greet", nodeId: "template", config: { text: "Hello {{ data.body.name }}" } },
    ],
    connections: [{ source: "start", target: "greet" }],
  },
});
assert(made.data, JSON.stringify(made.error));

const started = await executeStart({
  client,
  path: { id: made.data.workflowId },
  body: { triggerInputs: { name: "Ada" } },
});
assert(started.data, JSON.stringify(started.error));

const unfinished: Progress["status"][] = ["pending", "running", "waiting"];
let progress: Progress;
do {
  const polled = await executionsProgress({
    client,
    path: { id: started.data.executionId },
    query: { wait: 20 },
  });
  assert(polled.data, JSON.stringify(polled.error));
  progress = polled.data;
} while (unfinished.includes(progress.status));
assert.equal(progress.status, "completed");
assert.partialDeepStrictEqual(progress.outputs, { greet: { text: "Hello Ada" } });

const refused = await executionsShow({ client, path: { id: "exec_0" } });
assert.equal(refused.response?.status, 404);
assert.equal(refused.data, undefined);
const code: string | undefined = refused.error?.error.code;
assert.equal(code, "not-found");
