# `make run` needs python3 (3.11 or newer), python3-venv or uv, and make; the locks bring everything else.
.PHONY: run install test check check-units check-types check-style check-imports check-words bench docs dist lock
.SILENT:
MAKEFLAGS += --no-print-directory
# Without compiled modules every start would take several times as long.
unexport PYTHONDONTWRITEBYTECODE

bin := .venv/bin
# uv installs the same locks in seconds; pip does it where there is no uv, or with `make run UV=`.
UV := $(shell command -v uv)
ifeq ($(UV),)
pip := $(bin)/python -m pip --quiet --disable-pip-version-check install
else
pip := $(UV) pip install --quiet --python $(bin)/python --compile-bytecode
endif
# Options for `make lock`; LOCK=--upgrade moves every package to its newest release.
LOCK :=
# Options for `make test`, such as ARGUMENTS="-k restart -x".
ARGUMENTS :=

run: install
	exec $(bin)/pilotflame dev --example docs/examples/penguins.json

install: .venv/installed

# Two at once: most of the time they wait for processes that were killed. A file's tests share what they start, and
# files come in their own order: those with the fewest tests take the longest, and would leave one process idle in the end.
test: .venv/installed-for-tests
	$(bin)/python -m tests.tools.environments
	exec $(bin)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder $(ARGUMENTS)

# Types are checked beside the tests: each leaves a processor idle for some of its time. What was found is shown whole.
check: .venv/installed-for-tests
	$(MAKE) --jobs 2 --keep-going $(if $(filter output-sync,$(.FEATURES)),--output-sync=target) \
		check-units check-types check-style check-imports check-words

check-units: .venv/installed-for-tests
	$(bin)/python -m pytest --quiet --numprocesses 2 --dist worksteal tests/unit

check-types: .venv/installed-for-tests
	$(bin)/mypy

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

# The pages and tables that are generated from the code, then the site that the gateway serves below /docs/.
docs: .venv/installed
	$(bin)/python -m docs.tables
	$(bin)/python -m docs.site.build

# The wheel with the documentation site.
dist: docs
	$(bin)/python -m hatchling build --target wheel

# Each stamp is newer than what it was installed from, so a second `make run` installs nothing.
.venv/installed: $(bin)/python requirements.lock pyproject.toml
	echo "Installing Pilotflame into .venv ..."
	$(pip) --require-hashes --requirement requirements.lock
	$(pip) --no-deps --no-build-isolation --editable .
	touch $@

.venv/installed-for-tests: .venv/installed requirements-test.lock
	echo "Installing what the tests need into .venv ..."
	$(pip) --require-hashes --requirement requirements-test.lock
	touch $@

# The newest Python that can make a virtual environment; Debian ships some without ensurepip. uv needs no ensurepip.
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

# One resolution for every Python from 3.11 on, with the hashes of all wheels. The test lock is the same set and more.
# Each tool that tests run as a program has a lock of its own, so that none holds back a dependency. The packages of
# Node have one too: `npm update --package-lock-only` in docs/site and tests/tools/typescript_clients.
lock:
	tools=$$(mktemp -d) && trap 'rm -r "$$tools"' EXIT && python3 -m venv "$$tools" && \
	"$$tools/bin/python" -m pip --quiet --disable-pip-version-check install uv && \
	compile="$$tools/bin/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
		--no-header --no-annotate --no-config $(LOCK)" && \
	product="$$compile --group build --extra s3 --extra rabbitmq --extra smtp" && \
	$$product --output-file requirements.lock pyproject.toml && \
	$$product --group test --constraint requirements.lock --output-file requirements-test.lock pyproject.toml && \
	for tool in docs/site/requirements.in tests/tools/*/requirements.in; do \
		$$compile --output-file "$${tool%.in}.lock" "$$tool" || exit 1; \
	done
