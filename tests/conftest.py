"""Settings that every test shares: quiet frameworks, the same few examples on every run."""

import os

import hypothesis

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

# Without a deadline: the first example of a shape compiles. The same examples on every run, so that
# a failure is seen by all; `make fuzz` looks further.
hypothesis.settings.register_profile("steady", deadline=None, derandomize=True, max_examples=50)
hypothesis.settings.register_profile("fuzz", deadline=None, max_examples=2000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "steady"))


def pytest_addoption(parser):
    parser.addoption(
        "--pure-python",
        action="store_true",
        help="test as on a machine where the native library was not built",
    )


def pytest_configure(config):
    if config.getoption("--pure-python"):
        from normwise.kernels import library

        library.path = lambda: None
