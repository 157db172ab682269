# `make help` says what there is. GNU make 3.81 or newer, and a POSIX shell.
#
# Everything is installed into .venv, at the versions of uv.lock, and built once: a target that is up to date
# starts at once. cargo honours CARGO_TARGET_DIR.

ifneq ($(words $(CURDIR)),1)
$(error make cannot work in a folder whose path has spaces, and this one is "$(CURDIR)": move the checkout)
endif

UV_VERSION := 0.13.9
VENV := $(CURDIR)/.venv
BIN := $(VENV)/bin

# The core is tested on the very dependencies that the extension is built from, compiled once for both, and is
# itself compiled with the checks that a release leaves out.
CORE := profile.release.package.polyprag-core
CARGO_TEST := cargo test --release --workspace --locked --config '$(CORE).opt-level=1' \
	--config '$(CORE).debug-assertions=true' --config '$(CORE).overflow-checks=true'
PYTEST := $(BIN)/python -m pytest
# What reads damaged files, and what reads in many threads, under AddressSanitizer: the few unsafe lines are all in maps of
# files. The stable compiler has it behind a lock; a target of its own keeps the build scripts out.
SANITIZED := RUSTC_BOOTSTRAP=1 RUSTFLAGS=-Zsanitizer=address CARGO_TARGET_DIR=$(or $(CARGO_TARGET_DIR),$(CURDIR)/target)/sanitized \
	$(subst --workspace,--package polyprag-core,$(CARGO_TEST)) --target $(shell uname -m)-unknown-linux-gnu \
	--test bytes --test damage --test hostile --test readers --test sharing

# Another environment that happens to be active must not be built into, or imported from. Nor is what Python compiles thrown
# away: to compile torch and transformers anew takes every process of the tests twice the time.
unexport CONDA_PREFIX PYTHONDONTWRITEBYTECODE PYTHONHOME PYTHONPATH
export VIRTUAL_ENV := $(VENV)
export UV_PROJECT_ENVIRONMENT := $(VENV)

.DEFAULT_GOAL := help
.SUFFIXES:
.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: docs help setup demo test test-rust test-python lint bench fuzz proof sanitized clean check environment

help:
	@echo 'make demo    install and build, then encode the sample corpus and measure it (the main job)'
	@echo 'make test    install and build, then run the Rust and the Python tests'
	@echo 'make lint    formatting, lints and types, of both languages'
	@echo 'make bench   measure on PopQA, three seeds: benches/results/popqa.json'
	@echo 'make fuzz    everything that reads a file, on mutated ones, FUZZ_RUNS=... a target (needs a C++ compiler)'
	@echo 'make proof   fuzzing, and the tests that draw their cases, with many more cases (hours)'
	@echo 'make docs    build the documentation into site/'
	@echo 'make setup   only install and build: .venv/bin/polyprag is ready then'
	@echo 'make clean   remove what was installed and built; demo/ and results stay'
	@echo
	@echo 'Needs Python 3.10+ (make PYTHON=/path/to/python3 to choose one) and Rust 1.88+.'

# --- Set-up ---------------------------------------------------------------------------------------------------

check:
	@sh scripts/check.sh >/dev/null

environment: check
	@if ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
		echo 'Making .venv'; \
		"$$(sh scripts/check.sh)" -m venv --clear $(VENV); \
	fi

$(VENV)/.installed: pyproject.toml uv.lock | environment
	@echo 'Installing the packages of uv.lock (torch is large: the first time may take a while)'
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check 'uv==$(UV_VERSION)'
	@$(BIN)/uv sync --quiet --locked --inexact --no-install-project --all-extras --group small-model \
		--no-python-downloads --python $(BIN)/python
	@touch $@

# The folders are named too, so that a file that went away is noticed.
RUST := Cargo.toml Cargo.lock $(shell find rust/core rust/python \( -type d -o -name '*.rs' -o -name Cargo.toml \))

# Without the file that is imported, the stamp means nothing.
ifeq ($(wildcard python/polyprag/_polyprag.abi3.so),)
.PHONY: $(VENV)/.built
endif

$(VENV)/.built: $(VENV)/.installed pyproject.toml $(RUST)
	@echo 'Building the extension'
	@$(BIN)/maturin develop --uv --release --locked
	@touch $@

setup: $(VENV)/.built

# --- Jobs -----------------------------------------------------------------------------------------------------

demo: setup
	@$(BIN)/polyprag demo

# The compiler works while packages are fetched and unpacked, and the Rust tests run beside the rest: most of the time they
# use one core, or wait. What they say is shown when the Python tests are done.
test: environment
	@$(CARGO_TEST) --no-run --quiet & compiler=$$!; \
		$(MAKE) --no-print-directory $(VENV)/.installed; installed=$$?; \
		wait $$compiler && exit $$installed
	@told=$$(mktemp); trap 'kill $$! 2>/dev/null; rm -f "$$told"' EXIT INT TERM; \
		$(CARGO_TEST) -- --quiet >"$$told" 2>&1 & \
		$(MAKE) --no-print-directory test-python; python=$$?; \
		wait $$!; rust=$$?; cat "$$told"; \
		[ $$python -eq 0 ] && [ $$rust -eq 0 ]

test-rust: environment
	@$(CARGO_TEST) -- --quiet

test-python: setup
	@OMP_NUM_THREADS=1 $(PYTEST) --timeout=300 --numprocesses auto --dist worksteal --quiet

lint: setup
	@cargo fmt --version >/dev/null 2>&1 && cargo clippy --version >/dev/null 2>&1 || \
		{ echo 'make lint needs rustfmt and clippy: rustup component add rustfmt clippy' >&2; exit 1; }
	@cargo fmt --all --check
	@cargo clippy --release --workspace --all-targets --locked --quiet -- -D warnings
	@$(BIN)/ruff check --quiet
	@$(BIN)/ruff format --check --quiet
	@$(BIN)/python -m mypy
	@$(BIN)/python -m mypy.stubtest polyprag._polyprag --mypy-config-file pyproject.toml

bench: setup
	@mkdir -p benches/results
	@$(BIN)/python benches/popqa.py --seeds 3 --json benches/results/popqa.json

fuzz: check
	@sh scripts/fuzz.sh

proof: setup
	@FUZZ_RUNS=$${FUZZ_RUNS:-4000000} sh scripts/fuzz.sh
	@POLYPRAG_PROOF=1 PROPTEST_CASES=20000 $(CARGO_TEST) -- --quiet --nocapture
	@POLYPRAG_PROOF=1 $(PYTEST) --hypothesis-profile=proof
	@$(MAKE) sanitized

# The short forms again; the counting allocator of `hostile` goes through the sanitizer's.
sanitized:
	@[ "$$(uname)" != Linux ] || $(SANITIZED) -- --quiet --nocapture

docs: setup
	@$(BIN)/uv sync --quiet --locked --inexact --no-install-project --all-extras --group docs --no-python-downloads --python $(BIN)/python
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet && echo 'The site is in site/'

clean:
	@rm -rf .venv target site python/polyprag/_polyprag*.so .mypy_cache .pytest_cache .ruff_cache .hypothesis
	@find python tests benches examples -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true
	@[ -z "$$CARGO_TARGET_DIR" ] || echo "$$CARGO_TARGET_DIR is left as it is: other projects may use it"
