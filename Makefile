# `make demo` and `make test` need nothing but Python 3.11+ and a package index; everything lands in .venv.
# Paths are quoted or relative throughout: a directory with a space in its name works.

SHELL := /bin/sh
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
# Torch with two OpenMP threads beside any other busy process is up to 40 times slower on CPUs.
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM := false

.PHONY: help demo test check bench soak sim format docs clean

help: ## show this list
	@grep -hE '^[a-z]+:.*##' Makefile | sed -E 's/^([a-z]+):[^#]*## /  make \1\t/'

demo: $(VENV)/node.done ## start a network and a node, ask one question through the API, stop
	@$(PY) scripts/demo.py

test: $(VENV)/dev.done ## install what is needed and run the whole suite (under 15 minutes on 2 cores)
	$(PY) -m pytest

check: $(VENV)/dev.done ## format, lint, strict types, layout and docs
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(PY) -m pytest tests/test_layout.py tests/test_docs.py

SEEDS ?= 1000
FROM ?= 0

sim: $(VENV)/dev.done ## play seeds of the simulated network in two processes: make sim SEEDS=1000 FROM=0
	@$(PY) -m gridmill.sim --from $(FROM) --seeds $(SEEDS) --every 2 & odd=$$!; even=0; \
	$(PY) -m gridmill.sim --from $$(($(FROM) + 1)) --seeds $$(($(SEEDS) - 1)) --every 2 || even=1; \
	wait $$odd && test $$even = 0

soak: $(VENV)/dev.done ## whatever takes over two minutes
	$(PY) -m pytest -m soak --timeout=3600

bench: $(VENV)/dev.done ## measure against the references and regenerate docs/benchmarks.md
	$(PY) bench/run_all.py

format: $(VENV)/dev.done ## rewrite the sources as `make check` wants them
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

docs: $(VENV)/dev.done ## regenerate the generated parts of docs/
	$(PY) scripts/make_docs.py

$(VENV)/node.done: pyproject.toml constraints.txt scripts/install.sh
	@sh scripts/install.sh "$(PYTHON)" "$(VENV)" node
	@touch "$@"

$(VENV)/dev.done: pyproject.toml constraints.txt scripts/install.sh
	@sh scripts/install.sh "$(PYTHON)" "$(VENV)" "node,dev"
	@touch "$@" "$(VENV)/node.done"

clean: ## remove what make made
	rm -rf "$(VENV)" .bench-venv build dist
