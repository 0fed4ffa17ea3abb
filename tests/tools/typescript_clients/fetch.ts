// Create a workflow, execute it, poll it until it ends, and read a refusal, with the types of openapi-typescript.

import assert from "node:assert/strict";
import createClient from "openapi-fetch";
import type { components, paths } from "./schema.js";

type Progress = components["schemas"]["Progress"];

const [url, key] = process.argv.slice(2);
assert(url && key);
const client = createClient<paths>({ baseUrl: url, headers: { "X-API-Key": key } });

const made = await client.POST("/api/v1/workflows", {
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

const started = await client.POST("/api/v1/workflows/{id}/execute", {
  params: { path: { id: made.data.workflowId } },
  body: { triggerInputs: { name: "Ada" } },
});
assert(started.data, JSON.stringify(started.error));

const unfinished: Progress["status"][] = ["pending", "running", "waiting"];
let progress: Progress;
do {
  const polled = await client.GET("/api/v1/executions/{id}/progress", {
    params: { path: { id: started.data.executionId }, query: { wait: 20 } },
  });
  assert(polled.data, JSON.stringify(polled.error));
  progress = polled.data;
} while (unfinished.includes(progress.status));
assert.equal(progress.status, "completed");
assert.partialDeepStrictEqual(progress.outputs, { greet: { text: "Hello Ada" } });

const refused = await client.GET("/api/v1/executions/{id}", { params: { path: { id: "exec_0" } } });
assert.equal(refused.response.status, 404);
assert.equal(refused.data, undefined);
const code: string = refused.error.error.code;
assert.equal(code, "not-found");
