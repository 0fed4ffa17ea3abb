# `make run` needs python3 (3.11 or newer), python3-venv or uv, and make; the locks bring everything else.
.PHONY: run install test test-all check check-units check-types check-style check-imports check-words bench faults fuzz docs screenshots dist wheels audit lock
.SILENT:
MAKEFLAGS += --no-print-directory
# Without compiled modules every start takes several times as long.
unexport PYTHONDONTWRITEBYTECODE

bin := .venv/bin
# uv installs the same locks in seconds; pip is used without uv, or with `make run UV=`.
UV := $(shell command -v uv)
ifeq ($(UV),)
pip := $(bin)/python -m pip --quiet --disable-pip-version-check install
else
pip := $(UV) pip install --quiet --python $(bin)/python --compile-bytecode
endif
DIST := $(CURDIR)/dist
# Options for `make lock`; LOCK=--upgrade moves every package to its newest release.
LOCK :=
# Options for `make test`, such as ARGUMENTS="-k restart -x".
ARGUMENTS :=
# Processes of `make test`: six for two processors, since each test waits for most of its time.
PROCESSES := 6
# Module that runs the tests. `make test PYTEST=tests.tools.repeated_run`, as in CI, repeats failed ones alone.
PYTEST := pytest

run: install
	exec $(bin)/pilotflame dev --example docs/examples/penguins.json

install: .venv/installed

# Tests mostly wait for killed processes to be noticed. The tests of a file share their servers.
# Files keep the order of tests/conftest.py: xdist would start those with the most tests, which are the shortest.
# Tests of programs of others, which need their environments, run with ARGUMENTS=--toolchains, and in `make test-all`.
test: .venv/installed-for-tests
	$(if $(filter --toolchains --thorough,$(ARGUMENTS)),$(bin)/python -m tests.tools.environments)
	exec $(bin)/python -m $(PYTEST) --numprocesses $(PROCESSES) --dist loadfile --no-loadscope-reorder $(ARGUMENTS)

# Each test on every database, instead of one that its name chooses, and long tests in full.
test-all:
	exec $(MAKE) test ARGUMENTS="--thorough $(ARGUMENTS)"

# The checks run two at a time, because each leaves a processor idle for some of its time. Output is grouped by check.
check: .venv/installed-for-tests
	$(MAKE) --jobs 2 --keep-going $(if $(filter output-sync,$(.FEATURES)),--output-sync=target) \
		check-units check-types check-style check-imports check-words

check-units: .venv/installed-for-tests
	$(bin)/python -m $(PYTEST) --quiet --numprocesses 2 --dist worksteal tests/unit

# The SDK supports an older Python than the server.
check-types: .venv/installed-for-tests
	$(bin)/mypy
	$(bin)/mypy --python-version 3.10 sdk/python/pilotflame_sdk tests/tools/sdk_interpreters

check-style: .venv/installed-for-tests
	$(bin)/ruff check --quiet
	$(bin)/ruff format --check --quiet

check-imports: .venv/installed-for-tests
	$(bin)/lint-imports --no-logo

# Words of docstrings, and import cycles.
check-words: .venv/installed-for-tests
	$(bin)/python -m tests.source_checks

bench: .venv/installed-for-tests
	exec $(bin)/python -m benchmarks $(ARGUMENTS)

# Faults of every part under load against the promises of docs/promises.md: ten minutes, or ARGUMENTS=--quick for two.
faults: .venv/installed-for-tests
	exec $(bin)/python -m benchmarks.faults $(ARGUMENTS)

# Coverage-guided fuzzing of every parser of bytes from strangers: an hour, or ARGUMENTS="--seconds 60".
fuzz: .venv/installed-for-tests
	exec $(bin)/python -m benchmarks.fuzz $(ARGUMENTS)

# The pages and tables that are generated from the code, then the site that the gateway serves below /docs/.
docs: .venv/installed
	$(bin)/python -m docs.tables
	$(bin)/python -m sdk.client_generator
	$(bin)/python -m docs.site.build

# A picture of each page of the dashboard, in docs/images, with sample data.
screenshots: .venv/installed-for-tests
	exec $(bin)/python -m tests.integration.screenshots

# The wheels of the server, with the documentation site, and of the SDK, a bill of materials, and the build context of the images.
dist: docs
	$(MAKE) wheels
	$(bin)/python -m deploy.release.bill_of_materials
	$(bin)/python -m deploy.release.build_context

# The server's wheel contains the SDK too, since the command line uses it. Wheels of earlier versions are removed.
wheels: .venv/installed
	rm -f $(DIST)/*.whl
	$(bin)/python -m hatchling build --target wheel --directory $(DIST)
	cd sdk/python && $(CURDIR)/$(bin)/python -m hatchling build --target wheel --directory $(DIST)

# Known vulnerabilities of every locked package; exit code 2 if the advisory databases could not be asked.
audit: .venv/installed
	$(bin)/python -m deploy.release.audit

# Each stamp is newer than its sources, so a second `make run` installs nothing.
.venv/installed: $(bin)/python requirements.lock pyproject.toml
	echo "Installing Pilotflame into .venv ..."
	$(pip) --require-hashes --requirement requirements.lock
	$(pip) --no-deps --no-build-isolation --editable .
	touch $@

.venv/installed-for-tests: .venv/installed requirements-test.lock
	echo "Installing the tests' packages into .venv ..."
	$(pip) --require-hashes --requirement requirements-test.lock
	touch $@

# Newest Python that can create a virtual environment: Debian ships some without ensurepip, which uv doesn't need.
$(bin)/python:
ifneq ($(UV),)
	exec $(UV) venv --quiet --clear --seed --python-preference only-system --python '>=3.11' .venv
else
	for python in python3.14 python3.13 python3.12 python3.11 python3; do \
		if $$python -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
			exec $$python -m venv --clear .venv; \
		fi; \
	done; \
	echo "Pilotflame needs Python 3.11 or newer with venv. On Debian or Ubuntu: apt-get install python3-venv" >&2; \
	exit 1
endif

# One resolution for every Python from 3.11 on, for the SDK from 3.10 on, with the hashes of all wheels. The test lock is
# a superset. Each tool that tests run as a program has a separate lock, so that none holds back a dependency. The Node
# packages have one too: `npm update --package-lock-only` in docs/site and tests/tools/typescript_clients.
lock:
	tools=$$(mktemp -d) && trap 'rm -r "$$tools"' EXIT && python3 -m venv "$$tools" && \
	"$$tools/bin/python" -m pip --quiet --disable-pip-version-check install uv && \
	any="$$tools/bin/uv pip compile --quiet --universal --generate-hashes --no-header --no-annotate --no-config $(LOCK)" && \
	compile="$$any --python-version 3.11" && \
	product="$$compile --group build --extra s3 --extra rabbitmq --extra smtp --extra otel --extra oidc" && \
	$$product --output-file requirements.lock pyproject.toml && \
	$$product --group test --constraint requirements.lock --output-file requirements-test.lock pyproject.toml && \
	$$any --python-version 3.10 --output-file tests/tools/sdk_interpreters/requirements.lock sdk/python/pyproject.toml && \
	for tool in docs/site/requirements.in deploy/release/requirements.in tests/tools/*/requirements.in; do \
		$$compile --output-file "$${tool%.in}.lock" "$$tool" || exit 1; \
	done
