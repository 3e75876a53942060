# Every target makes .venv first, and again when pyproject.toml, constraints.txt or native/ change.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
NATIVE := $(wildcard native/*.[ch] native/*/*.[ch])

CLANG ?= clang
FUZZ_SECONDS ?= 1800

.PHONY: demo test test-training test-others test-faults test-long test-by-hand bench-datapipe bench-scale bench-sync bench-async bench-checkpoint bench-gpu \
    soak soak-async fuzz lint clean

demo: $(INSTALLED)  ## train on synthetic scenes, on a Ray cluster of its own; minutes
	@$(BIN)/python jobs/demo.py

test: $(INSTALLED)  ## all tests but those of the three below, in two processes
	@$(MAKE) --no-print-directory --jobs 2 --output-sync=target test-training test-others

test-training: $(INSTALLED)
	$(BIN)/python -m pytest tests/xdist

test-others: $(INSTALLED)
	$(BIN)/python -m pytest --ignore tests/xdist

# Every second test in each of two processes, with clusters of its own: one alone leaves a core half idle.
test-faults: $(INSTALLED)  ## processes killed in every phase of a run; in two processes
	@$(MAKE) --no-print-directory --jobs 2 --output-sync=target faults-1 faults-2

faults-%: $(INSTALLED)
	$(BIN)/python -m pytest -m 'faults and not long and not by_hand' --part $*/2

test-long: $(INSTALLED)  ## tests that take long, with faults and without; in two processes
	@$(MAKE) --no-print-directory --jobs 2 --output-sync=target long-1 long-2

long-%: $(INSTALLED)
	$(BIN)/python -m pytest -m 'long and not by_hand' --part $*/2

test-by-hand: $(INSTALLED)  ## more variants with faults, for which continuous integration has no time
	$(BIN)/python -m pytest -m by_hand

bench-datapipe: $(INSTALLED)  ## images a second, against three other pipelines; ten minutes
	$(BIN)/python -m tests.benchmarks.datapipe

bench-scale: $(INSTALLED)  ## a resume at 300 million samples: time, memory, shuffling
	$(BIN)/python -m tests.benchmarks.scale

bench-sync: $(INSTALLED)  ## steps a second and a killed worker, against torchrun and Ray Train; 15 minutes
	PYTHONPATH=jobs $(BIN)/python -m tests.benchmarks.sync

bench-async: $(INSTALLED)  ## updates a second against Ray's example, stragglers, killed servers; 15 minutes
	PYTHONPATH=jobs $(BIN)/python -m tests.benchmarks.asynchronous

bench-checkpoint: $(INSTALLED)  ## how long training stands still for one, against torch.save and Ray Train; 3 minutes
	PYTHONPATH=jobs $(BIN)/python -m tests.benchmarks.checkpoint

soak: $(INSTALLED)  ## a run whose workers are killed every 20 seconds, for 20 minutes; 30 killed drivers
	PYTHONPATH=jobs $(BIN)/python -m tests.benchmarks.soak
	$(BIN)/python -m pytest -m "long or by_hand" tests/xdist/test_killed_drivers.py

soak-async: $(INSTALLED)  ## the same with parameter servers, which are killed too
	PYTHONPATH=jobs $(BIN)/python -m tests.benchmarks.soak --strategy push_pull --every-s 15

bench-gpu: $(INSTALLED)  ## steps on one GPU, in each way that compute offers
	$(BIN)/python -m tests.benchmarks.gpu

fuzz:  ## the native kernel under clang's libFuzzer and sanitizers, for FUZZ_SECONDS
	@mkdir -p build/fuzz/corpus
	$(CLANG) -O1 -g -std=gnu11 -DWITH_LIBFUZZER -fsanitize=fuzzer,address,undefined \
	    -fno-sanitize-recover=undefined native/jpeg/*.c native/fuzz/fuzz.c -ljpeg -o build/fuzz/fuzz
	build/fuzz/fuzz -max_total_time=$(FUZZ_SECONDS) -max_len=6000 -dict=native/fuzz/jpeg.dict \
	    -artifact_prefix=build/fuzz/ build/fuzz/corpus tests/datapipe/corpus

lint: $(INSTALLED)  ## formatting, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# Behind a lock, and looked at again there: two makes at once must not both build it.
$(INSTALLED): pyproject.toml constraints.txt setup.py $(NATIVE)
ifdef VENV_LOCKED
	@echo "making .venv: torch and Ray, several minutes"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
	    --editable '.[dev]'
	@touch $@
else
	@flock . $(MAKE) --no-print-directory VENV_LOCKED=yes $@
endif

clean:
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache
