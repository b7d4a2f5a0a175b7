# `make` checks everything that is fast; `make demo` and `make test` set up .venv themselves.
PY := .venv/bin/python
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false
# Without bytecode every process compiles torch and transformers anew: ten seconds of each.
unexport PYTHONDONTWRITEBYTECODE

# `make` alone is `make check`: format, lint, types, floors, fast tests.
.PHONY: check format lint test test-vllm test-verl slow mutants zoo fuzz docs demo screenshots bench bench-gpu gpu-check setup setup-dev constraints clean

check: lint test

lint: setup-dev
	.venv/bin/ruff format --check src tests benchmarks examples tools
	.venv/bin/ruff check src tests benchmarks examples tools
	.venv/bin/mypy
	.venv/bin/lint-imports
	$(PY) tools/reference.py --check

format: setup-dev
	.venv/bin/ruff format src tests benchmarks examples tools
	.venv/bin/ruff check --fix src tests benchmarks examples tools

# Pages that the code writes: verbs and keys.
docs: setup-dev
	$(PY) tools/reference.py

demo: setup
	.venv/bin/fp4rl quickstart

# The pictures of the report in docs/images, from a real run and in headless Chromium.
screenshots: demo
	$(PY) tools/screenshots.py runs/quickstart

test: setup-dev
	$(PY) -m pytest -q -n 2 --dist worksteal -m "not slow"

# vLLM as a sampler, on this machine's CPU and in an environment of its own; skipped, with the reason, without its package.
test-vllm: setup
	@tools/vllm.sh

# verl's trainer with the plug-in, on this machine's CPU and in an environment of its own; skipped likewise.
test-verl: setup
	@tools/verl.sh

slow: setup-dev
	$(PY) -m pytest -q -n 2 --dist worksteal -m slow

# Mutations of the code, each with the tests that must find it; they are slow tests too.
mutants: setup-dev
	$(PY) -m pytest -q -n 2 -m slow tests/mutants

# Tiny models of every architecture against an independent oracle; writes the table of docs/models.md.
zoo: setup-dev
	$(PY) tests/zoo/zoo_table.py

# 10,000 damaged inputs for each property (`make fuzz FUZZ=500`: so many); a failure prints how to repeat it.
FUZZ ?= 10000
fuzz: setup-dev
	FUZZ=$(FUZZ) HYPOTHESIS_PROFILE=nightly $(PY) -m pytest -q -m fuzz

bench: setup-dev
	@for file in benchmarks/*.py; do echo "== $$file"; $(PY) $$file || exit 1; done

bench-gpu: setup-dev
	@$(PY) benchmarks/numerics.py --gpu
	@$(PY) benchmarks/gpu.py
	@$(PY) benchmarks/rl.py --gpu --rounds 4 --write

# All that only a CUDA machine can show, in one call; it says so where there is none.
gpu-check: setup-dev
	@$(PY) tools/gpu_check.py

setup:
	@./setup.sh train report

setup-dev:
	@./setup.sh train report search ray postgres dev oracles wandb mlflow math

# Resolved without find-links, so that nothing of one machine gets in; what belongs to a CUDA build stays out.
constraints: setup
	echo 'torch==2.13.0' > .venv/pin.txt
	env -u PIP_FIND_LINKS -u UV_FIND_LINKS .venv/bin/uv pip compile pyproject.toml $(foreach extra,train report search ray postgres wandb mlflow math oracles dev,--extra $(extra)) --python-version 3.11 \
	  --constraint .venv/pin.txt --no-header --no-annotate --quiet \
	  | grep -viE '^(nvidia|cuda|triton)' > constraints.txt

clean:
	rm -rf .venv .venv-vllm .venv-verl .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
