# Two commands matter: `make demo` runs the main job, `make test` runs every check. Each does all its own set-up.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# Agents start in a third of the time with compiled modules at hand.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test lint unit cluster torture bench fuzz clean

demo: $(READY)
	@$(BIN)/python examples/demo.py

test: lint unit cluster
	@echo "make test: all checks passed"

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

unit: $(READY)
	$(BIN)/python -m pytest -m "not cluster" -n auto --dist worksteal --durations=10

cluster: $(READY)
	@deploy/setup-attacks
	$(BIN)/python -m pytest -m cluster --durations=10

# Attacks real agents in network namespaces (root): make torture CYCLES=1000 NODES=5 SEED=7
CYCLES ?= 50
NODES ?= 3
torture: $(READY)
	@deploy/setup-attacks
	$(BIN)/python -m torture --cycles $(CYCLES) --nodes $(NODES) $(if $(SEED),--seed $(SEED)) $(TORTURE)

bench: $(READY)
	$(BIN)/python bench/run.py

# Ten minutes for each decoder; SECONDS and JOBS say otherwise. atheris is not among the locked packages: it has no wheels
# for every Python that meshd runs on, and `make test` replays what it found without it.
SECONDS ?= 600
JOBS ?= 2
fuzz: $(READY)
	@$(BIN)/python -c "import atheris" 2>/dev/null || $(BIN)/python -m pip install --quiet --disable-pip-version-check atheris
	$(BIN)/python -m fuzz --all --seconds $(SECONDS) --jobs $(JOBS)

$(READY): pyproject.toml requirements.lock
	@deploy/setup-venv "$(PYTHON)" "$(VENV)"
	@touch $@

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
