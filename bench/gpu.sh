#!/usr/bin/env bash
# Test and measure on a GPU, in stages that together fit into 15 minutes. None needs a network.
#
#     bash bench/gpu.sh OUTDIR first      # at most 200 s: check that everything runs and is right; the main timings
#     bash bench/gpu.sh OUTDIR            # at most 9 minutes: the GPU tests, compute-sanitizer, the whole benchmark
#     bash bench/gpu.sh OUTDIR variants   # at most 150 s: time every kernel variant that fits a plane size
#     bash bench/gpu.sh OUTDIR quick      # 3 minutes: the benchmark against PyTorch and the aims, for tuning
#
# OUTDIR gets at most eight files of facts.txt, smoke.txt, tests.txt, sanitizer.txt, bench.txt, bench.json, bench.png,
# variants.txt, variants.json and summary.txt. The output ends with summary.txt, which lists each aim and its
# measurement. Each part has a time limit. A part that fails is reported, the others go on, and the exit status is 1.
# PYTHON chooses the interpreter (python3), PEERS the peers of cupynorm (torch, then torch.compile and jax).
# To rehearse on the fake GPU (tests/fakegpu): SMALL=1 uses small shapes and some of the scopes, tests and variants, and
# does not measure the import, which compiles for a long time; PACE=1000 raises time limits to 1000 %.
# Without a GPU the parts that need one are skipped, and the benchmarks are rehearsed on the CPU. A GPU that exists but
# cannot be used is a failure.
set -u

stage=${2:-full}
if [ $# -lt 1 ] || [ $# -gt 2 ] || [ -z "$1" ] || [[ ! $stage =~ ^(first|full|variants|quick)$ ]]; then
    echo "usage: bash bench/gpu.sh OUTDIR [first | full | variants | quick]" >&2
    exit 2
fi
mkdir -p "$1" && out=$(cd "$1" && pwd) || exit 2
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
python=${PYTHON:-python3}
case $stage in
    first) mine="facts.txt smoke.txt bench.txt bench.json bench.png summary.txt" ;;
    full) mine="facts.txt tests.txt sanitizer.txt bench.txt bench.json bench.png summary.txt" ;;
    variants) mine="variants.txt variants.json summary.txt" ;;
    quick) mine="bench.txt bench.json bench.png summary.txt" ;;
esac
(cd "$out" && rm -f $mine)

results=()
failed=0
pace=${PACE:-100}
seconds() { awk "BEGIN {print $1 * $pace / 100}"; }

# part NAME SECONDS FILE COMMAND...: run it with a time limit, its output into FILE. An interrupt comes first, so that
# results measured until then are still written.
part() {
    local name=$1 limit file=$out/$3 start=$SECONDS status verdict
    limit=$(seconds "$2")
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
    local status=0 module
    date -u
    uname -a
    nproc
    nvidia-smi || echo "nvidia-smi: not there or not working"
    nvcc --version || echo "nvcc: not there"
    for module in numpy cupy ml_dtypes torch llvmlite jax hypothesis rich matplotlib sklearn; do
        CUPYNORM_EAGER=0 "$python" -W error -c "import $module" 2>&1 | tail -n 1 | sed "s/^/import $module: /"
    done
    CUPYNORM_EAGER=0 "$python" -W error -c "import cupynorm" || status=1
    CUPYNORM_EAGER=0 "$python" -c 'from bench.core.report import versions
print(*(f"{name}=={version}" for name, version in versions().items()), sep="\n")' || status=1
    "$python" -m cupynorm info || status=1
    return $status
}
export -f facts
export python

