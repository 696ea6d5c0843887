# Only python3 (3.11 or newer) has to be there. Everything else goes into virtual environments in
# this folder; uv installs them in seconds where plain pip takes minutes to resolve Airflow.

PYTHON ?= python3
VENV ?= .venv
DEMO_DIR ?= .demo
BENCH_ARGS ?= --json docs/benchmark.json --plot docs/benchmark.png

AIRFLOWS := 2.11 3.1 3.2 3.3
# Airflow 3.2 itself sets no such bounds; its API does not work with newer ones.
BOUNDS_3.2 := 'fastapi<0.137' 'svcs<26'
NEWEST := $(lastword $(AIRFLOWS))
# What Cloud Composer ships, as far as it is known: see the files in constraints/.
IMAGES := composer-2.11 composer-3.1
UV = UV_PYTHON_DOWNLOADS=never $(VENV)/bin/uv
# What `uv pip install` is to install.
TESTED := --editable '.[demo]' --group test --group optional
EVERYTHING := $(TESTED) --group lint
BENCHED := --editable . --group bench
# What core and its tests need, without Airflow: the package itself goes in with --no-deps.
KINETIC := keras-kinetic==0.0.4 google-cloud-storage aiohttp google-crc32c --group test

.DEFAULT_GOAL := help
.PHONY: help demo test test-all $(AIRFLOWS:%=test-%) test-composer $(IMAGES:%=test-%) test-kinetic lint lowest bench constraints $(AIRFLOWS:%=constraints-%) constraints-lowest constraints-bench constraints-kinetic clean
.NOTPARALLEL:
.DELETE_ON_ERROR:

help: ## list these targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' $(firstword $(MAKEFILE_LIST)) | awk -F'|' '{printf "%-22s %s\n", $$1, $$2}'

demo: $(VENV)/.installed ## train three times through Airflow: a miss, a hit, a changed image
	@$(VENV)/bin/python scripts/demo.py --dir $(DEMO_DIR)

test: $(VENV)/.installed ## run the whole test suite on the newest Airflow
	@$(VENV)/bin/python -m pytest $(PYTEST_ARGS)

test-all: $(AIRFLOWS:%=test-%) ## run it on Airflow 2.11, 3.1, 3.2 and 3.3

test-composer: $(IMAGES:%=test-%) ## run it with the versions of Cloud Composer's images

test-$(NEWEST): test

$(patsubst %,test-%,$(filter-out $(NEWEST),$(AIRFLOWS)) $(IMAGES)): test-%: $(VENV)-%/.installed
	@$(VENV)-$*/bin/python -m pytest $(PYTEST_ARGS)

test-kinetic: $(VENV)-kinetic/.installed ## run core's suite beside keras-kinetic, with no Airflow installed
	@$(VENV)-kinetic/bin/python -m pytest tests/kinetic tests/core $(PYTEST_ARGS)

lint: $(VENV)/.installed ## ruff and mypy
	@$(VENV)/bin/python -m ruff check
	@$(VENV)/bin/python -m ruff format --check
	@$(VENV)/bin/python -m mypy

lowest: $(VENV)-lowest/.installed ## run the suite with the lowest versions pyproject.toml allows
	@$(VENV)-lowest/bin/python -m pytest $(PYTEST_ARGS)

bench: $(VENV)-bench/.installed ## measure against keras-kinetic and others; twenty minutes
	@$(VENV)-bench/bin/python tests/benchmarks/run.py $(BENCH_ARGS)
	@$(VENV)-bench/bin/python tests/benchmarks/pages.py

constraints: $(AIRFLOWS:%=constraints-%) constraints-lowest constraints-bench constraints-kinetic ## pin the newest versions again, for every Airflow line

$(AIRFLOWS:%=constraints-%): constraints-%: $(VENV)/.uv
	@$(UV) venv --quiet --clear --python $(VENV)/bin/python $(VENV)-constraints
	@$(UV) pip install --quiet --upgrade --python $(VENV)-constraints/bin/python 'apache-airflow==$*.*' $(BOUNDS_$*) uv $(EVERYTHING)
	@$(UV) pip freeze --quiet --python $(VENV)-constraints/bin/python | grep -E '^[A-Za-z0-9._-]+==[^ ]+$$' > constraints/airflow-$*.txt
	@rm -rf $(VENV)-constraints

constraints-lowest: $(VENV)/.uv
	@$(UV) venv --quiet --clear --python $(VENV)/bin/python $(VENV)-constraints
	@$(UV) pip install --quiet --upgrade --python $(VENV)-constraints/bin/python --resolution lowest-direct $(EVERYTHING)
	@$(UV) pip freeze --quiet --python $(VENV)-constraints/bin/python | grep -E '^[A-Za-z0-9._-]+==[^ ]+$$' > constraints/airflow-lowest.txt
	@rm -rf $(VENV)-constraints

constraints-bench: $(VENV)/.uv
	@$(UV) venv --quiet --clear --python $(VENV)/bin/python $(VENV)-constraints
	@$(UV) pip install --quiet --upgrade --python $(VENV)-constraints/bin/python 'apache-airflow==$(NEWEST).*' $(BENCHED)
	@$(UV) pip freeze --quiet --python $(VENV)-constraints/bin/python | grep -E '^[A-Za-z0-9._-]+==[^ ]+$$' > constraints/bench.txt
	@rm -rf $(VENV)-constraints

constraints-kinetic: $(VENV)/.uv
	@$(UV) venv --quiet --clear --python $(VENV)/bin/python $(VENV)-constraints
	@$(UV) pip install --quiet --upgrade --python $(VENV)-constraints/bin/python $(KINETIC)
	@$(UV) pip freeze --quiet --python $(VENV)-constraints/bin/python | grep -E '^[A-Za-z0-9._-]+==[^ ]+$$' > constraints/kinetic.txt
	@rm -rf $(VENV)-constraints

clean: ## remove the environments, the demo's folder and all caches
	@rm -rf $(VENV) $(VENV)-lowest $(VENV)-bench $(VENV)-kinetic $(VENV)-constraints $(AIRFLOWS:%=$(VENV)-%) $(IMAGES:%=$(VENV)-%) $(DEMO_DIR) .bench
	@rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist

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
	@echo "Installing everybody who is measured into $(VENV)-bench ..."
	@$(UV) venv --quiet --clear --python $(VENV)/bin/python $(VENV)-bench
	@$(UV) pip install --quiet --python $(VENV)-bench/bin/python --constraint constraints/bench.txt $(BENCHED)
	@touch $@

$(VENV)-kinetic/.installed: $(VENV)/.uv pyproject.toml constraints/kinetic.txt
	@echo "Installing keras-kinetic, and this package without Airflow, into $(VENV)-kinetic ..."
	@$(UV) venv --quiet --clear --python $(VENV)/bin/python $(VENV)-kinetic
	@$(UV) pip install --quiet --python $(VENV)-kinetic/bin/python --constraint constraints/kinetic.txt $(KINETIC)
	@$(UV) pip install --quiet --python $(VENV)-kinetic/bin/python --no-deps --editable .
	@touch $@

$(VENV)-%/.installed: $(VENV)/.uv pyproject.toml constraints/airflow-%.txt
	@echo "Installing Airflow $* and the tools into $(VENV)-$* ..."
	@$(UV) venv --quiet --clear --python $(VENV)/bin/python $(VENV)-$*
	@$(UV) pip install --quiet --python $(VENV)-$*/bin/python --constraint constraints/airflow-$*.txt $(EVERYTHING)
	@touch $@
