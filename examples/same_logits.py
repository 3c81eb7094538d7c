"""Does `transformers` load an exported folder, and does it compute the same logits and the same greedy text?

python examples/same_logits.py MODEL_DIR
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from infer import LLM, SamplingParams
from parallel.hf import load_model
from parallel.mesh import Mesh
from parallel.models.batch import Batch
from parallel.models.build import Build

PROMPT = "def read_lines(path):\n    with open(path) as file:\n"


def main(folder: Path) -> int:
    """Compare, print, and return 0 if all is the same."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ours = load_model(folder, Build(mesh=Mesh.single())).eval()
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    with torch.no_grad():
        expected = theirs(ids).logits[0]
        difference = float((ours(Batch.pack([ids[0]])) - expected).abs().max())
        generated = theirs.generate(ids, max_new_tokens=32, do_sample=False)[0, ids.shape[1] :].tolist()
    print(f"largest difference of logits: {difference:.1e} (logits reach {float(expected.abs().max()):.1f})")
    (completion,) = LLM(folder).generate([ids[0].tolist()], SamplingParams(max_tokens=32))
    ends = theirs.generation_config.eos_token_id
    expected_tokens = [token for token in generated if token not in (ends if isinstance(ends, list) else [ends])]
    same = list(completion.tokens) == expected_tokens
    print(f"32 greedy tokens: {'the same' if same else 'DIFFERENT'}")
    return 0 if same and difference < 1e-3 else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
