# Two commands: `make quickstart` runs the main job, `make test` passes the tests. Both set up .venv by themselves.
# Others: `make policy-quickstart` for robots, `make docs` for the documentation's site.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
POLICY_STAMP := $(VENV)/.installed-policy
DOCS_STAMP := $(VENV)/.installed-docs
ONNX_STAMP := $(VENV)/.installed-onnx
DATA_STAMP := $(VENV)/.installed-data

.PHONY: quickstart policy-quickstart test docs clean

quickstart: $(STAMP)
	$(BIN)/fewstep quickstart

policy-quickstart: $(POLICY_STAMP)
	$(BIN)/fewstep policy-quickstart

test: $(POLICY_STAMP) $(ONNX_STAMP) $(DATA_STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2 --dist worksteal

docs: $(DOCS_STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "Site: build/site/index.html"

$(STAMP): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "fewstep needs Python 3.11 or newer; point to one with: make PYTHON=/path/to/python3"; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
		{ echo "cannot create $(VENV): on Debian, install the package python3-venv"; exit 2; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $(STAMP)

$(POLICY_STAMP): $(STAMP) requirements-policy.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-policy.txt
	@touch $(POLICY_STAMP)

$(DOCS_STAMP): $(STAMP) requirements-docs.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-docs.txt
	@touch $(DOCS_STAMP)

$(ONNX_STAMP): $(STAMP) requirements-onnx.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-onnx.txt
	@touch $(ONNX_STAMP)

$(DATA_STAMP): $(STAMP) requirements-data.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-data.txt
	@touch $(DATA_STAMP)

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
