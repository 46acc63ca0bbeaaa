# make demo: the main job on a real model. make test: the tests. Both set up .venv first; the demo needs less of it.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-all check setup clean

demo: .venv/.package
	$(BIN)/python -m haq_lab -m +experiment=demo quantizer=none,rtn,smoothquant,gptq,haq hydra.sweep.dir=runs/demo
	$(BIN)/python -m haq_lab.results runs/demo --csv runs/demo/table.csv --figure runs/demo/perplexity.png

test: setup
	$(BIN)/python -m pytest -n 2 --dist loadgroup

test-all: setup
	$(BIN)/python -m pytest -n 2 --dist loadgroup --all

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

setup: .venv/.installed

.venv/.installed: pyproject.toml setup.sh
	bash setup.sh "$(PYTHON)" dev
	touch .venv/.package $@

.venv/.package: pyproject.toml setup.sh
	bash setup.sh "$(PYTHON)"
	touch $@

clean:
	rm -rf .venv runs dist build .pytest_cache .mypy_cache .ruff_cache
