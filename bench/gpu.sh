#!/usr/bin/env bash
# Everything a GPU can show, in one command and within 9.5 minutes, without a network:
#
#     bash bench/gpu.sh OUTDIR           # all of it
#     bash bench/gpu.sh OUTDIR quick     # the benchmark beside PyTorch and the aims, in 3 minutes, for tuning
#
# OUTDIR gets facts.txt, tests.txt, sanitizer.txt (memcheck, racecheck), bench.txt (benchmark, host cost, DRAM bytes),
# bench.json (their figures), bench.png and summary.txt, which is also the end of the output: every figure that is aimed
# at, beside what was measured. A part that fails is reported and the others go on; the exit status is 1 then.
# PYTHON chooses the interpreter (python3); PEERS who is measured beside cupynorm (torch,torch.compile,jax).
# Without a usable GPU the parts that need one are skipped, and the benchmarks are rehearsed on the CPU.
set -u

if [ $# -lt 1 ] || [ $# -gt 2 ] || [ -z "$1" ] || [ "${2:-quick}" != quick ]; then
    echo "usage: bash bench/gpu.sh OUTDIR [quick]" >&2
    exit 2
fi
quick=${2:-}
mkdir -p "$1" && out=$(cd "$1" && pwd) || exit 2
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
python=${PYTHON:-python3}
(cd "$out" && rm -f facts.txt tests.txt sanitizer.txt bench.txt bench.json bench.png summary.txt)

results=()
failed=0

# part NAME SECONDS FILE COMMAND...: run it with a limit, its output into FILE. An interrupt first, so that what was
# measured until then is still written.
part() {
    local name=$1 limit=$2 file=$out/$3 start=$SECONDS status verdict
    shift 3
    echo "== $name" >>"$file"
    timeout --signal=INT --kill-after=10 "$limit" "$@" >>"$file" 2>&1 </dev/null
    status=$?
    case $status in
        0) verdict=passed ;;
        124 | 137) verdict="FAILED: not done after $limit s" ;;
        *) verdict="FAILED: exit status $status" ;;
    esac
    [ $status -eq 0 ] || failed=1
    results+=("$name: $verdict, $((SECONDS - start)) s")
    echo "${results[-1]}"
    [ $status -eq 0 ] || tail -n 12 "$file" | cut -c1-300 | sed 's/^/    /'
}

# skip NAME FILE REASON
skip() {
    results+=("$1: skipped: $3")
    echo "${results[-1]}"
    printf '== %s\nskipped: %s\n' "$1" "$3" >>"$out/$2"
}

facts() {
    date -u
    uname -a
    nvidia-smi || echo "nvidia-smi: not there or not working"
    nvcc --version || echo "nvcc: not there"
    "$python" -c 'from bench.report import versions
print(*(f"{name}=={version}" for name, version in versions().items()), sep="\n")'
    "$python" -m cupynorm info
}
export -f facts
export python

# bench_gpu PEERS SECONDS ARGUMENTS...: what matters most comes first, so that what is left out when time runs out is
# the end of the sweep.
bench_gpu() {
    local peers=$1 limit=$2
    shift 2
    part benchmark "$limit" bench.txt "$python" -m bench --device gpu --shapes real sweep --dtype float32,bfloat16 \
        --layout channels_first,channels_last --epilogue none,fused --op both,forward,backward --peers "$peers" \
        --rounds 7 --time-limit $((limit - 30)) --json "$out/bench.json" --plot "$out/bench.png" "$@"
}

gpu=$("$python" -c 'from cupynorm.devices import gpu_status
usable, why = gpu_status()
print("yes" if usable else f"no usable GPU: {why}")' 2>&1 | tail -n 1)

[ -n "$quick" ] || part facts 20 facts.txt bash -c facts

# pytest calls it a failure (5) when it selects no test: so do we.
if [ "$gpu" = yes ] && [ -n "$quick" ]; then
    bench_gpu "${PEERS:-torch}" 175
elif [ "$gpu" = yes ]; then
    part tests 200 tests.txt "$python" -m pytest -m gpu -q -ra --tb=short -p no:cacheprovider

    sanitizer=$(command -v compute-sanitizer || ls "${CUDA_HOME:-/usr/local/cuda}"/bin/compute-sanitizer \
        /usr/local/cuda*/bin/compute-sanitizer /opt/cuda/bin/compute-sanitizer 2>/dev/null | head -n 1)
    for tool in memcheck racecheck; do
        if [ -n "$sanitizer" ]; then
            # API errors are CuPy's way to ask what a device can do; a kernel's errors are what is looked for.
            CUPYNORM_EAGER=0 part "$tool" 55 sanitizer.txt "$sanitizer" --tool "$tool" --error-exitcode 99 \
                --report-api-errors no "$python" -m pytest -p bench.no_pool -p no:cacheprovider -m gpu -k small -q --tb=short
        else
            skip "$tool" sanitizer.txt "compute-sanitizer is not installed"
        fi
    done

    bench_gpu "${PEERS:-torch,torch.compile,jax}" 165 --compile-limit 20
    part "host cost" 25 bench.txt "$python" -m bench.host --device gpu --json "$out/bench.json"
    part dram 45 bench.txt "$python" -m bench.dram --json "$out/bench.json"
else
    [ -n "$quick" ] || for tool in tests memcheck racecheck; do
        skip "$tool" "$([ $tool = tests ] && echo tests.txt || echo sanitizer.txt)" "$gpu"
    done
    part "benchmark (rehearsed on the CPU)" 60 bench.txt "$python" -m bench --device cpu --shapes 2,3,16,16 2,320,4,4,4 \
        --epilogue none,fused --layout channels_first,channels_last --peers "${PEERS:-torch}" --compile-limit 0 \
        --rounds 2 --batch-ms 1 --json "$out/bench.json" --plot "$out/bench.png"
    if [ -z "$quick" ]; then
        part "host cost (rehearsed on the CPU)" 60 bench.txt "$python" -m bench.host --device cpu --rounds 1 --calls 1 \
            --json "$out/bench.json"
        part dram 20 bench.txt "$python" -m bench.dram
    fi
fi

{
    "$python" -m bench.summary "$out"
    printf '%s\n' "${results[@]}"
} >"$out/summary.txt" 2>&1
echo
cat "$out/summary.txt"
exit $failed
