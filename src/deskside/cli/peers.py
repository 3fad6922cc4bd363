"""Flags of llama.cpp and ik_llama.cpp that no command here has: which change nothing, which are
refused and why, which have another name here.

Names and numbers of values are facts of llama.cpp's `--help` (October 2026) and of ik_llama.cpp's
argument parser (as in the wheel ik-llama-cpp-python 0.1.5). A flag changes nothing here if it asks
how fast, where or how loudly something is computed, or concerns a server. It is refused if leaving
it out would change what is computed, or what is written.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Peer:
    """values: how many follow the flag. words: the texts of a value that may be left out.
    refusal: why the flag is refused, "" for one that changes nothing. off: the value with which it
    changes nothing after all."""

    values: int = 0
    words: tuple[str, ...] = ()
    refusal: str = ""
    off: str | None = None

    def is_off(self, value: str) -> bool:
        """Whether a value is the one that turns the flag off: as a number, or as text."""
        if self.off is None:
            return False
        try:
            return float(value) == float(self.off)
        except ValueError:
            return value.lower() == self.off


# Entries, with a comma or a line between them: the names of a flag, then what follows: nothing,
# a number of values, or the words that one value may be; for a flag that is refused also off=VALUE.
_NOTHING = """
# attention and fused kernels: there is one way of computing
-fa --flash-attn on|off|auto|1|0, -no-fa --no-flash-attn, -mla --mla-use 1
-amb --attention-max-batch 1, -fmoe --fused-moe, -no-fmoe --no-fused-moe
-ger --grouped-expert-routing, -fug --fused-up-gate, -no-fug --no-fused-up-gate
-mmad --fused-mul-multiadd, -no-mmad --no-fused-mul-multiadd, -rcache --rope-cache
-fdn --fused-delta-net 1, -ser --smart-expert-reduction 1, -bs --backend-sampling
-khad --k-cache-hadamard, -vhad --v-cache-hadamard
# graphs, schedulers and how GPUs share
-gr --graph-reuse, -no-gr --no-graph-reuse, -sm --split-mode 1, -smgs --split-mode-graph-scheduling
-smf16 --split-mode-f16, -smf32 --split-mode-f32, -sas --scheduler-async
-grt --graph-reduce-type 1, -wgt --worst-graph-tokens 1, -cuda --cuda-params 1
-mea --max-extra-alloc 1, --max-gpu 1, -kvo --kv-offload, -nkvo --no-kv-offload, --op-offload
--no-op-offload, -op --offload-policy 1, -ooae --offload-only-active-experts
-no-ooae --no-offload-only-active-experts, --no-host, -fit --fit on|off, -fitc --fit-ctx 1
-fitt --fit-target 1, --fit-margin 1
# weights in memory: always packed, checked, on huge pages
-rtr --run-time-repack, --repack, -nr --no-repack, -mqkv --merge-qkv, -muge --merge-up-gate-experts
-thp --transparent-huge-pages, -vq --validate-quants, --check-tensors, --mmap, -dio --direct-io
-ndio --no-direct-io, -lzm --lazy-mode 1, --warmup, --no-warmup, -wb --warmup-batch
# threads
-C --cpu-mask 1, -Cr --cpu-range 1, --cpu-strict 1, --prio 1, --poll 1, -Cb --cpu-mask-batch 1
-Crb --cpu-range-batch 1, --cpu-strict-batch 1, --prio-batch 1, --poll-batch 1
# caches of prompts
-dt --defrag-thold 1, --swa-full, -kvu --kv-unified, -no-kvu --no-kv-unified
--kv-unified-per-slot 1, --keep 1, --no-context-shift, --cache-prompt, --no-cache-prompt
--cache-reuse 1, --cache-idle-slots, --no-cache-idle-slots, -cram --cache-ram 1
-crs --cache-ram-similarity 1, -cram-n-min --cache-ram-n-min 1
-ctxcp --ctx-checkpoints --swa-checkpoints 1, --ctx-checkpoints-interval 1
--ctx-checkpoints-tolerance 1, -cms --checkpoint-min-step 1, --prompt-cache 1, --prompt-cache-all
--prompt-cache-ro, -dkvc --dump-kv-cache
# chat: the file's template, and the answer as it comes
--jinja, --no-jinja, --peg, --reasoning-format 1, --reasoning-budget-message 1
--no-reasoning-preserve, --skip-chat-parsing, --no-skip-chat-parsing, --prefill-assistant
--no-prefill-assistant on|off|1|0, -i --interactive, -if --interactive-first
-mli --multiline-input, --simple-io, -co --color on|off|auto, --show-timings, --no-show-timings
--display-prompt, --no-display-prompt
# details of samplers that are off
--mirostat-lr 1, --mirostat-ent 1, --dry-base 1, --dry-allowed-length 1, --dry-penalty-last-n 1
--dry-sequence-breaker 1, --dynatemp-exp 1, --xtc-threshold 1, --adaptive-decay 1
--adaptive-updt-w-cur, --penalize-nl, -gaw --grp-attn-w 1
# speculation: it changes no answer
-mtp --multi-token-prediction, -no-mtp --no-multi-token-prediction, -draft --draft-params 1
--draft --draft-n --draft-max 1, --draft-min --draft-n-min 1, --draft-p-min --spec-draft-p-min 1
-ps --p-split --draft-p-split --spec-draft-p-split 1, -cd --ctx-size-draft 1
-td --threads-draft --spec-draft-threads 1, -tbd --threads-batch-draft --spec-draft-threads-batch 1
-md --model-draft --spec-draft-model 1, -hfd -hfrd --hf-repo-draft --spec-draft-hf 1
-ngld --gpu-layers-draft --n-gpu-layers-draft --spec-draft-ngl 1
-devd --device-draft --spec-draft-device 1
-otd --override-tensor-draft --spec-draft-override-tensor 1
-ctkd --cache-type-k-draft --spec-draft-type-k 1, -ctvd --cache-type-v-draft --spec-draft-type-v 1
-cmoed --cpu-moe-draft --spec-draft-cpu-moe
-ncmoed --n-cpu-moe-draft --spec-draft-n-cpu-moe --spec-draft-ncmoe 1
-Cd --cpu-mask-draft --spec-draft-cpu-mask 1
-Cbd --cpu-mask-batch-draft --spec-draft-cpu-mask-batch 1
-Crd --cpu-range-draft --spec-draft-cpu-range 1
-Crbd --cpu-range-batch-draft --spec-draft-cpu-range-batch 1
--cpu-strict-draft --spec-draft-cpu-strict 1
--cpu-strict-batch-draft --spec-draft-cpu-strict-batch 1, --poll-draft --spec-draft-poll 1
--poll-batch-draft --spec-draft-poll-batch 1, --prio-draft --spec-draft-prio 1
--prio-batch-draft --spec-draft-prio-batch 1, --spec-default, --spec-autotune, --spec-type 1
--spec-replace 2, --spec-draft-n-max 1, --spec-draft-n-min 1, --spec-draft-sampling 1
--spec-draft-backend-sampling, --no-spec-draft-backend-sampling, --spec-ngram-size-n 1
--spec-ngram-size-m 1, --spec-ngram-min-hits 1, --spec-ngram-map-k-min-hits 1
--spec-ngram-map-k-size-m 1, --spec-ngram-map-k-size-n 1, --spec-ngram-map-k4v-min-hits 1
--spec-ngram-map-k4v-size-m 1, --spec-ngram-map-k4v-size-n 1, --spec-ngram-mod-n-match 1
--spec-ngram-mod-n-max 1, --spec-ngram-mod-n-min 1, --spec-ngram-simple-min-hits 1
--spec-ngram-simple-size-m 1, --spec-ngram-simple-size-n 1, -lcs --lookup-cache-static 1
-lcd --lookup-cache-dynamic 1
# logs
-v --verbose --log-verbose, -lv --verbosity --log-verbosity 1, --verbose-prompt, --log-disable
--log-file 1, --log-format 1, --log-colors on|off|auto, --log-prefix, --no-log-prefix
--log-timestamps, --no-log-timestamps, --log-jsonl, --no-log-jsonl, --log-prompts-dir 1
-ld --logdir 1, --minilog 1, -ptc --print-token-count 1, --perf, --no-perf
# parts of a file that are not run
--no-mmproj --no-mmproj-auto, --mmproj-auto, --mmproj-offload, --no-mmproj-offload
-mmdev --mmproj-device 1, --mtmd-kq-type 1, --mtmd-batch-max-tokens 1, --image-min-tokens 1
--image-max-tokens 1, --video-ffmpeg-dir 1, --video-fps 1, --video-timestamp-interval 1
# a server
--host 1, --port 1, --reuse-port, --path 1, --media-path 1, --api-prefix 1, --api-key 1
--api-key-file 1, --ssl-key-file 1, --ssl-cert-file 1, --cors-origins 1, --cors-methods 1
--cors-headers 1, --cors-credentials, --no-cors-credentials, -to --timeout 1, --threads-http 1
--sse-ping-interval 1, --sleep-idle-seconds 1, -a --alias 1, --tags 1, -cb --cont-batching
-nocb --no-cont-batching, -sps --slot-prompt-similarity 1, --slots, --no-slots, --slot-save-path 1
--metrics, --props, --send-done, --ui, --webui auto|none|llamacpp, --no-ui --no-webui
--ui-config --webui-config 1, --ui-config-file --webui-config-file 1
--ui-mcp-proxy --webui-mcp-proxy, --no-ui-mcp-proxy --no-webui-mcp-proxy, -ag --agent
-no-ag --no-agent, --tools 1, --tools-runtime 1, --mcp-servers-config 1, --mcp-servers-json 1
--models-dir 1, --models-max 1, --models-preset 1, --models-autoload, --no-models-autoload
--server-base 1, --sql-save-file 1, --sqlite-zstd-ext-file 1
"""

_REFUSED = {
    "answers are not held to a grammar; leave it out": """
