#!/usr/bin/env bash
# All that only a GPU can show, stage by stage: bash benchmarks/gpu.sh LOGS STAGE ...
#   tests      the tests marked gpu of kernels/ and sae/, side by side
#   jobs       those of subjects and of jobs/ (needs transformer_lens)
#   memcheck   the kernels' tests under compute-sanitizer; racecheck: the same for races in shared memory
#   tune       candidates of launch settings; quick, profile: of the training step
#   converge   benchmarks.convergence on $ACTIVATIONS
#   mesh       two GPUs: the tests of a mesh's steps, and benchmarks.scaling
#   ranks      two GPUs: sae train on $LAKE (corpus texts of smollm2) by Ray's actors, of which one is killed, and which
#              goes on on other meshes, beside one GPU on the same batches
#   reproduce  benchmarks.reproduction of layers 15 and 7 in $FOLDER, from texts $CORPUS, of which $SAMPLE is explained: side
#              by side, each on a GPU of its own where there are two; goes on where it was interrupted
#   measure    the benchmarks whose tables are kept;  live: those of training from tokens (needs transformer_lens)
# LIMIT (seconds) cuts off each process of a stage. The logs of a stage are LOGS/STAGE*.log.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
logs=$1
shift
limit=${LIMIT:-240}
alone="--noconftest -p tests.conftest" # the fixtures of these folders need Ray, these tests don't
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 OMP_WAIT_POLICY=PASSIVE PYTHONPATH=${PYTHONPATH:-}:$PWD

