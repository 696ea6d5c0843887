# Needs Python 3.11, 3.12 or 3.13, and a network. Everything else goes into virtual environments in
# this folder; uv installs them in seconds where plain pip takes minutes to resolve Airflow.

PYTHON ?= python3
VENV ?= .venv
DEMO_DIR ?= .demo
BENCH_ARGS ?= --json docs/benchmark.json --plot docs/benchmark.png

AIRFLOWS := 2.11 3.1 3.2 3.3
# Airflow 3.2 itself sets no such bounds; its API does not work with newer ones.
BOUNDS_3.2 := 'fastapi<0.137' 'svcs<26'
# Airflow 2.11.0 itself sets no such bound; its ObjectStoragePath does not work with newer ones.
BOUNDS_lowest := 'universal-pathlib<0.3'
NEWEST := $(lastword $(AIRFLOWS))
# The versions in Cloud Composer's images, as far as they are known: see the files in constraints/.
IMAGES := composer-2.11 composer-3.1
PYTHONS := 3.12 3.13
UV = UV_PYTHON_DOWNLOADS=never $(VENV)/bin/uv
# What `uv pip install` is to install.
TESTED := --editable '.[demo]' --group test --group optional
EVERYTHING := $(TESTED) --group lint --group coverage
$(foreach line,$(AIRFLOWS),$(eval INSTALLS_$(line) := $(TESTED)))
INSTALLS_$(NEWEST) := $(EVERYTHING)
INSTALLS_2.11 := $(TESTED) 'mypy>=1.14'   # what a user's project does with the package is type-checked
BENCHED := --editable '.[airflow]' --group bench
CORE := --editable . --group test
INSTALLS_kinetic := keras-kinetic==0.0.4 $(CORE)
INSTALLS_core := $(CORE)
INSTALLS_docs := --group docs
# Tests that need no Airflow, and those of them that depend on versions of what core is built on.
CORE_TESTS := tests/core tests/faults tests/testing
WIRE_TESTS := tests/core/test_store.py tests/core/test_transport.py tests/faults/test_wire.py tests/testing/test_clients.py
# Tests of what differs between systems: files, folders and locks.
PORTABLE_TESTS := tests/core/test_hashing.py tests/core/test_index.py tests/core/test_destination.py tests/core/test_materialize.py tests/core/test_platforms.py
# An idle process takes tests over from the other one; `PYTEST=pytest` makes it one process.
PYTEST := pytest -n 2 --dist worksteal

# Each process of Airflow's imports thousands of files. Where Python may not keep their bytecode, as in
# many containers, it compiles them each time: half of the CPU time of the tests that start Airflow.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help demo test coverage test-quick test-all $(AIRFLOWS:%=test-%) test-composer $(IMAGES:%=test-%) test-kinetic test-light test-without-linux test-cloud $(PYTHONS:%=test-python-%) lint docs lowest dist bench constraints $(AIRFLOWS:%=constraints-%) constraints-lowest constraints-bench constraints-kinetic constraints-core constraints-docs clean
.NOTPARALLEL:
.DELETE_ON_ERROR:

help: ## list these targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' $(firstword $(MAKEFILE_LIST)) | awk -F'|' '{printf "%-25s %s\n", $$1, $$2}'

demo: $(VENV)/.installed ## train three times through Airflow: a miss, a hit, a changed image
	@$(VENV)/bin/python scripts/demo.py --dir $(DEMO_DIR)

test: $(VENV)/.installed ## run the whole test suite on the newest Airflow
	@$(VENV)/bin/python -m $(PYTEST) $(PYTEST_ARGS)

coverage: $(VENV)/.installed ## the same, and show which lines of the package it did not run
	@rm -f .coverage .coverage.*
	@$(VENV)/bin/python -m coverage run -m $(PYTEST) $(PYTEST_ARGS)
	@$(VENV)/bin/python -m coverage combine --quiet
	@$(VENV)/bin/python -m coverage report

test-quick: $(VENV)/.installed ## run the tests that don't start Airflow and aren't marked slow
	@$(VENV)/bin/python -m $(PYTEST) -m 'not starts_airflow and not slow' $(PYTEST_ARGS)

test-all: test $(AIRFLOWS:%=test-%) ## run `make test`, and the tests that depend on Airflow on 2.11, 3.1 and 3.2

test-composer: $(IMAGES:%=test-%) ## run the tests that depend on Airflow with the versions in Cloud Composer's images

test-$(NEWEST): test

