#!/usr/bin/env bash
# Start vLLM on each of N GPUs, and vllm-router before them on port 8000; everything ends with this script.
#
#     examples/scale/start_vllm.sh MODEL [N] [arguments of vllm serve ...]
#
# Needs `pip install vllm vllm-router`. Then: recollect serve -m FOLDER --engine vllm=http://127.0.0.1:8000
set -euo pipefail

model=${1:?"usage: start_vllm.sh MODEL [N] [arguments of vllm serve ...]"}
replicas=${2:-1}
shift $(($# < 2 ? $# : 2))

trap 'kill $(jobs -p) 2>/dev/null; wait' EXIT

urls=()
for ((number = 0; number < replicas; number++)); do
    port=$((8100 + number))
    CUDA_VISIBLE_DEVICES=$number vllm serve "$model" --host 127.0.0.1 --port "$port" \
        --enable-prompt-tokens-details --enable-prefix-caching --scheduling-policy priority "$@" &
    urls+=("http://127.0.0.1:$port")
done

for url in "${urls[@]}"; do
    until curl --silent --fail "$url/health" >/dev/null; do
        sleep 2
    done
done

vllm-router --host 127.0.0.1 --port 8000 --policy sticky_least_loaded --worker-urls "${urls[@]}" &
wait -n
