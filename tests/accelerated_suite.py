"""Runs tests of `vector-quantize-pytorch`, of a checkout of that library, with every quantizer accelerated.

    python tests/accelerated_suite.py ../vector-quantize-pytorch/tests [pytest's arguments]

The installed library is the one tested. Every `VectorQuantize` passes through ``accelerate_vector_quantize`` as it is
made, those within other modules too; the end of the output says how many were accelerated, and why the others not.
"""

from __future__ import annotations

import collections
import logging
import sys
from typing import Any

import pytest
import vector_quantize_pytorch

from diveq_kernels.compat import accelerate_vector_quantize


class Accelerate(logging.Handler):
    """A pytest plugin; the reasons for leaving a quantizer alone arrive as log records."""

    def __init__(self) -> None:
        super().__init__()
        self.outcomes: collections.Counter[str] = collections.Counter()

    def emit(self, record: logging.LogRecord) -> None:
        self.outcomes[f"left alone: {record.args[-1]}" if record.args else record.getMessage()] += 1

    def pytest_configure(self) -> None:
        quantizer = vector_quantize_pytorch.VectorQuantize
        constructor = quantizer.__init__

        def construct(module: Any, *arguments: Any, **keywords: Any) -> None:
            constructor(module, *arguments, **keywords)
            accelerate_vector_quantize(module)
            self.outcomes["accelerated"] += type(module) is not quantizer

        quantizer.__init__ = construct
        logging.getLogger("diveq_kernels").addHandler(self)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        terminalreporter.section("quantizers")
        for outcome, count in self.outcomes.most_common():
            terminalreporter.write_line(f"{count:5} {outcome}")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    sys.exit(pytest.main([*sys.argv[1:], "-p", "no:cacheprovider"], plugins=[Accelerate()]))
