"""One contender of a race, in processes of its own: it steps when it is told to, and says how long that took.

    python benchmarks/contender.py SPEC            start the ranks (what contest.py does)
    python benchmarks/contender.py SPEC rank       be one of them

Rank 0 reads one line from stdin for each step and answers with one JSON line; the end of stdin ends all ranks.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from launch.env import detect
from launch.local import run_local, run_rank
from launch.meeting import connect, disconnect
from launch.memory import keep_freed_memory

__all__ = ["Contender", "build"]

Spec = dict[str, Any]


class Contender(Protocol):
    """Something that trains; ``parameters`` are those of this rank."""

    parameters: list[Any]

    def step(self) -> float:
        """One optimizer step; the mean loss of this rank's tokens, or of all."""
        ...


class Ours:
    """Trainer, as a user has it. Without ``reduce`` the collectives are left out, and the values are wrong.

    ``stage`` is of ZeRO. With a ``pipeline``, which is the name of a schedule, every document is a microbatch.
    """

    def __init__(self, spec: Spec, rank: int) -> None:
        import pipeline_model
        import workload

        from parallel.mesh import Layout, Mesh
        from parallel.models.build import Build
        from parallel.models.decoder import build_model
        from zero import Trainer, ZeroOptimizer
        from zero.optimizer import OptimizerConfig, ZeroConfig

        layout = Layout(**spec["layout"])
        if not spec["reduce"]:
            mesh = Mesh.fake(layout, rank)
        else:
            mesh = Mesh.build(layout) if layout.world > 1 else Mesh.single()
        pipeline = pipeline_model.options(spec["pipeline"]) if "pipeline" in spec else None
        cuts = pipeline_model.cuts(pipeline, spec["layers"], rank) if pipeline else None
        build = Build(mesh=mesh, dtype=workload.DTYPES[spec["precision"]], cuts=cuts)
        model = build_model(workload.config(spec["layers"]), build, seed=workload.WEIGHT_SEED)
        self.parameters = list(model.parameters())
        settings = OptimizerConfig(lr=3e-4, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01, clip=1.0)
        optimizer = ZeroOptimizer(model, mesh, settings, zero=ZeroConfig(stage=spec.get("stage", 0)))
        self.trainer = Trainer(model, optimizer, mesh, steps=1 << 20, pipeline=pipeline)
        own, first = _own_documents(layout.dp, mesh.dp.rank)
        self.batches = pipeline_model.microbatches() if pipeline else [workload.batch(own, first)]

    def step(self) -> float:
        """One :meth:`Trainer.step`."""
        return self.trainer.step(self.batches).loss


class Loop:
    """The plain torch loop around a model: loss, backward, clipping, AdamW.

    Args:
        parameters: of the model.
        loss: runs forward.
        precision: ``autocast`` runs forward under bfloat16 autocast; the others as the model is.
        adamw: ``fused``, or torch's ``default`` choice.
        around: a context for forward and backward.
    """

    def __init__(
        self,
        parameters: list[Any],
        loss: Callable[[], Any],
        precision: str,
        adamw: str,
        around: Callable[[], Any] = contextlib.nullcontext,
    ) -> None:
        import torch

        self.parameters, self.loss, self.around = parameters, loss, around
        self.autocast = precision == "autocast"
        options = {"fused": True} if adamw == "fused" else {}
        self.optimizer = torch.optim.AdamW(parameters, lr=3e-4, **options)

    def step(self) -> float:
        """One step as in torch's documentation."""
        import torch

        with self.around():
            with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
                loss = self.loss()
            loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())


def _own_documents(replicas: int = 1, replica: int = 0) -> tuple[Any, int]:
    """This replica's documents (B, S), and the index of their first token among those of all."""
    import workload

    tokens_BS = workload.documents()
    own = tokens_BS.chunk(replicas)[replica]
    return own, replica * own.numel()


def _dtype(precision: str) -> Any:
    import torch

    return torch.bfloat16 if precision == "bf16" else torch.float32