$(patsubst %,test-%,$(filter-out $(NEWEST),$(AIRFLOWS)) $(IMAGES)): test-%: $(VENV)-%/.installed
	@$(VENV)-$*/bin/python -m $(PYTEST) -m airflow $(PYTEST_ARGS)

lowest: $(VENV)-lowest/.installed ## run the tests that depend on versions, with the lowest that pyproject.toml allows
	@$(VENV)-lowest/bin/python -m $(PYTEST) -m airflow $(PYTEST_ARGS)
	@$(VENV)-lowest/bin/python -m $(PYTEST) $(WIRE_TESTS) $(PYTEST_ARGS)

test-kinetic: $(VENV)-kinetic/.installed ## run core's suite beside keras-kinetic, with no Airflow installed
	@$(VENV)-kinetic/bin/python -m $(PYTEST) tests/kinetic tests/core $(PYTEST_ARGS)

$(PYTHONS:%=test-python-%): test-python-%: $(VENV)-python-%/.installed # run what needs no Airflow on another Python
	@$(VENV)-python-$*/bin/python -m $(PYTEST) $(CORE_TESTS) $(PYTEST_ARGS)

test-light: $(VENV)/.installed $(VENV)-light/.installed ## check the wheel with its base dependencies only: size, upload, download
	@$(UV) pip check --python $(VENV)/bin/python
	@$(UV) pip check --python $(VENV)-light/bin/python
	@env -u PYTHONPATH $(VENV)-light/bin/python scripts/check_light_install.py

test-without-linux: $(VENV)/.installed ## run core's tests without the functions that only Linux has, as on macOS
	@PYTHONPATH=tests/without_linux $(VENV)/bin/python -m $(PYTEST) $(PORTABLE_TESTS) $(PYTEST_ARGS)

test-cloud: $(VENV)/.installed ## run against real Cloud Storage: KERAS_REMOTE_TEST_BUCKET=gs://BUCKET make test-cloud
	@$(VENV)/bin/python -m pytest tests/cloud -rs $(PYTEST_ARGS)

lint: $(VENV)/.installed ## ruff, mypy, the imports between the packages, what tests may patch
	@$(VENV)/bin/python -m ruff check
	@$(VENV)/bin/python -m ruff format --check
	@$(VENV)/bin/python -m mypy
	@$(VENV)/bin/lint-imports --no-logo
	@$(VENV)/bin/python scripts/lint_tests.py tests

docs: $(VENV)-docs/.installed ## build the pages and the API reference into site/
	@$(VENV)-docs/bin/python -m mkdocs build --strict --quiet

dist: $(VENV)/.uv ## build the wheel and the source distribution into dist/; see CONTRIBUTING.md, Release
	@$(UV) build --quiet --clear --out-dir dist

bench: $(VENV)-bench/.installed ## measure against keras-kinetic and others; twenty minutes
	@$(VENV)-bench/bin/python tests/benchmarks/run.py $(BENCH_ARGS)
	@$(VENV)-bench/bin/python tests/benchmarks/pages.py

constraints: $(AIRFLOWS:%=constraints-%) constraints-lowest constraints-bench constraints-kinetic constraints-core constraints-docs ## pin the newest versions again, for every Airflow line

$(AIRFLOWS:%=constraints-%): constraints-%: $(VENV)/.uv
	@$(UV) venv --quiet --clear --python $(VENV)/bin/python $(VENV)-constraints
	@$(UV) pip install --quiet --upgrade --python $(VENV)-constraints/bin/python 'apache-airflow==$*.*' $(BOUNDS_$*) uv $(INSTALLS_$*)
	@$(UV) pip freeze --quiet --python $(VENV)-constraints/bin/python | grep -E '^[A-Za-z0-9._-]+==[^ ]+$$' > constraints/airflow-$*.txt
	@rm -rf $(VENV)-constraints

constraints-lowest: $(VENV)/.uv
	@$(UV) venv --quiet --clear --python $(VENV)/bin/python $(VENV)-constraints
	@$(UV) pip install --quiet --upgrade --python $(VENV)-constraints/bin/python --resolution lowest-direct $(BOUNDS_lowest) $(TESTED)
	@$(UV) pip freeze --quiet --python $(VENV)-constraints/bin/python | grep -E '^[A-Za-z0-9._-]+==[^ ]+$$' > constraints/airflow-lowest.txt
	@rm -rf $(VENV)-constraints

