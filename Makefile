# make demo      quantise a real model with four quantizers and compare them
# make test      run the tests (make test-all: with the full grids)
# make check     run the linters and the type checker, and build the documentation
# make docs      update the generated pages and build the documentation in build/site
# make wheel     build wheel and sdist, check them, and try the wheel in an empty environment
# Each target first installs what it needs into .venv.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-all check docs wheel lock setup clean

demo: .venv/.package
	@PATH="$(CURDIR)/$(BIN):$$PATH" ./demo.sh

test: setup
	$(BIN)/python -m pytest -n 2 --dist loadgroup

test-all: setup
	$(BIN)/python -m pytest -n 2 --dist loadgroup --all

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/codespell
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

docs: setup
	$(BIN)/python -m docs.tools.pages
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# VERSION=1.2.3 also checks that this is the version, which a release's tag names.
wheel: setup
	rm -rf dist build/empty
	$(BIN)/python -m build --no-isolation
	$(BIN)/twine check --strict dist/*
	$(BIN)/check-wheel-contents dist/*.whl
	test -z "$(VERSION)" || test -f "dist/haq_lab-$(VERSION)-py3-none-any.whl"
	$(PYTHON) -m venv build/empty
	build/empty/bin/pip install --quiet dist/*.whl
	cd build/empty && bin/haq-lab --version && bin/haq-lab --help

# The newest versions of all packages, for the containers.
lock: setup
	for kind in cpu cuda; do \
	    $(BIN)/uv pip compile --quiet --upgrade --generate-hashes --no-header --python-version 3.11 \
	        $$(test $$kind = cpu && echo "--torch-backend cpu --no-emit-package torch" || echo "--extra cuda13") \
	        --extra report --extra serve --extra wandb pyproject.toml --output-file docker/$$kind.lock || exit 1; \
	done

setup: .venv/.installed

.venv/.installed: pyproject.toml setup.sh
	bash setup.sh "$(PYTHON)" dev
	touch .venv/.package $@

.venv/.package: pyproject.toml setup.sh
	bash setup.sh "$(PYTHON)" report
	touch $@

clean:
	rm -rf .venv runs dist build .pytest_cache .mypy_cache .ruff_cache
