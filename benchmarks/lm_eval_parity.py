"""lm-eval through the server against lm-eval's own ``hf`` backend: the same log-likelihoods.

    pip install lm-eval[api]
    python benchmarks/lm_eval_parity.py MODEL_DIR [--json FILE]

A small task file of choices and of whole texts, made of the standard library of the running Python, is evaluated twice
on one model folder: by ``local-completions`` on ``lockstep serve MODEL_DIR``, and by ``hf`` in this process. Both in
float32. Printed: the largest difference of a log-likelihood, and whether all greedy flags agree.
"""

from __future__ import annotations

import argparse
import json
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from report import Claim, add_report_options, finish
from serve_http import serving

ITEMS, CHOICES = 24, 3
CHOICE_TASK = """
task: lockstep_choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{before}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{right}}}}"
target_delimiter: ""
metric_list: [{{metric: acc}}]
metadata: {{version: 1}}
"""
TEXT_TASK = """
task: lockstep_texts
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: word_perplexity}}]
metadata: {{version: 1}}
"""


def write_tasks(folder: Path) -> None:
    """Two tasks and their data."""
    library = Path(sysconfig.get_path("stdlib"))
    texts = [(library / f"{name}.py").read_text() for name in ("heapq", "bisect", "queue", "shelve")]
    rows = []
    for index in range(ITEMS):
        text, start = texts[index % len(texts)], 400 + 90 * index
        ends = [other[start + 160 : start + 200] for other in texts[:CHOICES]]
        right = index % CHOICES
        ends[right] = text[start + 160 : start + 200]
        rows.append({"before": text[start : start + 160], "choices": ends, "right": right, "text": text[start:][:600]})
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, task in (("choices", CHOICE_TASK), ("texts", TEXT_TASK)):
        (folder / f"{name}.yaml").write_text(task.format(data=json.dumps(str(data))))


def likelihoods(model: str, options: dict[str, Any], tasks: Path) -> dict[str, list[tuple[float, bool]]]:
    """Of every request of every task, in order."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    found = lm_eval.simple_evaluate(
        model=model,
        model_args=options,
        tasks=["lockstep_choices", "lockstep_texts"],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        bootstrap_iters=0,
        log_samples=True,
    )
    assert found is not None
    values: dict[str, list[tuple[float, bool]]] = {}
    for task, samples in found["samples"].items():
        values[task] = []
        for sample in sorted(samples, key=lambda sample: sample["doc_id"]):
            for answers in sample["resps"]:
                for one in answers:
                    pair = one if isinstance(one, list | tuple) else (one, True)
                    values[task].append((float(pair[0]), str(pair[1]) == "True"))
    return values


def main() -> int:
    """Compare, print, and return 0 if all went well."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="MODEL_DIR")
    add_report_options(parser)
    args = parser.parse_args()
    try:
        import lm_eval  # noqa: F401
    except ModuleNotFoundError as missing:
        print(f"lm_eval_parity: {missing.name} is not installed; pip install 'lm-eval[api]'", file=sys.stderr)
        return 2
    claims: list[Claim] = []
    with tempfile.TemporaryDirectory() as name, serving(args.folder, 2, "--names", "model") as server:
        write_tasks(Path(name))
        ours = {
            "model": "model",
            "base_url": f"http://127.0.0.1:{server.port}/v1/completions",
            "tokenizer": str(args.folder),
            "tokenizer_backend": "huggingface",
            "num_concurrent": 4,
            "max_length": 512,
        }
        theirs = {"pretrained": str(args.folder), "dtype": "float32", "device": "cpu", "max_length": 512}
        got, want = likelihoods("local-completions", ours, Path(name)), likelihoods("hf", theirs, Path(name))
    for task, values in want.items():
        pairs = list(zip(got[task], values, strict=True))
        worst = max(abs(a - b) for (a, _), (b, _) in pairs)
        flags = sum(a != b for (_, a), (_, b) in pairs)
        scale = max(abs(b) for _, (b, _) in pairs)
        note = f"{len(pairs)} log-likelihoods up to {scale:.0f}"
        claims.append(Claim(f"{task}: largest difference", worst, "< 1e-3", worst < 1e-3, note))
        claims.append(Claim(f"{task}: greedy flags that differ", flags, "0", flags == 0))
    return finish(args, claims, [{"ours": got, "theirs": want}])


if __name__ == "__main__":
    sys.exit(main())
