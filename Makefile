# `make demo` sets up and runs the main job; `make test` sets up and runs the fast tests. Nothing else is needed
# than Python 3.10 to 3.13 (constraints are pinned for 3.11), pip, make and gcc.

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.complete
RESULTS := benchmarks/results

.PHONY: demo test test-rest lint format wheel bench bench-memory bench-speed bench-scaling bench-adjoints bench-service \
	clean

demo: $(STAMP)
	rm -rf runs/demo
	$(BIN)/memmeta train examples/glyphs.py --run-dir runs/demo

# One thread in each of two processes: threads that spin on the same cores take many times as long.
test test-rest: export OMP_NUM_THREADS = 1
PYTEST := $(BIN)/python -m pytest --durations=15
TWO := -n 2 --dist worksteal

test: $(STAMP)
	$(PYTEST) $(TWO)

# The other tiers: what needs minutes, and what needs a Ray cluster on this machine.
test-rest: $(STAMP)
	$(PYTEST) $(TWO) -m "slow and not cluster"
	$(PYTEST) -m cluster

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

wheel: $(STAMP)
	$(BIN)/python tools/check_wheel.py

# What memmeta costs beside its peers: docs/benchmarks.md shows what these commands have written. Bytes may be measured
# beside other work; times want a quiet machine. Two hours; `memmeta bench memory --quick` takes two minutes and a half.
bench: bench-memory bench-speed bench-scaling

bench-memory: $(STAMP)
	for problem in conv4 sinusoid_mlp "gpt --quick" "resnet12 --quick"; do \
		$(BIN)/memmeta bench memory --problems $$problem --json $(RESULTS)/memory-$${problem% *}.json \
			--plot $(RESULTS)/memory-$${problem% *}.png || exit 1; done

bench-speed: $(STAMP)
	for problem in sinusoid_mlp conv4 gpt resnet12; do \
		$(BIN)/memmeta bench speed --problems $$problem --json $(RESULTS)/speed-$$problem.json \
			--plot $(RESULTS)/speed-$$problem.png || exit 1; done

bench-scaling: $(STAMP)
	$(BIN)/memmeta bench scaling --json $(RESULTS)/scaling.json --plot $(RESULTS)/scaling.png

# Memory and time of the adjoints: bytes are counted, the same on every machine; times want a quiet one. The long inner
# loops take an hour, and gpu.py measures nothing without a GPU.
bench-adjoints: $(STAMP)
	$(BIN)/python benchmarks/adjoints.py --json benchmarks/results/adjoints.json --plot benchmarks/results/adjoints.png
	$(BIN)/python benchmarks/execution.py --json benchmarks/results/execution.json
	$(BIN)/python benchmarks/long.py --steps 100 --json benchmarks/results/long.json
	$(BIN)/python benchmarks/long.py --steps 500 --json benchmarks/results/long.json
	$(BIN)/python benchmarks/gpu.py --json benchmarks/results/gpu.json

# Of the service, on a private Ray cluster: scaling and overhead, a long run's memory, kills at random.
bench-service: $(STAMP)
	$(BIN)/python benchmarks/service.py --turns 3 --json benchmarks/results/service.json
	$(BIN)/python benchmarks/soak.py --json benchmarks/results/soak.json --plot benchmarks/results/soak.png
	$(BIN)/python benchmarks/faults.py --json benchmarks/results/faults.json

# learn2learn 0.2.0 ships C of an old Cython: it is translated anew, with the Cython and setuptools of constraints.txt.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --disable-pip-version-check -q -c constraints.txt \
		"cython<3.1" "setuptools<81" wheel hatchling torch
	$(BIN)/pip install --disable-pip-version-check -q -c constraints.txt --no-build-isolation \
		-e ".[service,plots,examples,peers,dev]"
	$(BIN)/pip install --disable-pip-version-check -q --use-pep517 --no-build-isolation --no-deps \
		--config-settings="--global-option=build_ext" learn2learn==0.2.0
	$(BIN)/python -m compileall -q memmeta workers  # once, where processes are told to write no bytecode
	touch $(STAMP)

clean:
	rm -rf .venv build dist .pytest_cache .ruff_cache .hypothesis