def transformers_loop(spec: Spec, rank: int) -> Loop:
    """Hugging Face transformers on one device, 8 sequences of 256."""
    import transformers

    transformers.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(spec["weights"], dtype=_dtype(spec["precision"])).train()
    tokens_BS, _ = _own_documents()
    forward = lambda: model(input_ids=tokens_BS, labels=tokens_BS, use_cache=False).loss  # noqa: E731
    return Loop(list(model.parameters()), forward, spec["precision"], spec["adamw"])


def _plain(spec: Spec, tokens_BS: Any) -> Any:
    import plain_llama
    import workload

    folder = Path(spec["weights"])
    return plain_llama.load_plain(
        workload.config(spec["layers"]), folder, tokens_BS.shape[1], _dtype(spec["precision"])
    ).train()


def _plain_loss(model: Any, tokens_BS: Any) -> Callable[[], Any]:
    import workload
    from torch.nn.functional import cross_entropy

    labels_T = workload.targets(tokens_BS).flatten()
    return lambda: cross_entropy(model(tokens_BS).flatten(0, 1).float(), labels_T)


def plain_loop(spec: Spec, rank: int) -> Loop:
    """The plain Llama on one device."""
    tokens_BS, _ = _own_documents()
    model = _plain(spec, tokens_BS)
    return Loop(list(model.parameters()), _plain_loss(model, tokens_BS), spec["precision"], spec["adamw"])


def dtensor_loop(spec: Spec, rank: int) -> Loop:
    """The plain Llama under DTensor tensor and sequence parallelism with ``loss_parallel``."""
    import plain_llama
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import loss_parallel

    tokens_BS, _ = _own_documents()
    model = _plain(spec, tokens_BS)
    plain_llama.parallelize(model, init_device_mesh("cpu", (spec["world"],)))
    loss = _plain_loss(model, tokens_BS)
    return Loop(list(model.parameters()), loss, spec["precision"], spec["adamw"], loss_parallel)


def ddp_loop(spec: Spec, rank: int) -> Loop:
    """The plain Llama under DistributedDataParallel; without ``reduce`` under its ``no_sync``."""
    from torch.nn.parallel import DistributedDataParallel

    tokens_BS, _ = _own_documents(spec["world"], rank)
    inner = _plain(spec, tokens_BS)
    model = DistributedDataParallel(inner, gradient_as_bucket_view=True)
    around = contextlib.nullcontext if spec["reduce"] else model.no_sync
    loss = _plain_loss(model, tokens_BS)
    return Loop(list(inner.parameters()), loss, spec["precision"], spec["adamw"], around)


def fsdp_loop(spec: Spec, rank: int) -> Loop:
    """The plain Llama under FSDP2, a group a block: stage 3 frees the weights after forward, stage 2 keeps them."""
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    tokens_BS, _ = _own_documents(spec["world"], rank)
    model = _plain(spec | {"precision": "fp32"}, tokens_BS)
    mixed = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    options: dict[str, Any] = {"mp_policy": mixed} if spec["precision"] == "bf16" else {}
    options |= {"mesh": init_device_mesh("cpu", (spec["world"],)), "reshard_after_forward": spec["stage"] == 3}
    for block in model.layers:
        fully_shard(block, **options)
    fully_shard(model, **options)
    return Loop(list(model.parameters()), _plain_loss(model, tokens_BS), spec["precision"], spec["adamw"])