--grammar 1, --grammar-file 1, -j --json-schema 1, -jf --json-schema-file 1
""",
    "this way of sampling is not here; leave it out": """
--mirostat 1 off=0, --typical --typical-p 1 off=1, --tfs 1 off=1
--top-nsigma --top-n-sigma 1 off=-1, --dynatemp-range 1 off=0, --xtc-probability 1 off=0
--dry-multiplier 1 off=0, --adaptive-target 1 off=-1, --cfg-scale 1 off=1, --cfg-negative-prompt 1
--cfg-negative-prompt-file 1, --samplers 1, --sampler-seq --sampling-seq 1, --banned-string-file 1
--banned-n 1, --allowlist-unicode-rule 1, --allowlist-pieces 1, --allowlist-keyword 1
--allowlist-keyword-delay 1
""",
    "a model is run as its file says; leave it out": """
--lora 1, --lora-scaled 1, --lora-init-without-apply, --control-vector 1, --control-vector-scaled 1
--control-vector-layer-range 2, --override-kv 1, --rope-scaling 1 off=none, --rope-scale 1 off=1
--rope-freq-base 1 off=0, --rope-freq-scale 1 off=1, --yarn-orig-ctx 1 off=0
--yarn-ext-factor 1 off=-1, --yarn-attn-factor 1 off=-1, --yarn-beta-fast 1 off=-1
--yarn-beta-slow 1 off=-1, -gan --grp-attn-n 1 off=1, --attention 1 off=causal
-ctk-first --cache-type-k-first 1, -ctk-last --cache-type-k-last 1
-ctv-first --cache-type-v-first 1, -ctv-last --cache-type-v-last 1
""",
    "only text is read; leave it out": """
