"""Runner: the process in a workflow's pod. It executes the workflow's runs, and knows no server but the gateway."""