class DeepSpeed:
    """The plain Llama under DeepSpeed's engine at a ``stage``, with torch's AdamW."""

    def __init__(self, spec: Spec, rank: int) -> None:
        import torch

        os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_RANK": str(rank)}
        import deepspeed

        tokens_BS, _ = _own_documents(spec["world"], rank)
        model = _plain(spec, tokens_BS)
        self.parameters = list(model.parameters())
        options = {"fused": True} if spec["adamw"] == "fused" else {}
        self.engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=torch.optim.AdamW(self.parameters, lr=3e-4, **options),
            dist_init_required=False,
            config={
                "train_micro_batch_size_per_gpu": len(tokens_BS),
                "gradient_clipping": 1.0,
                "bf16": {"enabled": spec["precision"] == "bf16"},
                "zero_optimization": {"stage": spec["stage"]},
                "zero_allow_untested_optimizer": True,
                "steps_per_print": 1 << 30,
            },
        )
        self.loss = _plain_loss(self.engine, tokens_BS)

    def step(self) -> float:
        """One step as in DeepSpeed's documentation."""
        loss = self.loss()
        self.engine.backward(loss)
        self.engine.step()
        return float(loss.detach())


def torch_pipeline(spec: Spec, rank: int) -> Contender:
    """Stages of the plain Llama under torch.distributed.pipelining."""
    import pipeline_model

    return pipeline_model.TorchPipeline(spec, rank)


def our_executor(spec: Spec, rank: int) -> Contender:
    """The same stages under our executor."""
    import pipeline_model

    return pipeline_model.OurExecutor(spec, rank)


KINDS: dict[str, Callable[[Spec, int], Contender]] = {
    "ours": Ours,
    "transformers": transformers_loop,
    "plain": plain_loop,
    "dtensor": dtensor_loop,
    "ddp": ddp_loop,
    "fsdp": fsdp_loop,
    "deepspeed": DeepSpeed,
    "torch_pipeline": torch_pipeline,
    "our_executor": our_executor,
}


def build(spec: Spec, rank: int) -> Contender:
    """The contender that ``spec`` describes; every rank calls it."""
    return KINDS[spec["kind"]](spec, rank)


def write_weights(folder: Path, layers: int) -> None:
    """Our initial weights as a Hugging Face folder."""
    import workload

    from parallel.hf import save_model
    from parallel.mesh import Mesh
    from parallel.models.build import Build
    from parallel.models.decoder import build_model

    mesh = Mesh.single()
    save_model(build_model(workload.config(layers), Build(mesh=mesh), workload.WEIGHT_SEED), mesh, folder)


def serve(spec: Spec) -> int:
    """Step on command until stdin ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    tuned = spec["kind"] == "ours" or spec["allocator"] == "tuned"
    if tuned and not keep_freed_memory() and spec["allocator"] == "tuned":
        raise OSError("the allocator does not take these settings; use --allocator default")
    import torch
    import torch.distributed as dist

    place = detect(os.environ)
    assert place is not None
    torch.set_num_threads(spec["threads"])
    if place.world > 1:
        connect(place, "cpu", 120.0)
    contender = build(spec, place.rank)

    def together(value: float, op: Any) -> float:
        number = torch.tensor(value, dtype=torch.float64)
        if place.world > 1:
            dist.all_reduce(number, op)
        return float(number)

    def answer(value: dict[str, Any]) -> None:
        if place.rank == 0:
            print(json.dumps(value), file=answers, flush=True)

    answer({"ready": True, "parameters": sum(p.numel() for p in contender.parameters)})
    while together(float(place.rank == 0 and bool(sys.stdin.readline())), dist.ReduceOp.SUM):
        started = time.perf_counter()
        loss = contender.step()
        seconds = time.perf_counter() - started
        mean = together(loss, dist.ReduceOp.SUM) / place.world
        answer({"seconds": together(seconds, dist.ReduceOp.MAX), "loss": mean})
    disconnect()
    return 0


def main(arguments: list[str]) -> int:
    """Write weights, start ranks, or be one."""
    spec: Spec = json.loads(arguments[0])
    if spec["kind"] == "weights":
        write_weights(Path(spec["folder"]), spec["layers"])
        return 0
    if arguments[1:] == ["rank"]:
        return run_rank(lambda: serve(spec))
    command = [sys.executable, str(Path(__file__).resolve()), arguments[0], "rank"]
    return run_local(command, spec["world"], environ=os.environ, threads_per_rank=spec["threads"], grace_s=2.0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
