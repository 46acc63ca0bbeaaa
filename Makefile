# make demo      quantise a real model with four quantizers and compare them
# make test      run the tests (make test-all: with the full grids)
# make check     run the linters and the type checker, and build the documentation
# make docs      update the generated pages and build the documentation in build/site
# Each target first installs what it needs into .venv.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-all check docs setup clean

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
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

docs: setup
	$(BIN)/python -m docs.tools.pages
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

setup: .venv/.installed

.venv/.installed: pyproject.toml setup.sh
	bash setup.sh "$(PYTHON)" dev
	touch .venv/.package $@

.venv/.package: pyproject.toml setup.sh
	bash setup.sh "$(PYTHON)"
	touch $@

clean:
	rm -rf .venv runs dist build .pytest_cache .mypy_cache .ruff_cache