pytest() { timeout "$limit" python3 -m pytest -q -m gpu --no-header -p no:cacheprovider --durations=3 "$@"; }
bench() { timeout "$limit" python3 -m "benchmarks.$@"; }
sanitizer() {
    # Without the caching allocator every tensor has bounds of its own. Kernels of torch and cuBLAS are not the question.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout "$limit" compute-sanitizer --tool "$1" --error-exitcode 9 \
        --kernel-regex-exclude kns=native --kernel-regex-exclude kns=nvjet --print-limit 20 python3 -m pytest -m gpu -v --no-header -p no:cacheprovider "${@:2}"
}
side_by_side() {
    local stage=$1 check=$2
    shift 2
    for tests in "$@"; do
        # shellcheck disable=SC2086
        $check $tests >"$logs/$stage-$(basename "${tests//[^[:alnum:]\/_]/-}").log" 2>&1 &
    done
    wait
    tail -n 12 "$logs/$stage"-*.log
}

mesh_run() {
    cat <<EOF
lake: $LAKE
subject: {model: smollm2, hook: blocks.15.hook_resid_pre, dtype: bfloat16, masked_positions: [0]}
corpus: {name: texts, paths: [texts.jsonl], context_length: 128}
autoencoder: {name: mesh, n_latents: 32768}
training: {tokens: 12_000_000, batch_tokens: 32_768, lr: 1.0e-3, checkpoint_tokens: 2_000_000, lanes: 2}
EOF
}
train() { timeout "$limit" python3 -m sae.jobs.cli train "$logs/mesh.yaml" "$@"; }
checkpoints() { find "$LAKE/checkpoints" -path '*mesh*' -type f 2>/dev/null | wc -l; }
# Whether a process is one of those that another has started.
below() {
    local one=$1
    while [ "${one:-1}" -gt 1 ]; do
        [ "$one" != "$2" ] || return 0
        one=$(ps -o ppid= -p "$one" | tr -d ' ')
    done
    return 1
}
ranks() {
    mesh_run >"$logs/mesh.yaml"
    local training rank before
    before=$(checkpoints)
    train --cluster.dp 2 &
    training=$!
    until [ "$(checkpoints)" -ge $((before + 4)) ] || ! kill -0 $training 2>/dev/null; do sleep 0.2; done
    rank=$(pgrep -f 'ray::Trainer' | while read -r one; do ! below "$one" $training || echo "$one"; done | tail -n 1)
    if [ -n "$rank" ]; then echo "killing rank $rank" && kill -9 "$rank"; else echo "no rank of the training to kill"; fi
    wait
    train --cluster.tp 2 --training.tokens 16_000_000
    CUDA_VISIBLE_DEVICES=0 train --training.tokens 20_000_000 &
    CUDA_VISIBLE_DEVICES=1 train --autoencoder.name alone --training.tokens 20_000_000
    wait
    python3 -m sae.jobs.cli sql "$LAKE" "select autoencoder, tokens, max(value) filter (metric = 'fvu') as fvu,
        max(value) filter (metric = 'normalized_mse') as mse from metrics where phase = 'validation' group by all order by 2, 1"
}

reproduction() {
    local folder=$FOLDER/$1
    mkdir -p "$logs/$1"
    CUDA_VISIBLE_DEVICES=$2 bench reproduction run "$folder" --corpus "$CORPUS" --sample "$SAMPLE" --dtype bfloat16 \
        --hook "blocks.$1.hook_resid_pre" --tokens "${TOKENS:-24000000}" --lr 1e-3 --side-by-side 6 --actors 4 "${@:3}" &&
        bench reproduction tell "$folder" --charts "$logs/$1" >"$logs/$1/reproduction.md"
}

for stage in "$@"; do
    echo "=== $stage, $(date +%T)"
    case $stage in
    tests)
        side_by_side tests pytest tests/kernels/test_fused.py tests/kernels/test_reference_ops.py \
            tests/kernels/test_edges.py tests/kernels/test_changes.py "tests/kernels/test_exact.py tests/kernels/test_tuning.py" \
            "tests/sae/test_gpu.py tests/sae/test_device_statistics.py tests/sae/test_model.py tests/sae/test_training.py $alone"
        ;;
    jobs)
        side_by_side jobs pytest "tests/sae/test_subject.py $alone" \
            "tests/jobs/test_prefetch.py tests/jobs/test_activations.py $alone"
        ;;
    memcheck | racecheck)
        fused=tests/kernels/test_fused.py
        # encode_selects asks cuBLAS for one row, in whose kernel racecheck fails; dense_latents launches all of ours.
        side_by_side "$stage" "sanitizer $stage" "$fused -k (update)and(cuda)and(True-True)" "$fused -k centre" \
            "$fused -k (update)and(cuda)and(not(True-True))" "$fused -k dense_latents" tests/kernels/test_reference_ops.py \
            "$fused -k not(update)and(not(centre))and(not(dense_latents))and(not(encode_selects))"
        [ "$stage" = racecheck ] || side_by_side "$stage" "sanitizer $stage" "tests/kernels/test_exact.py -k not(memory)" \
            "tests/kernels/test_edges.py -k not(31)" "tests/kernels/test_tuning.py -k (candidate)or(output)"
        ;;
    tune) bench tune --rounds 5 --budget 1 ;;
    quick)
        bench step --shapes 16384,768,32768,32 --cases zipf dead --only ours gemm --rounds 10 --budget 1
        bench step --shapes 16384,768,32768,32 --cases zipf dead --only ours gemm --rounds 10 --budget 1 --no-graphs
        ;;
    profile) bench step --profile --cases zipf dead ;;
    converge) bench convergence "$ACTIVATIONS" --batch 2048 --latents 4096 ;;
    mesh)
        pytest "tests/sae/test_gpu_mesh.py" --noconftest -p tests.conftest
        bench scaling --save "$logs" --rows 16384,768,32768,32@{1\,1,2\,1} 16384,768,131072,32@{1\,1,1\,2}
        bench scaling --losses 100 --rows 4096,768,32768,32@{1\,1,2\,1,1\,2}
        ;;
    ranks) ranks ;;
    reproduce)
        reproduction 15 0 &
        reproduction 7 $(($(nvidia-smi -L | wc -l) - 1)) --l1 --explained 0
        wait
        ;;
    measure)
        for name in step encode kernels; do bench "$name" --save "$logs" --rounds 10 --budget 1.5; done
        bench statistics
        ;;
    live) bench live --save "$logs" --seconds 2 ;;
    *) echo "no stage $stage" >&2 && exit 2 ;;
    esac 2>&1 | tee "$logs/$stage.log"
done
