import harness


def pytest_sessionfinish():
    for module, rows in harness.results.items():
        print(f"\nresults: {harness.write(module.removeprefix('bench_'), rows)}")
