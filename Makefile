# Shortcuts for what a change needs. They use the environments that tests/run.sh creates:
#
#   make test     the tests, with both MPI libraries on 1 to 4 ranks (creates the environments)
#   make lint     format, style, types, imports and spelling
#   make docs     links, notes and examples of the README and of docs/, then the site, into .test-env/site
#   make bench    list the benchmarks; CASES="step memory" RANKS=2 measures these on 2 ranks
#
# MPI=openmpi uses the environment with Open MPI for the last three.

MPI ?= mpich
CASES ?=
RANKS ?=
bin := .test-env/$(MPI)/bin

include tests/mpi.env
export

.PHONY: test lint docs bench

test:
	bash tests/run.sh

lint: $(bin)/python
	$(bin)/ruff check
	$(bin)/ruff format --check
	$(bin)/mypy
	$(bin)/lint-imports --no-cache
	$(bin)/codespell

docs: $(bin)/python
	$(bin)/python -m pytest tests/docs
	[ -x .test-env/docs/bin/mkdocs ] || { python3 -m venv .test-env/docs && .test-env/docs/bin/pip install -q '.[docs]'; }
	.test-env/docs/bin/mkdocs build --quiet --site-dir $(CURDIR)/.test-env/site

bench: $(bin)/python
	$(if $(RANKS),$(bin)/mpirun -n $(RANKS)) $(bin)/python -m benchmarks $(CASES)

$(bin)/python:
	$(error $@ must exist; found no such file. Run: bash tests/run.sh --mpi $(MPI))