# Find out without compiling if there is a usable GPU; the answer is on its own line.
asked=$(CUPYNORM_EAGER=0 "$python" -c 'from cupynorm.devices import gpu_status
usable, why = gpu_status()
print("gpu: usable" if usable else f"gpu: unusable: {why}")' 2>&1)
if grep -qx "gpu: usable" <<<"$asked"; then
    gpu=yes
elif [ -e /dev/nvidia0 ] || nvidia-smi -L 2>/dev/null | grep -q GPU || ! grep -q "^gpu: unusable: " <<<"$asked"; then
    printf '%s\n' "$asked" | tee "$out/summary.txt"
    echo "FAILED: this GPU cannot be used" | tee -a "$out/summary.txt"
    exit 1
else
    gpu="no usable GPU: $(sed -n 's/^gpu: unusable: //p' <<<"$asked")"
fi

# bench NAME SECONDS ARGUMENTS...: add figures to bench.json. The most important cases come first, so that only
# the end of the sweep is lost if time runs out.
bench() {
    local name=$1 limit=$2
    shift 2
    part "$name" "$limit" bench.txt "$python" -m bench --device gpu --time-limit "$(seconds $((limit - 15)))" \
        --json "$out/bench.json" "$@"
}

sanitizer() {
    local tool
    local program
    program=$(command -v compute-sanitizer || ls "${CUDA_HOME:-/usr/local/cuda}"/bin/compute-sanitizer \
        /usr/local/cuda*/bin/compute-sanitizer /opt/cuda/bin/compute-sanitizer 2>/dev/null | head -n 1)
    for tool in memcheck racecheck; do
        if [ -z "$program" ]; then
            skip "$tool" sanitizer.txt "compute-sanitizer is not installed"
            continue
        fi
        # Report errors in kernels, not API errors, which CuPy uses to find out what a device can do. Run only the small
        # cases of the table: PyTorch, the compiled loops and interrupts would only make it slow.
        CUPYNORM_EAGER=0 CUPYNORM_COMPILED=0 part "$tool" 45 sanitizer.txt "$program" --tool "$tool" \
            --error-exitcode 99 --report-api-errors no "$python" -m pytest -p bench.core.no_pool -p no:cacheprovider \
            -m gpu -k "test_small or test_double_small" -q --tb=short -p no:benchmark tests/conformance/test_cases.py
    done
}

both=float32,bfloat16
telling="20,100,35,45 12,512,4,4 12,512,32,32 20,64,184,248 12,32,512,512 2,32,128,128,128 1,1,4096,4096 1,4194304,4,4 1,65536,32,32"
real=real all="real sweep" parts=() pairs=() scopes=() tests=() sizes=() calls=() compiling=60
masks=(16,1,512,512 64,128,12,12 --kinds plane own)
if [ -n "${SMALL:-}" ]; then
    parts=(2,3,16,16 --batch-ms 0.01) pairs=("${parts[@]}" --pairs uint16:float32) masks=("${parts[@]}" --kinds own)
    telling="2,3,16,16" real="2,24,4,4" all="2,3,16,16 2,24,4,4" both=float32
    scopes=(--scopes warp) tests=(tests/conformance/test_cases.py -k "test_small and 2x3 and float32") calls=(--rounds 1 --calls 1 --no-import)
    sizes=(--elements 4096 --sizes 8 --dtype float32 --op forward --rounds 1 --batch-ms 0.01) compiling=0.3
fi
rehearse() {
    local name=$1 seconds=$2
    shift 2
    part "$name (rehearsed on the CPU)" "$seconds" bench.txt "$@" --device cpu --json "$out/bench.json"
}

if [ "$gpu" != yes ]; then
    [ $stage = quick ] || [ $stage = variants ] || part facts 180 facts.txt bash -c facts
    case $stage in
        first) skip smoke smoke.txt "$gpu" ;;
        full)
            skip prime tests.txt "$gpu"
            skip tests tests.txt "$gpu"
            skip memcheck sanitizer.txt "$gpu"
            skip racecheck sanitizer.txt "$gpu"
            ;;
        variants) skip variants variants.txt "$gpu" ;;
    esac
    if [ $stage != variants ]; then
        rehearse benchmark 60 "$python" -m bench --shapes 2,3,16,16 2,320,4,4,4 --epilogue none,fused \
            --layout channels_first,channels_last --peers "${PEERS:-torch}" --compile-limit 0 --rounds 2 --batch-ms 1 \
            --plot "$out/bench.png"
        [ $stage = quick ] || rehearse "host cost" 60 "$python" -m bench host --rounds 1 --calls 1
        [ $stage != full ] || part dram 20 bench.txt "$python" -m bench dram
        [ $stage != full ] || part "parts (rehearsed on the CPU)" 60 bench.txt "$python" -m bench parts --device cpu \
            2,3,16,16 --rounds 1 --batch-ms 0.1
        [ $stage != full ] || part "dtypes (rehearsed on the CPU)" 60 bench.txt "$python" -m bench dtypes --device cpu \
            2,3,16,16 --pairs uint16:float32 --rounds 1 --batch-ms 0.1
        [ $stage != full ] || part "masks (rehearsed on the CPU)" 60 bench.txt "$python" -m bench masks --device cpu \
            2,3,16,16 --rounds 1 --batch-ms 0.1
    fi
