"""A Hugging Face folder to GGUF by llama.cpp's own converter.

    PEER_PYTHON bench/peers/llama_cpp_convert.py SOURCES FOLDER OUT.gguf bf16|q8_0

SOURCES is the unpacked source archive of llama-cpp-python, which contains the converter. The
pre-tokenizer of a random model is not in the converter's list: it is told gpt-2.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path


def main() -> None:
    """Runs convert_hf_to_gguf.py as a program."""
    sources, folder, out, kind = sys.argv[1:]
    tool = Path(sources) / "vendor" / "llama.cpp"
    sys.path[:0] = [str(tool), str(tool / "gguf-py")]
    from conversion import base

    base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
    script = str(tool / "convert_hf_to_gguf.py")
    sys.argv = [script, folder, "--outfile", out, "--outtype", kind]
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
