"""Compare `model.py` with transformers' MixtralForCausalLM on the checkpoint, in fp32."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file

from data import CHECKPOINT, load_corpus
from model import Config, Mixtral
from rules import always_one

TOLERANCE = 1e-4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--windows", type=int, default=8, help="of 512 tokens, held-out text")
    args = parser.parse_args()
    torch.set_num_threads(1)

    ours = Mixtral(Config.load(args.checkpoint / "config.json"))
    state = load_file(str(args.checkpoint / "model.safetensors"))
    ours.load_state_dict({name: t.float() for name, t in state.items()})
    stream = torch.cat(load_corpus(args.checkpoint)[1])
    ids = stream[: args.windows * 512].view(-1, 512)

    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        args.checkpoint, dtype=torch.float32, output_loading_info=True
    )
    wrong = {kind: names for kind, names in report.items() if names}
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.checkpoint)
    text = tokenizer.decode(ids[0], skip_special_tokens=False)
    again = torch.tensor(tokenizer.encode(text, add_special_tokens=False))

    print(f"transformers {transformers.__version__}, {type(theirs).__name__}, {ids.numel()} tokens")
    print(f"loading report: {wrong or 'nothing missing, nothing unexpected'}")
    print(f"tokenizer round trip equal: {torch.equal(again, ids[0])}")
    worst = 0.0
    with torch.no_grad():
        for experts, cut in ((2, None), (1, always_one)):
            # k = 1 in transformers is the same model with top_k 1: its weights renormalise to 1.
            for name, module in theirs.named_modules():
                if name.endswith(".gate"):
                    module.top_k = experts
            difference = (ours(ids, cut)[0] - theirs(ids).logits).abs().max().item()
            worst = max(worst, difference)
            print(f"largest logit difference, {experts} experts: {difference:.1e}")
    if worst > TOLERANCE or wrong:
        raise SystemExit(f"the two do not agree to {TOLERANCE:g}")


if __name__ == "__main__":
    main()
