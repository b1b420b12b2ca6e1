"""The long tests say what they found: lines that stand in `docs/reliability.md` with the command that printed them."""

from collections.abc import Callable

import pytest

from benchmarks.report import header

_LINES: list[str] = []


@pytest.fixture
def report() -> Callable[[str], None]:
    """Take a line with a figure, such as `1,000 kills: 0 divergent bits`, to be printed when all tests are done."""
    return _LINES.append


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the figures behind the machine and versions that they were measured with."""
    if _LINES:
        terminalreporter.section("figures")
        header()
        for line in _LINES:
            terminalreporter.write_line(line)
