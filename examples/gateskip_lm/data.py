"""Corpus and tokenizer: the source of the Python standard library that runs this script.

It is text everyone has, it needs no download, and next-token accuracy on it means something.
A fixed list of well-known modules is held out; nothing of them is seen by the tokenizer, by the
base training, by the gate training or by threshold calibration.
"""

from __future__ import annotations

import argparse
import json
import sysconfig
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

HERE = Path(__file__).resolve().parent
PAD, BOS, EOS = "<|pad|>", "<|bos|>", "<|eos|>"
VOCAB_SIZE = 2048

# Paths relative to the standard library. Diverse on purpose: algorithms, parsing, text, numbers,
# networking, persistence.
HELD_OUT = (
    "bisect.py",
    "colorsys.py",
    "configparser.py",
    "contextlib.py",
    "csv.py",
    "fnmatch.py",
    "fractions.py",
    "graphlib.py",
    "heapq.py",
    "html/parser.py",
    "json/decoder.py",
    "netrc.py",
    "queue.py",
    "sched.py",
    "shelve.py",
    "shlex.py",
    "statistics.py",
    "textwrap.py",
    "wave.py",
)
# Tests, tables and generated text teach a small model nothing but their own numbers. `_pydecimal`
# and the sysconfig dump are huge; `pydoc_data` is generated documentation.
SKIP_DIRS = {
    "site-packages",
    "test",
    "tests",
    "idle_test",
    "encodings",
    "pydoc_data",
    "__pycache__",
    "ensurepip",
}
SKIP_PREFIXES = ("_sysconfigdata",)
MAX_FILE_BYTES = 200_000


def corpus_files() -> tuple[list[Path], list[Path]]:
    """(training files, held-out files) in a fixed order, as paths below the standard library."""
    root = Path(sysconfig.get_paths()["stdlib"])
    train: list[Path] = []
    for path in sorted(root.rglob("*.py"), key=lambda p: p.relative_to(root).as_posix()):
        relative = path.relative_to(root)
        if SKIP_DIRS.intersection(relative.parts[:-1]) or path.name.startswith(SKIP_PREFIXES):
            continue
        if relative.as_posix() in HELD_OUT or not 0 < path.stat().st_size <= MAX_FILE_BYTES:
            continue
        train.append(path)
    return train, [root / name for name in HELD_OUT]


def read_texts(paths: list[Path]) -> list[str]:
    """File contents; a file that is not UTF-8 is left out."""
    texts = []
    for path in paths:
        try:
            texts.append(path.read_text(encoding="utf-8"))
        except UnicodeDecodeError:
            continue
    return texts


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Byte-level BPE: every byte is in the alphabet, so any text survives encode + decode."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A {BOS} $B",
        special_tokens=[(BOS, tokenizer.token_to_id(BOS))],
    )
    return tokenizer


def encode_documents(tokenizer: Tokenizer, texts: list[str]) -> list[torch.Tensor]:
    """One id tensor per document: <|bos|> text <|eos|>."""
    bos, eos = tokenizer.token_to_id(BOS), tokenizer.token_to_id(EOS)
    encoded = tokenizer.encode_batch(texts, add_special_tokens=False)
    return [torch.tensor([bos, *item.ids, eos], dtype=torch.long) for item in encoded]


def load_corpus(base_dir: Path) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """(training documents, held-out documents), encoded with the tokenizer in `base_dir`."""
    tokenizer = Tokenizer.from_file(str(base_dir / "tokenizer.json"))
    train, held_out = corpus_files()
    return (
        encode_documents(tokenizer, read_texts(train)),
        encode_documents(tokenizer, read_texts(held_out)),
    )


def sample_batch(
    stream: torch.Tensor, tokens: int, length: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Random windows of the concatenated documents: inputs and next-token targets."""
    rows = tokens // length
    starts = torch.randint(0, len(stream) - length - 1, (rows,), generator=generator)
    window = stream[starts[:, None] + torch.arange(length + 1)]
    return window[:, :-1], window[:, 1:]


def main() -> None:
    parser = argparse.ArgumentParser(description="train the tokenizer and report corpus sizes")
    parser.add_argument("--base", type=Path, default=HERE / "base")
    args = parser.parse_args()
    args.base.mkdir(parents=True, exist_ok=True)
    texts = read_texts(corpus_files()[0])
    tokenizer = train_tokenizer(texts)
    tokenizer.save(str(args.base / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1024,
        # The model has never seen a dialogue: the template only strings the messages together.
        "chat_template": (
            "{{ bos_token }}{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
        ),
    }
    (args.base / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    train, held_out = load_corpus(args.base)
    print(
        f"training {len(train)} files, {sum(map(len, texts)) / 1e6:.2f} M characters, "
        f"{sum(map(len, train)) / 1e6:.2f} M tokens; "
        f"held out {len(held_out)} files, {sum(map(len, held_out)) / 1e3:.1f} k tokens"
    )


if __name__ == "__main__":
    main()
