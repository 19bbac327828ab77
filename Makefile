# make demo and make test set up .venv on the first call and reuse it afterwards.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test test-large test-learning lint format bench torture hostile schema clean

demo: $(READY)
	$(BIN)/sdxl demo

test: $(READY)
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal

test-large: $(READY)  # a full-size SDXL on the CPU: 20 GB of memory, about ten minutes
	$(BIN)/python -m pytest -m large -s

test-learning: $(READY)  # does micro-SDXL learn, and do options move it the right way: about twenty minutes
	$(BIN)/python -m pytest -m learning -s

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# REFERENCE=checkout of diffusers and DATA=folder of pictures add the comparison with the reference script, KOHYA=checkout of
# sd-scripts that with its cached rows; see benchmarks/peers.py. Half an hour on two cores.
bench: $(READY)
	$(BIN)/python benchmarks/loop.py $(if $(DATA),--data $(DATA))
	$(BIN)/python benchmarks/unet.py
	$(BIN)/python benchmarks/checkpoints.py
	$(BIN)/python benchmarks/memory.py
	$(if $(and $(REFERENCE),$(DATA)),$(BIN)/python benchmarks/peers.py --reference $(REFERENCE) --data $(DATA) $(if $(KOHYA),--kohya $(KOHYA)))
	$(BIN)/python benchmarks/page.py

torture: $(READY)  # 200 kills over runs of every method; an hour or more
	$(BIN)/python benchmarks/torture.py

hostile: $(READY)  # 1,000 hostile or broken inputs, one for each core at a time; goes on where it was stopped
	$(BIN)/python benchmarks/hostile.py

schema: $(READY)  # what docs say of the options, from the code
	$(BIN)/sdxl schema > docs/config.schema.json
	sed '/^### Top of the file/,$$d' docs/config.md > docs/config.md.new
	$(BIN)/sdxl schema --table >> docs/config.md.new
	mv docs/config.md.new docs/config.md
	$(BIN)/sdxl schema --commands > docs/commands.md

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || (echo "Python 3.11 or later is needed; set PYTHON=..." && exit 1)
	@echo "Setting up $(VENV), once: PyTorch and other packages, a few minutes of little to see."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $(READY)

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
