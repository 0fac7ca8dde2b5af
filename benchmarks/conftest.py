"""What `pytest benchmarks` needs: the choice of shapes, and a record of the machine in its JSON."""

from __future__ import annotations

from typing import Any

import pytest
from run_kernels import surroundings


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="every shape, not one an operator and layer")


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    del machine_info["node"]  # a host's name says nothing about its speed
    machine_info["vitzoo"] = surroundings()


def pytest_benchmark_update_json(config: Any, benchmarks: Any, output_json: dict[str, Any]) -> None:
    for found in output_json["benchmarks"]:
        found["stats"].pop("data", None)  # every round of every call: the statistics of them stay
