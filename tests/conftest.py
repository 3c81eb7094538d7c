"""Fixtures that all tests share."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

for folder in (Path(__file__).parent, Path(__file__).parent.parent):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

from ranks import Ranks

LONG = (
    "test_bench_serve.py::test_a_server_is_started_for_a_folder_and_stopped",
    "test_checkpoint_compare.py::test_resharded_is_the_same_bit_for_bit_and_continues",
    "test_llm.py::test_the_tokens_do_not_depend_on_the_layout[gpt2-2]",
    "test_llm.py::test_the_tokens_do_not_depend_on_the_layout[gpt2-4]",
    "test_llm.py::test_the_tokens_do_not_depend_on_the_layout[llama-4]",
    "test_llm.py::test_the_tokens_do_not_depend_on_the_layout[qwen2-2]",
    "test_llm.py::test_the_tokens_do_not_depend_on_the_layout[qwen2-4]",
    "test_pipeline.py::test_checkpoints_are_read_at_any_layout[zb-v-gpt2--1f1b-layout2]",
    "test_pipeline.py::test_checkpoints_are_read_at_any_layout[interleaved-qwen3--head layers.3-dualpipe-layout3]",
    "test_pipeline.py::test_training_beside_data_parallelism[qwen3]",
    "test_pipeline_faults.py::test_a_rank_that_is_stopped_ends_the_run[1]",
    "test_programs.py::test_fine_tuning_keeps_the_tokenizer_and_export_needs_no_particular_folder",
    "test_programs.py::test_the_losses_do_not_depend_on_the_layout[flags0-module0]",
    "test_programs.py::test_the_losses_do_not_depend_on_the_layout[flags1-module1]",
    "test_programs.py::test_the_losses_do_not_depend_on_the_layout[flags2-module2]",
    "test_programs.py::test_verify_of_a_recipe",
    "test_serve.py::test_texts_are_those_of_the_library_at_every_layout[pp]",
    "test_serve.py::test_texts_are_those_of_the_library_at_every_layout[tp]",
    "test_serve_ranks.py::test_an_engine_rank_that_dies_or_stops_is_replaced_everywhere[9]",
    "test_serve_ranks.py::test_engines_on_two_machines",
    "test_zero_hops.py::test_two_hops_learn",
    "test_zero_optimizers.py::test_whole_matrices_in_cpu_memory",
    "test_pipeline.py::test_checkpoints_are_read_at_any_layout[dualpipe-tied--dualpipe-layout1]",
    "test_zero_unused.py::test_ranks_that_gather_different_parameters_are_named[skip-0]",
    "test_zero_peers.py::test_twenty_steps_end_where_the_peers_end[4]",
    "test_bench_serve.py::test_an_interrupt_ends_the_wait_for_a_server[15]",
    "test_checkpoint.py::test_any_place_reads_any_other_bit_for_bit_and_no_byte_too_many[1]",
    "test_checkpoint.py::test_any_place_reads_any_other_bit_for_bit_and_no_byte_too_many[3]",
    "test_checkpoint.py::test_any_place_reads_any_other_bit_for_bit_and_no_byte_too_many[4]",
    "test_checkpoint.py::test_any_place_reads_any_other_bit_for_bit_and_no_byte_too_many[6]",
    "test_encoder.py::test_every_layout_equals_one_device[True]",
    "test_pipeline.py::test_beside_tensor_parallelism[False]",
    "test_pipeline_faults.py::test_a_rank_that_stops_answering_is_named[2I1-2]",
    "test_serve_ranks.py::test_an_engine_rank_that_dies_or_stops_is_replaced_everywhere[19]",
    "test_stragglers.py::test_time_that_is_waited_is_not_ones_own[layout0-1]",
    "test_stragglers.py::test_time_that_is_waited_is_not_ones_own[layout2-2]",
    "test_zero_residue.py::test_any_layout_takes_over_what_was_kept[{'dp': 4}-{'stage': 1}]",
    "test_zero_unused.py::test_ranks_that_gather_different_parameters_are_named[skip-2]",
)
"""What others in the suite show at a smaller size, at another layout, or of the parts of a program."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave them to ``make long``."""
    for item in items:
        if item.nodeid.endswith(LONG):
            item.add_marker(pytest.mark.long)


@pytest.fixture(scope="session")
def ranks(request: pytest.FixtureRequest) -> Iterator[Ranks]:
    """Four gloo ranks: ``ranks.run(function, world=2, **arguments)``; started by the first test that runs something."""
    filters = [*request.config.getini("filterwarnings"), *(request.config.getoption("pythonwarnings") or [])]
    pool = Ranks(filters)
    yield pool
    pool.close()