constraints-bench: $(VENV)/.uv
	@$(UV) venv --quiet --clear --python $(VENV)/bin/python $(VENV)-constraints
	@$(UV) pip install --quiet --upgrade --python $(VENV)-constraints/bin/python 'apache-airflow==$(NEWEST).*' $(BENCHED)
	@$(UV) pip freeze --quiet --python $(VENV)-constraints/bin/python | grep -E '^[A-Za-z0-9._-]+==[^ ]+$$' > constraints/bench.txt
	@rm -rf $(VENV)-constraints

constraints-kinetic constraints-core constraints-docs: constraints-%: $(VENV)/.uv
	@$(UV) venv --quiet --clear --python $(VENV)/bin/python $(VENV)-constraints
	@$(UV) pip install --quiet --upgrade --python $(VENV)-constraints/bin/python $(INSTALLS_$*)
	@$(UV) pip freeze --quiet --python $(VENV)-constraints/bin/python | grep -E '^[A-Za-z0-9._-]+==[^ ]+$$' > constraints/$*.txt
	@rm -rf $(VENV)-constraints

clean: ## remove the environments, the demo's folder and all caches
	@rm -rf $(VENV) $(addprefix $(VENV)-,lowest bench kinetic light docs constraints $(AIRFLOWS) $(IMAGES) $(PYTHONS:%=python-%))
	@rm -rf $(DEMO_DIR) .bench .import_linter_cache .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage* build dist site

# The stamps keep warm runs from asking uv again.
$(VENV)/.uv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, and $(PYTHON) is " + sys.version.split()[0] + ". Name another one: make PYTHON=python3.12 ...")'
	@echo "Making $(VENV) (once) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints/airflow-$(NEWEST).txt uv
	@touch $@

$(VENV)/.installed: $(VENV)/.uv pyproject.toml constraints/airflow-$(NEWEST).txt
	@echo "Installing Airflow $(NEWEST) and the tools into $(VENV) ..."
	@$(UV) pip install --quiet --python $(VENV)/bin/python --constraint constraints/airflow-$(NEWEST).txt $(EVERYTHING)
	@touch $@

$(VENV)-bench/.installed: $(VENV)/.uv pyproject.toml constraints/bench.txt
	@echo "Installing the clients that are measured into $(VENV)-bench ..."
	@$(UV) venv --quiet --clear --python $(VENV)/bin/python $(VENV)-bench
	@$(UV) pip install --quiet --python $(VENV)-bench/bin/python --constraint constraints/bench.txt $(BENCHED)
	@touch $@

$(VENV)-kinetic/.installed $(VENV)-docs/.installed: $(VENV)-%/.installed: $(VENV)/.uv pyproject.toml constraints/%.txt
	@echo "Making $(VENV)-$* ..."
	@$(UV) venv --quiet --clear --python $(VENV)/bin/python $(VENV)-$*
	@$(UV) pip install --quiet --python $(VENV)-$*/bin/python --constraint constraints/$*.txt $(INSTALLS_$*)
	@touch $@

$(PYTHONS:%=$(VENV)-python-%/.installed): $(VENV)-python-%/.installed: $(VENV)/.uv pyproject.toml constraints/core.txt
	@python=$$($(PYTHON) scripts/find_python.py $*) || { echo "no Python $* was found"; exit 1; }; \
	echo "Making $(VENV)-python-$* with $$python ..."; \
	$(UV) venv --quiet --clear --python "$$python" $(VENV)-python-$*
	@$(UV) pip install --quiet --python $(VENV)-python-$*/bin/python --constraint constraints/core.txt $(CORE)
	@touch $@

# Of what is in the wheel, so it is made anew each time.
.PHONY: $(VENV)-light/.installed
$(VENV)-light/.installed: $(VENV)/.uv
	@echo "Building the wheel, and installing it into $(VENV)-light ..."
	@$(UV) venv --quiet --clear --python $(VENV)/bin/python $(VENV)-light
	@$(UV) build --quiet --wheel --out-dir $(VENV)-light/dist
	@$(UV) pip install --quiet --python $(VENV)-light/bin/python --constraint constraints/core.txt $(VENV)-light/dist/*.whl

$(VENV)-%/.installed: $(VENV)/.uv pyproject.toml constraints/airflow-%.txt
	@echo "Installing Airflow $* and the tools into $(VENV)-$* ..."
	@$(UV) venv --quiet --clear --python $(VENV)/bin/python $(VENV)-$*
	@$(UV) pip install --quiet --python $(VENV)-$*/bin/python --constraint constraints/airflow-$*.txt $(or $(INSTALLS_$*),$(TESTED))
	@touch $@
