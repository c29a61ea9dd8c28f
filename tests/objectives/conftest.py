"""The summary of these tests: each method, what it is held against, the largest difference."""


def pytest_terminal_summary(terminalreporter):
    found: dict[tuple[str, str], float] = {}
    for report in terminalreporter.stats.get("passed", []):
        for key, value in report.user_properties:
            if key == "parity":
                method, source, difference = value
                found[method, source] = max(difference, found.get((method, source), 0.0))
    if found:
        terminalreporter.section("methods: largest relative difference")
    for (method, source), difference in sorted(found.items()):
        terminalreporter.write_line(f"{method:<14} {source:<28} {difference:.1e}")
