#!/bin/sh
# Fuzzes everything that the core reads from a file: scripts/fuzz.sh [TARGET ...], by default all of them.
#
#   FUZZ_RUNS=1000000   inputs a target
#   FUZZ_SEED=1         of the mutations
#   FUZZ_WORK=folder    where inputs that reach something new are kept; they are used again the next time
#
# It is what cargo-fuzz would do, on the stable toolchain and with nothing to install but a C++ compiler, which
# builds libFuzzer. An input that breaks a reader is left in rust/fuzz/artifacts/TARGET. With MINIMISE=1 it does not
# fuzz: it makes rust/fuzz/corpus as small as it can be without reaching less.
set -eu

here=$(cd "$(dirname "$0")/.." && pwd)
fuzz=$here/rust/fuzz
triple=$(rustc -vV | sed -n 's/^host: //p')
target=${CARGO_TARGET_DIR:-$here/target}/fuzz
work=${FUZZ_WORK:-$target/corpus}
runs=${FUZZ_RUNS:-1000000}
seed=${FUZZ_SEED:-1}

flags="-Zsanitizer=address -Cpasses=sancov-module"
for flag in level=4 inline-8bit-counters pc-table trace-compares; do
    flags="$flags -Cllvm-args=-sanitizer-coverage-$flag"
done
flags="$flags --cfg fuzzing -Cllvm-args=-simplifycfg-branch-fold-threshold=0"
# Sanitisers are not stable yet; a stable compiler has them all the same.
(cd "$fuzz" && RUSTC_BOOTSTRAP=1 RUSTFLAGS="$flags" CARGO_TARGET_DIR="$target" \
    cargo build --quiet --release --target "$triple")

names=${*:-$(cd "$fuzz/fuzz_targets" && ls | sed 's/\.rs$//')}
# Short call stacks with each allocation, and little memory kept from being used again: it is much quicker so.
export ASAN_OPTIONS=malloc_context_size=2:quarantine_size_mb=8:detect_leaks=0:detect_stack_use_after_return=0

if [ -z "${MINIMISE:-}" ]; then
    printf '%-10s %12s %8s %8s\n' target inputs seconds edges
fi
for name in $names; do
    program=$target/$triple/release/$name
    corpus=$fuzz/corpus/$name
    artifacts=$fuzz/artifacts/$name/
    log=$work/$name.log
    mkdir -p "$work/$name" "$artifacts" "$corpus"
    if [ -n "${MINIMISE:-}" ]; then
        rm -rf "$work/smaller" && mkdir "$work/smaller"
        "$program" -set_cover_merge=1 -use_counters=0 "$work/smaller" "$corpus" "$work/$name" >"$log" 2>&1
        # Those with a name of their own, not a hash of 40 digits, broke a reader once: they stay.
        find "$corpus" -type f -name "$(printf '?%.0s' $(seq 40))" -exec rm {} +
        find "$work/smaller" -type f -exec cp {} "$corpus" \;
        du -sk "$corpus"
        continue
    fi
    set -- -runs="$runs" -seed="$seed" -timeout=25 -print_final_stats=1 -artifact_prefix="$artifacts"
    [ ! -f "$fuzz/$name.dict" ] || set -- "$@" -dict="$fuzz/$name.dict"
    if ! "$program" "$@" "$work/$name" "$corpus" >"$log" 2>&1; then
        tail -n 40 "$log" >&2
        echo "$name failed: $log; the input is in $artifacts" >&2
        exit 1
    fi
    inputs=$(sed -n 's/^stat::number_of_executed_units: *//p' "$log")
    seconds=$(sed -n 's/^Done .* in \([0-9]*\) second.*/\1/p' "$log")
    edges=$(sed -n 's/.*DONE *cov: \([0-9]*\) .*/\1/p' "$log")
    printf '%-10s %12s %8s %8s\n' "$name" "$inputs" "$seconds" "$edges"
done