-mm --mmproj 1, -mmu --mmproj-url 1, --image --audio --video 1
""",
    "there are no embeddings and no reranking": """
--embedding --embeddings, --rerank --reranking, --pooling 1, --embd-normalize 1
--embd-output-format 1, --embd-separator 1, --cls-separator 1
""",
    "the prompt is made by the file's own chat template; leave it out": """
--chat-template 1, --chat-template-file 1, --chat-template-kwargs 1
--reasoning-effort 1 off=default, --reasoning-tokens 1, --reasoning-budget 1, --reasoning-preserve
-rea --reasoning on|off|auto, --in-prefix 1, --in-prefix-bos, --in-suffix 1
""",
    "control tokens are never shown; leave it out": """
-sp --special
""",
    "an answer ends where the context is full; leave it out": """
--context-shift on|off|auto|1|0
""",
    "a prompt comes from -p, -f or a pipe": """
-bf --binary-file 1, --parse-special, --infill, --spm-infill
""",
    "one computer computes; there is no RPC": """
--rpc 1
""",
    r"say which matrices stay on the CPU with -ot, such as 'blk\.[0-3]\.ffn_(up|down)\.=CPU'": """
-ncffn --n-cpu-ffn 1
""",
    "a loading mode is none, mmap, mlock, mmap+mlock or auto": """
-lm --load-mode 1
""",
    "the size of a GPU's memory for experts is --expert-cache SIZE": """
--moe-cache-mib 1
""",
    "a model is named by -m FILE, or by -hf USER/REPO where a command has it": """
