"""Send requests that schemathesis derives from an OpenAPI document, and report each status and each failed
check.

Reads `{"document": ..., "config": ...}` from standard input and writes `{"statuses": ..., "linked": ..., "failures":
...}` to standard output. Raises the error of schemathesis if the document is not OpenAPI.
"""

import json
import sys
from collections import defaultdict

import schemathesis
from schemathesis.config import SchemathesisConfig
from schemathesis.engine import events, from_schema


def main() -> None:
    """Send the requests and write the report, as the module says."""
    job = json.load(sys.stdin)
    schema = schemathesis.openapi.from_dict(
        job["document"], config=SchemathesisConfig.from_dict(job["config"])
    )
    schema.validate()
    statuses: defaultdict[str, set[int]] = defaultdict(set)
    linked: set[str] = set()
    failures: list[str] = []
    for event in from_schema(schema).execute():
        match event:
            case events.ScenarioFinished(recorder=recorder):
                for case_id, interaction in recorder.interactions.items():
                    if interaction.response is not None:
                        operation = recorder.cases[case_id].value.operation.label
                        statuses[operation].add(interaction.response.status_code)
                        if (
                            recorder.cases[case_id].is_transition_applied
                            and interaction.response.status_code < 300
                        ):
                            linked.add(operation)
                failures += [
                    f"{recorder.label}: {check.failure_info.failure}\n{check.failure_info.code_sample}"
                    for checks in recorder.checks.values()
                    for check in checks
                    if check.failure_info is not None
                ]
            case events.NonFatalError(label=label, value=error):
                failures.append(f"{label}: {error!r}")
            case events.FatalError(exception=error):
                raise error
    report = {
        "statuses": {label: sorted(found) for label, found in statuses.items()},
        "linked": sorted(linked),
        "failures": failures,
    }
    json.dump(report, sys.stdout)


if __name__ == "__main__":
    main()
