# make train   makes the environment and runs the main job on the built-in base and subject
# make test    makes the environment and passes the tests
# make science the claims about DreamBooth, tested on the lab (minutes)
# make lint    style
PYTHON ?= python3
VENV ?= .venv
ARGS ?=
READY = $(VENV)/.ready
export OMP_WAIT_POLICY ?= passive

.PHONY: train test science lint format

train: $(READY)
	$(VENV)/bin/python train.py $(ARGS)

test: $(READY)
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 -m "not science" $(ARGS)

science: $(READY)
	$(VENV)/bin/python -m pytest -m science $(ARGS)

lint: $(READY)
	$(VENV)/bin/python -m ruff check . && $(VENV)/bin/python -m ruff format --check .

format: $(READY)
	$(VENV)/bin/python -m ruff check --fix . && $(VENV)/bin/python -m ruff format .

$(READY): requirements.lock setup.cfg pyproject.toml
	@$(PYTHON) -c "import sys; sys.version_info >= (3, 11) or sys.exit('Python 3.11 or newer is needed, got ' + sys.version.split()[0] + '; name one: make PYTHON=python3.12 ...')"
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@
