"""``import CHECKPOINT MODEL_DIR``: weights that DeepSpeed or torch saved, as a Hugging Face folder."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from launch.cli import command_line, help_text, positionals
from launch.recipe import PRECISIONS
from parallel.config import option, options, resolve
from parallel.hf import read_config, write_folder
from zero.foreign import open_foreign
from zero.foreign.names import Named, match

__all__ = ["main"]

USAGE = """lockstep import CHECKPOINT MODEL_DIR --config FOLDER [--OPTION VALUE ...]

CHECKPOINT is a folder of DeepSpeed (ZeRO 0 to 3) or of torch.distributed.checkpoint, a Hugging Face folder of .bin
files, or a file of torch.save. FOLDER has the model's config.json, and its tokenizer if it is to come along."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportConfig:
    """How to read the checkpoint, and how to write the folder."""

    config: str = option("", "folder with the model's Hugging Face config.json, and its tokenizer")
    prefix: str = option("", "what stands before every name of the model (empty: what most names have; . is nothing)")
    precision: Literal["stored", "fp32", "bf16", "fp64"] = option(
        "stored", "of the weights; stored: the widest of them"
    )
    overwrite: bool = option(False, "replace a folder that is there")

    def problems(self) -> Iterator[str]:
        """Why a folder cannot be written like this."""
        if not self.config:
            yield "give --config FOLDER, with the config.json of the model"


def main(arguments: Sequence[str]) -> int:
    """Run the command; see :data:`launch.cli.USAGE`."""
    given, overrides, problems = command_line(arguments, ImportConfig())
    if "help" in overrides:
        print(help_text(USAGE, options(ImportConfig())))
        return 0
    source, target = positionals(["CHECKPOINT", "MODEL_DIR"], given, problems)
    wanted = resolve(ImportConfig(), overrides, extra=problems)
    folder = Path(wanted.config)
    config = read_config(folder).resolved()
    prefix = {"": None, ".": ""}.get(wanted.prefix, f"{wanted.prefix.removesuffix('.')}.")
    found = match(open_foreign(Path(source)), config, prefix)
    described = json.loads((folder / "config.json").read_bytes())
    bos, eos = described.get("bos_token_id"), described.get("eos_token_id")
    write_folder(
        config,
        found.whole,
        Path(target),
        dtype=found.dtype if wanted.precision == "stored" else PRECISIONS[wanted.precision],
        tokenizer=folder if (folder / "tokenizer.json").is_file() else None,
        bos=bos if isinstance(bos, int) else None,
        eos=eos if isinstance(eos, int | list) else None,
        overwrite=wanted.overwrite,
    )
    print("\n".join(_account(Path(source), found, Path(target))))
    return 0


def _account(source: Path, found: Named, target: Path) -> list[str]:
    """What became of everything that was there."""
    taken = {part.name for held in found.held.values() for part in held}
    lines = [f"{source}: {found.source.kind}", f"  {len(taken)} tensors: {found.names}, behind {found.prefix!r}"]
    unused = found.source.entries.keys() - taken - {*found.beside}
    if unused:
        lines.append(
            f"  {len(unused)} of the model that are not stored in such folders: {', '.join(sorted(unused)[:3])}"
        )
    for what, names in (
        ("tensors beside the model", found.beside),
        ("values that are no tensors", found.source.others),
    ):
        if names:
            kinds = Counter(name.partition(".")[0] for name in names)
            lines.append(
                f"  left: {len(names)} {what}: {', '.join(f'{kind} ({n})' for kind, n in kinds.most_common(5))}"
            )
    if found.source.states:
        lines.append(f"  left: the optimizer's state ({', '.join(found.source.states)})")
    return [*lines, f"{target}: written"]
