# make help lists the targets. The virtual environment is made when it is first needed.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

# What teaches a light CNN the digits in the fewest seconds: 280 steps of 32 images.
DEMO_ACTIVATIONS := relu swish kaf
DEMO_EPOCHS ?= 7
DEMO_RECIPE := --recipe adam --batch-size 32
DEMO_ATTACK := --n 200 --steps 10 --restarts 2 --labels true predicted
DEMO_MODELS := $(foreach a,$(DEMO_ACTIVATIONS),runs/demo/digits_light_cnn_$(a)_seed0)

export TF_CPP_MIN_LOG_LEVEL ?= 2

.PHONY: help venv demo study report test test-all test-jax test-torch mutants lint format clean

help: ## this list
	@grep -E '^[a-z-]+:.*## ' $(firstword $(MAKEFILE_LIST)) | sed -E 's/:[^#]*## /\t/' | expand -t 12

venv: $(VENV)/.installed ## create .venv and install everything that is pinned

$(VENV)/.installed: requirements.txt pyproject.toml
	$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if (3, 11) <= v < (3, 14) else f"Python 3.11, 3.12 or 3.13 is needed (TensorFlow has no other); this is {v.major}.{v.minor}. Say make PYTHON=python3.13")'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(RUN) -m pip install --quiet --disable-pip-version-check -e '.[study,legacy,workflow,dev]'
	touch $@

demo: venv ## train relu, swish and kaf on digits, attack them, draw the figure (minutes)
	for activation in $(DEMO_ACTIVATIONS); do \
	  $(RUN) -m kaf_study.train --dataset digits --architecture light_cnn \
	    --activation $$activation --epochs $(DEMO_EPOCHS) $(DEMO_RECIPE) --seed 0 \
	    --out runs/demo/digits_light_cnn_$${activation}_seed0 || exit; \
	done
	$(RUN) robustness_eval.py $(DEMO_MODELS) --dataset digits $(DEMO_ATTACK)
	$(RUN) robustness_eval.py compare $(DEMO_MODELS)
	$(RUN) -m kaf_study.figures scatter $(DEMO_MODELS) --out imgs/demo_scatter.png

study: venv ## what is missing of the study: trainings, attacks, tables, figures (days)
	$(RUN) -m snakemake --cores all

# A fixed date: the same result files give the same report, byte for byte.
report: export SOURCE_DATE_EPOCH := 0
report: venv ## thesis/report.pdf from the result files (needs latexmk and TeX Live)
	$(RUN) -m kaf_study.report
	$(RUN) -m kaf_study.figures curves models/cifar10_resnet20_*_seed0 --out imgs/curves_resnet20.pdf
	$(RUN) -m kaf_study.figures seeds models/cifar10_resnet20_* --out imgs/seeds_resnet20.pdf
	$(RUN) -m kaf_study.figures shapes models/cifar10_resnet20_kaf*_seed0 --out imgs/kaf_shapes_resnet20.pdf
	$(RUN) -m kaf_study.figures curvature models/cifar10_resnet20_* --out imgs/curvature_resnet20.pdf
	cd thesis && latexmk -pdf -interaction=nonstopmode -halt-on-error report.tex

TESTS := -m pytest -q -n 2 --dist loadgroup --no-loadscope-reorder

test: lint ## lint, types and all tests but the slow ones (minutes)
	$(RUN) $(TESTS) -m 'not slow'

test-all: lint ## the slow tests as well: stored results repeated, large networks, the original ones
	$(RUN) $(TESTS)

# The layer under a backend alone: no TensorFlow, nothing of the study
test-jax: ## the layer under JAX, in an environment of its own
	$(MAKE) test-backend BACKEND=jax PACKAGES=jax

test-torch: ## the layer under PyTorch, in an environment of its own
	$(MAKE) test-backend BACKEND=torch PACKAGES='$(TORCH)'

TORCH ?= torch
test-backend:
	$(PYTHON) -m venv .venv-$(BACKEND)
	.venv-$(BACKEND)/bin/python -m pip install --quiet --disable-pip-version-check . pytest $(PACKAGES)
	cd tests && KERAS_BACKEND=$(BACKEND) ../.venv-$(BACKEND)/bin/python -m pytest -q test_backends.py

mutants: venv ## plant faults in the modules, a random sample, and count those that the tests see (hours)
	$(RUN) tests/mutants.py

lint: venv ## ruff and mypy, check only
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

format: venv ## ruff, mend what it can
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

clean: ## remove the environment, caches and demo runs
	rm -rf $(VENV) .venv-jax .venv-torch runs/demo .pytest_cache .ruff_cache .mypy_cache src/*.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