-mu --model-url 1, -hf -hfr --hf-repo 1, -hff --hf-file 1, --embd-gemma-default
--fim-qwen-1.5b-default, --fim-qwen-3b-default, --fim-qwen-7b-default, --fim-qwen-7b-spec
--fim-qwen-14b-spec, --fim-qwen-30b-default, --gpt-oss-20b-default, --gpt-oss-120b-default
--vision-gemma-4b-default, --vision-gemma-12b-default
""",
    "Hugging Face's own variables say this: HF_TOKEN, HF_HUB_OFFLINE": """
-hft --hf-token 1, --offline
""",
    "nothing is fetched from Docker; what would be done without doing it says deskside plan": """
-dr --docker-repo 1, --dry-run
""",
    "deskside doctor shows the devices": """
--list-devices
""",
    "models are listed by deskside list": """
-cl --cache-list
""",
    "see deskside COMMAND --help, and deskside --version": """
--usage, --version, --completion-bash
""",
    "it is the flag of a measurement that is not here; see deskside bench --help": """
-pps, -tgs, -npp 1, -ntg 1, -npl 1, -nrep --n-repetitions 1, -ns --sequences 1, --spec-synth-len 1
--spec-synth-rates 1, --junk 1, --pos 1
""",
    "see deskside perplexity --help for what it measures": """
--perplexity --all-logits, --ppl, --no-ppl, --ppl-stride 1 off=0, --ppl-output-type 1 off=0
--kl-divergence, --save-all-logits --kl-divergence-base 1, --save-logits, --logits-output-dir 1
--hellaswag, --hellaswag-tasks 1, --winogrande, --winogrande-tasks 1, --multiple-choice
--multiple-choice-tasks 1, --tensor-filter 1
""",
    "it is the flag of a program of llama.cpp's that is not here": """
-o --output --output-file 1, --output-format 1, -ofreq --output-frequency 1, --save-frequency 1
--process-output, --output-tensor-name, --show-statistics, --nextn, --chunk --from-chunk 1
--chunk-size 1, --chunk-separator 1, --context-file 1, --in-file 1, --positive-file 1
--negative-file 1, --pca-batch 1, --pca-iter 1, --method 1
""",
}


def _read(text: str, refusal: str = "") -> dict[str, Peer]:
    found: dict[str, Peer] = {}
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    for entry in ",".join(lines).split(","):
        names = [word for word in entry.split() if word.startswith("-")]
        values, words, off = 0, tuple[str, ...](), None
        for word in entry.split()[len(names) :]:
            if word.startswith("off="):
                off = word.removeprefix("off=")
            elif word.isdigit():
                values = int(word)
            else:
                words = tuple(word.split("|"))
        found |= dict.fromkeys(names, Peer(values, words, refusal, off))
    return found


PEERS: Mapping[str, Peer] = _read(_NOTHING) | {
    name: peer for why, text in _REFUSED.items() for name, peer in _read(text, why).items()
}


def _template_arguments(value: str) -> Sequence[str] | None:
    """`--chat-template-kwargs '{"enable_thinking": false}'`, which most lines mean by it."""
    try:
        given = json.loads(value)
    except ValueError:
        return None
    words = {True: ["--think"], False: ["--no-think"]}
    if isinstance(given, dict) and set(given) == {"enable_thinking"}:
        return words.get(given["enable_thinking"])
    return None


def _expert_cache(value: str) -> Sequence[str] | None:
    if not value.isascii() or not value.isdigit():
        return None
    return ["--expert-cache", f"{value}MiB"] if int(value) else []


def _words(table: Mapping[str, Sequence[str]]) -> Callable[[str], Sequence[str] | None]:
    return lambda value: table.get(value.lower())


_REASONING = _words({"on": ["--think"], "off": ["--no-think"], "auto": []})
_LOAD_MODE = _words(
    {
        "auto": [],
        "mmap": [],
        "dio": [],
        "none": ["--no-mmap"],
        "mlock": ["--no-mmap", "--mlock"],
        "mmap+mlock": ["--mlock"],
    }
)
# Flags with a value that other flags here express: a function from the value to those, [] where the
# value changes nothing, None where the flag is taken as any other.
TRANSLATED: Mapping[str, Callable[[str], Sequence[str] | None]] = {
    "-rea": _REASONING,
    "--reasoning": _REASONING,
    "--reasoning-budget": _words({"0": ["--no-think"], "-1": []}),
    "--chat-template-kwargs": _template_arguments,
    "-lm": _LOAD_MODE,
    "--load-mode": _LOAD_MODE,
    "--moe-cache-mib": _expert_cache,
    "--numa": _words({"distribute": [], "isolate": [], "numactl": []}),
}