elif [ $stage = first ]; then
    part facts 30 facts.txt bash -c facts
    part smoke 80 smoke.txt "$python" -m bench smoke --limit "$(seconds 50)" "${scopes[@]}"
    bench benchmark 70 --shapes $telling --dtype $both --op forward,backward --peers "${PEERS:-torch}" --rounds 5 \
        --plot "$out/bench.png"
    part "host cost" 20 bench.txt "$python" -m bench host --device gpu --json "$out/bench.json" --rounds 11 "${calls[@]}"
elif [ $stage = full ]; then
    part facts 20 facts.txt bash -c facts
    part prime 75 tests.txt "$python" -m bench prime --limit "$(seconds $compiling)"
    # pytest fails (status 5) if it selects no test, and so does this part.
    part tests 120 tests.txt "$python" -m pytest -n 8 --full -m gpu -q -ra --tb=short -p no:cacheprovider \
        -p no:benchmark "${tests[@]}"
    bench benchmark 110 --shapes $all --dtype $both --op both,forward,backward --peers "${PEERS:-torch}" --rounds 7
    sanitizer
    part parts 15 bench.txt "$python" -m bench parts --device gpu --dtype $both --rounds 5 "${parts[@]}"
    part dtypes 10 bench.txt "$python" -m bench dtypes --device gpu --rounds 5 "${pairs[@]}"
    part masks 10 bench.txt "$python" -m bench masks --device gpu --dtype $both --rounds 5 "${masks[@]}"
    bench "channels-last and fused" 35 --shapes $real --dtype $both --layout channels_first,channels_last \
        --epilogue none,fused --op both,forward,backward --peers "${PEERS:-torch}" --rounds 5 --resume \
        --plot "$out/bench.png"
    part "host cost" 20 bench.txt "$python" -m bench host --device gpu --json "$out/bench.json" "${calls[@]}"
    part dram 35 bench.txt "$python" -m bench dram --json "$out/bench.json"
    left=$((530 - SECONDS * 100 / pace))
    [ $left -lt 30 ] || bench "torch.compile and JAX" $left --shapes $real --dtype $both --op both \
        --peers "${PEERS:-torch,torch.compile,jax}" --rounds 5 --resume
elif [ $stage = variants ]; then
    part variants 145 variants.txt "$python" -m bench variants --time-limit "$(seconds 130)" \
        --json "$out/variants.json" "${sizes[@]}"
else
    bench benchmark 175 --shapes $all --dtype $both --layout channels_first,channels_last --epilogue none,fused \
        --peers "${PEERS:-torch}" --rounds 7 --plot "$out/bench.png"
fi

{
    "$python" -m bench summary "$out"
    printf '%s\n' "${results[@]}"
} >"$out/summary.txt" 2>&1
echo
cat "$out/summary.txt"
exit $failed
